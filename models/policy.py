"""Policy networks: which blocks of the ResNet should run for this image?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import BasicBlock
from models.resnet import FlatResNet, FlatResNet32, FlatResNet224


class Policy(nn.Module):
    """A small ResNet with one output per block of the large one.

    Images (N, 3, H, W) give `probs` (N, K), the probability of keeping each block, and `value` (N, 1),
    which no loss of the paper uses but whose weights belong to the original's checkpoints.
    Source: Wu et al., CVPR 2018, section 3.2.
    """

    def __init__(self, features: FlatResNet, num_blocks: int):
        super().__init__()
        self.features = features
        self.logit = nn.Linear(features.fc.in_features, num_blocks)
        self.vnet = nn.Linear(features.fc.in_features, 1)
        features.fc = nn.Identity()

    def view(self, x: Tensor) -> Tensor:
        """Return the images (N, 3, H, W) as the policy network looks at them."""
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.view(x))
        # In bf16 a probability would be 1, and its gradient 0, from 0.998 on: the heads don't use it.
        with torch.autocast(x.device.type, enabled=False):
            features = features.to(self.logit.weight.dtype)
            return torch.sigmoid(self.logit(features)), self.vnet(features)


class Policy32(Policy):
    """Policy network for 32x32 images: a ResNet-8."""

    def __init__(self, num_blocks: int):
        super().__init__(FlatResNet32((1, 1, 1)), num_blocks)


class Policy224(Policy):
    """Policy network for ImageNet: a ResNet-10 on the image at half its height and width.

    A ResNet-18's weights fit its layers: each segment is a ResNet-18's with its first block alone.
    """

    def __init__(self, num_blocks: int):
        super().__init__(FlatResNet224(BasicBlock, (1, 1, 1, 1)), num_blocks)

    def view(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


def greedy_policy(probs: Tensor) -> Tensor:
    """Return the policy (N, K) of 0 and 1 that keeps the blocks with probability 0.5 or more.

    Source: Wu et al., CVPR 2018, section 3.2.
    """
    return (probs >= 0.5).float()
