"""A penalty sweep: finetuning with several penalties shows how accuracy and blocks trade off.

    python -m models.lab.sweep R20_SYN --penalties -0.5 -2 -5 -15 -p max_epochs_finetuning 12

Each penalty runs `blockdrop_training.ipynb` from the policy trained last, with checkpoints of its own in
`cv/penalties/<penalty>/`; an interrupted sweep goes on when it is started again. The figures go to
`results/penalties/<model>.json`, which the notebook draws. To take one of the pairs, run the notebook
with that penalty, the same settings and max_epochs_training 0.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import papermill

from models.lab import stages
from models.lab.checkpoints import newest_checkpoint
from models.lab.files import written_whole
from models.lab.settings import as_meant, names_of, refuse_unknown

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOK = "blockdrop_training"
OWN = (
    "model",
    "start_from",
    "max_epochs_training",
    "penalty",
    "cv_dir",
)  # settings that a sweep makes itself


def sweep(
    model: str,
    penalties: Sequence[float],
    settings: Mapping[str, object] | None = None,
    cv_dir: str | Path = "cv/",
    results_dir: str | Path = "results/",
) -> Path:
    """Finetune `model` with each penalty; return the JSON file with each one's held-out figures.

    `settings`: others of the notebook's, the same for all. FileNotFoundError without a trained ResNet
    and a trained policy, ValueError for a wrong setting.
    """
    settings = dict(settings or {})
    refuse_unknown(settings, names_of(NOTEBOOK))
    if own := [name for name in OWN if name in settings]:
        raise ValueError(f"a sweep sets {' and '.join(own)} itself: leave it out")
    settings = {name: as_meant(name, value) for name, value in settings.items()}
    if settings.get("max_epochs_finetuning") == 0:
        raise ValueError("max_epochs_finetuning is 0: a sweep needs 1 or more")
    cv_dir, results_dir = Path(cv_dir).expanduser(), Path(results_dir).expanduser()
    sole = stages.find(cv_dir, "trained_rnet", model, stages.sole_hint(model))
    policy = stages.find(cv_dir, "trained_policy", model, f"train a policy of {model} first")
    runs = []
    for penalty in penalties:
        as_meant("penalty", penalty)
        own = Path(cv_dir, "penalties", f"{penalty:g}").resolve()
        if sole is not None:
            (own / "trained_rnet" / model).mkdir(parents=True, exist_ok=True)
            shutil.copy2(sole, own / "trained_rnet" / model)
        given = {"model": model, "start_from": str(policy.resolve()), "max_epochs_training": 0,
                 "penalty": penalty, "cv_dir": str(own)}  # fmt: skip
        out = own / f"{model}.ipynb"
        papermill.execute_notebook(ROOT / f"{NOTEBOOK}.ipynb", out, settings | given, cwd=ROOT)
        runs.append({"penalty": penalty} | figures_of(newest_checkpoint(own / "finetuned" / model, "ckpt_")))
    path = results_dir / "penalties" / f"{model}.json"
    with written_whole(path) as file:
        file.write(json.dumps({"model": model, "runs": runs}, indent=1).encode() + b"\n")
    return path


def figures_of(checkpoint: Path) -> dict[str, object]:
    """Return what a finetuned pair reached on the held-out images in its last epoch, and its cost."""
    pair = stages.load(checkpoint)
    figures = {name: pair.history[-1][f"val_{name}"] for name in ("accuracy", "sparsity", "policies")}
    own = pair.lineage[-1]
    return figures | {"epoch": len(pair.history), "seconds": own["seconds"], "machine": own["machine"]}


def _plain_number(argument: str) -> str:
    """Write a number such as -5e-1 without exponent: argparse would take it for an option."""
    try:
        return f"{float(argument):f}"
    except ValueError:
        return argument


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--penalties", type=float, nargs="+", default=(-0.5, -1, -2, -5))
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="settings"
    )
    parser.add_argument("--cv-dir", default="cv/", help="where checkpoints are")
    parser.add_argument("--results-dir", default="results/", help="where the figures are written")
    args = parser.parse_args([_plain_number(a) if a.startswith("-") else a for a in sys.argv[1:]])
    print("Written:", sweep(args.model, args.penalties, dict(args.settings), args.cv_dir, args.results_dir))
