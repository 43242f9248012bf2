"""Checkpoints: every format loads, nothing else does, and no file is lost or half written."""

import argparse
import collections
import errno
import os
import signal
import stat
import sys

import numpy as np
import pytest
import torch
import torchvision

import utils
from models.lab import checkpoints, files
from models.lab.checkpoints import CheckpointError, fingerprint, save_checkpoint


def networks(seed, model="R8_SYN"):
    torch.manual_seed(seed)
    return utils.build_model(model)


def plain(state):
    """Return a FlatResNet's state dict under a plain ResNet's names, as from before PyTorch 0.4.1."""
    named = collections.OrderedDict()
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            first, *rest = key.split(".")
            name = f"layer{int(rest.pop(0)) + 1}" if first == "blocks" else first
            named[".".join([name, *rest])] = value
    return named


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


NUMBERS = {"epoch": 164, "best_epoch": np.int64(160), "acc": np.float64(0.5), "reward": torch.tensor(0.25),
           "args": argparse.Namespace(arch="resnet", lr=0.1), "curve": np.arange(3.0)}  # fmt: skip
FORMATS = {
    "bare": lambda state: state,
    "a wrapped network's": lambda state: prefixed("module.", state),
    "a compiled network's": lambda state: prefixed("_orig_mod.", state),
    "an averaged network's": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(3)},
    "Lightning's": lambda state: {"state_dict": prefixed("model.", state), "loops": {}},
    "torchvision's script's": lambda state: {"model": state, "optimizer": {"state": {}}, **NUMBERS},
    "PyTorch's tutorial's": lambda state: {"model_state_dict": state, "loss": 0.5},
}
FORMATS_RESNET = FORMATS | {
    "ours": lambda state: {"resnet": state, "agent": networks(4)[1].state_dict(), "epoch": 3},
    "torchvision's names": plain,
    "the original's": lambda state: {"state_dict": prefixed("module.", plain(state)), **NUMBERS},
}
FORMATS_POLICY = FORMATS | {
    "ours": lambda state: {"resnet": networks(4)[0].state_dict(), "agent": state, "epoch": 3},
    "the original's": lambda state: {"agent": state, **NUMBERS},
    "the original's first": lambda state: {"net": state | {"features.fc.bias": torch.zeros(10)}},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize(
    ("number", "form"), [(0, name) for name in FORMATS_RESNET] + [(1, name) for name in FORMATS_POLICY]
)
def test_formats_load(tmp_path, number, form, zipped):
    trained, loaded = networks(1)[number], networks(3)[number]
    content = (FORMATS_RESNET, FORMATS_POLICY)[number][form](trained.state_dict())
    torch.save(content, tmp_path / "a.t7", _use_new_zipfile_serialization=zipped)
    rest = utils.load_checkpoint(tmp_path / "a.t7", **{("rnet", "agent")[number]: loaded})
    assert fingerprint(loaded) == fingerprint(trained)
    if "reward" in content:
        assert [rest[name] for name in ("best_epoch", "acc", "reward")] == [160, 0.5, 0.25]
        assert not any(isinstance(value, (torch.Tensor, np.generic)) for value in rest.values())


def test_numpys_numbers_load_under_the_names_of_every_version(tmp_path):
    path, rnet = tmp_path / "a.t7", networks(1)[0]
    torch.save({"resnet": rnet.state_dict(), **NUMBERS}, path, _use_new_zipfile_serialization=False)
    data, (old, new) = path.read_bytes(), (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    for name in (old, new):
        path.write_bytes(data.replace(old, name).replace(new, name))
        assert utils.load_checkpoint(path, rnet)["acc"] == 0.5


def test_cuda_tensors_load_without_cuda(tmp_path, monkeypatch):
    """A stream from before 1.6 whose storages say that they were on cuda:0."""
    rnet, loaded = networks(1)[0], networks(3)[0]
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"resnet": rnet.state_dict()}, tmp_path / "a.t7", _use_new_zipfile_serialization=False)
    assert b"cuda:0" in (tmp_path / "a.t7").read_bytes()
    utils.load_checkpoint(tmp_path / "a.t7", loaded)
    assert fingerprint(loaded) == fingerprint(rnet)


def test_torchvisions_module_and_state_dict_load(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet50(weights=None)
    from_module, _ = utils.build_model("R50_ImgNet")
    utils.load_weights_to_flatresnet(source, from_module)
    torch.save(source.state_dict(), tmp_path / "r50.t7")
    from_file, _ = utils.build_model("R50_ImgNet")
    utils.load_checkpoint(tmp_path / "r50.t7", from_file)
    assert fingerprint(from_module) == fingerprint(from_file)
    torch.testing.assert_close(from_file.ds[1][0].weight, source.layer2[0].downsample[0].weight)


R8_C10 = {"model": "R8_C10"}
REFUSED = {  # what a file holds, given the state dicts of a ResNet and a policy network, and what is said
    "an empty file": (lambda r, a: b"", "not a PyTorch file"),
    "a text": (lambda r, a: b"<!DOCTYPE html>" * 100, "not a PyTorch file"),
    "a list": (lambda r, a: [1, 2, 3], "holds a list, not a "),
    "no weights": (lambda r, a: {"epoch": 3}, "holds no weights, and a ResNet is needed"),
    "a policy": (lambda r, a: {"agent": a}, "holds a policy, and a ResNet is needed"),
    "weights in a list": (lambda r, a: {"resnet": [1, 2]}, "the resnet in .* is not a state dict"),
    "a number for a weight": (lambda r, a: {"resnet": r | {"fc.bias": 3}}, r"fc\.bias is not a tensor"),
    "a missing weight": (lambda r, a: {k: r[k] for k in r if k != "fc.bias"}, r"fc\.bias is missing"),
    "NaN": (lambda r, a: r | {"fc.bias": r["fc.bias"] * float("nan")}, "values that are not finite"),
    "whole numbers": (lambda r, a: r | {"fc.bias": r["fc.bias"].long()}, r"holds torch\.int64, not"),
    "another depth": (lambda r, a: networks(0, "R14_SYN")[0].state_dict(), r"2\+2\+2, .*1\+1\+1\)\. Choose"),
    "other classes": (lambda r, a: networks(0, "R8_C100")[0].state_dict(), r"is \(100, 64\), not"),
    "another model": (lambda r, a: {"resnet": r, "lineage": [{"settings": R8_C10}]}, r"not as R8_SYN\. Ch"),
    "another model, older file": (lambda r, a: {"resnet": r, "settings": R8_C10}, "trained as R8_C10, not"),
    "another classifier": (lambda r, a: {k.replace("fc.", "linear."): r[k] for k in r}, "or named otherwise"),
    "a whole network": (lambda r, a: networks(0)[0], r"models\.resnet.*Save .* state_dict\(\) "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_and_changes_nothing(tmp_path, name):
    content, message = REFUSED[name]
    content = content(*(network.state_dict() for network in networks(3)))
    path, rnet = tmp_path / "bad.t7", networks(1)[0]
    before = fingerprint(rnet)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"bad\.t7") as refused:
        utils.load_checkpoint(path, rnet)
    assert refused.match(message) and fingerprint(rnet) == before


def test_a_bad_half_leaves_the_other_network_alone(tmp_path):
    rnet, agent = networks(1)
    broken = agent.state_dict() | {"vnet.bias": torch.zeros(2)}
    torch.save({"resnet": networks(3)[0].state_dict(), "agent": broken}, tmp_path / "pair.t7")
    before = fingerprint(rnet)
    with pytest.raises(CheckpointError, match=r"vnet\.bias is \(2,\), not \(1,\)"):
        utils.load_checkpoint(tmp_path / "pair.t7", rnet, agent)
    assert fingerprint(rnet) == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.t7"):
        utils.load_checkpoint(tmp_path / "none.t7")


def test_a_policy_networks_layers_can_come_from_a_resnet(tmp_path):
    (_, agent), (deeper, policy) = networks(1), networks(3, "R20_SYN")
    save_checkpoint(tmp_path / "a", {"resnet": deeper.state_dict()})
    head = agent.logit.weight.clone()
    checkpoints.load_features(tmp_path / "a", agent)
    source, layers = deeper.state_dict(), agent.features.state_dict()
    assert layers and all(torch.equal(value, source[key]) for key, value in layers.items())
    assert torch.equal(agent.logit.weight, head)

    before = fingerprint(agent)
    save_checkpoint(tmp_path / "policy", {"agent": policy.state_dict()})
    with pytest.raises(CheckpointError, match="policy holds no ResNet"):
        checkpoints.load_features(tmp_path / "policy", agent)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"the ResNet in .*foreign does not .* ResNet-8"):
        checkpoints.load_features(tmp_path / "foreign", agent)
    assert fingerprint(agent) == before


def test_a_limit_on_the_file_size_is_reported_in_the_systems_words(tmp_path):
    resource = pytest.importorskip("resource")
    path = save_checkpoint(tmp_path / "last.t7", {"epoch": 1})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RuntimeError, match=r"could not write .*File too large"):
            save_checkpoint(path, {"weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.read_checkpoint(path) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "can only be read"),
        (errno.ENOTDIR, "a file stands where a folder"), (errno.EEXIST, "a file stands where a folder"),
        (errno.EISDIR, "a folder stands where a file"), (errno.ENAMETOOLONG, "shorter path"),
        (errno.ENOLCK, "choose another folder"), (errno.EACCES, "ask for permission"),
    ],
)  # fmt: skip
def test_advice_fits_the_error(tmp_path, number, says):
    found = files.advice(OSError(number, "..."), tmp_path / "not there" / "a.t7")
    assert says in found and (number == errno.ENOSPC or "free some space" not in found or "quota" in found)
    assert number != errno.EACCES or f"only {tmp_path.owner()}, who owns {tmp_path}" in found


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path / "a.t7", {"epoch": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"epoch": 9}, {"epoch": 10}), ({"epoch": torch.tensor(9)}, {"epoch": np.int64(10)}),
        ({"epoch": 9, "saved": 1.0}, {"epoch": 1, "saved": 2.0}), ({"epoch": 99}, {"epoch": 1, "saved": 1.0}),
        ({"epoch": "nine"}, {"epoch": 1}),
    ],
)  # fmt: skip
def test_the_newest_checkpoint_is_the_one_that_says_so(tmp_path, older, newer):
    """Not by the time of the file, which a copy changes."""
    for name, content, time in (("pk_E_9.t7", older, 2), ("pk_E_10.t7", newer, 1)):
        torch.save(content, tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    assert checkpoints.newest_checkpoint(tmp_path, "pk_").name == "pk_E_10.t7"
    assert checkpoints.newest_checkpoint(tmp_path, "ckpt_") is None
