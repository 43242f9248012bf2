"""CIFAR-100 and ImageNet through all three notebooks, on small stand-ins in the real file formats."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from running import run_cells
from test_notebooks import BLOCKDROP, INFERENCE, SOLE

import utils
from models import names

CLASSES = 3


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Measure everything once: the times are of no interest here."""
    measure = utils.measure
    monkeypatch.setattr(
        utils, "measure", lambda runs, device, *_, **__: measure(runs, device, 0.01, rounds=1)
    )


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """CIFAR-100's files with 60 training and 8 test images, their checksums taken for the official ones."""
    cifar = torchvision.datasets.CIFAR100
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    chance = np.random.default_rng(0)
    contents = {
        name: {
            "data": chance.integers(256, size=(n, 3072), dtype=np.uint8),
            "fine_labels": list(range(n)),
        }
        for name, n in (("train", 60), ("test", 8))
    }
    contents["meta"] = {"fine_label_names": [f"class {number}" for number in range(100)]}
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["meta"]})
    return tmp_path


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Folders of JPEG files as ImageNet's, of few classes; torchvision's weights are random ones."""
    monkeypatch.setitem(names.NUM_CLASSES, "ImgNet", CLASSES)
    chance = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 2)):
        for number in range(CLASSES):
            folder = tmp_path / part / f"n{number:08}"
            folder.mkdir(parents=True)
            for image in range(n):
                pixels = chance.integers(256, size=(40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((300, 260)).save(folder / f"{image}.JPEG")

    def random_weights(weights, **_):
        torch.manual_seed(0)
        name = type(weights).__name__.split("_")[0].lower()
        return torchvision.models.get_model(name, num_classes=CLASSES).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", random_weights)
    return tmp_path


def through_all_notebooks(model, data_dir, sole_cv="cv", **settings):
    """Run them in their order; the sole ResNet's weights are the start of the rest if they lie in "cv"."""
    paths = {"model": model, "data_dir": str(data_dir), "cv_dir": str(data_dir / "cv"), "max_images": None}
    sole = {"cv_dir": str(data_dir / sole_cv), "epochs": 1, "warmup": 0.7}
    run_cells("rnet_sole", SOLE | paths | sole | settings)
    run_cells("blockdrop_training", BLOCKDROP | paths | {"cl_pace": 60} | settings)
    found = run_cells(
        "blockdrop_inference",
        INFERENCE | paths | {"batch_sizes": [1, 4], "results_dir": str(data_dir / "results")},
    )
    policies, predictions, _ = found["results"]["BlockDrop"]
    assert policies.shape == (len(found["testset"]), found["num_blocks"])
    assert predictions.shape == found["labels"].shape
    assert len(list((data_dir / "results").glob("*.svg"))) >= 9


@pytest.mark.parametrize("model", ["R32_C100", "R110_C100"])
def test_cifar100(cifar100, at_root, request, model):
    if model == "R110_C100" and not request.config.getoption("--long"):
        pytest.skip("takes a minute: pytest --long")
    through_all_notebooks(model, cifar100, batch_size=16)


def test_imagenet(imagenet, at_root, request):
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: pytest --long")
    small = {"batch_size": 6, "batch_size_test": 6, "holdout": 0.25, "workers": 2}
    through_all_notebooks("R101_ImgNet", imagenet, sole_cv="another cv", **small)  # torchvision's weights


def test_an_unreadable_image_is_named(imagenet):
    path = imagenet / "train" / "n00000001" / "3.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    trainset, _ = utils.get_dataset("R50_ImgNet", imagenet)
    with pytest.raises(ValueError, match=r"3\.JPEG can't be read as an image"):
        for _ in utils.Loader(trainset, 4, "cpu", workers=1):
            pass
