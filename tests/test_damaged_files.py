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
import zlib

import pytest
import torch

import utils

NUM_FILES, NUM_FILES_LONG = 300, 3000


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """The bytes of a finetuned pair as we save it and as PyTorch saved it before 1.6, and its contents."""
    torch.manual_seed(0)
    rnet, agent = utils.build_model("R8_SYN")
    state = {"resnet": rnet.state_dict(), "agent": agent.state_dict(), "epoch": 3, "acc": 0.5,
             "settings": {"model": "R8_SYN"}}  # fmt: skip
    path = tmp_path_factory.mktemp("whole") / "pair.t7"
    utils.save_checkpoint(path, state)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return [path.read_bytes(), old.getvalue()], state


def flip_bits(data, chance):
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 50])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data, chance):
    """Cut near the start, near the end, anywhere, or beside one of a zip file's records, if it is one."""
    records = [found.start() for found in re.finditer(rb"PK[\x01-\x08]{2}", data)] or [2]
    ends = (0, 1, 4, chance.randrange(len(data)), len(data) - chance.randrange(1, 200),
            chance.choice(records) + chance.randrange(-1, 5))  # fmt: skip
    return data[: max(0, chance.choice(ends))]


def cut_out(data, chance):
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 5000) :]


def overwrite(data, chance):
    start, length = chance.randrange(len(data)), chance.randrange(1, 300)
    return data[:start] + chance.randbytes(length) + data[start + length :]


def change_contents(state, chance):
    """Save contents that are no longer right: keys, shapes, types, values."""
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    part = state[chance.choice(["resnet", "agent"])]
    key, other = chance.sample(list(part), 2)
    match chance.randrange(8):
        case 0:
            part[key], part[other] = part[other], part[key]
        case 1:
            del part[key]
        case 2:
            part[key + "2"] = part[key]
        case 3:
            part[key] = part[key].flatten()[:-1]
        case 4:
            part[key] = chance.choice([None, "text", 3, [1.0], part[key].cfloat(), part[key].bool()])
        case 5:
            part[key] = part[key] * float("nan") if chance.random() < 0.5 else part[key].double() + 1e39
        case 6:
            model = chance.choice(["R14_SYN", "R8_C100"])
            state["resnet"] = utils.build_model(model)[0].state_dict()
        case 7:
            state[chance.choice(["resnet", "agent"])] = chance.choice([None, {}, [], "text", torch.ones(3)])
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=chance.random() < 0.5)
    return file.getvalue()


def test_damaged_files_are_refused_or_load(whole_files, tmp_path, request):
    files, state = whole_files
    chance = random.Random(0)
    num_files = NUM_FILES_LONG if request.config.getoption("--long") else NUM_FILES
    rnet, agent = utils.build_model("R8_SYN")
    rnet.load_state_dict(state["resnet"])
    agent.load_state_dict(state["agent"])
    path = tmp_path / "damaged.t7"
    original = utils.fingerprint(rnet, agent)
    seconds, refused = [], 0

    def load(number):
        nonlocal refused
        change = chance.choice([flip_bits, cut, cut_out, overwrite, None])
        which = chance.randrange(len(files))
        path.write_bytes(change(files[which], chance) if change else change_contents(state, chance))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                utils.load_checkpoint(path, rnet, agent)
        except utils.CheckpointError as error:
            refused += 1
            assert str(path) in str(error), number
            assert utils.fingerprint(rnet, agent) == original, number
        else:
            assert all(p.isfinite().all() for p in (*rnet.parameters(), *agent.parameters())), number
            if change and which == 0:  # our files have checksums; those from before PyTorch 1.6 have none
                assert utils.fingerprint(rnet, agent) == original, number
            rnet.load_state_dict(state["resnet"])
            agent.load_state_dict(state["agent"])
        seconds.append(time.perf_counter() - start)

    peak = utils.peak_memory(lambda: [load(number) for number in range(num_files)], "cpu")
    print(
        f"{num_files} files: {refused} refused, {num_files - refused} loaded, slowest {max(seconds):.2f} s, "
        f"{peak / 2**20:.0f} MiB at the peak"
    )
    assert refused > num_files / 2 and max(seconds) < 10 and not peak > 2**31


def test_a_zip_bomb_is_refused_unread(whole_files, tmp_path):
    """The archive's pickle unpacks to 4 GiB of nothing."""
    path = tmp_path / "bomb.t7"
    with zipfile.ZipFile(io.BytesIO(whole_files[0][0])) as whole, zipfile.ZipFile(path, "w") as bomb:
        for member in whole.infolist():
            if not member.filename.endswith("data.pkl"):
                bomb.writestr(member, whole.read(member))
            else:
                name = member.filename
        with bomb.open(zipfile.ZipInfo(name), "w", force_zip64=True) as file:
            file._compressor, file._zinfo.compress_type = zlib.compressobj(9, zlib.DEFLATED, -15), 8
            for _ in range(4):
                file.write(bytes(2**28))

    def refused():
        with pytest.raises(utils.CheckpointError, match="would unpack to"):
            utils.load_checkpoint(path, *utils.build_model("R8_SYN"))

    assert not utils.peak_memory(refused, "cpu") > 2**26


class CallsCode:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [open, os.system, os.mkdir])
@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_not_called(tmp_path, new_format, function):
    path, trace = tmp_path / "evil.t7", tmp_path / "called"
    args = {open: (str(trace), "w"), os.system: (f"touch {trace}",), os.mkdir: (str(trace),)}[function]
    evil = CallsCode(function, *args)
    torch.save({"resnet": evil}, path, _use_new_zipfile_serialization=new_format)
    name = rf"{function.__module__}\.{function.__name__}"
    with pytest.raises(utils.CheckpointError, match=f"asks for .*{name}, .* could run code"):
        utils.load_checkpoint(path, utils.build_model("R8_SYN")[0])
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(utils.CheckpointError, match=r"evil\.t7"):
        utils.load_checkpoint(path, utils.build_model("R8_SYN")[0])
    assert not trace.exists()
