"""The parts that the ResNets are built of, and the loop that runs their blocks."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and no bias (batch norm follows it)."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: the residual branch alone, without shortcut and last ReLU.

    Input (N, inplanes, H, W), output (N, planes, H/stride, W/stride).
    Source: He et al., CVPR 2016, figure 5 left.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution: the residual branch alone, without shortcut and last ReLU.

    Input (N, inplanes, H, W), output (N, 4 * planes, H/stride, W/stride). The stride stands on the
    3x3 convolution, as in torchvision. Source: He et al., CVPR 2016, figure 5 right.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class DownsampleB(nn.Module):
    """Shortcut without weights between two segments: average pooling, then zero channels.

    Input (N, in_planes, H, W), output (N, out_planes, H/stride, W/stride).
    Source: the original's `models/base.py` (option A of He et al., CVPR 2016, with pooling).
    """

    def __init__(self, in_planes: int, out_planes: int, stride: int):
        super().__init__()
        self.avg = nn.AvgPool2d(stride)
        self.zero_planes = out_planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.avg(x), (0, 0, 0, 0, 0, self.zero_planes))


def keepers(kept: Tensor, device: torch.device) -> list[bool | Tensor]:
    """Return for each block which images keep it: all (True), none (False), or their indices (n,).

    `kept`: (N, K) booleans on the host. The indices of all blocks go to `device` at once.
    """
    if len(kept) == 1:
        return kept[0].tolist()
    counts = kept.sum(0).tolist()
    indices = kept.t().nonzero()[:, 1].to(device).split(counts)
    return [n > 0 if n in (0, len(kept)) else i for n, i in zip(counts, indices, strict=True)]


def run_blocks(
    x: Tensor,
    blocks: Iterable[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]],
    keeping: Sequence[bool | Tensor],
) -> Tensor:
    """Run each block on the images of x (N, C, H, W) that keep it; `keeping`: as `keepers` returns it.

    `blocks`: pairs of a shortcut and a branch, which maps input and shortcut(input) to the block's output.
    """
    # In inference mode nothing else needs the shortcut's result: write into it.
    replace = Tensor.index_copy_ if torch.is_inference_mode_enabled() else Tensor.index_copy
    for (shortcut, branch), keeps in zip(blocks, keeping, strict=True):
        residual = shortcut(x)
        if keeps is True:
            x = branch(x, residual)
        elif keeps is False:
            x = residual
        else:
            inputs = _gather(x, keeps)
            out = branch(inputs, inputs if residual is x else _gather(residual, keeps))
            x = replace(residual.movedim(1, 3), 0, keeps, out.movedim(1, 3)).movedim(3, 1)
    return x


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """Copy some images in their memory format, several times as fast as by indexing."""
    if x.is_contiguous():
        return x.index_select(0, indices)
    return x.movedim(1, 3).index_select(0, indices).movedim(3, 1)
