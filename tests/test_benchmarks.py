"""The benchmarks run, on a small model and few images, and print what they are for."""

import math
import os
import subprocess
import sys

import pytest
import torch
from benchmarks.common import peak_memory
from conftest import ROOT

SMALL = ("--model", "R8_SYN", "--batch-size", "16")


def run(name, arguments):
    return subprocess.run(
        [sys.executable, f"tests/benchmarks/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        ("training", (*SMALL, "--batches", "1"), "ratio: "),
        ("blockdrop", (*SMALL, "--batches", "1"), "finetuning: "),
        (
            "blockdrop",
            ("--model", "R8_SYN", "--batches", "1", "--epochs-at", "16", "32"),
            "batch   32, finetuning",
        ),
        (
            "inference",
            ("--model", "R8_SYN", "--kept", "1", "--seconds", "0.01"),
            "| fp32 | BlockDrop | 1.0 |",
        ),
        ("scaling", (*SMALL, "--devices", "1", "2", "--batches", "1"), "| all | | | |"),
        (
            "accuracy",
            (*SMALL, "--epochs", "1", "--max-images", "100", "--seeds", "0", "1"),
            "finetuning: blocks: ",
        ),
        (
            "deciding",
            ("--blocks", "2", "1,3", "--epochs", "1", "--max-images", "100"),
            "points against 2 blocks for all",
        ),
    ],
)
def test_it_runs(name, arguments, printed):
    done = run(name, arguments)
    assert done.returncode == 0 and printed in done.stdout, done.stderr
    assert "Warning" not in done.stdout + done.stderr


def test_an_epoch_too_short_is_said():
    done = run("blockdrop", ("--model", "R8_SYN", "--batch-size", "9000"))
    assert done.returncode == 1 and done.stderr.startswith("an epoch has 1 batches"), done.stderr


def test_peak_memory_sees_what_is_gone_again():
    used_before = [torch.ones(2**18) for _ in range(100)]  # free memory that the process keeps
    del used_before
    peak = peak_memory(lambda: torch.ones(2**24).sum(), "cpu")  # 64 MiB
    if math.isnan(peak):
        pytest.skip("the peak is known on Linux with the GNU C library only")
    assert 0.8 * 2**26 < peak < 1.5 * 2**26
