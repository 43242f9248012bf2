"""Train as the notebook does and by the plain loop: the same accuracy and blocks?

    python tests/compare_training.py --model R20_SYN --seeds 0 1 2

The plain loop: fp32, images augmented one by one in DataLoader workers, the frozen ResNet masked, every
block of it computed for both policies; in finetuning every block for every image, too. Both run
blockdrop_training.ipynb's cells, policy training and finetuning, from the ResNet in cv/trained_rnet/ and,
where it lies there, the ResNet-8 of the data set; without stochastic depth. Printed are the figures on the
held-out images, and the mean differences with their standard errors.
"""

import argparse
import contextlib
import copy
import io
import math
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark_training import OneByOne
from running import run_cells

import utils
from models import inference
from models.data import Loader


class Masked:
    """Stands in for a `models.inference.Prepared`: every block is computed, none is shared."""

    def __init__(self, rnet, agent=None, precision="fp32", device=None):
        self.rnet = copy.deepcopy(rnet).eval()

    def __call__(self, x, policy):
        return self.rnet(x, policy)

    def under_each(self, x, policies):
        return [self.rnet(x, policy) for policy in policies]


class PlainLoader(torch.utils.data.DataLoader):
    """Stands in for a `utils.Loader` on the CPU: images augmented one by one in worker processes."""

    def __init__(self, dataset, batch_size, device, shuffle=False, workers=0):
        self.num_images = len(dataset)
        super().__init__(OneByOne(dataset), batch_size, shuffle, num_workers=2, generator=torch.Generator())


def plain_or_ours(dataset, batch_size, device, shuffle=False, workers=0):
    """Return the plain loader for training, ours for tests."""
    kind = PlainLoader if shuffle else Loader
    return kind(dataset, batch_size, device, shuffle, workers)


def held_out(args, seed: int, plain: bool) -> dict[str, float]:
    """Train with a seed; return the last epochs' figures on the held-out images."""
    cl_pace = math.ceil(utils.build_model(args.model)[0].num_blocks / args.epochs)
    settings = {
        "model": args.model, "batch_size": args.batch_size, "max_images": args.max_images, "seed": seed,
        "max_epochs_training": args.epochs, "max_epochs_finetuning": args.epochs, "cl_pace": cl_pace,
        "max_epochs_stochastic_depth": 0, "device": "cpu", "warmup_rnet": 0.3, "results_dir": "none",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        cv_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in (args.model, f"R8_{utils.parse_model(args.model).dataset}"):
            if (weights := Path("cv/trained_rnet", name)).exists():
                shutil.copytree(weights, cv_dir / "trained_rnet" / name, dirs_exist_ok=True)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if plain:
            settings |= {"precision": "fp32", "skip_dropped": False}
            stack.enter_context(mock.patch.object(inference, "prepare", Masked))
            stack.enter_context(mock.patch.object(utils, "Loader", plain_or_ours))
        found = run_cells("blockdrop_training", settings | {"cv_dir": str(cv_dir)})
    stages = {"policy training": found["policy_history"], "finetuning": found["finetuning_history"]}
    return {
        f"{stage}: {name}": history[-1][f"val_{key}"] * scale
        for stage, history in stages.items()
        for name, key, scale in (("accuracy (%)", "accuracy", 100), ("blocks", "sparsity", 1))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="R20_SYN")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=2, help="of each stage")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-images", type=int, default=None)
    args = parser.parse_args()
    matplotlib.use("agg")
    found = {way: [] for way in ("plain", "ours")}
    for seed in args.seeds:
        for way, runs in found.items():
            runs.append(held_out(args, seed, plain=way == "plain"))
            print(f"seed {seed}, {way}:", ", ".join(f"{k} {v:.2f}" for k, v in runs[-1].items()), flush=True)
    print(f"{args.model}, {args.epochs} epochs a stage, ours minus plain: mean and standard error")
    for name in found["plain"][0]:
        differences = [ours[name] - plain[name] for plain, ours in zip(*found.values(), strict=True)]
        error = utils.standard_error(torch.tensor(differences))
        print(f"  {name}: {np.mean(differences):+.2f} ± {error:.2f}")


if __name__ == "__main__":
    main()
