"""What the tests share: the repository's root, the notebooks' algorithm cells, data on hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("rnet_sole", "blockdrop_training", "blockdrop_inference")


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
def compiler():
    """Nothing; where torch.compile does not work, the test is skipped."""
    try:
        utils.compile_calls(torch.nn.ReLU(), torch.device("cpu"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def algorithm():
    """What the cells tagged `algorithm` of blockdrop_training.ipynb define, for 4 blocks."""
    notebook = nbformat.read(ROOT / "blockdrop_training.ipynb", as_version=4)
    code = notebook.cells[1].source if notebook.cells[1].cell_type == "code" else ""
    tagged = [c.source for c in notebook.cells if "algorithm" in c.metadata.get("tags", [])]
    namespace = {"num_blocks": 4, "cl_pace": 1}
    exec("\n".join([code, *tagged]), namespace)
    return SimpleNamespace(**{k: v for k, v in namespace.items() if not k.startswith("__")})
