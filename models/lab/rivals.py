"""BlockDrop's rivals: smaller sole ResNets, and one policy for all images, its ResNet finetuned for it alone.

    python -m models.lab.rivals R20_SYN

trains the second kind. Two policies are made of a pair's: `most_used` is what most held-out images get;
`equal_flops` keeps the blocks that held-out images keep most often, as many as BlockDrop's FLOPs allow, its
policy network counted. The third, `every_block`, gives the sole ResNet as many epochs as BlockDrop's. For
each, `blockdrop_training.ipynb` finetunes the ResNet as the pair was finetuned, from the same weights, for as
many epochs, with a policy network that always gives this policy. The pairs go to
`cv/one_policy/<kind>/finetuned/<model>/`, where `blockdrop_inference.ipynb` finds them.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import utils
from models import inference
from models.lab import data, stages
from models.lab.checkpoints import CheckpointError, newest_checkpoint, save_checkpoint
from models.lab.device import choose_device
from models.lab.files import ROOT
from models.lab.names import parse_model
from models.lab.settings import names_of
from models.policy import Policy, greedy_policy
from models.resnet import FlatResNet

NOTEBOOK = "blockdrop_training"
KINDS = {
    "most_used": "most used policy, finetuned", "equal_flops": "equal FLOPs, finetuned",
    "every_block": "every block, finetuned",
}  # fmt: skip
CERTAIN = 10.0  # logit of a block that is always kept; dropped: the same, negative
ALPHA = 1 - 1e-6  # sampled policies are this policy, too


class Rival(NamedTuple):
    """A network that BlockDrop is compared with."""

    model: str
    stage: stages.Stage
    rnet: FlatResNet
    policy: Tensor | None  # (K,), the one for all images; None: a sole ResNet, every block kept


def find_rivals(model: str, pair: stages.Stage, sole: stages.Stage, cv_dir: str | Path) -> dict[str, Rival]:
    """Return the rivals in `cv_dir` and among those that ship, by name: sole ResNets by depth, then policies.

    Left out, and named, are files that can't be read, networks that saw other images than the sole ResNet,
    `sole`, and policies whose ResNet was not finetuned as the pair's was, from the same weights.
    """
    name, other = parse_model(model), stages.sole_entry(sole.lineage, model)
    depths = range(8, name.depth, 6) if name.dataset != "ImgNet" else ()
    places = {f"R{depth}_{name.dataset}": ("trained_rnet", f"R{depth}_{name.dataset}") for depth in depths}
    places |= {label: (f"one_policy/{kind}/finetuned", model) for kind, label in KINDS.items()}
    rivals = {}
    for label, (folder, its_model) in places.items():
        is_finetuned = its_model == model  # for one policy; else a smaller sole ResNet
        try:
            path = stages.find(cv_dir, folder, its_model)
            if path is None:
                continue
            rnet, agent = utils.build_model(its_model)
            stage = stages.load(path, rnet, agent if is_finetuned else None)
        except CheckpointError as error:
            print(f"Left out: {error}")
            continue
        own = stages.sole_entry(stage.lineage, its_model)
        before = [entry for entry in stage.lineage if entry["stage"] != "finetuning"]
        if is_finetuned and any(entry not in pair.lineage for entry in before):
            print(f"Left out: {path} started from other weights than {pair.path}")
        elif is_finetuned and _finetunings(stage) != _finetunings(pair):
            print(f"Left out: {path} was finetuned with other settings than {pair.path}")
        elif own and other and _images_of(own) != _images_of(other):
            print(f"Left out: {path} was trained on other images than {sole.path}")
        else:
            policy = policy_of(agent) if is_finetuned else None
            rivals[label] = Rival(its_model, stage, rnet, policy)
    return rivals


def _images_of(entry: Mapping) -> tuple:
    """Return which images a training has seen; older files name the held-out share."""
    return entry["settings"].get("max_images"), entry["settings"].get("holdout", data.HOLDOUT)


def _finetunings(stage: stages.Stage) -> list[dict]:
    """Return the settings of each finetuning, but for those that a single policy needs otherwise.

    Older files also hold what are constants now, and not `deterministic`.
    """
    settings = [entry["settings"] for entry in stage.lineage if entry["stage"] == "finetuning"]
    names = {*names_of(NOTEBOOK), "epochs"} - {"lr_policy", "alpha", "deterministic"}
    return [{name: each.get(name) for name in names} for each in settings]


def run_training(model: str, settings: Mapping[str, object], out: Path, cv_dir: Path) -> Path:
    """Run the training notebook with checkpoints in `out`; return the pair's file.

    The sole ResNet, for a start without a ResNet, is that in `cv_dir`.
    """
    import papermill  # here: it takes two seconds, and the inference notebook reads rivals without it

    folder = out / "trained_rnet" / model
    folder.mkdir(parents=True, exist_ok=True)
    if sole := stages.find(cv_dir, "trained_rnet", model):
        shutil.copy2(sole, folder)
    given = {**settings, "model": model, "cv_dir": str(out.resolve())}
    papermill.execute_notebook(ROOT / f"{NOTEBOOK}.ipynb", out / f"{model}.ipynb", given, cwd=ROOT)
    return newest_checkpoint(out / "finetuned" / model, "ckpt_")


def heldout_policies(model: str, pair_path: Path, data_dir: str) -> tuple[Tensor, float]:
    """Return a pair's policies (N, K) on held-out images, and its mean FLOPs per image there."""
    rnet, agent = utils.build_model(model)
    pair = stages.load(pair_path, rnet, agent)
    _, heldout, _ = data.split(model, data_dir, pair.lineage[-1]["settings"].get("max_images"))
    device = choose_device()
    blockdrop = inference.prepare(rnet, agent, device=device)
    loader = data.Loader(heldout, data.test_batch_size(model), device)
    policies = torch.cat([blockdrop.decide(images).cpu() for images, _ in loader])
    return policies, utils.count_flops(rnet, policies, agent).mean().item()


def choose(kind: str, model: str, policies: Tensor, flops: float) -> Tensor:
    """Return the policy (K,) used most, or of equal FLOPs, given BlockDrop's (N, K) and its mean FLOPs."""
    if kind == "most_used":
        distinct, counts = policies.unique(dim=0, return_counts=True)
        return distinct[counts.argmax()]
    rnet, _ = utils.build_model(model)
    policy = torch.zeros(rnet.num_blocks)
    spent = utils.count_flops(rnet, policy[None])
    blocks = utils.count_flops(rnet, torch.eye(rnet.num_blocks)) - spent
    for block in policies.mean(0).argsort(descending=True, stable=True):
        if spent + blocks[block] <= flops:
            policy[block] = 1
            spent += blocks[block]
    return policy


def always(agent: Policy, policy: Tensor) -> None:
    """Have a policy network answer every image with one policy (K,)."""
    torch.nn.init.zeros_(agent.logit.weight)
    with torch.no_grad():
        agent.logit.bias.copy_(CERTAIN * (2 * policy - 1))


def policy_of(agent: Policy) -> Tensor:
    """Return the policy (K,) that `always` gave a policy network."""
    return greedy_policy(torch.sigmoid(agent.logit.bias.detach()))


def finetune(model: str, pair_path: Path, kind: str, cv_dir: Path, data_dir: str, out: Path) -> Path:
    """Finetune the ResNet for one policy, as the pair was finetuned; return the new pair's file in `out`.

    The weights to start from are those of the newest trained policy in `cv_dir`; ValueError where the pair
    started from others.
    """
    pair = stages.load(pair_path)
    entries = [e for e in pair.lineage if e["stage"] == "finetuning"]
    rnet, agent = utils.build_model(model)
    hint = f"train a policy of {model} first"
    start = stages.load(stages.find(cv_dir, "trained_policy", model, hint), rnet, agent)
    before = [e for e in pair.lineage if e["stage"] != "finetuning"]
    if not entries or start.lineage != before:
        todo = "move that away if the pair began with an older one"
        raise ValueError(f"{pair_path} does not say that it was finetuned from {start.path}: {todo}")
    if kind == "every_block":
        policy = torch.ones(rnet.num_blocks)
    else:
        policy = choose(kind, model, *heldout_policies(model, pair_path, data_dir))
    always(agent, policy)
    lineage = [
        e for e in start.lineage if e["settings"].get("model") == model and e["stage"] != "policy training"
    ]
    file = save_checkpoint(out / "start" / f"{model}.t7", {
        "resnet": rnet.state_dict(), "agent": agent.state_dict(), "epoch": 0, "history": [],
        "lineage": lineage,
    })  # fmt: skip
    print(f"{kind}: blocks {', '.join(str(int(k) + 1) for k in policy.nonzero())}")
    for number, entry in enumerate(entries, start=1):
        known = {k: v for k, v in entry["settings"].items() if k in names_of(NOTEBOOK)}
        settings = known | {
            "max_epochs_finetuning": entry["settings"]["epochs"], "max_epochs_training": 0,
            "start_from": str(file.resolve()), "lr_policy": 0, "alpha": ALPHA, "data_dir": data_dir,
        }  # fmt: skip
        part = out if number == len(entries) else out / f"part_{number}"
        file = run_training(model, settings, part, cv_dir)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--cv-dir", type=Path, default=Path("cv"), help="where checkpoints are")
    parser.add_argument("--data-dir", type=Path, default="data/", help="where data sets are")
    args = parser.parse_args()
    hint = f"run blockdrop_training.ipynb with model = {args.model!r} first"
    cv_dir, data_dir = args.cv_dir.expanduser(), str(args.data_dir.expanduser())
    path = stages.find(cv_dir, "finetuned", args.model, hint)
    for kind in args.kinds:
        out = cv_dir / "one_policy" / kind
        print("Written:", finetune(args.model, path, kind, cv_dir, data_dir, out))
