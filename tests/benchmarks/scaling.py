r"""Project how long training takes on several devices, from step times and gradient sizes.

    python tests/benchmarks/scaling.py --model R110_C10 --batch-size 512 --epochs 50 10 8 70
    python tests/benchmarks/scaling.py --model R101_ImgNet --batch-size 256 --images 1153050 \
        --epochs 90 0 10 30

Each of n devices takes 1 / n of a batch. Measured on this one are the seconds of a step of so many images, by
the notebooks' steps: random images, whole ones for the sole ResNet too, and untrained networks, whose policy
keeps about half of the blocks. On CUDA each step is one graph, without `skip_dropped`; several processes take
theirs without graphs. Then gradients are exchanged, in a ring: each device sends and receives
2 (n - 1) / n times their bytes. So

    seconds = epochs * steps an epoch * (seconds a step + 2 (n - 1) / n * bytes / bandwidth)

No exchange is hidden behind the step here, and no device waits for a slower one: the truth may lie on either
side. What happens once an epoch, such as tests on held-out images, is not counted.
"""

import argparse
import math

from blockdrop import STAGES, seconds_a_step

from models.lab.device import choose_device, choose_precision, machine
from utils import build_model


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
    device = choose_device()
    precision = choose_precision("auto", device)
    print(f"{args.model}, {args.batch_size} images a step, {args.bandwidth:g} GB/s, {precision}, "
          f"{machine(device)}\n")  # fmt: skip
    shares = {n: math.ceil(args.batch_size / n) for n in args.devices}
    measured = {n: seconds_a_step(args, share, device, precision) for n, share in shares.items()}
    rnet, agent = (4 * sum(p.numel() for p in network.parameters()) for network in build_model(args.model))
    exchanged = dict(zip(STAGES, (rnet, rnet, agent, rnet + agent), strict=True))
    steps = math.ceil(args.images / args.batch_size)
    columns = [f"ms a step of {share}; hours on {n} devices" for n, share in shares.items()]
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
