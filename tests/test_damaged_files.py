"""Checkpoints damaged in many ways: each loads or is refused in a sentence, and nothing is harmed."""

import io
import os
import pickle
import random
import re
import time
import warnings
import zipfile

import pytest
import torch
from benchmarks.common import peak_memory
from test_networks import networks

import utils
from models.lab.checkpoints import CheckpointError, fingerprint


def saved(state, zipped):
    """Return a checkpoint's bytes as PyTorch saves it, or as it did before 1.6."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def damage(data, chance):
    """Flip bits, cut a file off, also beside a record of a zip file, cut a piece out, or overwrite one."""
    start, length = chance.randrange(len(data)), chance.randrange(1, 3000)
    match chance.randrange(4):
        case 0:
            changed = bytearray(data)
            for _ in range(chance.choice([1, 1, 3, 50])):
                changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case 1:
            records = [found.start() for found in re.finditer(rb"PK[\x01-\x08]{2}", data)] or [2]
            near_one = chance.choice(records) + chance.randrange(-1, 5)
            return data[: max(0, chance.choice([0, 1, 4, start, len(data) - length // 10, near_one]))]
        case 2:
            return data[:start] + data[start + length :]
        case _:
            return data[:start] + chance.randbytes(length // 10) + data[start + length // 10 :]


def change_contents(state, chance):
    """Save contents that are no longer right: keys, shapes, types, values."""
    network = chance.choice(["resnet", "agent"])
    part = dict(state[network])
    key, other = chance.sample(list(part), 2)
    value, other_network = part[key], networks(chance.choice(["R14_SYN", "R8_C100"]))[0]
    changed = chance.choice([
        part | {key: part[other], other: value},
        {name: part[name] for name in part if name != key},
        part | {key + "2": value},
        part | {key: value.flatten()[:-1]},
        part | {key: chance.choice([None, "text", 3, [1.0], value.cfloat(), value.bool()])},
        part | {key: chance.choice([value * float("nan"), value.double() + 1e39])},
        other_network.state_dict(),
        chance.choice([None, {}, [], "text", torch.ones(3)]),
    ])  # fmt: skip
    return saved(state | {network: changed}, zipped=chance.random() < 0.5)


def test_damaged_files_are_refused_or_load(tmp_path, request):
    chance, num_files = random.Random(0), 3000 if request.config.getoption("--long") else 300
    rnet, agent = networks()
    weights = [network.state_dict() for network in networks()]  # the same, and they stay
    state = {"resnet": weights[0], "agent": weights[1], "epoch": 3, "acc": 0.5,
             "lineage": [{"stage": "finetuning", "settings": {"model": "R8_SYN"}}]}  # fmt: skip
    files = [saved(state, zipped) for zipped in (True, False)]
    path, original = tmp_path / "damaged.t7", fingerprint(rnet, agent)
    seconds, refused = [], []

    def load(number):
        which = chance.randrange(2)
        damaged = chance.random() < 0.8
        path.write_bytes(damage(files[which], chance) if damaged else change_contents(state, chance))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                utils.load_checkpoint(path, rnet, agent)
        except CheckpointError as error:
            refused.append(number)
            assert str(path) in str(error), number
            assert fingerprint(rnet, agent) == original, number
        else:
            assert all(p.isfinite().all() for p in (*rnet.parameters(), *agent.parameters())), number
            if damaged and which == 0:  # our files have checksums; those from before PyTorch 1.6 have none
                assert fingerprint(rnet, agent) == original, number
            rnet.load_state_dict(state["resnet"])
            agent.load_state_dict(state["agent"])
        seconds.append(time.perf_counter() - start)

    peak = peak_memory(lambda: [load(number) for number in range(num_files)], "cpu")
    print(f"{num_files} files: {len(refused)} refused, the others loaded, the slowest in "
          f"{max(seconds):.2f} s, {peak / 2**20:.0f} MiB at the peak")  # fmt: skip
    assert len(refused) > num_files / 2 and max(seconds) < 10 and not peak > 2**31


def test_a_zip_bomb_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.t7", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("bomb/data.pkl", bytes(2**28))  # 256 MiB of nothing

    def refused():
        with pytest.raises(CheckpointError, match="would unpack to"):
            utils.load_checkpoint(tmp_path / "bomb.t7", *networks())

    assert not peak_memory(refused, "cpu") > 2**26


class CallsCode:
    """Pickled, it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("called",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_not_called(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"resnet": CallsCode()}, "evil.t7", _use_new_zipfile_serialization=new_format)
    (tmp_path / "plain.t7").write_bytes(pickle.dumps(CallsCode()))
    for path, said in (("evil.t7", "asks for posix.mkdir, which could run code"), ("plain.t7", "not loaded")):
        with pytest.raises(CheckpointError, match=f"{path} .*{said}"):
            utils.load_checkpoint(path, networks()[0])
    assert not (tmp_path / "called").exists()
