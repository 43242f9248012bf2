"""A penalty sweep: finetuning with several penalties shows how accuracy and blocks trade off.

    python -m models.lab.sweep R20_SYN --penalties -0.5 -2 -5 -15 -p max_epochs_finetuning 12

Each penalty runs `blockdrop_training.ipynb` from the policy trained last, with checkpoints of its own in
`cv/penalties/<penalty>/`; with --rivals, the ResNet is also finetuned for one policy of equal FLOPs, in
`cv/penalties/<penalty>_one_policy/`. An interrupted sweep goes on when it is started again. The figures go to
`results/penalties/<model>.json`. To take one of the pairs, run the notebook with its penalty and settings.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import utils
from models.lab import rivals, stages
from models.lab.checkpoints import read_checkpoint
from models.lab.files import ROOT, explained, written_whole
from models.lab.settings import as_meant, names_of, refuse_unknown

OWN = ("model", "recipe", "start_from", "max_epochs_training", "penalty", "cv_dir")  # a sweep sets them


def sweep(
    model: str,
    penalties: Sequence[float],
    settings: Mapping[str, object],
    cv_dir: str | Path = "cv/",
    results_dir: str | Path = "results/",
    with_rivals: bool = False,
) -> Path:
    """Finetune `model` with each penalty; return the JSON file with what each one reached.

    `settings`: others of the notebook's, the same for all. FileNotFoundError without a trained policy,
    ValueError for a wrong setting.
    """
    refuse_unknown(settings, names_of(rivals.NOTEBOOK))
    settings = {name: as_meant(name, value) for name, value in settings.items()}
    if own := [name for name in OWN if name in settings]:
        raise ValueError(f"a sweep sets {' and '.join(own)} itself: leave it out")
    penalties = [as_meant("penalty", penalty)[0] for penalty in penalties]
    if settings.get("max_epochs_finetuning") == 0:
        raise ValueError("max_epochs_finetuning is 0: a sweep needs 1 or more")
    cv_dir, results_dir = Path(cv_dir).expanduser(), Path(results_dir).expanduser()
    few = f"_{settings['max_images']}images" if settings.get("max_images") else ""
    path = results_dir / "penalties" / f"{model}{few}.json"
    with explained(path.parent):  # now, not after hours
        path.parent.mkdir(parents=True, exist_ok=True)
    data_dir = str(ROOT / settings.get("data_dir", "data"))  # as the notebook, which runs there
    policy = stages.find(cv_dir, "trained_policy", model, f"train a policy of {model} first")
    given = settings | {"start_from": str(policy.resolve()), "max_epochs_training": 0}
    runs = []
    for penalty in penalties:
        folders = [cv_dir / "penalties" / f"{penalty:g}{ending}" for ending in ("", "_one_policy")]
        pair = rivals.run_training(model, given | {"penalty": penalty}, folders[0], cv_dir)
        _, flops = rivals.heldout_policies(model, pair, data_dir)
        runs.append({"penalty": penalty, **figures_of(pair), "flops": flops})
        if with_rivals:
            file = rivals.finetune(model, pair, "equal_flops", cv_dir, data_dir, folders[1])
            rnet, agent = utils.build_model(model)
            stages.load(file, rnet, agent)
            one = rivals.policy_of(agent)[None]
            flops = utils.count_flops(rnet, one).item()
            runs[-1]["one_policy"] = figures_of(file) | {"flops": flops}
    with written_whole(path) as file:
        file.write(json.dumps({"model": model, "runs": runs}, indent=1).encode() + b"\n")
    return path


def figures_of(checkpoint: Path) -> dict[str, object]:
    """Return what a finetuned pair reached, held out in its last epoch and in the test."""
    found = read_checkpoint(checkpoint)
    last = found["history"][-1]
    figures = {name: last[f"val_{name}"] for name in ("accuracy", "sparsity", "policies")}
    return figures | {"test_accuracy": found["acc"], "epoch": len(found["history"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--penalties", type=float, nargs="+", default=(-0.5, -1, -2, -5), help="like -0.5 -2")
    parser.add_argument("--rivals", action="store_true", help="finetune for one policy of equal FLOPs, too")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="settings"
    )
    parser.add_argument("--cv-dir", default="cv/", help="where checkpoints are")
    parser.add_argument("--results-dir", default="results/", help="where the figures are written")
    args = parser.parse_args()
    settings = dict(args.settings)
    print("Written:", sweep(args.model, args.penalties, settings, args.cv_dir, args.results_dir, args.rivals))
