"""Train as the notebook does and by the plain loop: the same accuracy and blocks?

    python tests/benchmarks/accuracy.py --model R20_SYN --seeds 0 1 2

Ours runs blockdrop_training.ipynb, policy training and finetuning without stochastic depth. The plain loop
takes the notebook's steps from the same weights with the same settings, but in fp32, on images augmented one
by one in DataLoader workers, and every block of the ResNet is computed for every image. Printed are the
figures on the held-out images, and the mean differences with their standard errors.
"""

import argparse
import contextlib
import io
import tempfile
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from common import plain_loader
from running import run_cells

from models.lab.device import seed_everything
from models.lab.statistics import standard_error
from models.lab.training import figures, one_cycle


def train_ours(args, seed: int, cv_dir: str) -> SimpleNamespace:
    """Run the notebook; return the variables that it leaves."""
    settings = {
        "model": args.model, "batch_size": args.batch_size, "max_images": args.max_images, "seed": seed,
        "max_epochs_training": args.epochs, "max_epochs_finetuning": args.epochs, "curriculum": args.epochs,
        "max_epochs_stochastic_depth": 0, "device": "cpu", "cv_dir": cv_dir,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return SimpleNamespace(**run_cells("blockdrop_training", settings))


def train_plain(args, seed: int, nb: SimpleNamespace) -> dict[str, dict[str, float]]:
    """Train by the plain loop with the settings and functions of the notebook; return the last figures."""
    sampling = [
        {"penalty": nb.penalty[i], "alpha": nb.alpha[i], "temperature": nb.temperature[i], "beta": beta}
        for i, beta in enumerate((nb.beta, 0))
    ]
    rnet, agent = nb.networks_of(nb.origin, nb.features, nb.model, nb.device, nb.cv_dir, seed)
    loader = plain_loader(nb.trainloader.dataset, args.batch_size)
    seed_everything(seed, 1)
    optimizer, found = torch.optim.Adam(agent.parameters(), nb.lr_policy[0]), {}
    for epoch in range(args.epochs):
        cl_step = nb.decided_blocks(epoch, args.epochs, nb.num_blocks)
        rnet.eval()
        agent.train()
        for images, labels in loader:
            nb.policy_step(agent, rnet, optimizer, images, labels, "fp32", cl_step, sampling[0])
    found["policy training"] = nb.evaluate(
        {"resnet": rnet, "agent": agent}, nb.valloader, "fp32", nb.penalty[0], nb.num_blocks
    )

    steps = args.epochs * len(loader)
    optimizer_rnet, scheduler_rnet = nb.sgd(rnet, nb.lr_rnet, steps)
    optimizers = (optimizer_rnet, torch.optim.Adam(agent.parameters(), nb.lr_policy[1]))
    scheduler_agent = one_cycle(optimizers[1], nb.lr_policy[1], steps, nb.WARMUP_POLICY)
    for _ in range(args.epochs):
        rnet.train()
        agent.train()
        for images, labels in loader:
            nb.finetuning_step(rnet, agent, optimizers, images, labels, "fp32", False, sampling[1])
            scheduler_rnet.step()
            scheduler_agent.step()
    found["finetuning"] = nb.evaluate(
        {"resnet": rnet, "agent": agent}, nb.valloader, "fp32", nb.penalty[1], nb.num_blocks
    )
    return {stage: figures(stats, "val_") for stage, (stats, _) in found.items()}


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
        with tempfile.TemporaryDirectory() as cv_dir:
            nb = train_ours(args, seed, cv_dir)
            rows = {
                "ours": {
                    "policy training": nb.policy_training.history[-1],
                    "finetuning": nb.finetuning.history[-1],
                },
                "plain": train_plain(args, seed, nb),
            }
        for way, runs in found.items():
            runs.append({
                f"{stage}: {name}": row[key] * scale
                for stage, row in rows[way].items()
                for name, key, scale in (("accuracy (%)", "val_accuracy", 100), ("blocks", "val_sparsity", 1))
            })  # fmt: skip
            print(f"seed {seed}, {way}:", ", ".join(f"{k} {v:.2f}" for k, v in runs[-1].items()), flush=True)
    print(f"{args.model}, {args.epochs} epochs a stage, ours minus plain: mean and standard error")
    for name in found["plain"][0]:
        differences = [ours[name] - plain[name] for plain, ours in zip(*found.values(), strict=True)]
        error = standard_error(torch.tensor(differences))
        print(f"  {name}: {np.mean(differences):+.2f} ± {error:.2f}")


if __name__ == "__main__":
    main()
