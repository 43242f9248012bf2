"""Checkpoints: every format loads, nothing else does, and no file is lost or half written."""

import argparse
import os
import re

import numpy as np
import pytest
import torch
import torchvision
from test_networks import networks

import utils
from models.lab.checkpoints import (
    CheckpointError,
    fingerprint,
    load_weights_to_flatresnet,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def plain(state):
    """Return a FlatResNet's state dict under a plain ResNet's names, as from before PyTorch 0.4.1."""
    names = {key: re.sub(r"^blocks\.(\d)", lambda found: f"layer{int(found[1]) + 1}", key) for key in state}
    return {name: state[key] for key, name in names.items() if not key.endswith("num_batches_tracked")}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


NUMBERS = {"epoch": 164, "best_epoch": np.int64(160), "acc": np.float64(0.5), "reward": torch.tensor(0.25),
           "args": argparse.Namespace(arch="resnet", lr=0.1)}  # fmt: skip
FORMATS = {
    "bare": lambda state: state,
    "a compiled network's": lambda state: prefixed("_orig_mod.", state),
    "an averaged network's": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(3)},
    "Lightning's": lambda state: {"state_dict": prefixed("model.", state), "loops": {}},
    "torchvision's script's": lambda state: {"model": state, "optimizer": {"state": {}}, **NUMBERS},
    "PyTorch's tutorial's": lambda state: {"model_state_dict": state, "loss": 0.5},
}
FORMATS_RESNET = FORMATS | {
    "ours": lambda state: {"resnet": state, "agent": networks(seed=4)[1].state_dict(), "epoch": 3},
    "torchvision's names": plain,
    "the original's": lambda state: {"state_dict": prefixed("module.", plain(state)), **NUMBERS},
}
FORMATS_POLICY = FORMATS | {
    "ours": lambda state: {"resnet": networks(seed=4)[0].state_dict(), "agent": state, "epoch": 3},
    "the original's": lambda state: {"agent": state, **NUMBERS},
    "the original's first": lambda state: {"net": state | {"features.fc.bias": torch.zeros(10)}},
}


@pytest.mark.parametrize(
    ("number", "form"), [(0, name) for name in FORMATS_RESNET] + [(1, name) for name in FORMATS_POLICY]
)
def test_formats_load(tmp_path, number, form):
    trained, loaded = networks(seed=1)[number], networks(seed=3)[number]
    content = (FORMATS_RESNET, FORMATS_POLICY)[number][form](trained.state_dict())
    torch.save(content, tmp_path / "a.t7", _use_new_zipfile_serialization="original" not in form)
    rest = utils.load_checkpoint(tmp_path / "a.t7", **{("rnet", "agent")[number]: loaded})
    assert fingerprint(loaded) == fingerprint(trained)
    if "reward" in content:
        assert [rest[name] for name in ("best_epoch", "acc", "reward")] == [160, 0.5, 0.25]
        assert not any(isinstance(value, (torch.Tensor, np.generic)) for value in rest.values())


def test_numpys_numbers_load_under_the_names_of_every_version(tmp_path):
    path, rnet = tmp_path / "a.t7", networks()[0]
    torch.save({"resnet": rnet.state_dict(), **NUMBERS}, path, _use_new_zipfile_serialization=False)
    data, (old, new) = path.read_bytes(), (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    for name in (old, new):
        path.write_bytes(data.replace(old, name).replace(new, name))
        assert utils.load_checkpoint(path, rnet)["acc"] == 0.5


def test_cuda_tensors_load_without_cuda(tmp_path, monkeypatch):
    """A stream from before 1.6 whose storages say that they were on cuda:0."""
    rnet, loaded = networks(seed=1)[0], networks(seed=3)[0]
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"resnet": rnet.state_dict()}, tmp_path / "a.t7", _use_new_zipfile_serialization=False)
    assert b"cuda:0" in (tmp_path / "a.t7").read_bytes()
    utils.load_checkpoint(tmp_path / "a.t7", loaded)
    assert fingerprint(loaded) == fingerprint(rnet)


R8_C10 = {"model": "R8_C10"}
REFUSED = {  # what a file holds, given the state dicts of a ResNet and a policy network, and what is said
    "a text": (lambda r, a: b"<!DOCTYPE html>" * 100, "not a PyTorch file"),
    "no weights": (lambda r, a: {"epoch": 3}, "holds no weights, but no resnet"),
    "a policy": (lambda r, a: {"agent": a}, "holds agent, but no resnet, which is needed"),
    "weights in a list": (lambda r, a: {"resnet": [1, 2]}, "the resnet in .* is not a state dict"),
    "another depth": (lambda r, a: networks("R14_SYN")[0].state_dict(), r"has no place in it\. Choose"),
    "another model": (lambda r, a: {"resnet": r, "lineage": [{"settings": R8_C10}]}, r"not as R8_SYN\. Ch"),
    "another model, older file": (lambda r, a: {"resnet": r, "settings": R8_C10}, "trained as R8_C10, not"),
    "another classifier": (lambda r, a: {k.replace("fc.", "linear."): r[k] for k in r}, "fc.weight is missi"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_and_changes_nothing(tmp_path, name):
    content, message = REFUSED[name]
    content = content(*(network.state_dict() for network in networks(seed=3)))
    path, rnet = tmp_path / "bad.t7", networks()[0]
    before = fingerprint(rnet)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"bad\.t7") as refused:
        utils.load_checkpoint(path, rnet)
    assert refused.match(message) and fingerprint(rnet) == before


def test_a_policy_networks_layers_can_come_from_a_resnet(tmp_path):
    (_, agent), (deeper, policy) = networks(), networks("R20_SYN")
    save_checkpoint(tmp_path / "a", {"resnet": deeper.state_dict()})
    head = agent.logit.weight.clone()
    load_weights_to_flatresnet(read_checkpoint(tmp_path / "a"), agent.features)
    source, layers = deeper.state_dict(), agent.features.state_dict()
    assert layers and all(torch.equal(value, source[key]) for key, value in layers.items())
    assert torch.equal(agent.logit.weight, head)

    before, foreign = fingerprint(agent), torchvision.models.resnet18()
    for network, message in ((policy, "a holds no ResNet"), (foreign, "the ResNet in a does not fit")):
        torch.save(network.state_dict(), tmp_path / "a")
        with pytest.raises(CheckpointError, match=message):
            load_weights_to_flatresnet(read_checkpoint(tmp_path / "a"), agent.features, "a")
    assert fingerprint(agent) == before


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"epoch": 9}, {"epoch": 10}), ({"epoch": torch.tensor(9)}, {"epoch": np.int64(10)}),
        ({"epoch": 9, "saved": 1.0}, {"epoch": 1, "saved": 2.0}), ({"epoch": 99}, {"epoch": 1, "saved": 1.0}),
    ],
)  # fmt: skip
def test_the_newest_checkpoint_is_the_one_that_says_so(tmp_path, older, newer):
    """Not by the time of the file, which a copy changes."""
    for name, content, time in (("pk_E_9.t7", older, 2), ("pk_E_10.t7", newer, 1)):
        torch.save(content, tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    assert newest_checkpoint(tmp_path, "pk_").name == "pk_E_10.t7"
    assert newest_checkpoint(tmp_path, "ckpt_") is None
