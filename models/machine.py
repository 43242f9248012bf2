"""The machine: devices, precision, seeds, time and memory."""

import ctypes
import hashlib
import logging
import math
import os
import platform
import re
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


def choose_device(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is some, else the CPU.

    Of several processes that `torchrun` started on a machine, each gets a GPU of its own. On CUDA,
    fp32 is set to mean fp32, where PyTorch's convolutions take TF32 by default; with `deterministic`,
    the same numbers give the same result to the bit, as they do on the CPU anyway. On the CPU, the
    process keeps the memory it has once used (see `keep_memory`).
    RuntimeError for a device that this machine lacks, and for `deterministic` once CUDA has started.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if device != "cpu" and torch.cuda.is_initialized():
            raise RuntimeError(
                "deterministic = True comes too late: CUDA is in use already; restart the kernel"
            )
        # cuBLAS reads it when it starts. Source: PyTorch's documentation, "Reproducibility".
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        number, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= num_gpus:
            raise RuntimeError(
                f"more processes than GPUs on this machine: choose --nproc_per_node {num_gpus} or fewer"
            )
        device = f"cuda:{number}"
    try:
        torch.empty(1, device=device)
        usable = torch.device(device).type in ("cpu", "cuda")
    except (RuntimeError, AssertionError, TypeError):
        usable = False
    if not usable:
        raise RuntimeError(
            f'device {str(device)!r} can\'t be used here: choose "auto", "cpu", or "cuda" on a '
            "machine with a CUDA GPU and a PyTorch built for it"
        )
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        keep_memory()
    return device


def keep_memory() -> None:
    """Have the GNU C library keep freed memory for the next tensors; elsewhere nothing happens.

    As it is, it gives memory back to the system and fetches it again, page by page, by rules that hang on
    where tensors happen to lie: for minutes at a time a single image took 3 ms instead of 0.9, and a step of
    training 6 % longer, the plain loop's 15 %.
    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # no free memory at the heap's end is too much
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # before version 2.35, no more than this one


def choose_precision(precision: str, device: torch.device, allowed: Sequence[str] = ("fp32", "bf16")) -> str:
    """Return the precision that is asked for; for "auto", bf16 where the device has instructions for it.

    Else fp32. ValueError for a precision that is not among the `allowed`.
    """
    if precision in allowed:
        return precision
    if precision != "auto":
        raise ValueError(f"unknown precision {precision!r}: expected one of auto, {', '.join(allowed)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older PyTorch can't tell; fp32 is right everywhere.
        features = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context that runs a network's layers in bf16, or as they are for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_calls(network: torch.nn.Module, device: torch.device) -> None:
    """Have `torch.compile` make the calls of a network faster; its other methods stay as they are.

    Each shape of input is compiled at its first call, which takes a minute for a deep network on two
    cores. RuntimeError where PyTorch can't compile.
    """
    # PyTorch tells in a warning that a CUDA toolkit lies on a machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(torch.relu)(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            "torch.compile does not work here; on a CPU it needs a C++ compiler and Python's headers "
            f"(Debian: g++ and python3-dev): install them, or set compiled to False ({reason})"
        ) from error
    network.compile(dynamic=False)


def seed_everything(seed: int, *more: int) -> None:
    """Seed PyTorch on all devices from `seed` and, say, an epoch: other numbers, other sequence."""
    torch.manual_seed(mixed(seed, *more))


def mixed(*numbers: int) -> int:
    """Return a seed made of several numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished all work, so that a clock read next is true."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device | str) -> str:
    """Describe what figures were measured on: the device, threads on a CPU, PyTorch's version."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and (m := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
            name = m[1]
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, PyTorch {torch.__version__.split('+')[0]}"


class Time(NamedTuple):
    """Seconds of one call: median and quartiles."""

    median: float
    low: float
    high: float


def measure(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    seconds: float = 0.5,
    rounds: int = 5,
) -> dict[str, Time]:
    """Time functions against each other on a device; return each one's time by its name.

    They take turns, `rounds` times, so that a machine that gets slower or faster is the same for
    all; each is warmed up, waited for after every call, and gets about `seconds` in all, one call
    a round at least. Median and quartiles are those of the rounds. Data should lie on the device
    already.
    """
    # Not `torch.utils.benchmark`: it warms up in every turn anew, too slow for calls of seconds.
    names = {"synchronize": synchronize, "device": device}
    timers = {
        name: timeit.Timer("function(); synchronize(device)", globals=names | {"function": function})
        for name, function in functions.items()
    }
    number = {}  # calls a round
    for name, timer in timers.items():
        slow = timer.timeit(1) > 2 * seconds / rounds  # the first call warms up
        number[name] = 1 if slow else max(1, round(seconds / rounds / timer.timeit(1)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number[name]) / number[name])
    return {
        name: Time(*(float(np.quantile(taken, q)) for q in (0.5, 0.25, 0.75)))
        for name, taken in times.items()
    }


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
