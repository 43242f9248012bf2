"""ResNets whose blocks can be dropped, image by image."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import BasicBlock, Bottleneck, DownsampleB, conv3x3, keepers, run_blocks


class FlatResNet(nn.Module):
    """A ResNet as a flat list of K residual blocks, each of which a policy keeps (1) or drops (0).

    A kept block computes ReLU(shortcut(x) + block(x)); a dropped one passes on shortcut(x), without
    the ReLU. `layer_config` holds the number of blocks per segment; K is their sum.
    The stem is `conv1`, batch norm, ReLU and `pool`; `shortcut` builds a shortcut that changes the shape.
    Source: Wu et al., CVPR 2018, section 3.1, and the original's `models/resnet.py`.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        pool: nn.Module,
        shortcut: Callable[[int, int, int], nn.Module],
        segment_planes: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck],
        layer_config: Sequence[int],
        num_classes: int,
    ):
        super().__init__()
        self.layer_config = list(layer_config)
        self.conv1 = conv1
        self.bn1 = nn.BatchNorm2d(conv1.out_channels)
        self.pool = pool
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        inplanes = conv1.out_channels
        for segment, (planes, num_blocks) in enumerate(zip(segment_planes, self.layer_config, strict=True)):
            stride = 1 if segment == 0 else 2
            outplanes = planes * block.expansion
            changes = stride > 1 or inplanes != outplanes
            self.ds.append(shortcut(inplanes, outplanes, stride) if changes else nn.Identity())
            inputs = [(inplanes, stride)] + [(outplanes, 1)] * (num_blocks - 1)
            self.blocks.append(nn.ModuleList(block(i, planes, s) for i, s in inputs))
            inplanes = outplanes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., ICCV 2015, normal, by fan-out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks that a policy decides on."""
        return sum(self.layer_config)

    def shortcuts_and_blocks(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (shortcut, block) of all K blocks in order."""
        identity = nn.Identity()
        for shortcut, segment in zip(self.ds, self.blocks, strict=True):
            for index, block in enumerate(segment):
                yield (shortcut if index == 0 else identity), block

    def seed(self, x: Tensor) -> Tensor:
        """Run the layers before the first block: (N, 3, H, W) to (N, C, H', W')."""
        return self.pool(F.relu(self.bn1(self.conv1(x))))

    def classify(self, x: Tensor) -> Tensor:
        """Pool the last block's output and return logits (N, classes)."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def check_policy(self, policy: Tensor, num_images: int) -> None:
        """Raise ValueError for a policy that is not (N, K) or, on the host, not made of 0 and 1."""
        expected = (num_images, self.num_blocks)
        if policy.shape != expected:
            raise ValueError(
                f"policy has shape {tuple(policy.shape)}, expected {expected}: "
                "one row per image, one column per block"
            )
        if policy.device.type == "cpu" and not ((policy == 0) | (policy == 1)).all():
            raise ValueError("policy has values other than 0 (drop) and 1 (keep)")

    def forward(self, x: Tensor, policy: Tensor | None = None, skip_dropped: bool = False) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under a policy (N, K) each.

        Masked: every block is computed for every image and hidden where the policy drops it. With
        `skip_dropped` each block is computed only for the images that keep it, and in train mode batch norm
        sees only those. Without a policy every block is kept. ValueError as in `check_policy`.
        """
        if policy is None:
            return self.forward_full(x)
        self.check_policy(policy, len(x))
        if skip_dropped:
            return self._run(x, keepers((policy > 0.5).cpu(), x.device))
        kept = policy.t()[:, :, None, None, None] > 0.5
        x = self.seed(x)
        for keep, (shortcut, block) in zip(kept, self.shortcuts_and_blocks(), strict=True):
            residual = shortcut(x)
            x = torch.where(keep, F.relu(residual + block(x)), residual)
        return self.classify(x)

    def forward_single(self, x: Tensor, policy: Tensor | Sequence[float]) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under one policy (K,) for all of them.

        Dropped blocks are not computed. ValueError as in `check_policy`.
        """
        policy = torch.as_tensor(policy).reshape(1, -1)
        self.check_policy(policy, 1)
        return self._run(x, (policy[0] > 0.5).tolist())

    def forward_full(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) with every block kept: the sole ResNet."""
        return self._run(x, [True] * self.num_blocks)

    def _run(self, x: Tensor, keeping: Sequence[bool | Tensor]) -> Tensor:
        """Return logits, each block computed for the images that keep it (see `run_blocks`)."""
        blocks = (
            (shortcut, functools.partial(_kept, block)) for shortcut, block in self.shortcuts_and_blocks()
        )
        return self.classify(run_blocks(self.seed(x), blocks, keeping))


def _kept(block: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return F.relu(residual + block(x))


class FlatResNet32(FlatResNet):
    """ResNet of depth 6n+2 for 32x32 images: 3 segments of n BasicBlocks, 16/32/64 planes.

    Source: He et al., CVPR 2016, section 4.2; shortcuts between segments are DownsampleB.
    """

    def __init__(self, layer_config: Sequence[int] = (5, 5, 5), num_classes: int = 10):
        stem = conv3x3(3, 16), nn.Identity()
        super().__init__(*stem, DownsampleB, (16, 32, 64), BasicBlock, layer_config, num_classes)


class FlatResNet224(FlatResNet):
    """ResNet for ImageNet, torchvision's architecture block by block (50, 101, 152: Bottleneck).

    Images are 224x224 by custom; any size from 32x32 on works.
    Source: He et al., CVPR 2016, table 1; `torchvision.models.resnet`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        layer_config: Sequence[int] = (3, 4, 23, 3),
        num_classes: int = 1000,
    ):
        conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        stem = conv1, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        super().__init__(*stem, _projection, (64, 128, 256, 512), block, layer_config, num_classes)


def _projection(in_planes: int, out_planes: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_planes))
