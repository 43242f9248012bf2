"""Time an epoch of sole training against the plain loop, or compare their accuracies over seeds.

    python tests/benchmark_training.py --model R32_C10 --batches 12
    python tests/benchmark_training.py --model R32_C10 --batch-size 128 --batches 12 --compiled
    python tests/benchmark_training.py --model R8_C10 --epochs 10 --seeds 42 1 2
    python tests/benchmark_training.py --model R20_SYN --batch-size 128 --epochs 20 --seeds 0 1 2 3 4

The plain loop: fp32, contiguous, augmented image by image in DataLoader workers. Ours: data on the
device in bytes and augmented there, channels last, bf16 where the machine has it, with `--compiled` by
torch.compile. `--batches` times so many batches of each, in turn, ours on crops of 3/4 the width too,
and prints the ratios; what is compiled is compiled before. `--epochs` trains both in full with each of
`--seeds`, ours on small crops only where `--small-crops` says so, and prints accuracies on images that
neither has seen, and the mean of their differences: many images, for less chance, since nothing is tuned
by them. Of CIFAR they are the held-out and the test images together, of SYN 10,000 drawn anew. Each loop
has a process of its own, the plain one as PyTorch sets it up; peak memory is that of one that runs ours.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from models import syn
from models.data import random_crop

ROUNDS = 3  # turns of each loop
WARMUP = 3  # batches not counted in each turn: the workers start


class OneByOne(torch.utils.data.Dataset):
    """The images of `utils.Images` through PIL and torchvision's transforms, as the original did."""

    def __init__(self, images: utils.Images):
        self.pixels = images.images.permute(0, 2, 3, 1).numpy().astype(np.uint8)
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(images.mean.flatten().tolist(), images.std.flatten().tolist()),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def setup(args, plain: bool, seed: int):
    """Return device, network, loader, precision, optimizer and the loader of unseen images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if plain else utils.choose_device()
    trainset, testset = utils.get_dataset(args.model, "data/")
    trainset, valset = utils.hold_out(trainset, testset, 0.1)
    if utils.parse_model(args.model).dataset == "SYN":
        images, labels, _ = map(torch.from_numpy, syn.draw(10_000, syn.SEED + 2))
        valset = utils.Images(images, labels, syn.CLASSES)
    else:
        valset.images = torch.cat([valset.images, testset.images])
        valset.labels = torch.cat([valset.labels, testset.labels])
    utils.seed_everything(seed)
    rnet, _ = utils.build_model(args.model)
    if plain:
        loader = torch.utils.data.DataLoader(
            OneByOne(trainset), args.batch_size, shuffle=True, num_workers=torch.get_num_threads()
        )
        precision = "fp32"
        rnet.to(device)
    else:
        loader = utils.Loader(trainset, args.batch_size, device, shuffle=True)
        loader.generator.manual_seed(seed)
        precision = utils.choose_precision(args.precision, device)
        rnet.to(device, memory_format=torch.channels_last)
        if args.compiled:
            utils.compile_calls(rnet, device)
    optimizer = torch.optim.SGD(rnet.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return device, rnet, loader, precision, optimizer, utils.Loader(valset, 1000, device)


def steps(device, rnet, loader, precision, optimizer, crop=1):
    """Train over one pass of the loader, yielding after each batch."""
    rnet.train()
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)
        if crop < 1:
            inputs = random_crop(inputs, crop)
        with utils.autocast(precision, device):
            loss = F.cross_entropy(rnet(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        utils.synchronize(device)
        yield


def check_length(epoch: int, needed: int) -> None:
    """End with a sentence where an epoch has fewer batches than are to be run."""
    if epoch < needed:
        sys.exit(f"an epoch has {epoch} batches, and {needed} are to be run: lower --batches or --batch-size")


def new_process() -> ProcessPoolExecutor:
    """Return a process that runs what is submitted to it."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def alone(function: Callable, *args: object) -> object:
    """Return what a function returns, called in a process of its own."""
    with new_process() as process:
        return process.submit(function, *args).result()


LOOP = []  # in a process of its own: what `setup` has returned there


def take_turn(args, plain: bool, crop: float) -> tuple[list[float], int, str]:
    """Run so many batches of one of the loops; return the seconds of each, batches an epoch, precision."""
    if not LOOP:
        LOOP.extend(setup(args, plain, args.seeds[0]))
        check_length(len(LOOP[2]), args.batches + WARMUP)
    running, seconds = steps(*LOOP[:5], crop), []
    for index in range(args.batches + WARMUP):
        start = time.perf_counter()
        next(running)
        if index >= WARMUP:
            seconds.append(time.perf_counter() - start)
    running.close()  # ends the plain loop's workers
    return seconds, len(LOOP[2]), LOOP[3]


def time_batches(args) -> None:
    """Print the seconds an epoch takes: the loops in turn, each alone, so many batches at a time."""
    crops = {"plain": 1, "ours, small crops": 0.75, "ours, whole images": 1}
    processes = {name: new_process() for name in crops}
    turns = [
        {
            name: processes[name].submit(take_turn, args, name == "plain", crops[name]).result()
            for name in crops
        }
        for _ in range(ROUNDS)
    ]
    medians = {}
    for name in crops:
        low, medians[name], high = np.quantile([turn[name][0] for turn in turns], [0.25, 0.5, 0.75])
        _, num_batches, precision = turns[0][name]
        print(
            f"{name:>18}: {1000 * medians[name]:7.0f} ms a batch ({1000 * low:.0f} to {1000 * high:.0f}), "
            f"{medians[name] * num_batches:6.1f} s an epoch, {precision}"
        )
        processes[name].shutdown()
    plain, small, whole = medians.values()
    print(f"ratio: {plain / small:.2f} on small crops, {plain / whole:.2f} on whole images")


def train_in_full(args, plain: bool, seed: int) -> tuple[float, float]:
    """Train one of the loops for `--epochs` epochs; return seconds and accuracy on unseen images (%)."""
    device, rnet, loader, precision, optimizer, valloader = setup(args, plain, seed)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=args.epochs * len(loader), pct_start=0.2, cycle_momentum=False
    )
    start = time.perf_counter()
    for epoch in range(args.epochs):
        crop = 1 if plain else utils.crop_share(epoch, args.epochs, args.small_crops)
        for _ in steps(device, rnet, loader, precision, optimizer, crop):
            scheduler.step()
    seconds = time.perf_counter() - start
    rnet.eval()
    with torch.no_grad():
        right = sum((rnet.forward_full(x).argmax(1) == y).sum().item() for x, y in valloader)
    return seconds, 100 * right / valloader.num_images


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
    loop = setup(args, False, args.seeds[0])
    running = steps(*loop[:5])
    for _ in range(5):
        next(running)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if loop[0].type == "cuda" else 0
    return f"{peak:.2f} GiB on the host" + (f", {on_gpu:.2f} GiB on the GPU" if on_gpu else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R32_C10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=0, help="train both in full instead")
    parser.add_argument("--small-crops", type=float, default=0, help="share of ours' epochs on small crops")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="several with --epochs only")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of ours")
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile")
    args = parser.parse_args()
    print(f"{args.model}, batch {args.batch_size}, {utils.machine(utils.choose_device())}", flush=True)
    if args.epochs:
        train_both(args)
        return
    time_batches(args)
    print(f"peak memory of ours: {alone(peak_memory, args)}")


if __name__ == "__main__":
    main()
