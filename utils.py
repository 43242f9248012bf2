"""The notebooks' toolbox. What it offers from `models/` it offers under its own name."""

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.base import BasicBlock, Bottleneck
from models.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_features,
    load_policy_file,
    load_weights_to_flatresnet,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from models.data import Images, Loader, crop_share, get_dataset, hold_out, pixels_and_input
from models.distributed import first_goes_first, gathered, join_processes, parallel, total
from models.machine import (
    autocast,
    choose_device,
    choose_precision,
    compile_calls,
    machine,
    measure,
    peak_memory,
    seed_everything,
    synchronize,
)
from models.names import parse_model
from models.plots import BLUE, GRAY, WIDTH, draw_policies, mark_segments, show_image, use_style, whole_numbers
from models.policy import Policy, Policy32, Policy224
from models.report import Report, three_digits
from models.resnet import FlatResNet, FlatResNet32, FlatResNet224
from models.settings import check, check_settings
from models.training import (
    TrainingRun,
    check_averaging,
    check_warmup,
    fits_memory,
    one_cycle,
    time_spent,
)

__all__ = [
    "BLUE",
    "GRAY",
    "WIDTH",
    "CheckpointError",
    "Images",
    "Loader",
    "Report",
    "TrainingRun",
    "autocast",
    "build_model",
    "check",
    "check_averaging",
    "check_settings",
    "check_warmup",
    "choose_device",
    "choose_precision",
    "compile_calls",
    "count_flops",
    "crop_share",
    "draw_policies",
    "find_features",
    "fingerprint",
    "fits_memory",
    "get_dataset",
    "get_model",
    "hold_out",
    "join_processes",
    "load_checkpoint",
    "load_features",
    "load_policy_file",
    "load_standard_weights",
    "load_weights_to_flatresnet",
    "machine",
    "mark_segments",
    "measure",
    "newest_checkpoint",
    "one_cycle",
    "parallel",
    "parse_model",
    "peak_memory",
    "performance_stats",
    "pixels_and_input",
    "policy_filename",
    "rank_correlation",
    "read_checkpoint",
    "save_checkpoint",
    "seed_everything",
    "show_image",
    "standard_error",
    "synchronize",
    "three_digits",
    "time_spent",
    "total",
    "use_style",
    "whole_numbers",
]


def build_model(model: str) -> tuple[FlatResNet, Policy]:
    """Return the untrained ResNet and policy network of a model name. ValueError for others."""
    name = parse_model(model)
    num_blocks = sum(name.layer_config)
    if name.dataset == "ImgNet":
        rnet = FlatResNet224(Bottleneck, name.layer_config, name.num_classes)
        agent = Policy224(num_blocks=num_blocks)
    else:
        rnet = FlatResNet32(BasicBlock, name.layer_config, name.num_classes)
        agent = Policy32(num_blocks=num_blocks)
    rnet.model = agent.model = model  # so that weights of another model are not taken for its own
    return rnet, agent


def get_model(
    model: str, device: torch.device | str, cv_dir: str | os.PathLike = "cv"
) -> tuple[FlatResNet, Policy]:
    """Return the ResNet with its standard weights and its untrained policy network, on `device`.

    See `load_standard_weights`; for ImgNet, the policy network starts from torchvision's ResNet-18.
    FileNotFoundError without a file, RuntimeError where torchvision's weights can't be fetched,
    CheckpointError for a wrong file.
    """
    rnet, agent = build_model(model)
    load_standard_weights(model, rnet, cv_dir)
    if isinstance(agent, Policy224):
        load_weights_to_flatresnet(_torchvision_weights("ResNet18"), agent.features)
    return rnet.to(device), agent.to(device)


def load_standard_weights(model: str, rnet: FlatResNet, cv_dir: str | os.PathLike = "cv") -> dict:
    """Load a model name's standard weights into `rnet`; return what else their file holds.

    They are the newest `pk_*.t7` in `<cv_dir>/trained_rnet/<model>/`; for ImgNet without one,
    torchvision's. Errors as in `get_model`.
    """
    folder = Path(cv_dir) / "trained_rnet" / model
    name = parse_model(model)
    if name.dataset == "ImgNet" and not any(folder.glob("pk_*.t7")):
        load_weights_to_flatresnet(_torchvision_weights(f"ResNet{name.depth}"), rnet)
        return {}
    hint = f"run rnet_sole.ipynb with model = {model!r} first"
    return load_checkpoint(newest_checkpoint(folder, "pk_", hint), rnet)


def find_features(model: str, cv_dir: str | os.PathLike = "cv/") -> Path | None:
    """Return the file for `load_features`: the newest of the ResNet-8 trained on a model's data set.

    None where there is none; for ResNet-8 itself, whose own training would count twice; and for ImageNet,
    where the policy network starts from torchvision's ResNet-18. (R8_C10 learned from images that are not
    normalized, and R32_C10's policy network sees normalized ones: its batch norms take that up in training.)
    """
    name = parse_model(model)
    if name.dataset == "ImgNet" or name.depth == 8:
        return None
    return newest_checkpoint(Path(cv_dir, "trained_rnet", f"R8_{name.dataset}"), "pk_")


def _torchvision_weights(architecture: str) -> Mapping[str, Tensor]:
    """Fetch torchvision's first ImageNet weights, as the original used, of e.g. `ResNet101`."""
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


def performance_stats(
    policies: Sequence[Tensor], rewards: Sequence[Tensor], matches: Sequence[Tensor]
) -> tuple[float, float, float, float, set[str]]:
    """Summarize batches of policies (n, K), rewards (n,) or (n, 1), and matches (n,) of 0 and 1.

    Where several processes train together, those of all are counted. Returns accuracy in [0, 1],
    mean reward, sparsity (mean number of blocks kept), variance (its standard deviation, under the
    original's name) and the set of distinct policies as strings of 0 and 1.
    Source: the original's `utils.py`.
    """
    policies, rewards, matches = (gathered(torch.cat(list(x))) for x in (policies, rewards, matches))
    kept = policies.sum(1, dtype=torch.float32)
    return (
        matches.mean(dtype=torch.float32).item(),
        rewards.mean(dtype=torch.float32).item(),
        kept.mean().item(),
        kept.std(correction=min(1, len(kept) - 1)).item(),
        {"".join(map(str, policy)) for policy in policies.int().unique(dim=0).tolist()},
    )


def policy_filename(
    epochs: int, accuracy: float, reward: float, sparsity: float, variance: float, policy_set: set[str]
) -> str:
    """Return the file name of a policy or finetuned pair, as the original names them."""
    figures = f"A_{accuracy:.3f}_R_{reward:.2E}_S_{sparsity:.2f}_#_{len(policy_set)}"
    return f"ckpt_E_{epochs}_{figures}.t7"


def fingerprint(*networks: nn.Module) -> str:
    """Return 12 hexadecimal digits that tell networks with other weights apart."""
    digest = hashlib.sha256()
    for network in networks:
        for key, value in network.state_dict().items():
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def count_flops(
    rnet: FlatResNet,
    policies: Tensor | None = None,
    agent: Policy | None = None,
    image_size: int = 32,
) -> Tensor:
    """Return the FLOPs per image (N,), float64, of the ResNet under policies (N, K).

    2 per multiply-add of convolutions and linear layers, as in the original. Without policies all
    blocks are kept (N = 1); with an `agent`, its FLOPs are added. `image_size` in pixels.
    """
    image = torch.zeros(1, 3, image_size, image_size)

    def flops(function: Callable[[Tensor], object], x: Tensor) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = function(x)
        return counter.get_total_flops(), y

    counted = copy.deepcopy(rnet).eval().float().cpu()
    always, x = flops(counted.seed, image)
    per_block = []
    for shortcut, block in counted.shortcuts_and_blocks():
        cost, residual = flops(shortcut, x)
        always += cost
        per_block.append(flops(block, x)[0])
        x = residual
    always += flops(counted.classify, x)[0]
    if agent is not None:
        always += flops(copy.deepcopy(agent).eval().float().cpu(), image)[0]
    if policies is None:
        policies = torch.ones(1, rnet.num_blocks)
    return always + policies.double() @ torch.tensor(per_block).double().to(policies.device)


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values (N,); nan of a single one."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two series (N,): ties share their mean rank; nan if constant."""

    def ranks(values: Tensor) -> Tensor:
        _, position, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2).double()[position]

    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()
