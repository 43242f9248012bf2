"""What the tests share: the repository's root, the notebooks' step functions, data on hand."""

import os
import sys

import pytest
import torch
from running import ROOT, step_functions

NOTEBOOKS = ("rnet_sole", "blockdrop_training", "blockdrop_inference")
sys.path.insert(0, str(ROOT))
# In networks as small as the tests', threads wait for each other longer than they compute.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels then run on the CPU


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="more damaged files and kills, and deep networks")
    parser.addoption("--browser", action="store_true", help="the notebooks in JupyterLab, in Chromium")


@pytest.fixture
def at_root(monkeypatch):
    """Run in the repository's root, as the notebooks do."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def cifar10():
    """The data folder, where CIFAR-10 is in it; else the test is skipped."""
    if not (ROOT / "data" / "cifar-10-batches-py" / "test_batch").is_file():
        pytest.skip("CIFAR-10 is not in data/: run a notebook on C10 once to download it")
    return ROOT / "data"


@pytest.fixture(scope="session")
def algorithm():
    """The functions of the cells tagged `algorithm` in blockdrop_training.ipynb."""
    return step_functions("blockdrop_training")
