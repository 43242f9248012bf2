"""Data sets and their batches: small images on the device in bytes, large ones by worker processes."""

import contextlib
import copy
import functools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets.utils import check_integrity

from models.lab import syn
from models.lab.distributed import first_goes_first, num_processes, rank
from models.lab.files import explained, written_whole
from models.lab.names import NUM_CLASSES, parse_model

# Mean and deviation of red, green and blue in [0, 1]. The original normalizes CIFAR for R32_C10 alone.
R32_C10_STATISTICS = np.divide(((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)), 255).tolist()
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224  # pixels
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HOLDOUT = 0.1  # share of the training images that is kept out of training, to tune and choose by
WORKERS = 4  # processes that read ImageNet's files; another number draws other crops


class Images(Dataset):
    """Small images held in memory as bytes; augmented, scaled and normalized when they are read.

    `images`: (N, 3, H, W) uint8. `labels`: (N,) int64. `difficulty`: (N,) float32, None where it is unknown.
    `statistics`: mean and deviation per channel. `augment`: whether reading crops at random, after padding
    with black, and flips. `transform`: from a picture of any size to an input that is not augmented.
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
        mean, std = statistics or ((0, 0, 0), (1, 1, 1))
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
        fit = [transforms.Resize(images.shape[-1]), transforms.CenterCrop(images.shape[-1])]
        self.transform = transforms.Compose([*fit, transforms.ToTensor(), transforms.Normalize(mean, std)])

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
        images, labels = self.images[indices[share]], self.labels[indices[share]]
        if self.augment:  # drawn on the CPU: the same for every device
            places = torch.randint(2 * self.PADDING + 1, (2, len(indices)), generator=generator)
            flip = torch.rand(len(indices), 1, 1, 1, generator=generator) < 0.5
            top, left, flip = (x[share].to(images.device, non_blocking=True) for x in (*places, flip))
            height, width = images.shape[2:]
            windows = F.pad(images, [self.PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
            crops = windows[torch.arange(len(images), device=images.device), :, top, left]
            images = torch.where(flip, crops.flip(3), crops)
        inputs = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return inputs.sub_(self.mean).div_(self.std), labels

    def subset(self, indices: Tensor | slice, augment: bool) -> "Images":
        """Return the images at `indices` (n,)."""
        part = copy.copy(self)
        part.images, part.labels, part.augment = self.images[indices], self.labels[indices], augment
        if self.difficulty is not None:
            part.difficulty = self.difficulty[indices]
        return part

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on `device`."""
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def get_dataset(
    model: str, root: str | Path = "data/", max_images: int | None = None
) -> tuple[Dataset, Dataset]:
    """Return the training set (augmented) and the test set of a model name.

    CIFAR is downloaded to `root` if absent, SYN drawn and kept there; ImgNet is read from
    `root/train/` and `root/val/`, a folder per class. `max_images`: use so many images of both, the first
    ones of CIFAR and SYN, some of all classes of ImgNet. ValueError for an unknown model or no images,
    FileNotFoundError for missing data that can't be had, RuntimeError where `root` can't be written to.
    """
    root = Path(root).expanduser()
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}: expected 1 or more, or None")
    by_name = {"ImgNet": _imagenet, "SYN": _syn}
    read = by_name.get(parse_model(model).dataset, functools.partial(_cifar, model))
    with first_goes_first():  # it downloads or draws
        datasets = [read(root, train) for train in (True, False)]
    train_classes, test_classes = (getattr(dataset, "class_to_idx", {}).keys() for dataset in datasets)
    if alone := train_classes ^ test_classes:
        raise ValueError(f"the class folder {min(alone)} is in one of train/ and val/ alone, under {root}")
    trainset, testset = datasets if max_images is None else (_first(d, max_images) for d in datasets)
    return trainset, testset


def _first(dataset: Dataset, max_images: int) -> Dataset:
    """Return a data set cut to so many images."""
    if isinstance(dataset, Images):
        return dataset.subset(slice(max_images), dataset.augment)
    number, samples = min(max_images, len(dataset)), dataset.samples  # sorted by class
    dataset.samples = [samples[i * len(samples) // number] for i in range(number)]
    return dataset


def _cifar(model: str, root: Path, train: bool) -> Images:
    images, labels, classes = _read_cifar(parse_model(model).dataset, root, train)
    return Images(images, labels, classes, R32_C10_STATISTICS if model == "R32_C10" else None, augment=train)


@functools.lru_cache(maxsize=2)  # training and test images: reading them takes a second, networks share them
def _read_cifar(dataset: str, root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    cifar = torchvision.datasets.CIFAR100 if dataset == "C100" else torchvision.datasets.CIFAR10
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        data = cifar(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
        paths = ((root / cifar.base_folder / name, md5) for name, md5 in files)
        bad = next((path for path, md5 in paths if not check_integrity(path, md5)), root)
        raise FileNotFoundError(
            f"{bad} is missing or damaged and could not be downloaded ({error}): connect to "
            f"the network, or unpack {cifar.url.rsplit('/', 1)[-1]} into {root}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets), data.classes


def _syn(root: Path, train: bool) -> Images:
    num_images, seed = (syn.NUM_TRAIN, syn.SEED) if train else (syn.NUM_TEST, syn.SEED + 1)
    path = root / f"syn-v{syn.VERSION}" / ("train.npz" if train else "test.npz")
    try:
        with np.load(path) as file:
            drawing = syn.Drawing(**file)
    except Exception:  # absent, or damaged, which fails in many ways
        drawing = syn.draw(num_images, seed)
        with contextlib.suppress(RuntimeError), written_whole(path) as file:  # else it is drawn again
            np.savez(file, **drawing._asdict())
    images, labels, difficulty = map(torch.from_numpy, drawing)
    return Images(images, labels, syn.CLASSES, difficulty=difficulty, augment=train)


def _imagenet(root: Path, train: bool) -> Dataset:
    augment = [transforms.RandomCrop(IMAGENET_CROP), transforms.RandomHorizontalFlip()]
    crop = augment if train else [transforms.CenterCrop(IMAGENET_CROP)]
    to_input = [transforms.ToTensor(), transforms.Normalize(*IMAGENET_STATISTICS)]
    transform = transforms.Compose([transforms.Resize(IMAGENET_RESIZE), *crop, *to_input])
    folder = root / ("train" if train else "val")
    try:
        dataset = torchvision.datasets.ImageFolder(folder, transform, loader=_read)
    except FileNotFoundError as error:  # no such folder, no folder in it, or one without images
        expected = f"{root / 'train'} and {root / 'val'} are to have a folder of ImageNet's images per class"
        raise FileNotFoundError(f"{error}: {expected}") from error
    if len(dataset.classes) != NUM_CLASSES["ImgNet"]:
        raise ValueError(f"{folder} has {len(dataset.classes)} class folders, expected ImageNet's 1000")
    # The folders are called n01440764 and so on.
    dataset.classes = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return dataset


def split(
    model: str, root: str | Path = "data/", max_images: int | None = None
) -> tuple[Dataset, Dataset, Dataset]:
    """Return a model's training, held-out and test images; errors as in `get_dataset`.

    The held-out images are a share `HOLDOUT` of the training set, drawn once and for all: the same in every
    run and notebook. They are read as test images are.
    """
    trainset, testset = get_dataset(model, root, max_images)
    indices = torch.randperm(len(trainset), generator=torch.Generator().manual_seed(0))
    num_val = round(HOLDOUT * len(trainset))
    if num_val == 0:
        raise ValueError(f"{len(trainset)} training images are too few to hold a tenth out: raise max_images")
    val, train = indices[:num_val], indices[num_val:]
    if isinstance(trainset, Images):
        return trainset.subset(train, augment=True), trainset.subset(val, augment=False), testset
    plain = copy.copy(trainset)
    plain.transform = testset.transform
    return Subset(trainset, train.tolist()), Subset(plain, val.tolist()), testset


def test_batch_size(model: str) -> int:
    """Return how many images a batch has in tests, where its size does not change the result."""
    return 100 if parse_model(model).dataset == "ImgNet" else 1000


def pixels_and_input(dataset: Dataset, source: int | str | Path) -> tuple[Tensor, Tensor]:
    """Return an image as pixels (H, W, 3) in bytes and as a network's input (3, H, W).

    `source`: its number in the data set, or a file, which is scaled and cut to the data set's size.
    IndexError without that number, FileNotFoundError without the file, ValueError if it is no image.
    """
    if not isinstance(source, int):
        image = _read(source, _as_shown)
    elif isinstance(dataset, Images):
        image = Image.fromarray(dataset.images[source].permute(1, 2, 0).numpy())
    else:
        image = _read(dataset.samples[source][0])
    resize, crop, *to_input = dataset.transform.transforms
    image = crop(resize(image))
    return torch.from_numpy(np.array(image)), transforms.Compose(to_input)(image)


def _as_shown(path: str | Path) -> Image.Image:
    """Read a picture file as an image viewer shows it: upright, transparent parts white, 16 bits as 8."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its values are fractions, save it with 8 or 16 bits per color")
        if image.mode.startswith("I"):
            image = Image.fromarray(np.uint8(np.rint(np.asarray(image) / 257).clip(0, 255)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _read(
    path: str | Path, reader: Callable[..., Image.Image] = torchvision.datasets.folder.pil_loader
) -> Image.Image:
    """Return a picture file's RGB image, by default with torchvision's reader."""
    try:
        return reader(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error


class Loader:
    """Batches of a data set on the device: inputs (n, 3, H, W), channels last, and labels (n,).

    `Images` lie on the device whole, in bytes, and are prepared there; others come from worker processes.
    With `shuffle`, each pass is in a new order, drawn from `generator`. `Images` draw their augmentation from
    it, too, others from PyTorch's own. `batch_size` counts all processes, each of which gets its share of a
    batch; ValueError where it can't, with `shuffle`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device | str, shuffle: bool = False):
        self.device, self.batch_size, self.shuffle = torch.device(device), batch_size, shuffle
        self.dataset, self.num_images = dataset, len(dataset)
        self.generator = torch.Generator()
        n = num_processes()
        self.share = slice(rank(), None, n)
        last = self.num_images % batch_size or batch_size
        if shuffle and (batch_size % n or last < n):
            raise ValueError(
                f"{n} processes can't share batches of {batch_size} images, the last of {last}: choose a "
                f"batch_size that is a multiple of {n} and leaves {n} or more images for the last"
            )
        self.images = dataset.to(device) if isinstance(dataset, Images) else None

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = self.num_images
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        batches = order.split(self.batch_size)  # of all processes together
        if self.images is not None:
            for indices in batches:
                yield self.images.read(indices.to(self.device, non_blocking=True), self.share, self.generator)
            return
        shares = [indices[self.share].tolist() for indices in batches]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        fork = cores > 1 and "fork" in multiprocessing.get_all_start_methods()
        workers = DataLoader(
            self.dataset,
            batch_sampler=[share for share in shares if share],
            num_workers=min(WORKERS, cores) if fork else 0,
            # Forked, workers don't run a script from its top, as other start methods make them.
            multiprocessing_context="fork" if fork else None,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for inputs, labels in workers:
                inputs = inputs.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                yield inputs, labels.to(self.device, non_blocking=True)
        except ValueError as error:  # a worker's, with its traceback as text
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def loaders(
    model: str, batch_size: int, device: torch.device, root: str = "data/", max_images: int | None = None
) -> tuple[Loader, Loader, Loader]:
    """Return the batches of a model's training, held-out and test images, and print how many there are."""
    trainset, valset, testset = split(model, root, max_images)
    print(f"{model}: {len(trainset)} training, {len(valset)} held-out, {len(testset)} test images")
    tests = (Loader(part, test_batch_size(model), device) for part in (valset, testset))
    return Loader(trainset, batch_size, device, shuffle=True), *tests


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
    if share == 1:
        return images
    height, width = images.shape[2:]
    rows, columns = round(share * height), round(share * width)
    top = torch.randint(height - rows + 1, (), generator=generator)
    left = torch.randint(width - columns + 1, (), generator=generator)
    crop = images[:, :, top : top + rows, left : left + columns]
    return crop.contiguous(memory_format=torch.channels_last)
