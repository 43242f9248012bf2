"""Data that is cut, altered, missing or can't be written: an error names the file, or none is needed."""

import hashlib
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

import utils
from models import syn

CIFAR10 = torchvision.datasets.CIFAR10
DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "longer": lambda content: content + b"\0",
}


@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)


@pytest.fixture
def cifar(tmp_path, monkeypatch, offline):
    """CIFAR-10's seven files with 6 images each, their checksums taken for the official ones."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    chance = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    contents = {
        name: {"data": chance.integers(256, size=(6, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3, 4, 9]}
        for name in names
    }
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name in names[5:]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return folder


def test_every_damaged_cifar_file_is_named(cifar):
    train, test = utils.get_dataset("R8_C10", cifar.parent)
    assert (len(train), len(test)) == (30, 6)
    refused = 0
    for path in sorted(cifar.iterdir()):
        whole = path.read_bytes()
        for damage in [*DAMAGES.values(), None]:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage(whole))
            with pytest.raises(FileNotFoundError) as error:
                utils.get_dataset("R8_C10", cifar.parent)
            word = "missing" if damage is None else "damaged"
            assert f"{path} is {word} and could not be downloaded" in str(error.value)
            refused += 1
            path.write_bytes(whole)
    print(f"CIFAR files damaged in {refused} ways, {refused} refused by name")


@pytest.mark.parametrize("name", ["test_batch", "data_batch_1", "data_batch_4"])
def test_labels_out_of_range(cifar, monkeypatch, name):
    path = cifar / name
    content = pickle.loads(path.read_bytes())
    content["labels"][2] = 10
    path.write_bytes(pickle.dumps(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    for files in ("train_list", "test_list"):
        official = getattr(CIFAR10, files)
        monkeypatch.setattr(CIFAR10, files, [[n, md5 if n == name else m] for n, m in official])
    with pytest.raises(ValueError, match=rf"{path} has the label 10, outside 0 to 9"):
        utils.get_dataset("R8_C10", cifar.parent)


def test_cifar_without_data_and_network(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 is not in .* unpack cifar-100-python\.tar\.gz"):
        utils.get_dataset("R32_C100", tmp_path)


def test_a_data_folder_that_cant_be_written(tmp_path, monkeypatch):
    """A file stands in its place. SYN is drawn all the same, only not kept; CIFAR says what is missing."""
    monkeypatch.setattr(syn, "NUM_TRAIN", 50)
    monkeypatch.setattr(syn, "NUM_TEST", 20)
    (tmp_path / "data").write_text("no folder")
    train, test = utils.get_dataset("R8_SYN", tmp_path / "data")
    assert (len(train), len(test)) == (50, 20)
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 is not in .*data and could not be downloaded"):
        utils.get_dataset("R8_C10", tmp_path / "data")


def test_a_damaged_drawing_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(syn, "NUM_TRAIN", 50)
    monkeypatch.setattr(syn, "NUM_TEST", 20)
    first, _ = utils.get_dataset("R8_SYN", tmp_path)
    (cache,) = tmp_path.glob("*/train.npz")
    whole = cache.read_bytes()
    for name, damage in DAMAGES.items():
        cache.write_bytes(damage(whole))
        again, test = utils.get_dataset("R8_SYN", tmp_path)
        assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels), name
        assert len(first.difficulty) == 50 and len(test) == 20
