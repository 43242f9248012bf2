"""Time BlockDrop against the sole ResNet, plain and prepared: a table for each batch size.

    python tests/benchmarks/inference.py --model R110_C10 --kept 17

The networks are untrained. The policy network's last layer has random weights under which about `--kept`
blocks are kept, others for each image: BlockDrop's time is that of one call, which decides and runs. The
plain ways, the original's, are given the policies. In fp16 and bf16 on CUDA both sides run as one kernel.
Speed-up: over the sole ResNet of the same precision. Share: of the speed-up that FLOPs allow, which include
the policy network's.
"""

import argparse

import torch
from common import peak_memory

from models import inference
from models.lab.device import choose_device, choose_precision, machine
from models.lab.names import parse_model
from models.lab.timing import measure
from utils import build_model, count_flops

POOL = 64  # images at least, of which a batch is those that keep nearest to `--kept` blocks


def keep_about(kept: int, agent, images) -> None:
    """Give the last layer random weights that keep each block for `kept` / K of the images (N, 3, H, W)."""
    features = agent.features(agent.view(images))
    agent.logit.weight.normal_()
    share = 1 - kept / agent.logit.out_features
    agent.logit.bias.copy_(-(features @ agent.logit.weight.t()).quantile(share, dim=0))


def ways_to_run(rnet, agent, images, policy, nets):
    """Return by precision and name the functions to be timed; `nets`: by precision both prepared networks."""
    ways = {
        ("plain", "sole ResNet"): torch.no_grad()(lambda: rnet.forward_full(images)),
        ("plain", "BlockDrop masked"): torch.no_grad()(lambda: (agent(images), rnet(images, policy))),
    }
    if len(images) == 1:
        single = torch.no_grad()(lambda: (agent(images), rnet.forward_single(images, policy)))
        ways["plain", "BlockDrop single"] = single
    for precision, (sole, blockdrop) in nets.items():
        ways[precision, "sole ResNet"] = lambda net=sole: net(images)
        ways[precision, "BlockDrop"] = lambda net=blockdrop: net(images)
        ways[precision, "policy network"] = lambda net=blockdrop: net.decide(images)
    return ways


def print_table(num_images: int, rows: dict) -> None:
    """Print {(precision, way): (times, blocks run, speed-up that FLOPs allow)} of a batch as a table."""
    print(f"\nBatch {num_images}:\n| precision | way | blocks | ms (quartiles) | speed-up | share |")
    print("|---" * 6 + "|")
    for (precision, way), (time, blocks, allowed) in rows.items():
        low, median, high = (1000 * time[name] for name in ("low", "seconds", "high"))
        cells = [precision, way, f"{blocks:.1f}", f"{median:.2f} ({low:.2f} to {high:.2f})"]
        speedup = rows[precision, "sole ResNet"][0]["seconds"] / time["seconds"]
        cells += [f"{speedup:.2f}", f"{speedup / allowed:.0%}"] if allowed else ["", ""]
        print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    device = choose_device()
    on_cuda = device.type == "cuda"
    bf16 = ["bf16"] * (choose_precision("auto", device) == "bf16")
    precisions = ["fp32", "tf32", *bf16, "fp16"] if on_cuda else ["fp32", *bf16]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R110_C10")
    parser.add_argument("--kept", type=int, default=17, help="blocks that policies keep, about")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes",
                        default=[1, 16, 64, 256, 1024, 4096] if on_cuda else [1, 256])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=4, help="spent on each measurement")
    args = parser.parse_args()

    size = parse_model(args.model).image_size
    torch.manual_seed(0)
    rnet, agent = (network.eval().to(device) for network in build_model(args.model))
    full = count_flops(rnet).item()
    print(f"{args.model}, {rnet.num_blocks} blocks, {machine(device)}")
    with torch.no_grad():
        for _, block in rnet.shortcuts_and_blocks():
            [*block.children()][-1].weight.fill_(0.1)  # a deep untrained network exceeds fp16's range
        keep_about(args.kept, agent, torch.rand(4 * POOL, 3, size, size, device=device))
    nets = {
        precision: [inference.prepare(rnet, policy_network, precision) for policy_network in (None, agent)]
        for precision in precisions
    }
    for num_images in args.batches:
        images = torch.rand(max(num_images, POOL), 3, size, size, device=device)
        policies = nets[precisions[0]][1].decide(images)
        nearest = (policies.sum(1) - args.kept).abs().argsort()[:num_images]
        images, policy = images[nearest], policies[nearest]
        ways = ways_to_run(rnet, agent, images, policy, nets)
        rows = {}
        for (precision, way), time in measure(ways, device, args.seconds).items():
            blocks, allowed = rnet.num_blocks * (way == "sole ResNet"), None
            if way.startswith("BlockDrop"):
                decided = policy if precision == "plain" else nets[precision][1].decide(images)
                blocks = decided.sum(1).mean().item()
                allowed = full / count_flops(rnet, decided, agent).mean().item()
            rows[precision, way] = time, blocks, allowed
        print_table(num_images, rows)
        for precision, pair in nets.items():
            print(f"{precision}: sole ResNet {pair[0].note}; BlockDrop {pair[1].note}")
        peaks = {name: peak_memory(run, device) / 2**20 for name, run in ways.items() if "Block" in name[1]}
        words = ", ".join(f"{' '.join(name)} {peak:.0f} MiB" for name, peak in peaks.items())
        print("Peak memory of a call, without what CUDA graphs hold:", words)
    if any(blockdrop.fused for _, blockdrop in nets.values()):
        from models import fused  # here: not every PyTorch comes with Triton

        scratch = fused.PROGRAMS * fused.SCRATCH * 2 / 1024
        print(f"\nScratch memory of the one kernel: {scratch:.0f} KiB per multiprocessor")


if __name__ == "__main__":
    main()
