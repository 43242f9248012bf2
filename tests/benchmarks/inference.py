"""Time a ResNet alone and under a policy, plain and prepared, and print the ratios of the run.

    python tests/benchmarks/inference.py --model R110_C10 --kept 17

The networks have random weights; each image's policy keeps `--kept` blocks at random. BlockDrop's times
include the policy network. Milliseconds a batch, median and quartiles; peak memory of masked and conditional
execution.
"""

import argparse

import common  # noqa: F401 (finds the project's modules)
import torch

from models import inference
from models.lab.device import choose_device, choose_precision, machine
from models.lab.names import parse_model
from models.lab.timing import measure, peak_memory
from utils import build_model, count_flops


def ways_to_run(rnet, agent, images, policy, precisions):
    """Return the functions to be timed, by name."""
    plain = torch.no_grad()
    ways = {
        "plain masked": plain(lambda: (agent(images), rnet(images, policy))),
        "plain sole": plain(lambda: rnet.forward_full(images)),
    }
    if len(images) == 1:
        ways["plain single"] = plain(lambda: (agent(images), rnet.forward_single(images, policy)))
    for precision in precisions:
        alone = inference.prepare(rnet, precision=precision)
        net = inference.prepare(rnet, agent, precision=precision)
        ways[f"sole {precision}"] = lambda alone=alone: alone(images)
        ways[f"BlockDrop {precision}"] = lambda net=net: (net.decide(images), net(images, policy))
        ways[f"policy network {precision}"] = lambda net=net: net.decide(images)
    return ways


def ratios(precisions):
    """Return the pairs of ways that are held against each other, the slow one first."""
    pairs = []
    for precision in precisions:
        pairs += [
            ("plain masked", f"BlockDrop {precision}"),
            (f"sole {precision}", f"BlockDrop {precision}"),
            ("plain sole", f"sole {precision}"),
        ]
    return pairs + [("BlockDrop fp32", f"BlockDrop {precision}") for precision in precisions[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R110_C10")
    parser.add_argument("--kept", type=int, default=17, help="blocks that each policy keeps")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=4, help="spent on each measurement")
    args = parser.parse_args()

    device, size = choose_device(), parse_model(args.model).image_size
    torch.manual_seed(0)
    rnet, agent = (network.eval().to(device) for network in build_model(args.model))
    precisions = ["fp32"] + (["bf16"] if choose_precision("auto", device) == "bf16" else [])
    print(f"{args.model}, {args.kept} of {rnet.num_blocks} blocks kept, {machine(device)}")
    full = count_flops(rnet, image_size=size).item()
    for num_images in args.batches:
        images = torch.rand(num_images, 3, size, size, device=device)
        policy = (torch.rand(num_images, rnet.num_blocks).argsort(1) < args.kept).float()
        part = count_flops(rnet, policy, agent, size).mean().item()
        print(f"batch {num_images}: FLOPs allow {full / part:.2f} times")
        ways = ways_to_run(rnet, agent, images, policy.to(device), precisions)
        times = measure(ways, device, args.seconds)
        for name, time in times.items():
            quartiles = f"{1000 * time['low']:.2f} to {1000 * time['high']:.2f}"
            print(f"  {name:22} {1000 * time['seconds']:9.2f} ms ({quartiles})", flush=True)
        for slow, fast in ratios(precisions):
            print(f"  {slow} / {fast}: {times[slow]['seconds'] / times[fast]['seconds']:.2f}")
        peaks = {name: peak_memory(ways[name], device) for name in ("plain masked", "BlockDrop fp32")}
        print("  peak memory:", ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in peaks.items()))


if __name__ == "__main__":
    main()
