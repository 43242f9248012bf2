"""What the tests share: options, one thread, the repository's root, no network."""

import os
import sys
import urllib.error

import pytest
import torch
from running import ROOT

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


@pytest.fixture
def offline(monkeypatch):
    """No data and no weights can be downloaded."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
