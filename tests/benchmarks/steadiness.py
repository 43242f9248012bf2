"""Run the inference notebook again and again, quiet and beside a busy process: do its figures hold?

    python tests/benchmarks/steadiness.py --model R20_SYN --runs 3

Printed for each figure is its range over the runs, quiet and busy; for the ratio sole / BlockDrop also how
far busy runs lie from the quiet median, and for the break-even in blocks how often it lies in the range that
the first quiet run printed. Runs whose report says that the machine was busy are counted.
"""

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median

import papermill

ROOT = Path(__file__).resolve().parent.parent.parent


def keep_a_core_busy() -> None:
    while True:
        pass


@contextlib.contextmanager
def company(busy: bool):
    """Compute on one core beside what runs meanwhile, if `busy`."""
    process = multiprocessing.Process(target=keep_a_core_busy, daemon=True)
    if busy:
        process.start()
    try:
        yield
    finally:
        if busy:
            process.kill()


def run(settings: dict) -> dict:
    """Execute the notebook; return its report's numbers and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        papermill.execute_notebook(
            ROOT / "blockdrop_inference.ipynb",
            Path(folder, "out.ipynb"),
            settings | {"results_dir": folder},
            cwd=ROOT,
            progress_bar=False,
        )
        seconds = time.perf_counter() - start
        (path,) = Path(folder).glob("*.json")
        return json.loads(path.read_text(encoding="utf-8")) | {"notebook_seconds": seconds}


def figures(numbers: dict) -> dict[str, float]:
    """Return the figures of one run that depend on time, by name."""
    found = {"notebook (s)": numbers["notebook_seconds"]}
    for size in ("1", str(numbers["large_batch"])):
        times = numbers["times"][size]
        for name in ("sole", "blockdrop", "one_policy"):
            found[f"batch {size}: {name} (ms per image)"] = 1000 * times[name]["seconds"]
        found[f"batch {size}: sole / BlockDrop"] = times["sole"]["seconds"] / times["blockdrop"]["seconds"]
        found[f"batch {size}: break-even in blocks"] = numbers["break_even_blocks"][size][0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R20_SYN")
    parser.add_argument("--runs", type=int, default=3, help="of each kind, quiet and busy")
    parser.add_argument("--max-images", type=int, default=None)
    args = parser.parse_args()
    settings = {"model": args.model, "max_images": args.max_images}
    runs = {}
    for kind in ("quiet", "busy"):
        with company(kind == "busy"):
            runs[kind] = [run(settings) for _ in range(args.runs)]
    found = {kind: [figures(numbers) for numbers in several] for kind, several in runs.items()}
    print(f"{args.model}, {runs['quiet'][0]['machine']}; range over {args.runs} runs each, quiet and busy")
    for name in found["quiet"][0]:
        quiet, busy = ([row[name] for row in found[kind]] for kind in ("quiet", "busy"))
        words = f"{name}: {min(quiet):.3g} to {max(quiet):.3g}, {min(busy):.3g} to {max(busy):.3g}"
        if "sole / BlockDrop" in name:
            apart = max(abs(ratio / median(quiet) - 1) for ratio in busy)
            words += f"; busy runs up to {100 * apart:.0f} % from the quiet median"
        print(words)
    first, *others = runs["quiet"] + runs["busy"]
    for size, (_, low, high) in first["break_even_blocks"].items():
        inside = sum(low <= numbers["break_even_blocks"][size][0] <= high for numbers in others)
        of = f"{inside + 1} of {len(others) + 1} runs"
        print(f"batch {size}: break-even in blocks within {low:.1f} to {high:.1f} in {of}")
    for kind, several in runs.items():
        print(f"{kind}: {sum(bool(numbers['busy']) for numbers in several)} of {args.runs} reports warn")


if __name__ == "__main__":
    main()
