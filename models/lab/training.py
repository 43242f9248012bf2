"""A stage that is trained: resuming, history, lineage, curves, schedule, averaging."""

import contextlib
import copy
import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorboardX
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm.auto import tqdm

from models.lab.checkpoints import CheckpointError, fingerprint, read_checkpoint, save_checkpoint
from models.lab.data import Loader, share_of
from models.lab.device import autocast, mixed, seed_everything
from models.lab.distributed import average_statistics, gathered, num_processes, rank, total
from models.lab.files import explained
from models.lab.stages import TORCHVISION, Stage
from models.lab.timing import machine_record, same_machine

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that can't lock
CHECK_EVERY = 100  # steps between two looks at whether the losses are finite
RESULT = (
    "Accuracy: {accuracy:.3f} | Reward: {reward:.2E} | Sparsity: {sparsity:.3f} | "
    "Variance: {variance:.3f} | #: {policies:.0f}"
)  # as the original prints it
HELD_OUT_RESULT = RESULT.replace("{", "{val_")


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, warmup: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule that raises the learning rate to `lr`, then lowers it to 0, by cosines.

    `warmup`: the share of the `steps` in which it rises, two steps at least.
    """
    steps = max(steps, 4)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=max(warmup, 2 / steps), cycle_momentum=False
    )


class Training:
    """A stage that is trained, resumed or, with 0 epochs, skipped; `save` returns it as a `Stage`.

    After every epoch `folder/last.t7` holds all that the next one needs. A new run of the same settings
    goes on from there, to the same result as one that was never interrupted: each epoch seeds the random
    generators anew. While epochs run, no other process can train in `folder`: RuntimeError there.
    """

    def __init__(
        self,
        stage: str,
        folder: str | Path,
        settings: Mapping[str, object],
        networks: Mapping[str, nn.Module],
        progress: Mapping[str, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler | nn.Module],
        epochs: int,
        line: str,
        start: Stage | None = None,
        resume: bool = True,
    ):
        """`stage`: its name in the lineage. `settings`: what decides the result, `seed` among them.
        `networks`: what the checkpoint holds, under the names `resnet` and `agent`. `progress`: optimizers,
        schedulers, averaged models. `line`: what is printed of an epoch, with {names} of the history.
        `start`: the stage whose weights the networks have; None: new weights. ValueError for a run of other
        settings in `folder` that is unfinished or was not saved; else the new run replaces it.
        """
        self.folder, self.epochs, self.line = Path(folder), epochs, line
        self.networks, self.progress = dict(networks), dict(progress)
        self.start = start or TORCHVISION
        self.settings = dict(settings) | {"epochs": epochs}
        if start is not None:
            self.settings["starting weights"] = fingerprint(*networks.values())
        self.device = next(next(iter(networks.values())).parameters()).device
        self.entry = {"stage": stage, "seconds": 0.0, "machine": [], "weights": None,
                      "settings": self.settings}  # fmt: skip
        self.history: list[dict[str, float | list[float]]] = []
        self.last = self.folder / "last.t7"
        if epochs == 0:
            if self.start.lineage and self.start.lineage[-1]["stage"] == stage:
                self.history = self.start.history
            taken = self.start.path or "torchvision's ResNet"
            print(f"{stage.capitalize()} is skipped: {taken} is taken")
        elif resume and self.last.is_file():
            self._resume()
        if len(gathered(torch.tensor([len(self.history)])).unique()) > 1:
            raise RuntimeError(f"processes find different runs in {self.folder}: let all share one cv_dir")
        self.kept = self._state()

    def _resume(self) -> None:
        state = read_checkpoint(self.last)
        try:
            entry, history = state["lineage"][-1], state["history"]
            weights = entry["weights"]
            before, finished = entry["settings"], len(history) == entry["settings"]["epochs"]
            restored = self.networks | ({} if finished else self.progress)
            saved = {name: state[name] for name in restored}
        except (KeyError, IndexError, TypeError):
            raise CheckpointError(f"{self.last} is of another kind of run: move it away") from None
        changed = ", ".join(
            f"{key} {before.get(key)!r} -> {self.settings.get(key)!r}"
            for key in sorted(before.keys() | self.settings.keys())
            if before.get(key) != self.settings.get(key)
        )
        if changed and not (finished and self._is_saved(weights)):
            kind = "a finished but unsaved" if finished else "an unfinished"
            raise ValueError(
                f"{self.last} holds {kind} run of other settings ({changed}): set them back to go on with it "
                "or move it away to start this stage afresh (with resume = False, all do)"
            )
        if changed:
            print(f"Settings changed since the last run ({changed}): starting afresh")
            return
        self.history, self.entry = history, entry
        for name, part in restored.items():
            part.load_state_dict(saved[name])
        if self.device.type == "cpu":  # undo what a step captured on CUDA needs
            for part in self.progress.values():
                for group in getattr(part, "param_groups", ()):  # an optimizer's
                    group |= {"lr": float(group["lr"]), "fused": None, "capturable": False}
        print(f"Resumed from {self.last}: {len(history)} epochs done, {self.epochs - len(history)} to go")
        for row in history:
            print(self._words(row))

    @property
    def parts(self) -> tuple:
        """Return what is trained: networks, then the `progress`, as they were given, whatever ran since."""
        return tuple((self.networks | self.progress).values())

    def _words(self, row: Mapping) -> str:
        return f"Epoch: {row['epoch']} - {self.line.format(**row)}"

    def _state(self) -> dict[str, dict]:
        """Return a copy of what the next epoch starts from, to go on from there if it is interrupted."""
        parts = (self.networks | self.progress).items()
        return copy.deepcopy({name: part.state_dict() for name, part in parts})

    def _is_saved(self, weights: str) -> bool:
        """Tell whether a final checkpoint with weights of this fingerprint lies in the folder."""
        return any(path != self.last and _weights_of(path) == weights for path in self.folder.glob("*.t7"))

    def __iter__(self) -> Iterator[int]:
        """Yield the epochs that are left, counted from 0, under one progress bar."""
        done = len(self.history)
        if self.epochs == 0:
            return
        lock = self._lock()
        for name, part in (self.networks | self.progress).items():
            part.load_state_dict(copy.deepcopy(self.kept[name]))
        layout = "{l_bar}{bar}| {n:.2f}/{total_fmt} epochs [{elapsed}<{remaining}]"
        with tqdm(total=self.epochs, initial=done, bar_format=layout, disable=rank() > 0) as self.bar:
            with explained(self.folder / "tensorboard"):
                self.writer = tensorboardX.SummaryWriter(
                    str(self.folder / "tensorboard"),
                    purge_step=done,
                    max_queue=0,  # any number: a full queue that nothing empties any more would block
                    write_to_disk=rank() == 0,
                )
            try:
                for epoch in range(done, self.epochs):
                    seed_everything(self.settings["seed"], epoch, rank())
                    self.epoch, self.started = epoch, time.perf_counter()
                    yield epoch
                    self.bar.n = epoch + 1
                    self.bar.refresh()
            finally:
                lock.release(force=len(self.history) == self.epochs)  # however often it was interrupted
                with contextlib.suppress(OSError):  # what a full disk keeps from the curves: see the history
                    self.writer.close()

    def _lock(self) -> FileLock:
        """Keep other processes from training in the folder, until this one ends, in whatever way."""
        # One object per file and process: a cell that was interrupted may run again.
        lock = FileLock(self.folder / ".lock", is_singleton=True)
        if rank() > 0:
            return lock
        with explained(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
                for left_by_a_kill in self.folder.glob(".*.tmp"):
                    left_by_a_kill.unlink()
            except Timeout:
                todo = "wait for it, end it, or set another cv_dir"
                raise RuntimeError(f"another process is training in {self.folder}: {todo}") from None
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                    raise
                print(f"The file system of {self.folder} has no locks: don't train there twice at a time")
        return lock

    def batches(self, loader: Loader, losses: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the loader's batches, in this epoch's order; the progress bar moves along.

        `losses`: the list that the loop fills. RuntimeError soon after one that is not finite.
        """
        loader.generator.manual_seed(mixed(self.settings["seed"], self.epoch))
        for step, batch in enumerate(loader, start=1):
            yield batch
            # Not by 1 / len(loader): the rounding errors would add up to more than an epoch.
            self.bar.update(self.epoch + step / len(loader) - self.bar.n)
            if losses and step % CHECK_EVERY == 0:
                self.mean_loss(losses, loader)

    def mean_loss(self, losses: Sequence[Tensor], loader: Loader) -> float:
        """Return the mean over the loader's images of the losses (), each a batch's sum.

        RuntimeError where one is not finite.
        """
        losses = total(torch.stack(list(losses)))
        if not losses.isfinite().all():
            step = losses.isfinite().logical_not().nonzero()[0].item()
            where = f"from step {step} of epoch {self.epoch} on"
            raise RuntimeError(f"the loss is not finite {where}: lower the learning rate")
        return losses.sum().item() / loader.num_images

    def end_epoch(self, **figures: float | Sequence[float]) -> None:
        """Record the epoch's figures in history and TensorBoard, save the state, print the line.

        A figure is a number, or a number for each block. RuntimeError for weights that are not finite,
        which are not saved.
        """
        for name, network in self.networks.items():
            for key, value in network.state_dict().items():
                if not value.isfinite().all():
                    problem = f"the {name}'s {key} is not finite after epoch {self.epoch}"
                    raise RuntimeError(f"{problem}: lower the learning rate")
        seconds = self.entry["seconds"] + time.perf_counter() - self.started
        here = machine_record(self.device) | ({"processes": num_processes()} if num_processes() > 1 else {})
        if not any(same_machine(here, known) for known in self.entry["machine"]):
            self.entry["machine"].append(here)
        history = [*self.history, {"epoch": self.epoch, **figures, "seconds": seconds}]
        # Not before the copy is complete: interrupted in it, the epoch is trained again.
        self.kept, self.history, self.entry["seconds"] = self._state(), history, seconds
        save_checkpoint(self.last, self.kept | self._record())
        for name, value in figures.items():
            if isinstance(value, Sequence):
                for block, part in enumerate(value):
                    self.writer.add_scalar(f"{name}/{block}", part, self.epoch)
            else:
                self.writer.add_scalar(name, value, self.epoch)
        print(self._words(self.history[-1]))

    def _record(self) -> dict:
        """Return what a checkpoint says of its weights."""
        own = self.entry | {"weights": fingerprint(*self.networks.values())}
        lineage = [*self.start.lineage, own]
        return {"epoch": len(self.history), "history": self.history, "lineage": lineage}

    def save(self, name: str, **more: object) -> Stage:
        """Write the finished run to `folder/name`, with `more`; return it as a stage.

        A file of that name with other weights stays: the new name gets a number. RuntimeError where it
        can't be written, or where epochs are left.
        """
        if self.epochs == 0:
            return self.start
        if len(self.history) < self.epochs:
            done = f"only {len(self.history)} of {self.epochs} epochs are done in {self.folder}"
            raise RuntimeError(f"{done}: run the training's cell again, it goes on")
        weights = {name: network.state_dict() for name, network in self.networks.items()}
        record, path, number = self._record(), self.folder / name, 1
        while path.exists() and _weights_of(path) != record["lineage"][-1]["weights"]:
            number += 1
            path = (self.folder / name).with_stem(f"{Path(name).stem}_{number}")
        path = save_checkpoint(path, weights | record | {"saved": time.time(), **more})
        print("Model saved: ", path)
        return Stage(path, tuple(self.networks), self.history, record["lineage"])


def _weights_of(path: Path) -> str | None:
    """Return the fingerprint of the weights that a checkpoint ends with; None where it does not say."""
    with contextlib.suppress(CheckpointError, KeyError, IndexError, TypeError):
        return read_checkpoint(path)["lineage"][-1]["weights"]
    return None


def figures(stats: tuple, prefix: str = "") -> dict[str, float]:
    """Name what `performance_stats` returns, for `RESULT` and the history."""
    names = ("accuracy", "reward", "sparsity", "variance", "policies")
    return {prefix + name: value for name, value in zip(names, (*stats[:4], len(stats[4])), strict=True)}


def policy_filename(
    epochs: int, accuracy: float, reward: float, sparsity: float, _variance: float, policy_set: set[str]
) -> str:
    """Return the file name of a policy or finetuned pair, as the original names them."""
    return f"ckpt_E_{epochs}_A_{accuracy:.3f}_R_{reward:.2E}_S_{sparsity:.2f}_#_{len(policy_set)}.t7"


def first_averaged_epoch(epochs: int, averaging: float) -> int:
    """Return the first epoch whose weights are averaged: the last ones are, a share `averaging` of all.

    ValueError where that is less than one epoch.
    """
    averaged = share_of(epochs, averaging)
    if averaging > 0 and averaged == 0 and epochs > 0:
        raise ValueError(f"averaging is {averaging} of {epochs} epochs, less than one: train more or set 0")
    return epochs - averaged


def take_average(averaged: AveragedModel, rnet: nn.Module, loader: Loader, precision: str) -> None:
    """Give the ResNet the mean of the weights that `averaged` has seen.

    Batch norm learns the mean's statistics in one pass of the `loader`; in a block that no image keeps it
    keeps its old ones. The ResNet gets images alone: policies come from a forward pre-hook.
    Stochastic weight averaging: Izmailov et al., UAI 2018.
    """
    rnet.load_state_dict(averaged.module.state_dict())
    norms = [module for module in rnet.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    with autocast(precision, loader.device):
        update_bn(loader, rnet)
    for norm, (mean, variance) in zip(norms, before, strict=True):
        if norm.num_batches_tracked == 0:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    average_statistics(rnet)
