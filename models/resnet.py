"""ResNets whose blocks can be dropped, image by image."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import (
    BasicBlock,
    Bottleneck,
    DownsampleB,
    as_nchw,
    as_nhwc,
    conv3x3,
    gather,
    indices_keeping,
)


class FlatResNet(nn.Module):
    """A ResNet as a flat list of K residual blocks, each of which a policy keeps (1) or drops (0).

    A kept block computes ReLU(shortcut(x) + block(x)); a dropped one passes on shortcut(x), without
    the ReLU. `layer_config` holds the number of blocks per segment; K is their sum.
    What differs between image sizes stands in FlatResNet32 and FlatResNet224.
    Source: Wu et al., CVPR 2018, section 3.1, and the original's `models/resnet.py`.
    """

    segment_planes: tuple[int, ...]

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layer_config: Sequence[int],
        num_classes: int,
    ):
        super().__init__()
        self.layer_config = list(layer_config)
        self.build_stem()
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        inplanes = self.segment_planes[0]
        for segment, (planes, num_blocks) in enumerate(
            zip(self.segment_planes, self.layer_config, strict=True)
        ):
            stride = 1 if segment == 0 else 2
            outplanes = planes * block.expansion
            if stride == 1 and inplanes == outplanes:
                self.ds.append(nn.Identity())
            else:
                self.ds.append(self.build_shortcut(inplanes, outplanes, stride))
            inputs = [(inplanes, stride)] + [(outplanes, 1)] * (num_blocks - 1)
            self.blocks.append(nn.ModuleList(block(i, planes, s) for i, s in inputs))
            inplanes = outplanes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, num_classes)
        self.initialize()

    def build_stem(self) -> None:
        """Create the layers before the first block."""
        raise NotImplementedError

    def build_shortcut(self, inplanes: int, outplanes: int, stride: int) -> nn.Module:
        """Return the shortcut of a segment's first block, where the shape changes."""
        raise NotImplementedError

    def seed(self, x: Tensor) -> Tensor:
        """Run the layers before the first block: (N, 3, H, W) to (N, C, H', W')."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Draw new weights: He et al., ICCV 2015, normal, by fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

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

    def classify(self, x: Tensor) -> Tensor:
        """Pool the last block's output and return logits (N, classes)."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor, policy: Tensor | None = None, skip_dropped: bool = False) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under a policy (N, K) each.

        Masked: every block is computed for every image and hidden where the policy drops it. With
        `skip_dropped` each block is computed only for the images that keep it. In eval mode that
        gives the same result, sooner; in train mode batch norm, too, sees only those images.
        Without a policy every block is kept. ValueError for a policy of another shape.
        """
        if policy is None:
            return self.forward_full(x)
        if policy.shape != (len(x), self.num_blocks):
            raise ValueError(
                f"policy has shape {tuple(policy.shape)}, expected {(len(x), self.num_blocks)}: "
                "one row per image, one column per block"
            )
        if skip_dropped:
            return self._forward_kept(x, (policy > 0.5).cpu())
        kept = policy.t()[:, :, None, None, None] > 0.5
        x = self.seed(x)
        for keep, (shortcut, block) in zip(kept, self.shortcuts_and_blocks(), strict=True):
            residual = shortcut(x)
            x = torch.where(keep, F.relu(residual + block(x)), residual)
        return self.classify(x)

    def _forward_kept(self, x: Tensor, kept: Tensor) -> Tensor:
        """Run each block on the images that keep it; `kept`: (N, K) booleans on the host."""
        x = self.seed(x)
        keeping = indices_keeping(kept, x.device)
        for indices, (shortcut, block) in zip(keeping, self.shortcuts_and_blocks(), strict=True):
            residual = shortcut(x)
            if len(indices) == len(x):
                x = F.relu(residual + block(x))
            elif len(indices) > 0:
                inputs = gather(x, indices)
                passed = inputs if residual is x else gather(residual, indices)
                out = F.relu(passed + block(inputs))
                x = as_nchw(as_nhwc(residual).index_copy(0, indices, as_nhwc(out)))
            elif torch.is_grad_enabled():  # gradients of 0: DDP would wait for those of weights left out
                x = residual + 0 * sum(weight.sum() for weight in block.parameters())
            else:
                x = residual
        return self.classify(x)

    def forward_single(self, x: Tensor, policy: Tensor | Sequence[float]) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under one policy (K,) for all of them.

        Dropped blocks are not computed. ValueError for a policy of another length.
        """
        if isinstance(policy, Tensor):
            policy = policy.flatten().tolist()
        if len(policy) != self.num_blocks:
            raise ValueError(f"policy has {len(policy)} entries, expected {self.num_blocks}: one per block")
        x = self.seed(x)
        for keep, (shortcut, block) in zip(policy, self.shortcuts_and_blocks(), strict=True):
            residual = shortcut(x)
            x = F.relu(residual + block(x)) if keep > 0.5 else residual
        return self.classify(x)

    def forward_full(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) with every block kept: the sole ResNet."""
        return self.forward_single(x, [1] * self.num_blocks)


class FlatResNet32(FlatResNet):
    """ResNet of depth 6n+2 for 32x32 images: 3 segments of n BasicBlocks, 16/32/64 planes.

    Source: He et al., CVPR 2016, section 4.2; shortcuts between segments are DownsampleB.
    """

    segment_planes = (16, 32, 64)

    def __init__(
        self,
        block: type[BasicBlock] = BasicBlock,
        layer_config: Sequence[int] = (5, 5, 5),
        num_classes: int = 10,
    ):
        super().__init__(block, layer_config, num_classes)

    def build_stem(self) -> None:
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)

    def build_shortcut(self, inplanes: int, outplanes: int, stride: int) -> nn.Module:
        return DownsampleB(inplanes, outplanes, stride)

    def seed(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class FlatResNet224(FlatResNet):
    """ResNet for ImageNet, torchvision's architecture block by block (50, 101, 152: Bottleneck).

    Images are 224x224 by custom; any size from 32x32 on works.
    Source: He et al., CVPR 2016, table 1; `torchvision.models.resnet`.
    """

    segment_planes = (64, 128, 256, 512)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        layer_config: Sequence[int] = (3, 4, 23, 3),
        num_classes: int = 1000,
    ):
        super().__init__(block, layer_config, num_classes)

    def build_stem(self) -> None:
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def build_shortcut(self, inplanes: int, outplanes: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(outplanes),
        )

    def seed(self, x: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn1(self.conv1(x))))
