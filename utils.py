"""The notebooks' toolbox: model names, data, checkpoints, training runs, statistics, time."""

import copy
import ctypes
import hashlib
import math
import os
import pickle
import platform
import re
import time
import timeit
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorboardX
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm.auto import tqdm

from models import syn
from models.base import BasicBlock, Bottleneck
from models.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_weights_to_flatresnet,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from models.policy import Policy, Policy32, Policy224
from models.resnet import FlatResNet, FlatResNet32, FlatResNet224

__all__ = [
    "CheckpointError",
    "Images",
    "Loader",
    "ModelName",
    "TrainingRun",
    "autocast",
    "build_model",
    "check",
    "check_warmup",
    "choose_device",
    "choose_precision",
    "count_flops",
    "fingerprint",
    "get_dataset",
    "get_model",
    "hold_out",
    "load_checkpoint",
    "load_standard_weights",
    "load_weights_to_flatresnet",
    "machine",
    "measure",
    "newest_checkpoint",
    "one_cycle",
    "parse_model",
    "peak_memory",
    "performance_stats",
    "policy_filename",
    "read_checkpoint",
    "save_checkpoint",
    "seed_everything",
    "synchronize",
]

# ---------------------------------------------------------------------------------------- names

NUM_CLASSES = {"C10": 10, "C100": 100, "SYN": len(syn.CLASSES), "ImgNet": 1000}
IMAGENET_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

# Mean and deviation of red, green and blue in [0, 1]. The original normalizes CIFAR for R32_C10
# alone; its checkpoints depend on it.
R32_C10_STATISTICS = (
    tuple(x / 255 for x in (125.3, 123.0, 113.9)),
    tuple(x / 255 for x in (63.0, 62.1, 66.7)),
)
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ModelName(NamedTuple):
    """A model name taken apart."""

    depth: int
    dataset: str
    layer_config: tuple[int, ...]  # blocks per segment
    num_classes: int
    image_size: int  # pixels


def parse_model(model: str) -> ModelName:
    """Take a model name `R<depth>_<dataset>` apart. ValueError, saying what is allowed, for others.

    >>> parse_model("R110_C10").layer_config
    (18, 18, 18)
    """
    match = re.fullmatch(r"R([1-9]\d*)_([A-Za-z0-9]+)", str(model))
    depth, dataset = (int(match[1]), match[2]) if match else (0, "")
    if dataset == "ImgNet" and depth in IMAGENET_LAYERS:
        return ModelName(depth, dataset, IMAGENET_LAYERS[depth], NUM_CLASSES[dataset], 224)
    if dataset in ("C10", "C100", "SYN") and depth >= 8 and depth % 6 == 2:
        return ModelName(depth, dataset, ((depth - 2) // 6,) * 3, NUM_CLASSES[dataset], 32)
    raise ValueError(
        f"unknown model {model!r}: expected R<depth>_<dataset>, with depth 8, 14, 20, 32, ... 110 "
        "(6n+2) for the datasets C10, C100 and SYN, and depth 50, 101 or 152 for ImgNet"
    )


def build_model(model: str) -> tuple[FlatResNet, Policy]:
    """Return the untrained ResNet and policy network of a model name. ValueError for others."""
    name = parse_model(model)
    num_blocks = sum(name.layer_config)
    if name.dataset == "ImgNet":
        rnet = FlatResNet224(Bottleneck, name.layer_config, name.num_classes)
        agent = Policy224(num_blocks=num_blocks)
    else:
        rnet = FlatResNet32(BasicBlock, name.layer_config, name.num_classes)
        agent = Policy32(num_blocks=num_blocks)
    rnet.model = agent.model = model  # so that weights of another model are not taken for its own
    return rnet, agent


def get_model(
    model: str, device: torch.device | str, cv_dir: str | os.PathLike = "cv"
) -> tuple[FlatResNet, Policy]:
    """Return the ResNet with its standard weights and its untrained policy network, on `device`.

    See `load_standard_weights`; for ImgNet, the policy network starts from torchvision's ResNet-18.
    FileNotFoundError without a file, RuntimeError where torchvision's weights can't be fetched,
    CheckpointError for a wrong file.
    """
    rnet, agent = build_model(model)
    load_standard_weights(model, rnet, cv_dir)
    if isinstance(agent, Policy224):
        load_weights_to_flatresnet(_torchvision_weights("ResNet18"), agent.features)
    return rnet.to(device), agent.to(device)


def load_standard_weights(model: str, rnet: FlatResNet, cv_dir: str | os.PathLike = "cv") -> dict:
    """Load a model name's standard weights into `rnet`; return what else their file holds.

    They are the newest `pk_*.t7` in `<cv_dir>/trained_rnet/<model>/`; for ImgNet without one,
    torchvision's. Errors as in `get_model`.
    """
    folder = Path(cv_dir) / "trained_rnet" / model
    name = parse_model(model)
    if name.dataset == "ImgNet" and not any(folder.glob("pk_*.t7")):
        load_weights_to_flatresnet(_torchvision_weights(f"ResNet{name.depth}"), rnet)
        return {}
    hint = f"run rnet_sole.ipynb with model = {model!r} first"
    return load_checkpoint(newest_checkpoint(folder, "pk_", hint), rnet)


def _torchvision_weights(architecture: str) -> Mapping[str, Tensor]:
    """Fetch torchvision's first ImageNet weights, as the original used, of e.g. `ResNet101`."""
    weights = torchvision.models.get_model_weights(architecture.lower()).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise RuntimeError(
            f"torchvision's {architecture} weights could not be fetched from {weights.url} "
            f"({error}): connect to the network, or put that file into {cache}"
        ) from error


# ----------------------------------------------------------------------------------------- data


class Images(Dataset):
    """Small images held in memory as bytes; augmented, scaled and normalized when they are read.

    `images`: (N, 3, H, W) uint8. `labels`: (N,) int64. `difficulty`: (N,) float32, or None where
    it is not known. `statistics`: mean and deviation per channel. With `augment`, reading pads by
    4 black pixels, crops at random to the old size and flips every second image.
    """

    PADDING = 4  # pixels

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
        difficulty: Tensor | None = None,
        augment: bool = False,
    ):
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.difficulty, self.augment = difficulty, augment
        self.mean, self.std = (
            torch.tensor(s, dtype=torch.float32).view(1, 3, 1, 1)
            for s in statistics or ((0, 0, 0), (1, 1, 1))
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image (3, H, W) float32 and its label."""
        inputs, labels = self.read(torch.tensor([index], device=self.images.device))
        return inputs[0], labels.item()

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, H, W) float32, channels last, and labels (n,), on their device."""
        images = self.images[indices]
        if self.augment:
            images = self._random_crop_and_flip(images)
        inputs = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return inputs.sub_(self.mean).div_(self.std), self.labels[indices]

    def _random_crop_and_flip(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        padded = F.pad(images, [self.PADDING] * 4)
        # The numbers are drawn on the CPU, so that every device sees the same augmentation.
        top, left = torch.randint(2 * self.PADDING + 1, (2, n, 1)).to(images.device)
        flip = (torch.rand(n, 1) < 0.5).to(images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = left + torch.where(flip, columns.flip(0), columns)
        each = torch.arange(n, device=images.device)[:, None, None]
        crops = padded[each, :, rows[:, :, None], columns[:, None, :]]  # (n, H, W, 3)
        return crops.permute(0, 3, 1, 2)

    def subset(self, indices: Tensor, augment: bool | None = None) -> "Images":
        """Return the images at `indices` (n,), with augmentation as here or as told."""
        part = copy.copy(self)
        part.images, part.labels = self.images[indices], self.labels[indices]
        if self.difficulty is not None:
            part.difficulty = self.difficulty[indices]
        part.augment = self.augment if augment is None else augment
        return part

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on `device`."""
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def get_dataset(
    model: str, root: str | os.PathLike = "data/", max_images: int | None = None
) -> tuple[Dataset, Dataset]:
    """Return the training set (augmented) and the test set of a model name.

    CIFAR is downloaded to `root` if absent, SYN drawn and kept there; ImgNet is read from
    `root/train/` and `root/val/`, a folder per class. With `max_images`, both are cut to so many
    images, CIFAR and SYN to their first ones, ImgNet to some of all classes. ValueError for an
    unknown model or a limit below 1, FileNotFoundError for missing data that can't be had.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}, expected 1 or more, or None for all")
    name = parse_model(model)
    root = Path(root)
    if name.dataset == "ImgNet":
        datasets = _imagenet(root)
    elif name.dataset == "SYN":
        datasets = [_syn(root, train) for train in (True, False)]
    else:
        statistics = R32_C10_STATISTICS if model == "R32_C10" else None
        datasets = [_cifar(name.dataset, root, train, statistics) for train in (True, False)]
    if max_images is not None:
        for dataset in datasets:
            _limit(dataset, max_images)
    trainset, testset = datasets
    return trainset, testset


def _limit(dataset: Dataset, max_images: int) -> None:
    """Cut a data set to so many images."""
    if isinstance(dataset, Images):
        dataset.images, dataset.labels = dataset.images[:max_images], dataset.labels[:max_images]
        if dataset.difficulty is not None:
            dataset.difficulty = dataset.difficulty[:max_images]
    else:  # an ImageFolder, sorted by class
        step = max(1, len(dataset.samples) // max_images)
        dataset.samples = dataset.samples[::step][:max_images]


def _cifar(dataset: str, root: Path, train: bool, statistics) -> Images:
    cifar = {"C10": torchvision.datasets.CIFAR10, "C100": torchvision.datasets.CIFAR100}[dataset]
    try:
        data = cifar(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{cifar.__name__} is not in {root} and could not be downloaded ({error}): connect to "
            f"the network, or unpack {cifar.url.rsplit('/', 1)[-1]} into {root}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(data.targets), data.classes, statistics, augment=train)


def _syn(root: Path, train: bool) -> Images:
    num_images, seed = (syn.NUM_TRAIN, syn.SEED) if train else (syn.NUM_TEST, syn.SEED + 1)
    path = root / f"syn-v{syn.VERSION}" / ("train.npz" if train else "test.npz")
    try:
        with np.load(path) as file:
            drawing = syn.Drawing(**file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):  # absent or damaged
        drawing = syn.draw(num_images, seed)
        _keep_drawing(path, drawing)
    images, labels, difficulty = map(torch.from_numpy, drawing)
    return Images(images, labels, syn.CLASSES, difficulty=difficulty, augment=train)


def _keep_drawing(path: Path, drawing: syn.Drawing) -> None:
    """Keep a drawing for the next time; where that fails, it will be drawn again."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **drawing._asdict())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _imagenet(root: Path) -> list[Dataset]:
    normalize = [transforms.ToTensor(), transforms.Normalize(*IMAGENET_STATISTICS)]
    train = [transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
    test = [transforms.Resize(256), transforms.CenterCrop(224)]
    datasets = []
    for folder, transform in (("train", train), ("val", test)):
        path = root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path}: ImageNet is expected as {root / 'train'} and "
                f"{root / 'val'}, each with a folder of images per class"
            )
        transform = transforms.Compose(transform + normalize)
        dataset = torchvision.datasets.ImageFolder(path, transform)
        if len(dataset.classes) != NUM_CLASSES["ImgNet"]:
            raise ValueError(
                f"{path} has {len(dataset.classes)} class folders, expected ImageNet's "
                f"{NUM_CLASSES['ImgNet']}"
            )
        datasets.append(dataset)
    if datasets[0].classes != datasets[1].classes:
        raise ValueError(f"{root / 'train'} and {root / 'val'} don't have the same class folders")
    return datasets


def hold_out(trainset: Dataset, testset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Split `share` of the training images off, for tuning and selection; read them as test images.

    Which ones is drawn once and for all, the same in every run and notebook. Returns the remaining
    training set and the held-out set. ValueError for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"holdout is {share}, expected a share between 0 and 1, such as 0.1")
    indices = torch.randperm(len(trainset), generator=torch.Generator().manual_seed(0))
    num_val = round(share * len(trainset))
    if not 0 < num_val < len(trainset):
        raise ValueError(
            f"holdout {share} of {len(trainset)} training images leaves one part empty: "
            "use more images or another share"
        )
    val, train = indices[:num_val], indices[num_val:]
    if isinstance(trainset, Images):
        return trainset.subset(train), trainset.subset(val, augment=False)
    plain = copy.copy(trainset)
    plain.transform = testset.transform
    return Subset(trainset, train.tolist()), Subset(plain, val.tolist())


class Loader:
    """Batches of a data set on the device: inputs (n, 3, H, W), channels last, and labels (n,).

    Small images (`Images`) lie on the device whole, in bytes, and are prepared there; others come
    from `workers` processes. With `shuffle`, each pass is in a new order, drawn from PyTorch's
    generator. The last batch holds what is left. ValueError for a batch size below 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        device: torch.device | str,
        shuffle: bool = False,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 image or more")
        self.device, self.batch_size, self.shuffle = torch.device(device), batch_size, shuffle
        self.images = dataset.to(device) if isinstance(dataset, Images) else None
        self.num_images = len(dataset)
        if self.images is None:
            self.loader = DataLoader(
                dataset,
                batch_size,
                shuffle=shuffle,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
            )

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images is None:
            for inputs, labels in self.loader:
                inputs = inputs.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield inputs, labels.to(self.device, non_blocking=True)
            return
        order = torch.randperm(self.num_images) if self.shuffle else torch.arange(self.num_images)
        for indices in order.to(self.device).split(self.batch_size):
            yield self.images.read(indices)


# ------------------------------------------------------------------------------ machine and time


def choose_device(device: str = "auto") -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is some, else the CPU.

    RuntimeError for a device that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
        usable = torch.device(device).type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise RuntimeError(
            f'device {str(device)!r} can\'t be used here: choose "auto", "cpu", or "cuda" on a '
            "machine with a CUDA GPU and a PyTorch built for it"
        )
    return torch.device(device)


def choose_precision(
    precision: str, device: torch.device, allowed: Sequence[str] = ("fp32", "bf16")
) -> str:
    """Return the precision that is asked for; for "auto", the faster one of fp32 and bf16 on the device.

    That is bf16 on CUDA GPUs and CPUs that have instructions for it. ValueError for one that is not
    among the `allowed`.
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


def seed_everything(seed: int, *more: int) -> None:
    """Seed PyTorch on all devices from `seed` and, say, an epoch: other numbers, other sequence."""
    digest = hashlib.sha256(repr((seed, *more)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


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
    """Seconds of one call: median and quartiles, and over how many calls."""

    median: float
    low: float
    high: float
    calls: int


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
        timer.timeit(1)
        number[name] = max(1, round(seconds / rounds / timer.timeit(1)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number[name]) / number[name])
    return {
        name: Time(*(float(np.quantile(times[name], q)) for q in (0.5, 0.25, 0.75)), rounds * number[name])
        for name in timers
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


def check(name: str, value: float, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Check that a setting lies from `low` up to but without `high`. ValueError saying so if not."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (number and low <= value < high):
        kind = "a whole number" if whole else "a number"
        limit = f" and below {high}" if high < math.inf else ""
        raise ValueError(f"{name} is {value!r}, expected {kind}, {low} or more{limit}")


# --------------------------------------------------------------------------------- training runs


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


class TrainingRun:
    """The bookkeeping of a training: resuming, history, TensorBoard curves, seconds.

        line = "Epoch: {epoch} - Loss: {loss:.3f}"
        run = TrainingRun(folder, settings, {"agent": agent}, {"optimizer": optimizer}, epochs, line)
        for epoch in run:
            for inputs, labels in run.batches(trainloader):
                ...
            run.end_epoch(epoch, loss=..., accuracy=...)

    After every epoch `folder/last.t7` holds all that the next one needs. A new run with the same
    settings goes on from there, to the same result as one that was never interrupted: the random
    generators are seeded anew, from seed and epoch, as each epoch starts. A finished run of the
    same settings has no epochs left; one of other settings is replaced by the new run.
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
    ):
        """`settings`: what decides the result, as plain values, `seed` among them. `networks`: what
        is trained, under the names `resnet` and `agent`. `progress`: optimizers and schedulers.
        `line`: what is printed of an epoch, a format string of the figures in the history.
        `seconds`: what the training took that this one builds on.

        ValueError for an unfinished run of other settings in `folder`: it would be lost.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}, expected 1 or more")
        self.folder, self.epochs, self.line = Path(folder), epochs, line
        self.settings = dict(settings) | {"epochs": epochs}
        self.networks, self.progress = dict(networks), dict(progress)
        self.history: list[dict[str, float]] = []
        self.seconds = seconds
        self.last = self.folder / "last.t7"
        if resume and self.last.is_file():
            self._resume()

    def _resume(self) -> None:
        state = read_checkpoint(self.last)
        if not {"history", "settings", "seconds", *self.progress} <= state.keys():
            raise CheckpointError(
                f"{self.last} is not the state of a run like this one: move it away, or set resume = False"
            )
        before = state["settings"]
        changed = [
            f"{key} {before.get(key)!r} -> {self.settings.get(key)!r}"
            for key in sorted(before.keys() | self.settings.keys())
            if before.get(key) != self.settings.get(key)
        ]
        if changed and len(state["history"]) < before["epochs"]:
            raise ValueError(
                f"{self.last} holds an unfinished run of other settings ({', '.join(changed)}): "
                "set them back to go on with it, or move it away or set resume = False to start afresh"
            )
        if changed:
            print(f"Settings changed since the last run ({', '.join(changed)}): starting afresh")
            return
        load_checkpoint(self.last, self.networks.get("resnet"), self.networks.get("agent"))
        self.history, self.seconds = state["history"], state["seconds"]
        left = self.epochs - len(self.history)
        if left:
            for name, part in self.progress.items():
                part.load_state_dict(state[name])
        print(f"Resumed from {self.last}: {len(self.history)} epochs done, {left} to go")
        for row in self.history:
            print(self.line.format(**row))

    def __iter__(self) -> Iterator[int]:
        """Yield the epochs that are left, counted from 0, under one progress bar."""
        done = len(self.history)
        if done == self.epochs:
            return
        layout = "{l_bar}{bar}| {n:.2f}/{total_fmt} epochs [{elapsed}<{remaining}]"
        with (
            tqdm(total=self.epochs, initial=done, bar_format=layout) as self.bar,
            tensorboardX.SummaryWriter(str(self.folder / "tensorboard"), purge_step=done) as self.writer,
        ):
            for epoch in range(done, self.epochs):
                seed_everything(self.settings["seed"], epoch)
                self.started = time.perf_counter()
                yield epoch
                self.bar.n = epoch + 1
                self.bar.refresh()

    def batches(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the loader's batches; the progress bar moves along."""
        for batch in loader:
            yield batch
            self.bar.update(1 / len(loader))

    def end_epoch(self, epoch: int, **figures: float | Sequence[float]) -> None:
        """Record an epoch's figures in history and TensorBoard, save the state, print the line.

        A figure is a number, or a number for each block.
        """
        self.seconds += time.perf_counter() - self.started
        self.history.append({"epoch": epoch, **figures, "seconds": self.seconds})
        for name, value in figures.items():
            if isinstance(value, Sequence):
                for block, part in enumerate(value):
                    self.writer.add_scalar(f"{name}/{block}", part, epoch)
            else:
                self.writer.add_scalar(name, value, epoch)
        parts = {name: part.state_dict() for name, part in self.progress.items()}
        save_checkpoint(self.last, self.state() | parts)
        print(self.line.format(**self.history[-1]))

    def state(self) -> dict:
        """Return what a checkpoint of this run should hold: weights, history, settings, seconds, machine."""
        return {name: network.state_dict() for name, network in self.networks.items()} | {
            "epoch": len(self.history),
            "history": self.history,
            "settings": self.settings,
            "seconds": self.seconds,
            "machine": machine(next(next(iter(self.networks.values())).parameters()).device),
        }


# ------------------------------------------------------------------------------------ statistics


def performance_stats(
    policies: Sequence[Tensor], rewards: Sequence[Tensor], matches: Sequence[Tensor]
) -> tuple[float, float, float, float, set[str]]:
    """Summarize batches of policies (n, K), rewards (n,) or (n, 1), and matches (n,) of 0 and 1.

    Returns accuracy in [0, 1], mean reward, sparsity (mean number of blocks kept), variance (its
    standard deviation, under the original's name) and the set of distinct policies as strings of
    0 and 1. Source: the original's `utils.py`.
    """
    policies = torch.cat(list(policies))
    kept = policies.sum(1, dtype=torch.float32)
    return (
        torch.cat(list(matches)).mean(dtype=torch.float32).item(),
        torch.cat(list(rewards)).mean(dtype=torch.float32).item(),
        kept.mean().item(),
        kept.std(correction=min(1, len(kept) - 1)).item(),
        {"".join(map(str, policy)) for policy in policies.int().unique(dim=0).tolist()},
    )


def policy_filename(
    epochs: int, accuracy: float, reward: float, sparsity: float, variance: float, policy_set: set[str]
) -> str:
    """Return the file name of a policy or finetuned pair, as the original names them."""
    figures = f"A_{accuracy:.3f}_R_{reward:.2E}_S_{sparsity:.2f}_#_{len(policy_set)}"
    return f"ckpt_E_{epochs}_{figures}.t7"


def fingerprint(*networks: nn.Module) -> str:
    """Return 12 hexadecimal digits that tell networks with other weights apart."""
    digest = hashlib.sha256()
    for network in networks:
        for key, value in network.state_dict().items():
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def count_flops(
    rnet: FlatResNet,
    policies: Tensor | None = None,
    agent: Policy | None = None,
    image_size: int = 32,
) -> Tensor:
    """Return the FLOPs per image (N,), float64, of the ResNet under policies (N, K).

    2 per multiply-add of convolutions and linear layers, as in the original. Without policies all
    blocks are kept (N = 1); with an `agent`, its FLOPs are added. `image_size` in pixels.
    """
    image = torch.zeros(1, 3, image_size, image_size)

    def flops(function: Callable[[Tensor], object], x: Tensor) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = function(x)
        return counter.get_total_flops(), y

    counted = copy.deepcopy(rnet).eval().float().cpu()
    always, x = flops(counted.seed, image)
    per_block = []
    for shortcut, block in counted.shortcuts_and_blocks():
        cost, residual = flops(shortcut, x)
        always += cost
        per_block.append(flops(block, x)[0])
        x = residual
    always += flops(counted.classify, x)[0]
    if agent is not None:
        always += flops(copy.deepcopy(agent).eval().float().cpu(), image)[0]
    if policies is None:
        policies = torch.ones(1, rnet.num_blocks)
    return always + policies.double() @ torch.tensor(per_block).double().to(policies.device)
