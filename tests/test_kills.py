"""Trainings killed at random moments and run again end as if nothing had happened, to the bit."""

import contextlib
import io
import multiprocessing
import random
import signal
import time

import pytest
from running import ROOT, run_cells
from test_networks import networks

from models.lab import stages
from models.lab.checkpoints import fingerprint

SMALL = {
    "model": "R8_SYN", "device": "cpu", "max_images": 240, "batch_size": 24, "averaging": 0.67,
    "small_crops": 0.5, "data_dir": str(ROOT / "data"),
}  # fmt: skip
# A kill may fall in a stage or between two. BlockDrop's training starts from the ResNet that ships.
NOTEBOOKS = {
    "rnet_sole": SMALL | {"epochs": 3},
    "blockdrop_training": SMALL | {"max_epochs_stochastic_depth": 1, "max_epochs_training": 2,
                                   "max_epochs_finetuning": 3, "curriculum": 2},
}  # fmt: skip
# Each training is a process of its own, forked from one that has imported everything.
processes = multiprocessing.get_context("forkserver")
PRELOADED = ["pytest", "nbformat", "utils", "models.lab.plots", "models.lab.training", "models.lab.settings"]


def run_silently(name, cv_dir):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_cells(name, NOTEBOOKS[name] | {"cv_dir": str(cv_dir)})


def start(function, *args):
    process = processes.Process(target=function, args=args)
    process.start()
    return process


def finish(name, cv_dir):
    """Run a training to its end; return the weights."""
    process = start(run_silently, name, cv_dir)
    process.join()
    assert process.exitcode == 0 and not any(cv_dir.rglob(".*.tmp"))
    return weights(cv_dir)


def wait_for_a_file_being_written(cv_dir, number, process):
    """Return when the checkpoint of that number is being written, or the process has ended."""
    seen = set()
    while process.is_alive() and len(seen) < number:
        seen.update(cv_dir.rglob(".*.tmp"))
        time.sleep(0.0005)


def weights(cv_dir):
    """Return each final checkpoint's name and its networks' fingerprint; all checkpoints load."""
    found = {}
    for path in cv_dir.rglob("*.t7"):
        pair = networks()
        stages.load_networks(stages.load(path), None, *pair)
        if path.name != "last.t7":
            found[path.relative_to(cv_dir)] = fingerprint(*pair)
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_killed_and_resumed_is_uninterrupted_to_the_bit(at_root, tmp_path, request, name):
    processes.set_forkserver_preload(PRELOADED)
    start(time.sleep, 0).join()  # the process that others are forked from starts
    begin = time.perf_counter()
    expected = finish(name, tmp_path / "whole")
    seconds = time.perf_counter() - begin
    assert len(expected) == (1 if name == "rnet_sole" else 3)
    chance, killed, number, loaded = random.Random(name), 0, 0, 0
    while killed < (30 if request.config.getoption("--long") else 1):  # one that ends before doesn't count
        cv_dir = tmp_path / str(number)
        process = start(run_silently, name, cv_dir)
        if number % 3 == 2:  # one of the checkpoints, each in its turn, is half written
            wait_for_a_file_being_written(cv_dir, 1 + number // 3 % 10, process)
        else:
            time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        number += 1
        weights(cv_dir)
        loaded += len(list(cv_dir.rglob("*.t7")))
        assert finish(name, cv_dir) == expected
    print(f"{name}: killed {killed} times, {loaded} checkpoints found, all loaded, all ended the same")
