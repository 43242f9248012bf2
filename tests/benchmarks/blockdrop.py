"""Time policy training and finetuning, as the notebook runs them, against the plain loops.

    python tests/benchmark_blockdrop.py --model R32_C10
    python tests/benchmark_blockdrop.py --model R110_C10 --batches 1 --memory

The plain loops are the original's: fp32, contiguous, images augmented one by one in DataLoader
workers, and two masked forwards with gradients kept for the frozen ResNet too. Ours are the
functions of blockdrop_training.ipynb. The networks are untrained: the policy keeps about half of the blocks
that it decides on. Both take turns, each in a process of its own, the plain one as PyTorch sets it up; the
ratio is that of the medians. Peak memory is what a stage of ours holds beyond the weights.
"""

import argparse
import contextlib
import copy
import io
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark_training import OneByOne, check_length, new_process
from running import run_cells

import utils
from models import inference, machine
from models.policy import greedy_policy

ROUNDS = 3  # turns of each loop
WARMUP = 2  # batches not counted in each turn: the workers start


class FewBatches:
    """Stands in for a `utils.TrainingRun`: so many batches an epoch, nothing written."""

    in_average = False

    def __init__(self, batches: int, device: torch.device):
        self.num_batches, self.device, self.times = batches, device, []

    def batches(self, loader, crop=1):
        remaining = iter(loader)
        for index in range(self.num_batches + WARMUP):
            start = time.perf_counter()
            inputs, labels = next(remaining)
            yield inputs, labels
            utils.synchronize(self.device)
            if index >= WARMUP:
                self.times.append(time.perf_counter() - start)

    def mean_loss(self, losses, loader):
        return torch.stack(losses).sum().item()


def notebook(model: str, batch_size: int) -> dict:
    """Run the training notebook's cells without training, from an untrained ResNet; return the variables."""
    matplotlib.use("agg")
    settings = {
        "model": model,
        "batch_size": batch_size,
        "max_epochs_training": 0,
        "max_epochs_finetuning": 0,
    }
    with tempfile.TemporaryDirectory() as cv_dir, contextlib.redirect_stdout(io.StringIO()):
        untrained, _ = utils.build_model(model)
        utils.save_checkpoint(f"{cv_dir}/trained_rnet/{model}/pk_.t7", {"resnet": untrained.state_dict()})
        return run_cells("blockdrop_training", settings | {"cv_dir": cv_dir})


def plain_loop(nb, run, loader, rnet, agent, optimizer, finetuning, cl_step):
    """One epoch as the original does it."""
    agent.train()
    rnet.train(finetuning)
    for inputs, targets in run.batches(loader):
        inputs, targets = inputs.to(nb["device"]), targets.to(nb["device"])
        probs = agent(inputs)[0]
        explored = nb["explore"](probs, nb["alpha"])
        greedy = nb["keep_first"](greedy_policy(probs), cl_step)
        sampled = nb["keep_first"](torch.bernoulli(explored.detach()), cl_step)
        logits_greedy, logits = rnet(inputs, greedy), rnet(inputs, sampled)
        reward_greedy, _ = nb["get_reward"](logits_greedy, targets, greedy, -1)
        reward, _ = nb["get_reward"](logits, targets, sampled, -1)
        loss = nb["policy_loss"](explored, sampled, reward - reward_greedy, cl_step, beta=0.1)
        if finetuning:
            loss = loss + F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loops(nb: dict, args, cl_step: int | None) -> dict:
    """Return functions that run a few batches and give each one's seconds; `cl_step` None: finetuning."""
    utils.seed_everything(0)
    rnet, agent = (network.to(nb["device"]) for network in utils.build_model(args.model))
    both = [*rnet.parameters(), *agent.parameters()]
    plain_optimizer = torch.optim.Adam(both if cl_step is None else agent.parameters(), 1e-6)
    loader = torch.utils.data.DataLoader(
        OneByOne(nb["trainset"]), args.batch_size, shuffle=True, num_workers=torch.get_num_threads()
    )
    nb["rnet"], nb["agent"] = (copy.deepcopy(n).to(memory_format=torch.channels_last) for n in (rnet, agent))
    nb["rnet_parallel"], nb["agent_parallel"] = nb["rnet"], nb["agent"]
    nb["frozen"] = inference.prepare(nb["rnet"], precision=nb["precision"])
    nb["curriculum"] = lambda epoch: cl_step
    nb["optimizer"] = nb["optimizer_agent"] = torch.optim.Adam(nb["agent"].parameters(), 1e-6)
    nb["optimizer_rnet"] = torch.optim.SGD(nb["rnet"].parameters(), 1e-6, momentum=0.9, nesterov=True)
    for name in ("rnet", "agent"):
        nb[f"scheduler_{name}"] = torch.optim.lr_scheduler.ConstantLR(nb[f"optimizer_{name}"])

    def plain():
        run = FewBatches(args.batches, nb["device"])
        plain_loop(nb, run, loader, rnet, agent, plain_optimizer, cl_step is None, cl_step or rnet.num_blocks)
        return run.times

    def ours():
        nb["policy_training"] = nb["finetuning"] = run = FewBatches(args.batches, nb["device"])
        nb["finetune"]() if cl_step is None else nb["train"](0)
        return run.times

    return {"plain": plain, "ours": ours}


HERE = {}  # in a process of its own: the notebook's variables, the loops of the stage


def start(args, plain: bool) -> tuple[int, str]:
    """Run the notebook's cells in this process; return the batches of an epoch and the precision of ours."""
    as_it_is = mock.patch.object(machine, "keep_memory", lambda: None)
    with as_it_is if plain else contextlib.nullcontext():
        HERE["notebook"] = notebook(args.model, args.batch_size)
    num_batches = len(HERE["notebook"]["trainloader"])
    check_length(num_batches, args.batches + WARMUP)
    return num_batches, HERE["notebook"]["precision"]


def start_stage(args, cl_step: int | None) -> None:
    HERE["loops"] = loops(HERE["notebook"], args, cl_step)


def take_turn(way: str) -> list[float]:
    return HERE["loops"][way]()


def memory() -> float:
    return utils.peak_memory(HERE["loops"]["ours"], HERE["notebook"]["device"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R32_C10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="print the peak memory of ours alone")
    args = parser.parse_args()
    num_blocks = utils.build_model(args.model)[0].num_blocks
    stages = {
        "policy training, mid-curriculum": num_blocks // 2,
        "policy training, every block decided": num_blocks,
        "finetuning": None,
    }
    processes = {way: new_process() for way in ("plain", "ours")}

    def run(way, function, *given):
        return processes[way].submit(function, *given).result()

    run("plain", start, args, True)
    num_batches, precision = run("ours", start, args, False)
    print(
        f"{args.model}, batch {args.batch_size}, {utils.machine(utils.choose_device())}, ours in {precision}"
    )
    for stage, cl_step in stages.items():
        for way in processes:
            run(way, start_stage, args, cl_step)
        if args.memory:
            print(f"{stage}: {run('ours', memory) / 2**30:.2f} GiB at the peak")
            continue
        turns = [{way: run(way, take_turn, way) for way in processes} for _ in range(ROUNDS)]
        seconds = {way: [taken for turn in turns for taken in turn[way]] for way in processes}
        medians = {name: np.median(values) for name, values in seconds.items()}
        print(f"{stage}: {medians['plain'] / medians['ours']:.2f} times as fast")
        for name, values in seconds.items():
            low, high = 1000 * np.quantile(values, [0.25, 0.75])
            batch, epoch = 1000 * medians[name], medians[name] * num_batches
            print(f"  {name:>5}: {batch:7.0f} ms a batch ({low:.0f} to {high:.0f}), {epoch:.0f} s an epoch")


if __name__ == "__main__":
    main()
