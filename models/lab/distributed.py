"""Several processes, one training: PyTorch's `torchrun` starts them, this is what they share.

In a process that runs alone, each function does nothing, or the plain thing.
"""

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=2)  # with one that downloads, or hangs; one that dies ends all at once
GRACE = 5  # seconds; an error that all processes have is reported by the first one, whose end ends all


def join_processes(device: torch.device) -> None:
    """Join the other processes where `torchrun` started this one; only the first goes on printing."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None)
    atexit.register(dist.destroy_process_group)
    sys.excepthook = _end_at_once
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _end_at_once(kind, error, trace) -> None:
    """Report an error that nothing caught, and end: an orderly exit would wait for the other processes."""
    if rank() > 0:
        time.sleep(GRACE)
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def rank() -> int:
    """Return this process's number; process 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(num_images: int, *networks: nn.Module) -> None:
    """Average the networks' gradients over the processes, each weighted by its images in the batch.

    `num_images`: this process's share of the batch, over which its loss is a mean.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    flat = total(torch.cat([gradient.flatten() for gradient in gradients]) * num_images)
    count = total(flat.new_tensor([num_images]))
    parts = (flat / count).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def average_statistics(*networks: nn.Module) -> None:
    """Set batch norm's running statistics to their mean over the processes, its counts to the first one's.

    Networks in eval mode have learned none, and keep what they have.
    """
    if not dist.is_initialized():
        return
    for network in networks:
        for buffer in network.buffers() if network.training else ():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= num_processes()
            else:  # a block that no image of a process keeps counts no batch there
                dist.broadcast(buffer, 0)


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, the first process's first; their numbers may differ."""
    if not dist.is_initialized():
        return rows
    parts = [None] * num_processes()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process run a block before the others, which then find what it has written."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
