"""The benchmarks run, on a small model and few images, and print what they are for."""

import math

import pytest
import torch
from benchmarks.common import peak_memory
from running import run_python


def run(name, arguments):
    small = ("--model", "R8_SYN", *arguments.split())
    return run_python(f"tests/benchmarks/{name}.py", *small, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("training", "--batch-size 16 --batches 1", "ratio: "),
        ("blockdrop", "--batch-size 16 --batches 1", "finetuning: "),
        ("inference", "--kept 1 --seconds 0.01", "| fp32 | BlockDrop | 1.0 |"),
        ("scaling", "--batch-size 16 --batches 1 --devices 1 2", "| all | | | |"),
        ("accuracy", "--batch-size 16 --epochs 1 --max-images 100 --seeds 0 1", "finetuning: blocks: "),
        ("deciding", "--model R20_SYN --blocks 2 1,3 --epochs 1 --max-images 100", "2 blocks for all"),
    ],
)
def test_it_runs(name, arguments, expected, request):
    if name in ("accuracy", "deciding") and not request.config.getoption("--long"):
        pytest.skip("takes half a minute: pytest --long")
    status, printed = run(name, arguments)
    assert status == 0 and expected in printed and "Warning" not in printed, printed


def test_peak_memory_sees_what_is_gone_again():
    used_before = [torch.ones(2**18) for _ in range(100)]  # free memory that the process keeps
    del used_before
    peak = peak_memory(lambda: torch.ones(2**24).sum(), "cpu")  # 64 MiB
    if math.isnan(peak):
        pytest.skip("the peak is known on Linux with the GNU C library only")
    assert 0.8 * 2**26 < peak < 1.5 * 2**26
