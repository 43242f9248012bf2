"""Time policy training and finetuning, by the notebook's steps, against the plain loops.

    python tests/benchmarks/blockdrop.py --model R32_C10
    python tests/benchmarks/blockdrop.py --model R110_C10 --batches 1 --memory
    python tests/benchmarks/blockdrop.py --model R110_C10 --epochs-at 128 512

The plain loops are the original's: fp32, contiguous, images augmented one by one in DataLoader workers, and
two masked forwards with gradients kept for the frozen ResNet too. Ours are blockdrop_training.ipynb's steps,
on CUDA each as one graph, for which stochastic depth and finetuning do without `skip_dropped`. The networks
are untrained: the policy keeps about half of the blocks that it decides on. Both take turns, each in its own
process, the plain one as PyTorch sets it up. The ratio is that of the medians. Peak memory is what a stage
of ours holds beyond the weights. `--epochs-at` times ours alone, all four stages, on random images in batches
of these sizes.
"""

import argparse
import math
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    alone,
    epoch_length,
    in_turns,
    new_process,
    peak_memory,
    plain_device,
    plain_loader,
    print_times,
    time_steps,
)
from running import step_functions

from models import inference
from models.graphs import one_graph
from models.lab.data import Loader, split
from models.lab.device import choose_device, choose_precision, machine, seed_everything
from models.lab.names import parse_model
from models.policy import greedy_policy
from utils import build_model

SAMPLING = {"penalty": -1, "alpha": 0.95, "temperature": 1, "beta": 0.1}
LR = 1e-6  # so that the policy stays as it is
STAGES = ("sole ResNet", "stochastic depth", "policy training", "finetuning")
SURVIVAL_PROBABILITY = 0.7  # in stochastic depth
EPOCH = 45_000  # images of `--epochs-at`


def learn_plainly(steps, rnet, agent, optimizer, images, labels, cl_step, finetuning):
    """Learn from a batch as the original does it."""
    probs = agent(images)[0]
    explored = steps.explore(probs, SAMPLING["alpha"])
    greedy = steps.keep_first(greedy_policy(probs), cl_step)
    sampled = steps.keep_first(torch.bernoulli(explored.detach()), cl_step)
    logits_greedy, logits = rnet(images, greedy), rnet(images, sampled)
    reward_greedy, _ = steps.get_reward(logits_greedy, labels, greedy, SAMPLING["penalty"])
    reward, _ = steps.get_reward(logits, labels, sampled, SAMPLING["penalty"])
    loss = steps.policy_loss(explored, sampled, reward - reward_greedy, cl_step, SAMPLING["beta"])
    if finetuning:
        loss = loss + F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def plain_step(model, stage, cl_step, device):
    """Return a plain loop's step, which learns from images and labels."""
    steps, finetuning = step_functions("blockdrop_training"), stage == "finetuning"
    seed_everything(0)
    rnet, agent = (network.to(device).train() for network in build_model(model))
    rnet.train(finetuning)
    learning = [*rnet.parameters(), *agent.parameters()] if finetuning else agent.parameters()
    optimizer = torch.optim.Adam(learning, LR)
    return lambda x, y: learn_plainly(steps, rnet, agent, optimizer, x, y, cl_step, finetuning)


def our_step(model, stage, cl_step, device, precision):
    """Return a stage's step as the notebooks take it: it learns from images and labels."""
    sole, steps = (step_functions(notebook) for notebook in ("rnet_sole", "blockdrop_training"))
    seed_everything(0)
    networks = build_model(model)
    rnet, agent = (net.to(device, memory_format=torch.channels_last).train() for net in networks)
    sgd, adam = steps.sgd(rnet, LR, 100)[0], torch.optim.Adam(agent.parameters(), LR)
    skip_dropped = device.type != "cuda"  # for it the host counts images, which no graph can
    why_not = None
    if stage == "sole ResNet":
        step, before, after = sole.sole_step, (rnet, sgd), (precision,)
    elif stage == "stochastic depth":
        step, before, after = steps.depth_step, (rnet, sgd), (SURVIVAL_PROBABILITY, precision, skip_dropped)
    elif stage == "policy training":
        frozen = inference.prepare(rnet.eval(), precision=precision)
        step, before, after = steps.policy_step, (agent, frozen, adam), (precision, cl_step, SAMPLING)
        why_not = None if frozen.fused else "the host reads the policies"
    else:
        step, before = steps.finetuning_step, (rnet, agent, (sgd, adam))
        after = (precision, skip_dropped, SAMPLING)
    step = one_graph(step, device, why_not)
    return lambda images, labels: step(*before, images, labels, *after)


def seconds_a_step(args, num_images: int, device: torch.device, precision: str) -> dict[str, float]:
    """Return the median seconds of each stage's step of so many random images, as the notebooks take it."""
    name, num_blocks = parse_model(args.model), build_model(args.model)[0].num_blocks
    images = torch.rand(num_images, 3, name.image_size, name.image_size, device=device)
    labels = torch.arange(num_images, device=device) % name.num_classes
    loader = repeat((images.to(memory_format=torch.channels_last), labels))
    found = {}
    for stage in STAGES:
        step = our_step(args.model, stage, num_blocks, device, precision)
        found[stage] = float(np.median(time_steps(loader, step, args.batches, device)))
    return found


def print_epochs(args, device: torch.device, precision: str) -> None:
    """Print milliseconds a step and seconds an epoch of each stage of ours at each batch size."""
    for size in args.epochs_at:
        for stage, seconds in seconds_a_step(args, size, device, precision).items():
            epoch = seconds * math.ceil(EPOCH / size)
            words = f"{1000 * seconds:.1f} ms per step, {epoch:.1f} s per {EPOCH:,} images"
            print(f"batch {size:4}, {stage}: {words}", flush=True)


def turn(args, plain: bool, stage: str, cl_step: int):
    """Return the function that runs so many batches and returns their seconds."""
    device = plain_device() if plain else choose_device()
    trainset, _, _ = split(args.model, "data/")
    if plain:
        loader = plain_loader(trainset, args.batch_size)
        step = plain_step(args.model, stage, cl_step, device)
    else:
        loader = Loader(trainset, args.batch_size, device, shuffle=True)
        step = our_step(args.model, stage, cl_step, device, choose_precision("auto", device))
    return lambda: time_steps(loader, step, args.batches, device)


def memory(args, stage: str, cl_step: int) -> float:
    return peak_memory(turn(args, False, stage, cl_step), choose_device())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R32_C10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="print the peak memory of ours alone")
    parser.add_argument("--epochs-at", type=int, nargs="+", metavar="SIZE", help="batch sizes, ours alone")
    args = parser.parse_args()
    num_blocks, device = build_model(args.model)[0].num_blocks, choose_device()
    precision = choose_precision("auto", device)
    how = ", each step as one CUDA graph, without skip_dropped" if device.type == "cuda" else ""
    batch = "" if args.epochs_at else f"batch {args.batch_size}, "
    print(f"{args.model}, {batch}{machine(device)}, ours in {precision}{how}", flush=True)
    if args.epochs_at:
        print_epochs(args, device, precision)
        return
    epoch = epoch_length(split(args.model, "data/")[0], args)
    processes = {way: new_process() for way in ("plain", "ours")}
    for words, stage, cl_step in (
        ("policy training, mid-curriculum", "policy training", num_blocks // 2),
        ("policy training, every block decided", "policy training", num_blocks),
        ("finetuning", "finetuning", num_blocks),
    ):
        if args.memory:
            print(f"{words}: {alone(memory, args, stage, cl_step) / 2**30:.2f} GiB at the peak")
            continue
        ways = {
            way: (process, turn, args, way == "plain", stage, cl_step) for way, process in processes.items()
        }
        seconds = in_turns(ways)
        plain, ours = map(np.median, seconds.values())
        print(f"{words}: {plain / ours:.2f} times as fast")
        print_times(seconds, epoch)


if __name__ == "__main__":
    main()
