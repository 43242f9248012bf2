"""How tests and benchmarks run a notebook without a kernel."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def run_cells(name: str, settings: dict) -> dict:
    """Run a notebook's code cells in this process, with other settings; return the variables they leave."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    variables = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, variables)
            if "parameters" in cell.metadata.get("tags", []):
                variables.update(settings)
    return variables
