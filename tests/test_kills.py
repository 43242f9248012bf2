"""Trainings killed at random moments and run again end as if nothing had happened, to the bit.

`pytest tests/test_kills.py --long` kills each stage 20 times, otherwise once. The kill is SIGKILL: the
process can do nothing about it. Every third kill falls while a checkpoint is written: the first one of its
folder, the next time the second, the third, the final one.
"""

import contextlib
import io
import multiprocessing
import random
import shutil
import signal
import time

import pytest
from running import ROOT, run_cells

import utils

NUM_KILLS, NUM_KILLS_LONG = 1, 20
SMALL = {"model": "R8_SYN", "device": "cpu", "max_images": 240, "batch_size": 24, "seed": 1}
BLOCKDROP = SMALL | {
    "max_epochs_stochastic_depth": 0, "cl_pace": 3, "warmup_rnet": 0.5, "warmup_policy": 0.5,
}  # fmt: skip
STAGES = {
    "trained_rnet": ("rnet_sole", SMALL | {"epochs": 3, "averaging": 0.67}),
    "trained_policy": (
        "blockdrop_training",
        BLOCKDROP | {"max_epochs_training": 3, "max_epochs_finetuning": 0},
    ),
    # Both stages, so that a kill may fall in one, in the other or between them.
    "finetuned": (
        "blockdrop_training",
        BLOCKDROP | {"max_epochs_training": 2, "max_epochs_finetuning": 3, "averaging": 0.34},
    ),
}
# Each training is a process of its own, forked from one that has imported everything.
processes = multiprocessing.get_context("forkserver")


def run_silently(name, settings):
    """Run a notebook; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_cells(name, settings)


def start(stage, cv_dir):
    name, settings = STAGES[stage]
    paths = {"cv_dir": str(cv_dir), "data_dir": str(ROOT / "data")}
    process = processes.Process(target=run_silently, args=(name, settings | paths))
    process.start()
    return process


def wait_for_a_file_being_written(folder, number, process):
    """Return when the folder's checkpoint of that number is being written, or the process has ended."""
    seen = set()
    while process.is_alive() and len(seen) < number:
        seen.update(folder.glob(".*.tmp"))
        time.sleep(0.0005)


def weights(cv_dir, stage):
    """The fingerprint of the checkpoint that a finished stage leaves."""
    (path,) = [p for p in (cv_dir / stage / "R8_SYN").glob("*.t7") if p.name != "last.t7"]
    rnet, agent = utils.build_model("R8_SYN")
    trained = (
        {"resnet": rnet, "agent": agent}
        if stage == "finetuned"
        else ({"resnet": rnet} if stage == "trained_rnet" else {"agent": agent})
    )
    utils.load_checkpoint(path, trained.get("resnet"), trained.get("agent"))
    return utils.fingerprint(*trained.values())


def prepared(cv_dir, stage, sole):
    """Return an empty `cv_dir`, with the sole ResNet of another one where the stage starts from it."""
    shutil.rmtree(cv_dir, ignore_errors=True)
    if stage != "trained_rnet":
        shutil.copytree(sole / "trained_rnet", cv_dir / "trained_rnet")
    return cv_dir


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """All stages, never killed: the folder, with one for each, and the seconds that each took."""
    processes.set_forkserver_preload(["utils", "matplotlib.pyplot", "models.inference", "running"])
    folder, seconds = tmp_path_factory.mktemp("uninterrupted"), {}
    for stage in STAGES:
        for run in ("warm", "timed"):
            cv_dir = prepared(folder / stage, stage, folder / "trained_rnet")
            begin = time.perf_counter()
            process = start(stage, cv_dir)
            process.join()
            assert process.exitcode == 0, run
            seconds[stage] = time.perf_counter() - begin
    return folder, seconds


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path, request, stage):
    whole, seconds = uninterrupted
    expected = weights(whole / stage, stage)
    chance = random.Random(stage)
    num_kills = NUM_KILLS_LONG if request.config.getoption("--long") else NUM_KILLS
    killed, loaded, number = 0, 0, -1
    while killed < num_kills:  # one that ends before its kill doesn't count
        number += 1
        cv_dir = prepared(tmp_path / str(number), stage, whole / "trained_rnet")
        folder = cv_dir / stage / "R8_SYN"
        process = start(stage, cv_dir)
        if number % 3 == 2:
            # One after each of three epochs, the second and third in place of the one before; the final one.
            wait_for_a_file_being_written(folder, 1 + number // 3 % 4, process)
        else:
            time.sleep(chance.uniform(0, seconds[stage]))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for path in cv_dir.rglob("*.t7"):
            utils.load_checkpoint(path)
            loaded += 1
        process = start(stage, cv_dir)
        process.join()
        assert process.exitcode == 0 and weights(cv_dir, stage) == expected
        assert not any(folder.glob(".*.tmp"))
    print(f"{stage}: killed {killed} times, {loaded} checkpoints found, all loaded, all ended the same")
