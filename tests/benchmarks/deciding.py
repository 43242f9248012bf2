"""Can deciding per image pay? Policies that know each image's difficulty, against one policy for all.

    python tests/benchmarks/deciding.py --model R20_SYN --blocks 3 4 2,2,4,4 2,3,4,7

Only the ResNet learns, and knowing the difficulty costs nothing: no policy network's FLOPs are counted. Each
item of --blocks is one finetuning, from the weights of the policy trained last. It says how many blocks
images keep: one number for all images, or several by difficulty, for quantile groups, the easiest images
first. A policy keeps the blocks that BlockDrop's policies keep most often. The difficulty of SYN's images is
known; elsewhere it is how unsure a ResNet-8 is, which has learned from the same training images. The script
prints figures on the test images in fp32, and compares an item that decides with the policy for all whose
FLOPs are nearest.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from common import TESTS
from running import step_functions
from torch import Tensor

import utils
from models import inference
from models.lab import data, rivals, stages
from models.lab.device import autocast, choose_device, choose_precision, keep_memory, seed_everything
from models.lab.names import parse_model
from models.lab.statistics import points, standard_error

CV = TESTS.parent / "cv"


def difficulties(model: str, max_images: int | None, device: torch.device) -> list[Tensor]:
    """Return the difficulty of a model's training images (N,), and of its test images (n,)."""
    train, _, test = data.split(model, max_images=max_images)
    if train.difficulty is not None:
        return [train.difficulty, test.difficulty]
    small = f"R8_{parse_model(model).dataset}"
    train, _, test = data.split(small, max_images=max_images)
    rnet, _ = utils.build_model(small)
    stages.load_sole(small, rnet, CV)
    run = inference.prepare(rnet, device=device)
    found = []
    for images in (train.subset(slice(None), augment=False), test):
        loader = data.Loader(images, 1000, device)
        top = torch.cat([run(x).softmax(1).topk(2).values.cpu() for x, _ in loader])
        found.append(top[:, 1] - top[:, 0])
    return found


def assigned(policies: Tensor, difficulty: Tensor) -> Tensor:
    """Return a policy (N, K) per image by its difficulty (N,); policies (M, K), the easiest images' first."""
    rank = difficulty.argsort().argsort()
    return policies[rank * len(policies) // len(difficulty)]


def finetune(args: argparse.Namespace, policies: Tensor, known: list[Tensor], device: torch.device) -> Tensor:
    """Finetune the ResNet under these policies (M, K); return 1 where it is right on the test images (n,)."""
    nb = step_functions("blockdrop_training")
    train, _, test = data.split(args.model, max_images=args.max_images)
    rnet, _ = utils.build_model(args.model)
    stages.load(stages.find(CV, "trained_policy", args.model, "train a policy first"), rnet)
    rnet.to(device, memory_format=torch.channels_last)
    precision, generator = choose_precision("auto", device), torch.Generator().manual_seed(args.seed)
    images, kept = train.to(device), assigned(policies, known[0]).to(device)
    steps = args.epochs * math.ceil(len(train) / args.batch_size)
    optimizer, scheduler = nb.sgd(rnet, args.lr_rnet, steps)
    for _ in range(args.epochs):
        for indices in torch.randperm(len(train), generator=generator).split(args.batch_size):
            inputs, labels = images.read(indices.to(device), generator=generator)
            with autocast(precision, device):
                logits = rnet(inputs, kept[indices.to(device)], True)
            optimizer.zero_grad(set_to_none=False)  # as in the notebook: unused blocks decay
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            scheduler.step()
    run, batches = inference.prepare(rnet, device=device), data.Loader(test, 1000, device)
    policies = assigned(policies, known[1]).to(device).split(1000)
    hits = [run(x, p).argmax(1) == y for (x, y), p in zip(batches, policies, strict=True)]
    return torch.cat(hits).float().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R20_SYN")
    parser.add_argument("--blocks", nargs="+", default=("3", "4", "2,2,4,4", "2,3,4,7"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr-rnet", type=float, default=0.03)
    parser.add_argument("--max-images", type=int, default=None)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    keep_memory()
    device = choose_device()
    pair = stages.find(CV, "finetuned", args.model, "train a pair first")
    learned, _ = rivals.heldout_policies(args.model, pair, "data/")
    order = learned.mean(0).argsort(descending=True, stable=True)
    known, one_policy = difficulties(args.model, args.max_images, device), {}
    rnet, _ = utils.build_model(args.model)
    print(f"{args.model}, {args.epochs} epochs, seed {args.seed}; blocks by how often they are kept: "
          f"{', '.join(str(int(block) + 1) for block in order)}")  # fmt: skip
    for item in sorted(args.blocks, key=lambda item: "," in item):
        policies = torch.stack(
            [torch.zeros(len(order)).index_fill(0, order[: int(k)], 1) for k in item.split(",")]
        )
        seed_everything(args.seed)
        flops = utils.count_flops(rnet, policies).mean().item()
        hits = finetune(args, policies, known, device)
        accuracy, error = 100 * hits.mean(), 100 * standard_error(hits)
        words = f"{item:>9} blocks, {flops / 1e6:5.1f} million FLOPs: {accuracy:.2f} ± {error:.2f} %"
        if len(policies) == 1:
            one_policy[item] = (flops, hits)
        elif one_policy:
            nearest = min(one_policy, key=lambda name: abs(one_policy[name][0] - flops))
            difference, error = points(hits, one_policy[nearest][1])
            words += f", {difference:+.2f} ± {error:.2f} points against {nearest} blocks for all"
        print(words, flush=True)


if __name__ == "__main__":
    main()
