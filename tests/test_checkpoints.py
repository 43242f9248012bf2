"""Checkpoints: every format loads, nothing else does, and nothing runs or breaks on the way."""

import argparse
import collections
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT

import utils
from models import checkpoints
from models.resnet import FlatResNet32


@pytest.fixture
def rnet():
    torch.manual_seed(1)
    return utils.build_model("R8_SYN")[0]


@pytest.fixture
def agent():
    torch.manual_seed(2)
    return utils.build_model("R8_SYN")[1]


def other(network):
    """The same network with other weights."""
    torch.manual_seed(3)
    fresh = utils.build_model("R8_SYN")
    return fresh[0] if isinstance(network, FlatResNet32) else fresh[1]


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def plain_names(rnet):
    """The names of a plain ResNet in nn.DataParallel, as the original's files hold them."""
    state = collections.OrderedDict()
    for key, value in rnet.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # these came with PyTorch 0.4.1
            parts = key.split(".")
            if parts[0] == "blocks":
                parts = [f"layer{int(parts[1]) + 1}", *parts[2:]]
            state[".".join(["module", *parts])] = value
    return state


def cases():
    yield "ours", lambda r, a: {"resnet": r.state_dict(), "agent": a.state_dict(), "epoch": 3, "acc": 0.5}
    yield "bare resnet", lambda r, a: r.state_dict()
    yield "torchvision's names", lambda r, a: {k[7:]: v for k, v in plain_names(r).items()}
    yield "original's resnet", lambda r, a: {
        "state_dict": plain_names(r), "args": argparse.Namespace(arch="resnet", lr=0.1), "epoch": 164,
        "best_epoch": np.int64(160), "acc": np.float64(0.923),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("content", [c[1] for c in cases()], ids=[c[0] for c in cases()])
def test_resnet_formats_load(tmp_path, rnet, agent, content, zipped):
    path = tmp_path / "pk.t7"
    torch.save(content(rnet, agent), path, _use_new_zipfile_serialization=zipped)
    loaded = other(rnet)
    rest = utils.load_checkpoint(path, loaded)
    assert same(loaded, rnet)
    assert not any(isinstance(value, (torch.Tensor, np.generic)) for value in rest.values())


@pytest.mark.parametrize("key", ["agent", "net", None])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_policy_formats_load(tmp_path, agent, key, zipped):
    state = agent.state_dict()
    if key == "net":
        state |= {"features.fc.weight": torch.zeros(10, 64), "features.fc.bias": torch.zeros(10)}
    extra = {"epoch": 7, "reward": torch.tensor(0.25), "acc": np.float32(0.5)}
    content = {key: state, **extra} if key else state
    torch.save(content, tmp_path / "ckpt.t7", _use_new_zipfile_serialization=zipped)
    loaded = other(agent)
    rest = utils.load_checkpoint(tmp_path / "ckpt.t7", agent=loaded)
    assert same(loaded, agent)
    assert rest == ({"epoch": 7, "reward": 0.25, "acc": 0.5} if key else {})


def test_cuda_tensors_load_without_cuda(tmp_path, rnet, monkeypatch):
    """A stream from before 1.6 whose storages say that they were on cuda:0."""
    original = torch.serialization.location_tag
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"resnet": rnet.state_dict()}, tmp_path / "a.t7", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch.serialization, "location_tag", original)
    assert b"cuda:0" in (tmp_path / "a.t7").read_bytes()
    loaded = other(rnet)
    utils.load_checkpoint(tmp_path / "a.t7", loaded)
    assert same(loaded, rnet)


def test_torchvision_module_and_state_dict_load(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet50(weights=None)
    from_module, _ = utils.build_model("R50_ImgNet")
    utils.load_weights_to_flatresnet(source, from_module)
    torch.save(source.state_dict(), tmp_path / "r50.t7")
    from_file, _ = utils.build_model("R50_ImgNet")
    utils.load_checkpoint(tmp_path / "r50.t7", from_file)
    assert same(from_module, from_file)
    torch.testing.assert_close(from_file.ds[1][0].weight, source.layer2[0].downsample[0].weight)


class Attack:
    """Runs code when it is unpickled by a loader that lets it."""

    def __reduce__(self):
        return os.system, ("echo attacked > attacked.txt",)


def refused(tmp_path, name):
    """Bytes of files that must not load, by name."""
    rnet, agent = utils.build_model("R8_SYN")
    whole = tmp_path / "whole.t7"
    torch.save({"resnet": rnet.state_dict()}, whole)
    old = tmp_path / "old.t7"
    torch.save({"resnet": rnet.state_dict()}, old, _use_new_zipfile_serialization=False)
    state = rnet.state_dict()

    def saved(content):
        torch.save(content, tmp_path / "made.t7")
        return (tmp_path / "made.t7").read_bytes()

    return {
        "empty": lambda: b"",
        "text": lambda: b"not a checkpoint at all\n" * 100,
        "truncated": lambda: whole.read_bytes()[:-2000],
        "truncated, before 1.6": lambda: old.read_bytes()[:-2000],
        "a list": lambda: saved([1, 2, 3]),
        "no weights": lambda: saved({"epoch": 3}),
        "a policy": lambda: saved({"agent": agent.state_dict()}),
        "another depth": lambda: saved({"resnet": utils.build_model("R14_SYN")[0].state_dict()}),
        "another class count": lambda: saved({"resnet": utils.build_model("R8_C100")[0].state_dict()}),
        "a missing weight": lambda: saved({"resnet": {k: v for k, v in state.items() if k != "fc.bias"}}),
        "not a tensor": lambda: saved({"resnet": state | {"fc.bias": "text"}}),
        "NaN": lambda: saved({"resnet": state | {"fc.bias": torch.full((10,), float("nan"))}}),
        "weights in a list": lambda: saved({"resnet": [1, 2]}),
        "code, zip": lambda: saved({"resnet": state, "args": Attack()}),
        "code, plain pickle": lambda: pickle.dumps({"resnet": Attack()}),
    }[name]()


NAMES = (
    "empty", "text", "truncated", "truncated, before 1.6", "a list", "no weights", "a policy",
    "another depth", "another class count", "a missing weight", "not a tensor", "NaN",
    "weights in a list", "code, zip", "code, plain pickle",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_anything_else_is_refused_and_changes_nothing(tmp_path, monkeypatch, rnet, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.t7"
    path.write_bytes(refused(tmp_path, name))
    before = {key: value.clone() for key, value in rnet.state_dict().items()}
    with pytest.raises(utils.CheckpointError, match=r"bad\.t7"):
        utils.load_checkpoint(path, rnet)
    assert all(torch.equal(before[key], value) for key, value in rnet.state_dict().items())
    assert not (tmp_path / "attacked.txt").exists()


def test_depths_are_named(tmp_path, rnet):
    torch.save(utils.build_model("R14_SYN")[0].state_dict(), tmp_path / "a.t7")
    with pytest.raises(utils.CheckpointError, match=r"file: 2\+2\+2, in the network: 1\+1\+1"):
        utils.load_checkpoint(tmp_path / "a.t7", rnet)


def test_a_bad_half_leaves_the_other_network_alone(tmp_path, rnet, agent):
    broken = agent.state_dict() | {"vnet.bias": torch.zeros(2)}
    torch.save({"resnet": other(rnet).state_dict(), "agent": broken}, tmp_path / "pair.t7")
    before = rnet.fc.weight.clone()
    with pytest.raises(utils.CheckpointError, match=r"vnet\.bias is \(2,\), not \(1,\)"):
        utils.load_checkpoint(tmp_path / "pair.t7", rnet, agent)
    assert torch.equal(rnet.fc.weight, before)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.t7"):
        utils.load_checkpoint(tmp_path / "none.t7")


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = utils.save_checkpoint(tmp_path / "a" / "last.t7", {"epoch": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(RuntimeError, match=r"could not write .*last\.t7 .*No space left"):
        utils.save_checkpoint(path, {"epoch": 2})
    assert utils.read_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.t7"]


def test_a_full_disk_keeps_the_old_report(tmp_path, monkeypatch):
    report = utils.Report(tmp_path, "R8_SYN", "cpu")
    report.write("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"could not write the report .*No space left.*free some space"):
        report.write("new")
    assert (tmp_path / "R8_SYN_cpu.md").read_text() == "old\n"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_limit_on_the_file_size_is_told_in_the_systems_words(tmp_path):
    code = f"""
import resource, signal, torch, utils
path = utils.save_checkpoint({str(tmp_path / "last.t7")!r}, {{"epoch": 1}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    utils.save_checkpoint(path, {{"weights": torch.zeros(1_000_000)}})
except RuntimeError as error:
    print(error)
print(utils.read_checkpoint(path), len(list(path.parent.iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout and "could not write" in done.stdout
    assert done.stdout.splitlines()[-1] == "{'epoch': 1} 1"


def test_weights_of_another_model_are_refused(tmp_path, rnet):
    content = {"resnet": rnet.state_dict(), "settings": {"model": "R8_C10"}}
    path = utils.save_checkpoint(tmp_path / "a.t7", content)
    with pytest.raises(utils.CheckpointError, match=r"was trained as R8_C10, not as R8_SYN\. Choose"):
        utils.load_checkpoint(path, rnet)


def test_settings_of_a_foreign_file_are_left_out(tmp_path, rnet):
    path = utils.save_checkpoint(tmp_path / "a.t7", {"resnet": rnet.state_dict(), "settings": [1, 2]})
    assert utils.load_checkpoint(path, rnet) == {}


def test_a_deeper_resnet_is_not_cut_to_fit():
    deep, shallow = utils.build_model("R14_SYN")[0], utils.build_model("R8_SYN")[0]
    with pytest.raises(utils.CheckpointError, match="has no place in the network"):
        utils.load_weights_to_flatresnet(deep, shallow)


def test_a_policy_networks_layers_can_come_from_a_resnet(agent, tmp_path):
    deeper, other_policy = utils.build_model("R20_SYN")
    torch.save({"resnet": deeper.state_dict(), "seconds": 2.0}, tmp_path / "a")
    head = agent.logit.weight.clone()
    utils.load_features(tmp_path / "a", agent)
    source, layers = deeper.state_dict(), agent.features.state_dict()
    assert layers and all(torch.equal(value, source[key]) for key, value in layers.items())
    assert torch.equal(agent.logit.weight, head)

    torch.save({"agent": other_policy.state_dict()}, tmp_path / "policy")
    with pytest.raises(utils.CheckpointError, match="policy holds no ResNet: name a sole ResNet's file"):
        utils.load_features(tmp_path / "policy", agent)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "foreign")
    with pytest.raises(
        utils.CheckpointError, match=r"the ResNet in .*foreign does not .* Name a file of ResNet-8"
    ):
        utils.load_features(tmp_path / "foreign", agent)
    assert all(torch.equal(value, source[key]) for key, value in agent.features.state_dict().items())


def test_features_come_from_the_resnet8_of_the_same_data(tmp_path):
    assert utils.find_features("R20_SYN", tmp_path) is None
    for name in ("R8_SYN", "R8_C10", "R14_C100"):
        utils.save_checkpoint(tmp_path / "trained_rnet" / name / "pk_E_1_A_0.5.t7", {"acc": 0.5})
    for model, expected in (("R20_SYN", "R8_SYN"), ("R32_C10", "R8_C10")):
        assert utils.find_features(model, tmp_path).parent.name == expected
    assert all(utils.find_features(model, tmp_path) is None for model in ("R8_SYN", "R20_C100", "R50_ImgNet"))


def test_the_newest_checkpoint_is_found(tmp_path):
    for age, name in enumerate(("pk_E_9_A_0.9.t7", "pk_E_1_A_0.1.t7")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert utils.newest_checkpoint(tmp_path, "pk_").name == "pk_E_1_A_0.1.t7"
    assert utils.newest_checkpoint(tmp_path, "ckpt_") is None
    with pytest.raises(FileNotFoundError, match=r"no ckpt_\*\.t7 in .*: train first"):
        utils.newest_checkpoint(tmp_path, "ckpt_", "train first")
