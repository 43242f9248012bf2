"""Data: drawn, read, split, batched; cut, altered or missing, it is named; stand-ins run in all notebooks."""

import hashlib
import pickle
import re
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from running import ROOT, run_cells, run_python
from test_notebooks import BLOCKDROP, INFERENCE, SOLE
from torchvision.datasets import CIFAR10, CIFAR100

import utils
from models.lab import data, names, stages, syn

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "longer": lambda content: content + b"\0",
}
TURNED = Image.Exif()
TURNED[0x0112] = 3  # by half a turn


def test_syn_is_drawn_the_same_balanced_and_noisier_with_difficulty():
    drawing = syn.draw(1000, seed=0)
    digest = hashlib.sha256(drawing.images.tobytes() + drawing.labels.tobytes()).hexdigest()
    assert digest[:16] == "d028250d72179d62"
    assert drawing.difficulty.min() >= 0 and drawing.difficulty.max() <= 1
    assert abs(drawing.difficulty.mean() - 0.5) < 0.05
    rough = np.abs(np.diff(drawing.images.astype(float), axis=3)).mean((1, 2, 3))
    assert np.corrcoef(rough, drawing.difficulty)[0, 1] > 0.8


@pytest.fixture
def few_syn(monkeypatch):
    monkeypatch.setattr(syn, "NUM_TRAIN", 50)
    monkeypatch.setattr(syn, "NUM_TEST", 20)


def test_a_damaged_drawing_is_drawn_again_and_so_is_one_that_cant_be_kept(few_syn, tmp_path):
    first, _ = utils.get_dataset("R8_SYN", tmp_path)
    (kept,) = tmp_path.glob("*/train.npz")
    whole = kept.read_bytes()
    (tmp_path / "file").write_text("no folder")
    for name, damage in DAMAGES.items():
        kept.write_bytes(damage(whole))
        for root in (tmp_path, tmp_path / "file"):
            again, test = utils.get_dataset("R8_SYN", root)
            assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels), name
            assert len(first.difficulty) == 50 and len(test) == 20


@pytest.fixture
def stand_in(tmp_path, monkeypatch, offline):
    """A function that writes CIFAR's files, n random images in each, as official; it returns their folder."""

    def write(cifar, n):
        folder = tmp_path / cifar.base_folder
        folder.mkdir()
        labels = {CIFAR10: "labels", CIFAR100: "fine_labels"}[cifar]
        contents = {cifar.meta["filename"]: {cifar.meta["key"]: [f"class {i}" for i in range(100)]}}
        for name, _ in cifar.train_list + cifar.test_list:
            pixels = np.random.default_rng(0).integers(256, size=(n, 3072), dtype=np.uint8)
            contents[name] = {"data": pixels, labels: [i % 10 for i in range(n)]}
        for name, content in contents.items():
            (folder / name).write_bytes(pickle.dumps(content))
        md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(cifar, files, [[name, md5[name]] for name, _ in getattr(cifar, files)])
        monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5[cifar.meta["filename"]]})
        return folder

    return write


def test_every_damaged_cifar_file_is_named(stand_in):
    folder = stand_in(CIFAR10, 6)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damage in [*DAMAGES.values(), None]:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage(whole))
            said = rf"{path} is missing or damaged and .* unpack cifar-10-python\.tar\.gz into"
            with pytest.raises(FileNotFoundError, match=said):
                utils.get_dataset("R8_C10", folder.parent)
            path.write_bytes(whole)
    assert [len(part) for part in utils.get_dataset("R8_C10", folder.parent)] == [30, 6]


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Folders of JPEG files as ImageNet's, of 3 classes."""
    monkeypatch.setitem(names.NUM_CLASSES, "ImgNet", 3)
    chance = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 2)):
        for label in range(3):
            folder = tmp_path / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = chance.integers(256, size=(40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((300, 260)).save(folder / f"{i}.JPEG")
    return tmp_path


def test_imagenet_folders(imagenet):
    trainset, valset, testset = data.split("R50_ImgNet", imagenet)
    assert (len(trainset), len(valset), len(testset)) == (22, 2, 6)
    assert torch.equal(valset[0][0], valset[0][0]) and not torch.equal(trainset[0][0], trainset[0][0])
    shapes = [tuple(images.shape) for images, _ in data.Loader(trainset, 16, "cpu", shuffle=True)]
    assert shapes == [(16, 3, 224, 224), (6, 3, 224, 224)]
    _, few = utils.get_dataset("R50_ImgNet", imagenet, max_images=3)
    assert [label for _, label in few] == [0, 1, 2]
    pixels, inputs = data.pixels_and_input(few, 1)
    assert pixels.shape == (224, 224, 3) and torch.equal(inputs, few[1][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mv train elsewhere", "train and .*val are to have a folder of ImageNet's images per class"),
        ("rm val/n*/[0-9].JPEG", "no valid file .*val are to have a folder of ImageNet's images per class"),
        ("rm -r val/n00000002", r"val has 2 class folders, expected ImageNet's 1000"),
        ("truncate -s 100 train/n00000001/3.JPEG", r"3\.JPEG can't be read as an image"),
    ],
)
def test_what_is_wrong_with_imagenets_folders_is_said(imagenet, damage, message):
    subprocess.run(damage, shell=True, cwd=imagenet, check=True)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        list(utils.get_dataset("R50_ImgNet", imagenet)[0])


def random_images(n=12, **options):
    pixels = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator())
    return data.Images(pixels, torch.arange(n) % 10, list("abcdefghij"), **options)


@pytest.fixture
def random_weights(monkeypatch):
    """What would be torchvision's weights, drawn at random, the same each time."""

    def draw(weights, **_):
        torch.manual_seed(0)
        name = type(weights).__name__.split("_")[0].lower()
        return torchvision.models.get_model(name, num_classes=names.NUM_CLASSES["ImgNet"]).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", draw)


def test_imagenet_starts_from_torchvisions_weights(random_weights, tmp_path):
    rnet, agent = utils.get_model("R50_ImgNet", "cpu", tmp_path)
    resnet50, resnet18 = (stages.torchvision_weights(name) for name in ("ResNet50", "ResNet18"))
    assert torch.equal(rnet.fc.weight, resnet50["fc.weight"])
    assert torch.equal(agent.features.ds[3][0].weight, resnet18["layer4.0.downsample.0.weight"])
    assert torch.equal(agent.features.blocks[2][0].conv2.weight, resnet18["layer3.0.conv2.weight"])


def test_imagenet_weights_that_cant_be_fetched_or_are_damaged(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"ResNet101 weights could not be fetched .* put that file into"):
        utils.get_model("R101_ImgNet", "cpu", tmp_path)
    path = tmp_path / "hub" / "checkpoints" / "resnet101-63fe2227.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match=r"resnet101-63fe2227\.pth is damaged: delete it"):
        utils.get_model("R101_ImgNet", "cpu", tmp_path)


def test_held_out_images_are_always_the_same_and_not_augmented(few_syn, tmp_path):
    (train, val, test), (_, again, _) = (data.split("R8_SYN", tmp_path) for _ in range(2))
    assert (len(train), len(val), len(test)) == (45, 5, 20) and train.augment and not val.augment
    assert torch.equal(val.images, again.images)
    assert not (train.images[:, None] == val.images).flatten(2).all(2).any()


def test_augmentation_is_a_crop_of_the_padded_image_perhaps_flipped():
    dataset, flips = random_images(augment=True), 0
    inputs, labels = dataset.read(torch.arange(12), generator=torch.Generator())
    assert inputs.is_contiguous(memory_format=torch.channels_last) and torch.equal(labels, dataset.labels)
    for image, whole in zip(inputs, F.pad(dataset.images, [4] * 4) / 255, strict=True):
        crops = whole.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
        plain, flipped = ((crops == x).flatten(2).all(2).any() for x in (image, image.flip(2)))
        assert plain or flipped
        flips += bool(flipped)
    assert 0 < flips < 12


def test_small_crops_come_in_the_first_epochs_from_anywhere_in_the_image():
    assert [data.crop_share(epoch, 4, 0.5) for epoch in range(4)] == [0.75, 0.75, 1, 1]
    assert data.crop_share(0, 1, 0.9) == data.crop_share(0, 9, 0) == 1  # the last epoch sees whole images
    numbered = torch.arange(64.0).view(8, 8).expand(2, 3, 8, 8)
    generator, places = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        crop = data.random_crop(numbered, 0.75, generator)
        top, left = divmod(int(crop[0, 0, 0, 0]), 8)
        assert torch.equal(crop, numbered[:, :, top : top + 6, left : left + 6])
        assert crop.is_contiguous(memory_format=torch.channels_last)
        places.add((top, left))
    assert len(places) == 9


def test_a_loader_shows_every_image_once_in_a_new_order():
    loader = data.Loader(random_images(25), 8, "cpu", shuffle=True)
    passes = [torch.cat([inputs.flatten(1).sum(1) for inputs, _ in loader]) for _ in range(2)]
    assert len(loader) == 4 and not torch.equal(*passes)
    torch.testing.assert_close(passes[0].sort()[0], passes[1].sort()[0])


@pytest.mark.parametrize("processes", [3, 8])  # 8 is no multiple of 3; of the last 4 images, 8 can't have one
def test_batches_that_processes_cant_share_are_refused(monkeypatch, processes):
    monkeypatch.setattr(data, "num_processes", lambda: processes)
    with pytest.raises(ValueError, match="processes can't share batches of 8 images, the last of 4"):
        data.Loader(random_images(20), 8, "cpu", shuffle=True)


@pytest.mark.parametrize(
    ("name", "picture", "shown"),
    [
        ("rgb.png", Image.new("RGB", (50, 40), (10, 20, 30)), [10, 20, 30]),
        ("gray.jpg", Image.new("L", (50, 40), 100), [100] * 3),
        ("gray of 16 bits.png", Image.fromarray(np.full((40, 50), 257 * 128, np.uint16)), [128] * 3),
        ("transparent.png", Image.new("RGBA", (50, 40), (10, 20, 30, 0)), [255] * 3),
        ("transparent gray.png", Image.new("LA", (50, 40), (10, 0)), [255] * 3),
        ("turned.jpg", Image.fromarray(np.repeat(np.uint8([[0, 255]]), 25, 1).repeat(40, 0)), [255] * 3),
    ],
)
def test_picture_files_are_read_as_they_look(tmp_path, name, picture, shown):
    path = tmp_path / name
    picture.save(path, exif=TURNED if name == "turned.jpg" else b"")
    pixels, inputs = data.pixels_and_input(random_images(3), path)
    assert pixels.shape == (32, 32, 3) and pixels[5, 5].tolist() == shown
    torch.testing.assert_close(inputs, pixels.permute(2, 0, 1) / 255)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{name} can't be read as an image"):
        data.pixels_and_input(random_images(3), path)


def test_an_image_looked_at_is_the_networks_input():
    dataset = random_images(3, statistics=data.R32_C10_STATISTICS)
    pixels, inputs = data.pixels_and_input(dataset, 1)
    assert torch.equal(pixels.permute(2, 0, 1), dataset.images[1]) and torch.equal(inputs, dataset[1][0])


def through_all_notebooks(model, data_dir, sole_cv="cv", **settings):
    """Run them in their order; the others start from the sole ResNet's weights if they lie in "cv"."""
    paths = {"model": model, "data_dir": str(data_dir), "cv_dir": str(data_dir / "cv"), "max_images": None}
    run_cells("rnet_sole", SOLE | paths | {"cv_dir": str(data_dir / sole_cv), "epochs": 1} | settings)
    quick = {"max_epochs_stochastic_depth": 0, "max_epochs_training": 1, "max_epochs_finetuning": 1}
    run_cells("blockdrop_training", BLOCKDROP | paths | quick | {"curriculum": 0} | settings)
    results = {"batch_sizes": [1, 4], "results_dir": str(data_dir / "results")}
    found = run_cells("blockdrop_inference", INFERENCE | paths | results)
    assert found["policies"].shape == (len(found["testset"]), found["num_blocks"])
    assert len(list((data_dir / "results").glob("*.svg"))) >= 8


def test_cifar100_in_all_notebooks(stand_in, at_root):
    through_all_notebooks("R14_C100", stand_in(CIFAR100, 30).parent, batch_size=16)


def test_imagenet_in_all_notebooks(imagenet, random_weights, at_root, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: pytest --long")
    through_all_notebooks("R101_ImgNet", imagenet, sole_cv="another cv", batch_size=6)


WORKERS = """
import multiprocessing
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor
from models.lab.data import Loader
multiprocessing.set_start_method("spawn")
print("top", [len(labels) for _, labels in Loader(FakeData(5, (3, 8, 8), transform=ToTensor()), 2, "cpu")])
"""


def test_workers_do_not_run_a_script_from_its_top(tmp_path):
    (tmp_path / "out.py").write_text(WORKERS)
    status, printed = run_python("out.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert status == 0 and re.findall("top.*", printed) == ["top [2, 2, 1]"], printed
