"""The notebooks' toolbox, under the original's names: networks, data, checkpoints, statistics, FLOPs."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.base import Bottleneck
from models.lab.checkpoints import load_checkpoint, load_weights_to_flatresnet
from models.lab.data import get_dataset
from models.lab.distributed import gathered
from models.lab.names import parse_model
from models.lab.stages import load_sole, torchvision_weights
from models.policy import Policy, Policy32, Policy224
from models.resnet import FlatResNet, FlatResNet32, FlatResNet224

__all__ = [
    "build_model",
    "count_flops",
    "get_dataset",
    "get_model",
    "load_checkpoint",
    "load_weights_to_flatresnet",
    "performance_stats",
]


def build_model(model: str) -> tuple[FlatResNet, Policy]:
    """Return the untrained ResNet and policy network of a model name. ValueError for others."""
    name = parse_model(model)
    num_blocks = sum(name.layer_config)
    if name.dataset == "ImgNet":
        rnet = FlatResNet224(Bottleneck, name.layer_config, name.num_classes)
        agent = Policy224(num_blocks)
    else:
        rnet = FlatResNet32(name.layer_config, name.num_classes)
        agent = Policy32(num_blocks)
    rnet.model = agent.model = model  # so that weights of another model are not taken for its own
    return rnet, agent


def get_model(model: str, device: torch.device | str, cv_dir: str | Path = "cv") -> tuple[FlatResNet, Policy]:
    """Return the ResNet with its standard weights and its untrained policy network, on `device`.

    See `models.lab.stages.load_sole`; for ImgNet, the policy network starts from torchvision's ResNet-18.
    FileNotFoundError without a file, RuntimeError where torchvision's weights can't be fetched,
    CheckpointError for a wrong file.
    """
    rnet, agent = build_model(model)
    load_sole(model, rnet, cv_dir)
    if isinstance(agent, Policy224):
        load_weights_to_flatresnet(torchvision_weights("ResNet18"), agent.features)
    return rnet.to(device), agent.to(device)


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


def count_flops(rnet: FlatResNet, policies: Tensor | None = None, agent: Policy | None = None) -> Tensor:
    """Return the FLOPs per image (N,), float64, of the ResNet under policies (N, K).

    2 per multiply-add of convolutions and linear layers, as in the original; images have 224 pixels a
    side for ImageNet's networks, 32 for the others. Without policies all blocks are kept (N = 1); with an
    `agent`, its FLOPs are added. ValueError for policies of another shape or with values other than 0 and 1.
    """
    size = 224 if isinstance(rnet, FlatResNet224) else 32
    image = torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for network in (rnet, agent):
            if network is not None:
                copy.deepcopy(network).eval().float().cpu()(image)
    found = {module: sum(flops.values()) for module, flops in counter.get_flop_counts().items()}
    places = ((i, j) for i, num_blocks in enumerate(rnet.layer_config) for j in range(num_blocks))
    per_block = [found[f"{type(rnet).__name__}.blocks.{i}.{j}"] for i, j in places]
    if policies is None:
        policies = torch.ones(1, rnet.num_blocks)
    rnet.check_policy(policies, len(policies))
    of_policies = policies.double() @ torch.tensor(per_block).double().to(policies.device)
    return found["Global"] - sum(per_block) + of_policies
