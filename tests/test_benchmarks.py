"""The benchmarks run, on a small model and few images, and print what they are for."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = ("--model", "R8_SYN", "--batch-size", "16")


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        ("benchmark_training", (*SMALL, "--batches", "1"), "ratio: "),
        ("benchmark_blockdrop", (*SMALL, "--batches", "1"), "finetuning: "),
        ("benchmark_inference", ("--model", "R8_SYN", "--kept", "1", "--seconds", "0.01"), "plain sole / "),
        ("benchmark_scaling", (*SMALL, "--devices", "1", "2", "--batches", "1"), "| all | | | |"),
        (
            "compare_training",
            (*SMALL, "--epochs", "1", "--max-images", "300", "--seeds", "0", "1"),
            "finetuning: blocks: ",
        ),
    ],
)
def test_it_runs(name, arguments, printed):
    done = subprocess.run(
        [sys.executable, f"tests/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and printed in done.stdout and "Warning" not in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["benchmark_training", "benchmark_blockdrop"])
def test_an_epoch_too_short_is_said(name):
    done = subprocess.run(
        [sys.executable, f"tests/{name}.py", "--model", "R8_SYN", "--batch-size", "9000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and done.stderr.startswith("an epoch has 1 batches"), done.stderr
