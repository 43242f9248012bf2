"""How tests and benchmarks run a notebook without a kernel, its step functions alone, and other processes."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("rnet_sole", "blockdrop_training", "blockdrop_inference")


@functools.cache
def read_notebook(name: str) -> nbformat.NotebookNode:
    """Return a notebook, which is not to be changed."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(name: str, tag: str | None = None) -> list:
    """Return a notebook's code cells, all of them or those with a tag."""
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def run_cells(name: str, settings: dict, times: int = 1, again_after: tuple = ()) -> dict:
    """Run a notebook's code cells in this process, with other settings; return the variables they leave.

    `times`: how often each cell runs before the next one. `again_after`: exceptions after which a cell
    runs again, as often as they happen, and before it the first cell that makes networks.
    """
    variables = {}
    network = next((cell for cell in code_cells(name) if "\nrnet" in f"\n{cell.source}"), None)
    for cell in code_cells(name):
        done = 0
        while done < times:
            try:
                exec(cell.source, variables)
                done += 1
            except again_after:
                exec(network.source, variables)
            plt.close("all")  # as a notebook does once they are drawn
        if "parameters" in cell.metadata.get("tags", []):
            variables.update(settings)
    return variables


def step_functions(name: str, **replaced: object) -> SimpleNamespace:
    """Return what a notebook's imports and its cells tagged `algorithm` define, without running the rest.

    `replaced`: functions that the others are to call instead of the notebook's own.
    """
    variables = {}
    for cell in (code_cells(name)[0], *code_cells(name, "algorithm")):
        exec(cell.source, variables)
    variables.update(replaced)
    return SimpleNamespace(**{key: value for key, value in variables.items() if not key.startswith("__")})


def run_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Run Python in a process of its own; return its exit status and what it printed, errors included."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout
