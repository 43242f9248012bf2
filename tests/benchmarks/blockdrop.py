"""Time policy training and finetuning, by the notebook's steps, against the plain loops.

    python tests/benchmarks/blockdrop.py --model R32_C10
    python tests/benchmarks/blockdrop.py --model R110_C10 --batches 1 --memory

The plain loops are the original's: fp32, contiguous, images augmented one by one in DataLoader workers, and
two masked forwards with gradients kept for the frozen ResNet too. Ours are blockdrop_training.ipynb's steps.
The networks are untrained: the policy keeps about half of the blocks that it decides on. Both take turns,
each in a process of its own, the plain one as PyTorch sets it up; the ratio is that of the medians. Peak
memory is what a stage of ours holds beyond the weights.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    alone,
    epoch_length,
    in_turns,
    new_process,
    plain_device,
    plain_loader,
    print_times,
    time_steps,
)
from running import step_functions

from models import inference
from models.lab.data import Loader, split
from models.lab.device import choose_device, choose_precision, machine, seed_everything
from models.lab.timing import peak_memory
from models.policy import greedy_policy
from utils import build_model

SAMPLING = {"penalty": -1, "alpha": 0.95, "temperature": 1, "beta": 0.1}
LR = 1e-6  # so that the policy stays as it is


def plain_step(steps, rnet, agent, optimizer, images, labels, cl_step, finetuning):
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


def make_step(model, plain, finetuning, cl_step, device, precision):
    """Return a loop's step, which learns from images and labels."""
    steps = step_functions("blockdrop_training")
    seed_everything(0)
    rnet, agent = (network.to(device).train() for network in build_model(model))
    if plain:
        rnet.train(finetuning)
        learning = [*rnet.parameters(), *agent.parameters()] if finetuning else agent.parameters()
        optimizer = torch.optim.Adam(learning, LR)
        return lambda x, y: plain_step(steps, rnet, agent, optimizer, x, y, cl_step, finetuning)
    rnet, agent = (network.to(memory_format=torch.channels_last) for network in (rnet, agent))
    optimizer = torch.optim.Adam(agent.parameters(), LR)
    if finetuning:
        optimizers = (steps.sgd(rnet, LR, 100)[0], optimizer)
        return lambda x, y: steps.finetuning_step(
            rnet, agent, optimizers, x, y, precision, skip_dropped=True, sampling=SAMPLING
        )
    frozen = inference.prepare(rnet.eval(), precision=precision)
    return lambda x, y: steps.policy_step(agent, frozen, optimizer, x, y, precision, cl_step, SAMPLING)


def turn(args, plain: bool, finetuning: bool, cl_step: int):
    """Return the function that runs so many batches and returns their seconds."""
    device = plain_device() if plain else choose_device()
    step = make_step(args.model, plain, finetuning, cl_step, device, choose_precision("auto", device))
    trainset, _, _ = split(args.model, "data/")
    if plain:
        loader = plain_loader(trainset, args.batch_size)
    else:
        loader = Loader(trainset, args.batch_size, device, shuffle=True)
    return lambda: time_steps(loader, step, args.batches, device)


def memory(args, finetuning: bool, cl_step: int) -> float:
    return peak_memory(turn(args, False, finetuning, cl_step), choose_device())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R32_C10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="print the peak memory of ours alone")
    args = parser.parse_args()
    num_blocks, device = build_model(args.model)[0].num_blocks, choose_device()
    epoch = epoch_length(split(args.model, "data/")[0], args)
    precision = choose_precision("auto", device)
    print(f"{args.model}, batch {args.batch_size}, {machine(device)}, ours in {precision}", flush=True)
    processes = {way: new_process() for way in ("plain", "ours")}
    for stage, finetuning, cl_step in (
        ("policy training, mid-curriculum", False, num_blocks // 2),
        ("policy training, every block decided", False, num_blocks),
        ("finetuning", True, num_blocks),
    ):
        if args.memory:
            print(f"{stage}: {alone(memory, args, finetuning, cl_step) / 2**30:.2f} GiB at the peak")
            continue
        call = (finetuning, cl_step)
        ways = {way: (process, turn, args, way == "plain", *call) for way, process in processes.items()}
        seconds = in_turns(ways)
        plain, ours = map(np.median, seconds.values())
        print(f"{stage}: {plain / ours:.2f} times as fast")
        print_times(seconds, epoch)


if __name__ == "__main__":
    main()
