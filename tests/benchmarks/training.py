"""Time an epoch of sole training against the plain loop, or compare their accuracies over seeds.

    python tests/benchmarks/training.py --model R32_C10 --batches 12
    python tests/benchmarks/training.py --model R8_C10 --epochs 10 --seeds 42 1 2
    python tests/benchmarks/training.py --model R20_SYN --batch-size 128 --epochs 20 --seeds 0 1 2 3 4

The plain loop: fp32, contiguous, augmented image by image in DataLoader workers. Ours: rnet_sole.ipynb's
step, on CUDA as one graph, data on the device in bytes and augmented there, channels last, bf16 where the
machine has it. blockdrop.py --epochs-at times this step beside those of the other stages.
`--batches` times so many batches of each, in turn, ours on crops of 3/4 the width too, and prints the ratios.
`--epochs` trains both in full with each of `--seeds`, ours on small crops only where `--small-crops` says so,
and prints accuracies on images that neither has seen, and the mean of their differences: many images, for
less chance, since nothing is tuned by them. Of CIFAR they are the held-out and the test images together, of
SYN 10,000 drawn anew. Both loops follow this script's schedule. Each has a process of its own, the plain one
as PyTorch sets it up; peak memory is measured in one that runs ours.
"""

import argparse
import resource
import time

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

from models.graphs import one_graph
from models.lab import syn
from models.lab.data import Images, Loader, crop_share, random_crop, split
from models.lab.device import choose_device, choose_precision, machine, seed_everything
from models.lab.names import parse_model
from models.lab.training import one_cycle
from utils import build_model


def setup(args, plain: bool, seed: int):
    """Return device, loader, network, optimizer, and a loop's step, which learns from images and labels."""
    device = plain_device() if plain else choose_device()
    trainset, _, _ = split(args.model, "data/")
    seed_everything(seed)
    rnet = build_model(args.model)[0].to(device)
    optimizer = torch.optim.SGD(rnet.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rnet.train()
    if plain:

        def step(images, labels):
            loss = F.cross_entropy(rnet(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return device, plain_loader(trainset, args.batch_size), rnet, optimizer, step
    loader = Loader(trainset, args.batch_size, device, shuffle=True)
    loader.generator.manual_seed(seed)
    rnet.to(memory_format=torch.channels_last)
    precision = choose_precision("auto", device)
    sole_step = one_graph(step_functions("rnet_sole").sole_step, device)

    def step(images, labels):
        sole_step(rnet, optimizer, images, labels, precision)

    return device, loader, rnet, optimizer, step


def turn(args, plain: bool, crop: float):
    """Return the function that runs so many batches and returns their seconds."""
    device, loader, _, _, step = setup(args, plain, args.seeds[0])

    def cropped_step(images, labels):
        step(random_crop(images, crop), labels)

    return lambda: time_steps(loader, cropped_step, args.batches, device)


def time_batches(args) -> None:
    """Print the seconds an epoch takes: the loops in turn, each alone, so many batches at a time."""
    epoch = epoch_length(split(args.model, "data/")[0], args)
    ours = new_process()
    ways = {
        "plain": (new_process(), turn, args, True, 1),
        "ours, small crops": (ours, turn, args, False, 0.75),
        "ours, whole images": (ours, turn, args, False, 1),
    }
    seconds = in_turns(ways)
    print_times(seconds, epoch)
    plain, small, whole = map(np.median, seconds.values())
    print(f"ratio: {plain / small:.2f} on small crops, {plain / whole:.2f} on whole images")


def unseen(model: str) -> Images:
    """Return images that no training has seen."""
    if parse_model(model).dataset == "SYN":
        images, labels, _ = map(torch.from_numpy, syn.draw(10_000, syn.SEED + 2))
        return Images(images, labels, syn.CLASSES)
    _, valset, testset = split(model, "data/")
    valset.images = torch.cat([valset.images, testset.images])
    valset.labels = torch.cat([valset.labels, testset.labels])
    return valset


def train_in_full(args, plain: bool, seed: int) -> tuple[float, float]:
    """Train one of the loops for `--epochs` epochs; return seconds and accuracy on unseen images (%)."""
    device, loader, rnet, optimizer, step = setup(args, plain, seed)
    scheduler = one_cycle(optimizer, 0.2, args.epochs * len(loader), warmup=0.2)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        crop = 1 if plain else crop_share(epoch, args.epochs, args.small_crops)
        for images, labels in loader:
            step(random_crop(images.to(device), crop), labels.to(device))
            scheduler.step()
    seconds = time.perf_counter() - start
    evaluate = step_functions("rnet_sole").evaluate
    return seconds, 100 * evaluate(rnet, Loader(unseen(args.model), 1000, device), "fp32")[1]


def train_both(args) -> None:
    """Train both loops with every seed; print seconds, accuracies and their mean difference."""
    differences = []
    for seed in args.seeds:
        both = [alone(train_in_full, args, plain, seed) for plain in (True, False)]
        seconds, accuracy = zip(*both, strict=True)
        differences.append(accuracy[1] - accuracy[0])
        print(
            f"seed {seed}: plain {accuracy[0]:.2f} % in {seconds[0]:.0f} s, "
            f"ours {accuracy[1]:.2f} % in {seconds[1]:.0f} s; ratio of times: {seconds[0] / seconds[1]:.2f}",
            flush=True,
        )
    if len(differences) > 1:
        error = np.std(differences, ddof=1) / len(differences) ** 0.5
        print(f"ours minus plain: {np.mean(differences):+.2f} ± {error:.2f} points (mean, standard error)")


def peak_memory(args) -> str:
    """Run a few batches of ours; return this process's peak memory in words."""
    turn(args, False, 1)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    return f"{peak:.2f} GiB on the host" + (f", {on_gpu:.2f} GiB on the GPU" if on_gpu else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R32_C10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=0, help="train both in full instead")
    parser.add_argument("--small-crops", type=float, default=0, help="share of ours' epochs on small crops")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="several with --epochs only")
    args = parser.parse_args()
    device = choose_device()
    precision = choose_precision("auto", device)
    print(f"{args.model}, batch {args.batch_size}, {machine(device)}, ours in {precision}", flush=True)
    if args.epochs:
        train_both(args)
        return
    time_batches(args)
    print(f"peak memory of ours: {alone(peak_memory, args)}")


if __name__ == "__main__":
    main()
