r"""Project how long training takes on several devices, from step times and gradient sizes.

    python tests/benchmark_scaling.py --model R110_C10 --batch-size 512 --epochs 50 10 8 70
    python tests/benchmark_scaling.py --model R101_ImgNet --batch-size 256 --images 1153050 \
        --epochs 90 0 10 30

Each of n devices takes 1 / n of a batch. Measured on this one are the seconds of a step of so many images:
random ones, whole ones for the sole ResNet too, and untrained networks, whose policy keeps about half of the
blocks. Then gradients are exchanged, in a ring: each device sends and receives 2 (n - 1) / n times their
bytes. So

    seconds = epochs * steps an epoch * (seconds a step + 2 (n - 1) / n * bytes / bandwidth)

No exchange is hidden behind the step here, as DDP does, and no device waits for a slower one: the
truth may lie on either side. What happens once an epoch, such as tests on held-out images, is not counted.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark_blockdrop import WARMUP, FewBatches, loops, notebook

import utils

STAGES = ("sole ResNet", "stochastic depth", "policy training", "finetuning")


def seconds_a_step(nb: dict, args, num_images: int) -> dict[str, float]:
    """Return the median seconds of a training step of each stage, of so many images on this device."""
    device, spec = nb["device"], utils.parse_model(args.model)
    images = torch.rand(num_images, 3, spec.image_size, spec.image_size, device=device)
    batch = images.to(memory_format=torch.channels_last), torch.arange(num_images, device=device) % 10
    nb["trainloader"] = [batch] * (args.batches + WARMUP)
    nb["num_blocks"] = utils.build_model(args.model)[0].num_blocks
    policy_training = loops(nb, args, cl_step=nb["num_blocks"])["ours"]
    medians = {"policy training": np.median(policy_training())}
    medians["finetuning"] = np.median(loops(nb, args, cl_step=None)["ours"]())
    for stage, train in (
        ("stochastic depth", nb["train_stochastic_depth"]), ("sole ResNet", lambda: train_sole(nb)),
    ):  # fmt: skip
        nb["stochastic_depth"] = FewBatches(args.batches, device)
        train()
        medians[stage] = np.median(nb["stochastic_depth"].times)
    return medians


def train_sole(nb: dict) -> None:
    """Take the sole ResNet's steps, as rnet_sole.ipynb does."""
    nb["rnet"].train()
    for inputs, targets in nb["stochastic_depth"].batches(nb["trainloader"]):
        with nb["autocast"]:
            loss = F.cross_entropy(nb["rnet"].forward_full(inputs), targets)
        nb["optimizer_rnet"].zero_grad()
        loss.backward()
        nb["optimizer_rnet"].step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R110_C10")
    parser.add_argument("--batch-size", type=int, default=512, help="images a step, of all devices together")
    parser.add_argument("--images", type=int, default=45000, help="training images")
    parser.add_argument("--epochs", type=int, nargs=4, default=(50, 10, 8, 70), help=", ".join(STAGES))
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--bandwidth", type=float, default=10, help="of the network, gigabytes a second")
    parser.add_argument("--batches", type=int, default=5, help="to be timed")
    args = parser.parse_args()
    nb = notebook("R20_SYN", 64)  # for the functions of its cells; networks and images are replaced
    print(f"{args.model}, {args.batch_size} images a step, {args.bandwidth:g} GB/s, {nb['precision']}, "
          f"{utils.machine(nb['device'])}\n")  # fmt: skip
    measured = {n: seconds_a_step(nb, args, math.ceil(args.batch_size / n)) for n in args.devices}
    rnet, agent = (4 * sum(p.numel() for p in nb[name].parameters()) for name in ("rnet", "agent"))
    exchanged = dict(zip(STAGES, (rnet, rnet, agent, rnet + agent), strict=True))
    steps = math.ceil(args.images / args.batch_size)
    columns = [f"ms a step of {math.ceil(args.batch_size / n)}; hours on {n} devices" for n in args.devices]
    print("| stage | epochs | steps an epoch | MB of gradients |", " | ".join(columns), "|")
    print("|---" * (4 + len(columns)) + "|")
    hours = dict.fromkeys(args.devices, 0)
    for stage, epochs in zip(STAGES, args.epochs, strict=True):
        cells = []
        for n in args.devices:
            exchange = 2 * (n - 1) / n * exchanged[stage] / (args.bandwidth * 1e9)
            here = epochs * steps * (measured[n][stage] + exchange) / 3600
            hours[n] += here
            cells.append(f"{1000 * measured[n][stage]:.1f} + {1000 * exchange:.1f}; {here:.2f}")
        print(f"| {stage} | {epochs} | {steps} | {exchanged[stage] / 1e6:.1f} |", " | ".join(cells), "|")
    print("| all | | | |", " | ".join(f"{total:.2f}" for total in hours.values()), "|")


if __name__ == "__main__":
    main()
