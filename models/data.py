"""Data sets and their batches: small images on the device in bytes, large ones by worker processes."""

import contextlib
import copy
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import transforms
from torchvision.datasets.utils import check_integrity

from models import syn
from models.distributed import first_goes_first, num_processes, rank
from models.names import NUM_CLASSES, parse_model

# Mean and deviation of red, green and blue in [0, 1]. The original normalizes CIFAR for R32_C10
# alone; its checkpoints depend on it.
R32_C10_STATISTICS = (
    tuple(x / 255 for x in (125.3, 123.0, 113.9)),
    tuple(x / 255 for x in (63.0, 62.1, 66.7)),
)
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224  # pixels
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Images(Dataset):
    """Small images held in memory as bytes; augmented, scaled and normalized when they are read.

    `images`: (N, 3, H, W) uint8. `labels`: (N,) int64. `difficulty`: (N,) float32, or None where
    it is not known. `statistics`: mean and deviation per channel. With `augment`, reading pads by
    4 black pixels, crops at random to the old size and flips with probability 1/2.
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

    def read(
        self, indices: Tensor, share: slice = slice(None), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, H, W) float32, channels last, and labels (n,), on their device.

        `share`: the part of the batch `indices` to be read; it is augmented as in the whole batch.
        """
        numbers = self._draw(len(indices), generator) if self.augment else ()
        indices = indices[share]
        images = self.images[indices]
        if self.augment:
            images = self._crop_and_flip(images, *(n[share].to(images.device) for n in numbers))
        inputs = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return inputs.sub_(self.mean).div_(self.std), self.labels[indices]

    def _draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw top and left of n crops, and whether to flip: on the CPU, the same for every device."""
        top, left = torch.randint(2 * self.PADDING + 1, (2, n, 1), generator=generator)
        return top, left, torch.rand(n, 1, generator=generator) < 0.5

    def _crop_and_flip(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        n, _, height, width = images.shape
        padded = F.pad(images, [self.PADDING] * 4)
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
    else:
        with first_goes_first():  # it downloads or draws
            if name.dataset == "SYN":
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
        samples = dataset.samples
        number = min(max_images, len(samples))
        dataset.samples = [samples[i * len(samples) // number] for i in range(number)]


def _cifar(dataset: str, root: Path, train: bool, statistics) -> Images:
    cifar = {"C10": torchvision.datasets.CIFAR10, "C100": torchvision.datasets.CIFAR100}[dataset]
    try:
        data = cifar(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{_what_is_wrong(cifar, root)} and could not be downloaded ({error}): connect to "
            f"the network, or unpack {cifar.url.rsplit('/', 1)[-1]} into {root}"
        ) from error
    last = NUM_CLASSES[dataset] - 1
    for index, label in enumerate(data.targets):
        if not 0 <= label <= last:
            files = cifar.train_list if train else cifar.test_list  # of equal size
            path = root / cifar.base_folder / files[index * len(files) // len(data.targets)][0]
            raise ValueError(f"{path} has the label {label}, outside 0 to {last}: get the file again")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(data.targets), data.classes, statistics, augment=train)


def _what_is_wrong(cifar: type[torchvision.datasets.CIFAR10], root: Path) -> str:
    """Name the first file of CIFAR that is missing or not the official one."""
    folder = root / cifar.base_folder
    if not folder.is_dir():
        return f"{cifar.__name__} is not in {root}"
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    for name, md5 in files:
        if not check_integrity(folder / name, md5):
            return f"{folder / name} is {'damaged' if (folder / name).exists() else 'missing'}"
    return f"{folder} can't be read"


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
        with contextlib.suppress(OSError):
            temporary.unlink()


def _imagenet(root: Path) -> list[Dataset]:
    normalize = [transforms.ToTensor(), transforms.Normalize(*IMAGENET_STATISTICS)]
    resize = transforms.Resize(IMAGENET_RESIZE)
    train = [resize, transforms.RandomCrop(IMAGENET_CROP), transforms.RandomHorizontalFlip()]
    test = [resize, transforms.CenterCrop(IMAGENET_CROP)]
    datasets = []
    for folder, transform in (("train", train), ("val", test)):
        path = root / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path}: ImageNet is expected as {root / 'train'} and "
                f"{root / 'val'}, each with a folder of images per class"
            )
        transform = transforms.Compose(transform + normalize)
        try:
            dataset = torchvision.datasets.ImageFolder(path, transform, loader=_read_rgb)
        except FileNotFoundError as error:  # no folder in it, or one without images
            raise FileNotFoundError(f"{error}: expected a folder of images per class in {path}") from error
        if len(dataset.classes) != NUM_CLASSES["ImgNet"]:
            raise ValueError(
                f"{path} has {len(dataset.classes)} class folders, expected ImageNet's "
                f"{NUM_CLASSES['ImgNet']}"
            )
        datasets.append(dataset)
    if datasets[0].classes != datasets[1].classes:
        raise ValueError(f"{root / 'train'} and {root / 'val'} don't have the same class folders")
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    for dataset in datasets:
        if len(dataset.classes) == len(names):  # the folders are called n01440764 and so on
            dataset.classes = list(names)
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


def pixels_and_input(dataset: Dataset, source: int | str | os.PathLike) -> tuple[Tensor, Tensor]:
    """Return an image as pixels (H, W, 3) in bytes and as a network's input (3, H, W).

    `source`: its number in the data set, or a file, which is scaled and cut to the data set's size.
    IndexError without that number, FileNotFoundError without the file, ValueError if it is no image.
    """
    if isinstance(dataset, Images):
        if isinstance(source, int):
            shown = dataset.images[source].permute(1, 2, 0)
        else:
            size = dataset.images.shape[-1]
            fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
            shown = torch.from_numpy(np.array(fit(_read_rgb(source))))
        inputs = shown.permute(2, 0, 1).float().div(255)
        return shown, (inputs - dataset.mean[0]) / dataset.std[0]
    path = dataset.samples[source][0] if isinstance(source, int) else source
    resize, crop, *to_input = dataset.transform.transforms
    image = crop(resize(_read_rgb(path)))
    return torch.from_numpy(np.array(image)), transforms.Compose(to_input)(image)


def _read_rgb(path: str | os.PathLike) -> Image.Image:
    try:
        return torchvision.datasets.folder.pil_loader(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error


class Loader:
    """Batches of a data set on the device: inputs (n, 3, H, W), channels last, and labels (n,).

    Small images (`Images`) lie on the device whole, in bytes, and are prepared there; others come
    from `workers` processes. With `shuffle`, each pass is in a new order, drawn from `generator`,
    as the small images' augmentation is. The last batch holds what is left.

    Where several processes train together, `batch_size` and length mean all of them, and each gets
    its share of every batch. ValueError for a batch size below 1 or, with `shuffle`, one that can't
    be shared.
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
        self.num_images = len(dataset)
        self.generator = torch.Generator()
        self.share = slice(rank(), None, num_processes())
        if shuffle:
            self._check_shares()
        self.images = dataset.to(device) if isinstance(dataset, Images) else None
        if self.images is None:
            self.loader = DataLoader(
                dataset,
                batch_sampler=_Shares(self),
                collate_fn=_collate,
                num_workers=min(workers, _num_cores()),
                pin_memory=self.device.type == "cuda",
            )

    def _check_shares(self) -> None:
        n = num_processes()
        if self.batch_size % n:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {n} processes can't share evenly: "
                f"choose a multiple of {n}"
            )
        if 0 < (last := self.num_images % self.batch_size) < n:
            raise ValueError(
                f"the last batch of {self.num_images} images has {last}, too few for {n} processes: "
                "choose another batch_size or holdout"
            )

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def batches(self) -> Sequence[Tensor]:
        """Return the indices (n,) of all batches of a pass, the shares of all processes together."""
        if self.shuffle:
            order = torch.randperm(self.num_images, generator=self.generator)
        else:
            order = torch.arange(self.num_images)
        return order.split(self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images is None:
            for inputs, labels in self.loader:
                inputs = inputs.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield inputs, labels.to(self.device, non_blocking=True)
            return
        for indices in self.batches():
            yield self.images.read(indices.to(self.device), self.share, self.generator)


def crop_share(epoch: int, epochs: int, small_crops: float) -> float:
    """Return the share of the images' width that an epoch trains on, of `epochs` counted from 0.

    3/4 in the first ones, a share `small_crops` of all, which saves 7/16 of the FLOPs; then the whole.
    Idea: Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019.
    """
    return 0.75 if epoch < share_of(epochs, small_crops) else 1


def share_of(epochs: int, share: float) -> int:
    """Return how many epochs a share of them is, rounded down: 29 for 0.29 of 100, though 0.29 * 100 < 29."""
    return int(share * epochs + 1e-9)


def random_crop(images: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a crop of images (n, 3, H, W), `share` of their width and height, at one random place."""
    height, width = images.shape[2:]
    rows, columns = round(share * height), round(share * width)
    top = torch.randint(height - rows + 1, (), generator=generator)
    left = torch.randint(width - columns + 1, (), generator=generator)
    crop = images[:, :, top : top + rows, left : left + columns]
    return crop.contiguous(memory_format=torch.channels_last)


def _num_cores() -> int:
    """Return the number of cores that this process may use; more workers only slow each other down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collate(images: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Join images of ImageNet to a batch; a process's share of the last one may be empty."""
    if not images:
        return torch.empty(0, 3, IMAGENET_CROP, IMAGENET_CROP), torch.empty(0, dtype=torch.int64)
    return default_collate(images)


class _Shares:
    """A process's share of a loader's batches, as lists of indices for a DataLoader."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.loader.batches():
            yield indices[self.loader.share].tolist()

    def __len__(self) -> int:
        return len(self.loader)
