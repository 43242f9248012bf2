"""A penalty sweep: finetuning with several penalties, to see how accuracy and blocks trade off.

    python -m models.sweep R20_SYN --penalties -0.5 -2 -5 -15 -p max_epochs_finetuning 12

Each penalty runs `blockdrop_training.ipynb` from the policy trained last and the ResNet it was trained
on, with checkpoints of its own in `cv/penalties/<penalty>/`; a sweep that was interrupted goes on when
it is started again. What it found is written to `results/penalties/<model>.json`, which the notebook draws.
To take one of them, run the notebook with that penalty, the same settings and max_epochs_training 0: it
ends with the same pair.
"""

import argparse
import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import papermill

from models.checkpoints import newest_checkpoint, read_checkpoint, written_whole
from models.report import ROOT

FIGURES = ("accuracy", "sparsity", "policies")


def sweep(
    model: str,
    penalties: Sequence[float],
    settings: Mapping[str, object] | None = None,
    cv_dir: str | Path = "cv/",
    results_dir: str | Path = "results/",
) -> Path:
    """Finetune `model` with each penalty; return the JSON file with each one's held-out figures.

    `settings`: others of the notebook's, the same for all. FileNotFoundError without a trained ResNet
    and a trained policy in `cv_dir`, ValueError for a setting that the sweep makes itself.
    """
    settings = dict(settings or {})
    if own_settings := settings.keys() & {"model", "max_epochs_training", "penalty_finetuning", "cv_dir"}:
        raise ValueError(f"a sweep sets {' and '.join(sorted(own_settings))} itself: leave it out")
    if settings.get("max_epochs_finetuning") == 0:
        raise ValueError("max_epochs_finetuning is 0: a sweep needs 1 or more")
    start = {
        folder: newest_checkpoint(
            f"{cv_dir}/{folder}/{model}", prefix, f"train {model} with the notebooks first"
        )
        for folder, prefix in (("trained_rnet", "pk_"), ("trained_policy", "ckpt_"))
    }
    runs = []
    for penalty in penalties:
        own = Path(cv_dir, "penalties", f"{penalty:g}").resolve()
        for folder, path in start.items():
            shutil.rmtree(own / folder / model, ignore_errors=True)
            (own / folder / model).mkdir(parents=True)
            shutil.copy2(path, own / folder / model)
        given = {
            "model": model, "max_epochs_training": 0, "penalty_finetuning": penalty, "cv_dir": str(own),
        }  # fmt: skip
        papermill.execute_notebook(
            ROOT / "blockdrop_training.ipynb",
            own / f"{model}.ipynb",
            parameters=settings | given,
            cwd=Path.cwd(),
        )
        runs.append(
            found_in(newest_checkpoint(own / "finetuned" / model, "ckpt_", "finetuning left none"))
            | {"penalty": penalty}
        )
    path = Path(results_dir, "penalties", f"{model}.json")
    with written_whole(path) as file:
        file.write(json.dumps({"model": model, "runs": runs}, indent=1).encode() + b"\n")
    return path


def found_in(checkpoint: Path) -> dict[str, object]:
    """Return what a finetuned pair reached on the held-out images in its last epoch, and how."""
    pair = read_checkpoint(checkpoint)
    last = pair["history"][-1]
    figures = {name: last[f"val_{name}"] for name in FIGURES}
    return figures | {name: pair[name] for name in ("epoch", "seconds", "machine")}


def _value(text: str) -> object:
    """Read a setting as Python writes it; what is none of that is a name, such as bf16."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--penalties", type=float, nargs="+", default=(-0.5, -1, -2, -5))
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="settings"
    )
    parser.add_argument("--cv-dir", default="cv/", help="where checkpoints lie")
    parser.add_argument("--results-dir", default="results/", help="where what it found is written")
    args = parser.parse_args()
    settings = {name: _value(value) for name, value in args.settings}
    print("Written:", sweep(args.model, args.penalties, settings, args.cv_dir, args.results_dir))
