"""The bookkeeping of a training: schedules, resuming, history, curves."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorboardX
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from models.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from models.data import Loader, random_crop, share_of
from models.distributed import average_statistics, num_processes, rank, total, weigh_gradients
from models.machine import machine as machine_name
from models.machine import mixed, seed_everything


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule that raises the learning rate to `lr`, then lowers it to 0, by cosines.

    `warmup`: the share of the `steps` in which it rises. ValueError as in `check_warmup`.
    """
    check_warmup(warmup, steps)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )


def check_warmup(warmup: float, steps: int) -> None:
    """Check that a warm-up, a share of the steps, is 2 steps or more and ends before the last. ValueError."""
    if not 2 <= warmup * steps < steps:
        raise ValueError(
            f"warmup is {warmup} of {steps} steps, expected 2 steps or more and a share below 1: "
            "choose another share, or train longer"
        )


def check_averaging(averaging: float, epochs: int, warmup: float) -> None:
    """Check that the last epochs, a share `averaging` of all, are none or at least one, after the warm-up.

    ValueError.
    """
    if averaging > 0 and share_of(epochs, averaging) < 1:
        raise ValueError(
            f"averaging is {averaging} of {epochs} epochs, less than one: choose a larger share, or 0"
        )
    if averaging > 0 and averaging + warmup > 1 + 1e-9:
        raise ValueError(
            f"averaging is {averaging}, and in the first {warmup} of the steps the learning rate rises: "
            f"lower averaging to {1 - warmup:g} or less, or the warm-up"
        )


def fits_memory(function: Callable) -> Callable:
    """Decorate a function of training or testing: a GPU too small for the batch is told as RuntimeError."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                "this GPU's memory is too small for the batch: lower batch_size (where a test fails, "
                "batch_size_test), or use more GPUs"
            ) from error

    return run


def time_spent(checkpoints: Sequence[Mapping[str, object]]) -> dict[str, float | str | None]:
    """Return the `seconds` that all of some checkpoints' trainings took, and the `machine`s they ran on.

    Seconds are NaN where a checkpoint doesn't tell its own; machines, parted by "; ", None where none does.
    """
    seconds = [found.get("seconds") for found in checkpoints]
    seconds += [found.get("policy_seconds", 0) for found in checkpoints]
    machines = [found.get(key) for found in checkpoints for key in ("policy_machine", "machine")]
    named = dict.fromkeys(name for several in machines if several for name in several.split("; "))
    return {"seconds": math.nan if None in seconds else sum(seconds), "machine": "; ".join(named) or None}


class TrainingRun:
    """The bookkeeping of a training: resuming, history, TensorBoard curves, seconds.

        line = "Epoch: {epoch} - Loss: {loss:.3f}"
        run = TrainingRun(folder, settings, {"agent": agent}, {"optimizer": optimizer}, epochs, line)
        for epoch in run:
            for inputs, labels in run.batches(trainloader):
                ...
            run.end_epoch(epoch, loss=..., accuracy=...)
        run.save("final.t7", acc=...)

    After every epoch `folder/last.t7` holds all that the next one needs. A new run with the same
    settings goes on from there, to the same result as one that was never interrupted: the random
    generators are seeded anew, from seed and epoch, as each epoch starts. A finished run of the
    same settings has no epochs left; one of other settings is replaced by the new run. From the
    first epoch on until `save`, no other process can train in `folder`: RuntimeError there.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, object],
        networks: Mapping[str, nn.Module],
        progress: Mapping[str, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler],
        epochs: int,
        line: str,
        resume: bool = True,
        seconds: float = 0.0,
        machine: str | None = None,
        averaging: float = 0,
    ):
        """`settings`: what decides the result, as plain values, `seed` among them. `networks`: what
        is trained or, in eval mode, kept, under the names `resnet` and `agent`. `progress`: optimizers
        and schedulers.
        `line`: what is printed of an epoch, a format string of the figures in the history.
        `seconds`: what the training took that this one builds on; `machine`: where. `averaging`: the
        share of the epochs, the last ones, after each of which the ResNet's weights go into a mean,
        see `take_average`.

        ValueError for a run of other settings in `folder` that is unfinished, or whose final checkpoint
        was never written: it would be lost.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}, expected 1 or more")
        self.folder, self.epochs, self.line = Path(folder), epochs, line
        self.settings = dict(settings) | {"epochs": epochs}
        self.networks, self.progress = dict(networks), dict(progress)
        self.num_averaged = share_of(epochs, averaging)
        if self.num_averaged > 0:
            self.progress["averaged"] = AveragedModel(self.networks["resnet"])
        self.history: list[dict[str, float | list[float]]] = []
        self.seconds = seconds
        self.machine = machine  # of the epochs done so far
        self.last = self.folder / "last.t7"
        if resume and self.last.is_file():
            self._resume()

    def _resume(self) -> None:
        state = read_checkpoint(self.last)
        foreign = CheckpointError(f"{self.last} is not the state of a run like this one: move it away")
        if not {"history", "settings", "seconds"} <= state.keys():
            raise foreign
        before = state["settings"]
        changed = [
            f"{key} {before.get(key)!r} -> {self.settings.get(key)!r}"
            for key in sorted(before.keys() | self.settings.keys())
            if before.get(key) != self.settings.get(key)
        ]
        unfinished = len(state["history"]) < before["epochs"]
        if changed and (unfinished or not self._is_saved(state)):
            raise ValueError(
                f"{self.last} holds {'an unfinished' if unfinished else 'a finished but unsaved'} run of "
                f"other settings ({', '.join(changed)}): set them back to go on with it, or move it away to "
                "start this stage afresh (with resume = False, all do)"
            )
        if changed:
            print(f"Settings changed since the last run ({', '.join(changed)}): starting afresh")
            return
        if not self.progress.keys() <= state.keys():
            raise foreign
        load_checkpoint(self.last, self.networks.get("resnet"), self.networks.get("agent"))
        self.history, self.seconds = state["history"], state["seconds"]
        self.machine = state.get("machine")
        left = self.epochs - len(self.history)
        if left:
            for name, part in self.progress.items():
                part.load_state_dict(state[name])
        print(f"Resumed from {self.last}: {len(self.history)} epochs done, {left} to go")
        for row in self.history:
            print(self.line.format(**row))

    def _is_saved(self, state: Mapping) -> bool:
        """Tell whether a final checkpoint of the run in `state` lies in the folder."""
        for path in self.folder.glob("*.t7"):
            with contextlib.suppress(CheckpointError):
                if path != self.last and read_checkpoint(path).get("history") == state["history"]:
                    return True
        return False

    def __iter__(self) -> Iterator[int]:
        """Yield the epochs that are left, counted from 0, under one progress bar."""
        done = len(self.history)
        if done == self.epochs:
            self._lock()  # kept until `save`
            return
        layout = "{l_bar}{bar}| {n:.2f}/{total_fmt} epochs [{elapsed}<{remaining}]"
        with (
            self._lock(),
            tqdm(total=self.epochs, initial=done, bar_format=layout, disable=rank() > 0) as self.bar,
            self._curves(done) as self.writer,
        ):
            for epoch in range(done, self.epochs):
                seed_everything(self.settings["seed"], epoch, rank())
                self.epoch = epoch
                self.started = time.perf_counter()
                yield epoch
                self.bar.n = epoch + 1
                self.bar.refresh()
            self._lock()  # once more: kept when this one is released

    @contextlib.contextmanager
    def _curves(self, done: int) -> Iterator[tensorboardX.SummaryWriter]:
        """Yield TensorBoard's writer. What a full disk keeps it from writing stands in the history, too."""
        writer = tensorboardX.SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=done,
            max_queue=0,  # any number: a full queue that nothing empties any more would block
            write_to_disk=rank() == 0,
        )
        try:
            yield writer
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    def _lock(self) -> contextlib.AbstractContextManager:
        """Keep other processes from training in the folder, until this one ends, in whatever way.

        Locked again, it is to be released as often.
        """
        if rank() > 0:
            return contextlib.nullcontext()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One object per file and process: a cell that was interrupted may run again.
            self.lock = FileLock(self.folder / ".lock", is_singleton=True)
            locked = self.lock.acquire(timeout=0)
            for left_by_a_kill in self.folder.glob(".*.tmp"):
                left_by_a_kill.unlink()
            return locked
        except Timeout:
            raise RuntimeError(
                f"another process is training in {self.folder}: wait for it, end it, or set another cv_dir"
            ) from None
        except OSError as error:
            raise RuntimeError(
                f"could not write in {self.folder} ({error}): free some space or set another cv_dir"
            ) from error

    def batches(self, loader: Loader, crop: float = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the loader's batches, in this epoch's order; the progress bar moves along.

        `crop`: the share of the images' width and height that is seen, at another place in each batch.
        After the last batch, in the last epochs with `averaging`, the ResNet's weights go into the mean.
        """
        loader.generator.manual_seed(mixed(self.settings["seed"], self.epoch))
        for step, (inputs, labels) in enumerate(loader, start=1):
            seen = (step - 1) * loader.batch_size
            weigh_gradients(len(labels), of=min(loader.batch_size, loader.num_images - seen))
            yield (random_crop(inputs, crop, loader.generator) if crop < 1 else inputs), labels
            # Not by 1 / len(loader): the rounding errors would add up to more than an epoch.
            self.bar.update(self.epoch + step / len(loader) - self.bar.n)
        average_statistics(self.networks.values())
        if self.in_average:
            self.progress["averaged"].update_parameters(self.networks["resnet"])

    @property
    def in_average(self) -> bool:
        """Whether this epoch's weights go into the mean; if so, the ResNet's learning rate should stay."""
        return self.epoch >= self.epochs - self.num_averaged

    @fits_memory
    @torch.no_grad()
    def take_average(self, loader: Loader, forward: Callable[[Tensor], object]) -> None:
        """In the last epoch, give the ResNet the mean of its weights, where there is one to be taken.

        Batch norm learns the mean's statistics in one pass of `loader`, whose images (n, 3, H, W) go to
        `forward`, which is to run the ResNet on them. A block that no image keeps has the statistics that it
        had. To be called between `batches` and the test.
        Stochastic weight averaging: Izmailov et al., UAI 2018.
        """
        if self.num_averaged == 0 or self.epoch < self.epochs - 1:
            return
        rnet = self.networks["resnet"].train()
        rnet.load_state_dict(self.progress["averaged"].module.state_dict())
        norms = [module for module in rnet.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.num_batches_tracked.zero_()
            norm.momentum = None  # the mean over the batches so far
        for inputs, _ in loader:
            forward(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        average_statistics([rnet])

    def mean_loss(self, losses: Sequence[Tensor], loader: Loader) -> float:
        """Return the mean over the loader's images of the losses (), each a batch's sum.

        RuntimeError where one is not finite.
        """
        losses = total(torch.stack(list(losses)))
        if not (finite := losses.isfinite()).all():
            step = finite.logical_not().nonzero()[0].item()
            raise RuntimeError(
                f"the loss is not finite from step {step} of epoch {self.epoch} on: {self._way_out()}"
            )
        return losses.sum().item() / loader.num_images

    def _way_out(self) -> str:
        """Say what to do about numbers that are not finite."""
        kept = f", and move {self.last} away, which holds the epoch before" if self.history else ""
        return f"lower the learning rate{kept}"

    def end_epoch(self, epoch: int, **figures: float | Sequence[float]) -> None:
        """Record an epoch's figures in history and TensorBoard, save the state, print the line.

        A figure is a number, or a number for each block. RuntimeError for weights that are not finite,
        which are not saved.
        """
        for name, network in self.networks.items():
            for key, value in network.state_dict().items():
                if not value.isfinite().all():
                    raise RuntimeError(
                        f"the {name}'s {key} is not finite after epoch {epoch}: {self._way_out()}"
                    )
        self.seconds += time.perf_counter() - self.started
        self.history.append({"epoch": epoch, **figures, "seconds": self.seconds})
        here = machine_name(next(next(iter(self.networks.values())).parameters()).device)
        if num_processes() > 1:
            here = f"{num_processes()} x {here}"
        if self.machine is None or here not in self.machine.split("; "):
            self.machine = f"{self.machine}; {here}" if self.machine else here
        parts = {name: part.state_dict() for name, part in self.progress.items()}
        save_checkpoint(self.last, self.state() | parts)
        for name, value in figures.items():
            if isinstance(value, Sequence):
                for block, part in enumerate(value):
                    self.writer.add_scalar(f"{name}/{block}", part, epoch)
            else:
                self.writer.add_scalar(name, value, epoch)
        print(self.line.format(**self.history[-1]))

    def state(self) -> dict:
        """Return what a checkpoint of this run should hold.

        Weights, history, settings, seconds; `machine`: where its epochs ran, several parted by "; ".
        """
        return {name: network.state_dict() for name, network in self.networks.items()} | {
            "epoch": len(self.history),
            "history": self.history,
            "settings": self.settings,
            "seconds": self.seconds,
            "machine": self.machine,
        }

    def save(self, name: str, **more: object) -> Path:
        """Write the finished run to `folder/name`, its `state` and `more`; return the path.

        From then on other processes may train in the folder. RuntimeError where it can't be written, or
        where epochs are left.
        """
        if len(self.history) < self.epochs:
            raise RuntimeError(
                f"only {len(self.history)} of {self.epochs} epochs are done in {self.folder}: "
                "run the training's cell again, it goes on"
            )
        with self._lock():
            path = save_checkpoint(self.folder / name, self.state() | more)
        if rank() == 0:
            self.lock.release(force=True)
        return path
