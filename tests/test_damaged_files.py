"""Checkpoints damaged in many ways: each loads correctly or is refused in a sentence, and nothing is harmed.

`pytest tests/test_damaged_files.py --long` tries 3,000 of them instead of 300.
"""

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

import utils
from models.lab.checkpoints import CheckpointError, fingerprint, save_checkpoint


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """The bytes of a finetuned pair as we save it and as PyTorch saved it before 1.6, and its contents."""
    torch.manual_seed(0)
    rnet, agent = utils.build_model("R8_SYN")
    state = {"resnet": rnet.state_dict(), "agent": agent.state_dict(), "epoch": 3, "acc": 0.5,
             "lineage": [{"stage": "finetuning", "settings": {"model": "R8_SYN"}}]}  # fmt: skip
    path = save_checkpoint(tmp_path_factory.mktemp("whole") / "pair.t7", state)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return [path.read_bytes(), old.getvalue()], state


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
    value, deeper, wider = part[key], *(utils.build_model(name)[0] for name in ("R14_SYN", "R8_C100"))
    changed = chance.choice([
        part | {key: part[other], other: value},
        {name: part[name] for name in part if name != key},
        part | {key + "2": value},
        part | {key: value.flatten()[:-1]},
        part | {key: chance.choice([None, "text", 3, [1.0], value.cfloat(), value.bool()])},
        part | {key: chance.choice([value * float("nan"), value.double() + 1e39])},
        chance.choice([deeper, wider]).state_dict(),
        chance.choice([None, {}, [], "text", torch.ones(3)]),
    ])  # fmt: skip
    file = io.BytesIO()
    torch.save(state | {network: changed}, file, _use_new_zipfile_serialization=chance.random() < 0.5)
    return file.getvalue()


def test_damaged_files_are_refused_or_load(whole_files, tmp_path, request):
    files, state = whole_files
    chance, num_files = random.Random(0), 3000 if request.config.getoption("--long") else 300
    rnet, agent = utils.build_model("R8_SYN")
    rnet.load_state_dict(state["resnet"])
    agent.load_state_dict(state["agent"])
    path, original = tmp_path / "damaged.t7", fingerprint(rnet, agent)
    seconds, refused = [], 0

    def load(number):
        nonlocal refused
        which = chance.randrange(2)
        damaged = chance.random() < 0.8
        path.write_bytes(damage(files[which], chance) if damaged else change_contents(state, chance))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                utils.load_checkpoint(path, rnet, agent)
        except CheckpointError as error:
            refused += 1
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
    print(f"{num_files} files: {refused} refused, {num_files - refused} loaded, the slowest in "
          f"{max(seconds):.2f} s, {peak / 2**20:.0f} MiB at the peak")  # fmt: skip
    assert refused > num_files / 2 and max(seconds) < 10 and not peak > 2**31


def test_a_zip_bomb_is_refused_unread(whole_files, tmp_path):
    """The archive's pickle unpacks to 256 MiB of nothing."""
    path = tmp_path / "bomb.t7"
    with zipfile.ZipFile(io.BytesIO(whole_files[0][0])) as whole, zipfile.ZipFile(path, "w") as bomb:
        for member in whole.infolist():
            if member.filename.endswith("data.pkl"):
                bomb.writestr(member.filename, bytes(2**28), zipfile.ZIP_DEFLATED)
            else:
                bomb.writestr(member, whole.read(member))

    def refused():
        with pytest.raises(CheckpointError, match="would unpack to"):
            utils.load_checkpoint(path, *utils.build_model("R8_SYN"))

    assert not peak_memory(refused, "cpu") > 2**26


class CallsCode:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_not_called(tmp_path, new_format):
    path, trace = tmp_path / "evil.t7", tmp_path / "called"
    evil = CallsCode(os.mkdir, str(trace))
    torch.save({"resnet": evil}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"evil\.t7 .* asks for posix\.mkdir, which could run code"):
        utils.load_checkpoint(path, utils.build_model("R8_SYN")[0])
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"evil\.t7"):
        utils.load_checkpoint(path, utils.build_model("R8_SYN")[0])
    assert not trace.exists()
