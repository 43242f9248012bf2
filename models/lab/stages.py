"""Finished stages of the experiment: each is a checkpoint with its history and its lineage."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from models.lab.checkpoints import load_states, load_weights_to_flatresnet, newest_checkpoint, read_checkpoint
from models.lab.distributed import first_goes_first
from models.lab.files import ROOT
from models.lab.names import parse_model
from models.resnet import FlatResNet

SHIPPED = ROOT / "cv"


class Stage(NamedTuple):
    """A finished stage: its checkpoint, what was measured after each epoch, and where it comes from.

    The lineage has an entry for each training on the way to these weights, the oldest first: `stage` (sole,
    stochastic depth, policy training or finetuning), its own `seconds`, the `machine`s that it ran on, the
    `weights`' fingerprint and its `settings`. Seconds and weights are None where they are unknown.
    """

    path: Path | None  # None: torchvision's weights
    holds: tuple[str, ...]  # networks in the file: resnet, agent
    history: list[dict]
    lineage: list[dict]


TORCHVISION = Stage(None, (), [], [])


def load(path: str | Path, rnet: nn.Module | None = None, agent: nn.Module | None = None) -> Stage:
    """Return the stage that ended in a checkpoint, its weights loaded. Errors as in `load_checkpoint`."""
    states, rest = load_states(path, rnet, agent)
    return Stage(Path(path), tuple(states), rest.get("history", []), rest.get("lineage", []))


def load_networks(stage: Stage, features: Stage | None, rnet: nn.Module, agent: nn.Module) -> None:
    """Load the networks that a stage's file holds; the others keep the weights they have.

    `features`: the sole ResNet whose layers a new policy network takes, if any.
    """
    if features is not None:
        load_weights_to_flatresnet(read_checkpoint(features.path), agent.features, str(features.path))
    if stage.path is not None:
        load(stage.path, rnet if "resnet" in stage.holds else None, agent if "agent" in stage.holds else None)


def starting_point(
    model: str, start_from: str | None, trains_policy: bool, cv_dir: str | Path, max_images: int | None
) -> tuple[Stage, Stage | None]:
    """Return, and print, what BlockDrop's training starts from: a stage, and a ResNet for a policy's layers.

    `start_from`: a policy's or pair's file is that stage; a ResNet's file gives layers to a new policy
    network beside the sole ResNet; "auto": ResNet-8's does, where there is one of the data set; None: new
    weights. Without policy training, "auto" and None are the policy trained last. Errors as in
    `load_checkpoint`.
    """
    name, features = parse_model(model), None
    given = None if start_from in ("auto", None) else load(start_from)
    if given and "agent" in given.holds:
        start = given
    elif given and not trains_policy:
        raise ValueError(f"start_from is {start_from}, a ResNet: finetuning alone needs a policy's file")
    elif not trains_policy:
        hint = "train a policy first, with max_epochs_training > 0"
        start = load(find(cv_dir, "trained_policy", model, hint))
    else:
        features = given
        if start_from == "auto" and name.dataset != "ImgNet" and name.depth > 8:
            path = find(cv_dir, "trained_rnet", f"R8_{name.dataset}")
            features = load(path) if path else None
        path = find(cv_dir, "trained_rnet", model, sole_hint(model))
        start = load(path) if path else TORCHVISION
    print("Training starts from", start.path or "torchvision's weights")
    if "agent" not in start.holds:
        print("The policy network's layers start from", features.path if features else "new weights")
    for stage in [start, features] if features else [start]:
        if any(entry["settings"].get("max_images") != max_images for entry in stage.lineage):
            print(f"{stage.path} or its start had another max_images: it may have seen images held out now")
    return start, features


def sole_hint(model: str) -> str | None:
    """Return what to do where there is no sole ResNet; None for ImageNet, which has torchvision's."""
    dataset = parse_model(model).dataset
    return None if dataset == "ImgNet" else f"run rnet_sole.ipynb with model = {model!r} first"


def costs(lineage: Sequence[Mapping], model: str) -> dict[str, float | None]:
    """Return the seconds of the sole ResNet, of policy training with what it builds on, and of finetuning.

    None where some are unknown, 0 for finetuning that was skipped.
    """
    sole = sole_entry(lineage, model)
    finetuning = [entry for entry in lineage if entry["stage"] == "finetuning"]
    policy = [entry for entry in lineage if entry != sole and entry not in finetuning]
    return {
        "sole": sole["seconds"] if sole else None,
        "policy training": seconds_of(policy) if policy else None,
        "finetuning": seconds_of(finetuning),
    }


def seconds_of(entries: Sequence[Mapping]) -> float | None:
    """Return the seconds of lineage entries together; None where some are unknown."""
    taken = [entry["seconds"] for entry in entries]
    return None if None in taken else sum(taken)


def machines_of(entries: Sequence[Mapping]) -> list[Mapping]:
    """Return the machines that lineage entries ran on; an empty record for one that is unknown."""
    return [machine for entry in entries for machine in entry["machine"] or [{}]]


def sole_entry(lineage: Sequence[Mapping], model: str) -> Mapping | None:
    """Return the entry of the sole ResNet of this model name; None where the lineage has none."""
    found = [e for e in lineage if e["stage"] == "sole" and e["settings"].get("model") == model]
    return found[-1] if found else None


def find(cv_dir: str | Path, stage: str, model: str, hint: str | None = None) -> Path | None:
    """Return the newest checkpoint of a stage's folder in `cv_dir`, else in `cv/`, whose weights ship.

    Without one: None, or FileNotFoundError that ends in the `hint`, which says what to do.
    """
    parse_model(model)
    prefix = "pk_" if stage in ("trained_rnet", "stochastic_depth") else "ckpt_"
    found = newest_checkpoint(Path(cv_dir, stage, model), prefix)
    if found is None and (found := newest_checkpoint(SHIPPED / stage / model, prefix)):
        found = Path(os.path.relpath(found))
    if found is None and hint:
        raise FileNotFoundError(f"there is no {prefix}*.t7 in {Path(cv_dir, stage, model)}: {hint}")
    return found


def load_sole(model: str, rnet: FlatResNet, cv_dir: str | Path = "cv") -> Stage:
    """Load the sole ResNet's standard weights into `rnet`; return the stage that they come from.

    They are the newest `pk_*.t7` in `<cv_dir>/trained_rnet/<model>/`; for ImgNet without one,
    torchvision's. Errors as in `utils.get_model`.
    """
    path = find(cv_dir, "trained_rnet", model, sole_hint(model))
    if path is None:
        load_weights_to_flatresnet(torchvision_weights(f"ResNet{parse_model(model).depth}"), rnet)
        return TORCHVISION
    return load(path, rnet)


def torchvision_weights(architecture: str) -> Mapping[str, Tensor]:
    """Fetch torchvision's weights IMAGENET1K_V1, the original's, of an architecture such as `ResNet101`."""
    weights = torchvision.models.get_model_weights(architecture.lower()).IMAGENET1K_V1
    kept = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    try:
        with first_goes_first():
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # a damaged file fails in torch.load in many ways
        if kept.exists():
            raise RuntimeError(
                f"{kept} is damaged: delete it, and torchvision's {architecture} weights are fetched anew"
            ) from error
        raise RuntimeError(
            f"torchvision's {architecture} weights could not be fetched from {weights.url} "
            f"({error}): connect to the network, or put that file into {kept.parent}"
        ) from error
