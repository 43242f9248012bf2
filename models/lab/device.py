"""The device: which one, in which precision, from which seed, and its name."""

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path

import torch

from models.lab.distributed import join_processes, num_processes


def choose_device(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is some, else the CPU.

    Of several processes that `torchrun` started on a machine, each gets a GPU of its own. On CUDA, fp32 is
    set to mean fp32 (PyTorch's convolutions take TF32 by default); with `deterministic`, the same numbers
    give the same result to the bit, as they do on the CPU anyway.
    RuntimeError for a device that this machine lacks, and for `deterministic` once CUDA has started.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if device != "cpu" and torch.cuda.is_initialized():
            raise RuntimeError("deterministic = True comes too late: CUDA is in use; restart the kernel")
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
        kind = torch.empty(1, device=torch.device(device)).device.type
    except (RuntimeError, AssertionError, TypeError):
        kind = None
    if kind not in ("cpu", "cuda"):
        raise RuntimeError(
            f'device {str(device)!r} can\'t be used here: choose "auto", "cpu", or "cuda" on a '
            "machine with a CUDA GPU and a PyTorch built for it"
        )
    device = torch.device(device)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        keep_memory()
    return device


def set_up(
    device: str, precision: str, deterministic: bool = False, training: bool = True
) -> tuple[torch.device, str]:
    """Return device and precision as chosen, print them, and join the processes that `torchrun` started.

    RuntimeError for several processes where nothing is trained.
    """
    chosen = choose_device(device, deterministic)
    join_processes(chosen)
    if not training and num_processes() > 1:
        raise RuntimeError("this notebook runs in one process: start it without torchrun")
    precision = choose_precision(precision, chosen, training)
    print(f"{machine(chosen)}, {precision}")
    return chosen, precision


def keep_memory() -> None:
    """Have the GNU C library keep freed memory for the next tensors; elsewhere nothing happens.

    Else it returns memory and fetches it again, page by page, by rules that depend on where tensors lie:
    for minutes at a time a single image took 3 ms instead of 0.9, and a step of training 6 % longer.
    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # no free memory at the heap's end is too much
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # before version 2.35, no more than this one


def choose_precision(precision: str, device: torch.device, training: bool = True) -> str:
    """Return `precision`; for "auto" the fastest that changes no result to speak of.

    In training that is bf16 where the device has instructions for it, else fp32; in inference fp16 on CUDA,
    fp32 on the CPU. ValueError for an unknown precision.
    """
    allowed = ("fp32", "bf16") if training else ("fp32", "tf32", "bf16", "fp16")
    if precision in allowed:
        return precision
    if precision != "auto":
        raise ValueError(f"unknown precision {precision!r}: expected one of auto, {', '.join(allowed)}")
    if not training:
        return "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch can't tell
        fast = any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context that runs a network's layers in bf16, or as they are for "fp32"."""
    cached = device.type == "cpu"  # a CUDA graph would keep weights that were rounded before it
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16", cache_enabled=cached)


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


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """Describe what figures were measured on: the device, threads on a CPU, PyTorch's version."""
    number = torch.get_num_threads()
    threads = "1 thread" if number == 1 else f"{number} threads"
    threads = "" if device.type == "cuda" else f", {threads}"
    return f"{device_name(device)}{threads}, PyTorch {torch.__version__.split('+')[0]}"
