"""Several processes, one training: PyTorch's `torchrun` starts them, this is what they share.

Everything here does nothing, or the plain thing, in a process that runs alone.
"""

import atexit
import contextlib
import inspect
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from models.policy import Policy

PATIENCE = timedelta(minutes=15)  # for the others in a step or a test; a process that dies ends all at once
PATIENCE_FOR_DATA = timedelta(hours=2)  # for the first process, which downloads
GRACE = 5  # seconds that the others leave to the first process, to report an error that all of them have

_waiting_for_data: dist.ProcessGroup | None = None
_weight = 1.0  # this process's images in the batch, as a multiple of an even share


def join_processes(device: torch.device) -> None:
    """Join the other processes where `torchrun` started this one; only the first goes on printing.

    NCCL connects GPUs, gloo CPUs. What torchrun says stands in its environment variables.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    global _waiting_for_data
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    _waiting_for_data = dist.new_group(backend="gloo", timeout=PATIENCE_FOR_DATA)
    atexit.register(dist.destroy_process_group)
    sys.excepthook = _end_at_once
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _end_at_once(kind, error, trace) -> None:
    """Report an error that nothing caught, and end: leaving the others in order would wait for them.

    An error that all processes have, a wrong setting say, is reported once: the first one's end ends all.
    """
    if rank() > 0:
        time.sleep(GRACE)
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def rank() -> int:
    """Return this process's number; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(network: nn.Module) -> nn.Module:
    """Return what to call in training: the network, its gradients averaged over the processes.

    Each process's count as much as it has images in the batch, see `weigh_gradients`.
    """
    if not dist.is_initialized():
        return network
    # Batch norm's running statistics are averaged after each epoch, see `average_statistics`.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    if isinstance(network, Policy):
        network.vnet.requires_grad_(False)  # no loss uses it, and gradients that never come are waited for
    wrapped = DistributedDataParallel(network, **{buffers: False})
    wrapped.register_comm_hook(None, _weighted_mean)
    return wrapped


def weigh_gradients(images: int, of: int) -> None:
    """Tell how many images of a batch this process has, `images` of `of`, before its gradients are averaged.

    A process's loss is the mean over its own images: where shares differ in size, so do their weights.
    """
    global _weight
    _weight = images * num_processes() / of


def _weighted_mean(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients over the processes, each weighted by its images."""
    bucket.buffer().mul_(_weight)
    return allreduce_hook(group, bucket)


def average_statistics(networks: Iterable[nn.Module]) -> None:
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
    """Return the rows of all processes, the first process's first; each may have another number."""
    if not dist.is_initialized():
        return rows
    parts = [None] * num_processes()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process run a block before the others, which then find what it has written."""
    if rank() > 0:
        dist.barrier(_waiting_for_data)
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier(_waiting_for_data)


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
