"""How tests and benchmarks run a notebook without a kernel, or its step functions alone."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def run_cells(name: str, settings: dict, times: int = 1, again_after: tuple = ()) -> dict:
    """Run a notebook's code cells in this process, with other settings; return the variables they leave.

    `times`: how often each cell runs before the next one. `again_after`: exceptions after which a cell
    runs again, as often as they happen.
    """
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    variables = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            done = 0
            while done < times:
                try:
                    exec(cell.source, variables)
                    done += 1
                except again_after:
                    pass
                plt.close("all")  # as a notebook does once they are drawn
            if "parameters" in cell.metadata.get("tags", []):
                variables.update(settings)
    return variables


def step_functions(name: str, **replaced: object) -> SimpleNamespace:
    """Return what a notebook's imports and its cells tagged `algorithm` define, without running the rest.

    `replaced`: functions that the others are to call instead of the notebook's own.
    """
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    imports = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    tagged = [cell.source for cell in notebook.cells if "algorithm" in cell.metadata.get("tags", [])]
    variables = {}
    exec("\n".join([imports, *tagged]), variables)
    variables.update(replaced)
    return SimpleNamespace(**{key: value for key, value in variables.items() if not key.startswith("__")})
