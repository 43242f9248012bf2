"""What the benchmarks share: the plain loop's images, loops that take turns in own processes, peak memory."""

import ctypes
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # for `running`, and for the project's modules

ROUNDS = 3  # turns of each loop
WARMUP = 2  # batches not counted in each turn: the workers start


class OneByOne(torch.utils.data.Dataset):
    """The images of a small data set through PIL and torchvision's transforms, as the original read them."""

    def __init__(self, images):
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


def plain_loader(trainset, batch_size: int) -> torch.utils.data.DataLoader:
    """Return the plain loop's loader: images augmented one by one in worker processes."""
    return torch.utils.data.DataLoader(
        OneByOne(trainset),
        batch_size,
        shuffle=True,
        num_workers=torch.get_num_threads(),
        # As in a process that was not spawned itself; there, workers would import everything anew.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )


def plain_device() -> torch.device:
    """Return the device with memory and precision as PyTorch sets them up."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def epoch_length(trainset, args) -> int:
    """Return the batches of an epoch; end with a sentence where more are to be run."""
    epoch, needed = math.ceil(len(trainset) / args.batch_size), args.batches + WARMUP
    if epoch < needed:
        sys.exit(f"an epoch has {epoch} batches, and {needed} are to be run: lower --batches or --batch-size")
    return epoch


def time_steps(
    loader: Iterable, step: Callable[[Tensor, Tensor], object], batches: int, device: torch.device
) -> list[float]:
    """Return the seconds of each of so many steps, a batch's loading included, after a warm-up."""
    seconds, remaining = [], iter(loader)
    for _ in range(batches + WARMUP):
        start = time.perf_counter()
        images, labels = next(remaining)
        step(images.to(device), labels.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP:]


def new_process() -> ProcessPoolExecutor:
    """Return a process that runs what is submitted to it."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def alone(function: Callable, *args: object) -> object:
    """Return what a function returns, called in a process of its own."""
    with new_process() as process:
        return process.submit(function, *args).result()


TURNS = {}  # in a loop's own process: by name, the function that takes its turn


def _start(name: str, make: Callable, *args: object) -> None:
    TURNS[name] = make(*args)


def _turn(name: str) -> list[float]:
    return TURNS[name]()


def in_turns(ways: Mapping[str, tuple]) -> dict[str, list[float]]:
    """Let loops take turns; return the seconds of their batches.

    `ways`: by name the loop's process, and a function with its arguments that returns, there, the function
    that takes a turn.
    """
    seconds = {name: [] for name in ways}
    for name, (process, *call) in ways.items():
        process.submit(_start, name, *call).result()
    for _ in range(ROUNDS):
        for name, (process, *_) in ways.items():
            seconds[name] += process.submit(_turn, name).result()
    return seconds


def print_times(seconds: Mapping[str, list[float]], epoch: int) -> None:
    """Print each loop's milliseconds a batch, median and quartiles, and its seconds an epoch."""
    for name, values in seconds.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(f"{name:>18}: {1000 * median:7.0f} ms a batch ({1000 * low:.0f} to {1000 * high:.0f}), "
              f"{median * epoch:6.1f} s an epoch", flush=True)  # fmt: skip


def peak_memory(function: Callable[[], object], device: torch.device | str) -> float:
    """Return the bytes that a call of `function` holds at its peak, beyond what is held before it.

    On CUDA what PyTorch allocates; on the CPU what the process resides in, known on Linux with the
    GNU C library only: elsewhere `nan`.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if clear.exists() else None
    if give_back is None:
        return math.nan

    def kibibytes(field: str) -> int:
        return int(re.search(rf"{field}:\s*(\d+) kB", status.read_text())[1])

    give_back(0)  # what is free but still resides would be used again, unseen
    clear.write_text("5")  # proc(5): the peak starts anew from what resides now
    before = kibibytes("VmRSS")
    function()
    return 1024.0 * (kibibytes("VmHWM") - before)
