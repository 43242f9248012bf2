"""The ways to run a ResNet under a policy, fast: prepared once, dropped blocks not computed."""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.policy import Policy, greedy_policy
from models.resnet import FlatResNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fold(network: nn.Module) -> nn.Module:
    """Return a copy for inference: eval mode, no gradients, batch norms folded into convolutions."""
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


class Prepared:
    """A ResNet, alone or under a policy network, ready for inference. Made by `prepare`."""

    def __init__(self, rnet: FlatResNet, agent: Policy | None, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        to = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
        self.rnet = fold(rnet).to(**to)
        self.blocks = _flattened(self.rnet)
        self.agent = None
        if agent is not None:
            self.agent = fold(agent).to(**to)
            self.agent.logit.float()  # it decides in fp32, as in training
            self.agent_blocks = _flattened(self.agent.features)

    @torch.inference_mode()
    def __call__(self, x: Tensor, policy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, classes) of images (N, 3, H, W); with an agent, the policy (N, K) too.

        `policy`: run this one instead of the agent's. Alone and without one, every block is kept.
        ValueError for a policy of another shape or with values other than 0 and 1, and for images
        on another device.
        """
        x = self._input(x)
        if policy is not None:
            kept = self._checked(policy, len(x))
        elif self.agent is not None:
            policy = self._decide(x)
            kept = policy.cpu().bool()
        else:
            return self.rnet.classify(_all_blocks(self.blocks, self.rnet.seed(x))).float()
        logits = self._run(self.rnet.seed(x), kept, 0)
        return logits if self.agent is None else (logits, policy)

    @torch.inference_mode()
    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K) for images (N, 3, H, W)."""
        return self._decide(self._input(x))

    def _decide(self, x: Tensor) -> Tensor:
        features = self.agent.features
        x = features.classify(_all_blocks(self.agent_blocks, features.seed(self.agent.view(x))))
        return greedy_policy(torch.sigmoid(self.agent.logit(x.float())))

    @torch.inference_mode()
    def under_each(self, x: Tensor, policies: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (N, classes) of images (N, 3, H, W) under each of several policies (N, K).

        What they share is computed once: the first blocks, as far as all of them keep those for
        every image, and images for which a policy is the same as the first one.
        """
        x = self._input(x)
        kept = [self._checked(policy, len(x)) for policy in policies]
        kept_by_all = torch.stack(kept).all(0).all(0).tolist()
        shared = [*kept_by_all, False].index(False)
        x = self._blocks(self.rnet.seed(x), kept[0], 0, shared)
        differs = [(other != kept[0]).any(1).nonzero().flatten() for other in kept[1:]]
        rows = torch.cat([torch.arange(len(x)), *differs])
        policy = torch.cat([kept[0], *(p[i] for p, i in zip(kept[1:], differs, strict=True))])
        logits = self._run(_rows(x, rows.to(x.device)), policy, shared)
        first, *others = logits.split([len(x), *map(len, differs)])
        return [
            first,
            *(
                first.index_copy(0, index.to(first.device), other)
                for index, other in zip(differs, others, strict=True)
            ),
        ]

    def _input(self, x: Tensor) -> Tensor:
        """Return images in the network's precision and memory format."""
        device = self.rnet.fc.weight.device
        if x.device != device:
            raise ValueError(f"the images are on {x.device}, the network on {device}: move one of them")
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _checked(self, policy: Tensor, num_images: int) -> Tensor:
        """Return the policy as booleans on the host."""
        expected = (num_images, len(self.blocks))
        if policy.shape != expected:
            raise ValueError(
                f"policy has shape {tuple(policy.shape)}, expected {expected}: "
                "one row per image, one column per block"
            )
        policy = policy.cpu()
        if not ((policy == 0) | (policy == 1)).all():
            raise ValueError("policy has values other than 0 (drop) and 1 (keep)")
        return policy.bool()

    def _run(self, x: Tensor, kept: Tensor, first: int) -> Tensor:
        x = self._blocks(x, kept, first, len(self.blocks))
        return self.rnet.classify(x).float()

    def _blocks(self, x: Tensor, kept: Tensor, first: int, last: int) -> Tensor:
        """Run blocks `first` up to `last` on the images that keep them; `x` is overwritten.

        `kept`: (N, K) booleans on the host. The index lists of all blocks are made at once; blocks
        that all images keep, or none, need none of them.
        """
        if len(x) == 1:
            counts, keeping = kept[0].tolist(), ()
        else:
            counts = kept.sum(0).tolist()
            keeping = kept.t().nonzero()[:, 1].to(x.device).split(counts)
        for k in range(first, last):
            shortcut, branch = self.blocks[k]
            passed = x if shortcut is None else shortcut(x)
            if counts[k] == 0:
                x = passed
            elif counts[k] == len(x):
                x = branch(x, passed)
            else:
                images = keeping[k]
                out = branch(_rows(x, images), _rows(passed, images))
                x = passed
                _channels_last(x).index_copy_(0, images, _channels_last(out))
        return x


def _flattened(rnet: FlatResNet) -> list[tuple[nn.Module | None, Callable[[Tensor, Tensor], Tensor]]]:
    """Return each block of a folded ResNet as (shortcut, or None where it changes nothing; branch).

    A branch maps the block's input and its shortcut to ReLU(shortcut + block(input)) by its
    convolutions alone, without a module call.
    """
    blocks = []
    for shortcut, block in rnet.shortcuts_and_blocks():
        convs = [module for module in block.children() if isinstance(module, nn.Conv2d)]
        blocks.append((None if isinstance(shortcut, nn.Identity) else shortcut, _branch(convs)))
    return blocks


def _all_blocks(blocks: list, x: Tensor) -> Tensor:
    """Run every block."""
    for shortcut, branch in blocks:
        x = branch(x, x if shortcut is None else shortcut(x))
    return x


def _branch(convs: list[nn.Conv2d]) -> Callable[[Tensor, Tensor], Tensor]:
    *inner, outer = [(conv.weight, conv.bias, conv.stride, conv.padding) for conv in convs]

    def run(x: Tensor, residual: Tensor) -> Tensor:
        for conv in inner:
            x = F.relu_(torch.conv2d(x, *conv))
        return F.relu_(torch.conv2d(x, *outer).add_(residual))

    return run


def _channels_last(x: Tensor) -> Tensor:
    """View (N, C, H, W) in channels-last memory as (N, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1)


def _rows(x: Tensor, images: Tensor) -> Tensor:
    """Gather some images; they stay channels last, which indexing (N, C, H, W) would not keep."""
    return _channels_last(x).index_select(0, images).permute(0, 3, 1, 2)


def prepare(
    rnet: FlatResNet,
    agent: Policy | None = None,
    precision: str = "fp32",
    device: torch.device | str | None = None,
) -> Prepared:
    """Return `rnet`, alone or under `agent`, made ready for inference; both stay untouched.

    Batch norm folded, channels last, weights in `precision` ("fp32", "bf16" or "fp16") on `device`
    (None: where `rnet` is). Alone, `net(x)` gives logits (N, classes); with an agent, logits and
    policy (N, K). Any batch size; blocks are computed for the images that keep them and no others.
    ValueError for an unknown precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(DTYPES)}")
    device = torch.device(device) if device is not None else rnet.fc.weight.device
    return Prepared(rnet, agent, DTYPES[precision], device)
