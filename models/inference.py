"""The ways to run a ResNet under a policy, fast: prepared once, dropped blocks not computed."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.base import keepers, run_blocks
from models.graphs import SingleImage, captured
from models.policy import Policy, greedy_policy
from models.resnet import FlatResNet

# TF32 holds fp32 values and multiplies them with 10 bits of mantissa, on CUDA GPUs.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fold(network: nn.Module) -> nn.Module:
    """Return a copy for inference: eval mode, no gradients, batch norms folded into convolutions."""
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


class Eager:
    """The folded networks and the ways to run them, without checks; `SingleImage` has the same, captured."""

    def __init__(self, rnet: FlatResNet, agent: Policy | None, dtype: torch.dtype, device: torch.device):
        to = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
        self.rnet = fold(rnet).to(**to)
        self.blocks = _lean_blocks(self.rnet)
        self.agent = None
        if agent is not None:
            self.agent = fold(agent).to(**to)
            self.agent.logit.float()  # it decides in fp32, as in training
            self.agent_blocks = _lean_blocks(self.agent.features)

    def alone(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W), every block kept."""
        return _run(self.rnet, self.blocks, x, [True] * len(self.blocks)).float()

    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K)."""
        x = self.agent.view(x)
        features = _run(self.agent.features, self.agent_blocks, x, [True] * len(self.agent_blocks))
        return greedy_policy(torch.sigmoid(self.agent.logit(features.float())))

    def under(self, x: Tensor, kept: Tensor) -> Tensor:
        """Return logits (N, classes) under policies (N, K) of booleans on the host."""
        return _run(self.rnet, self.blocks, x, keepers(kept, x.device)).float()


def _run(network: FlatResNet, blocks: list, x: Tensor, keeping: list[bool | Tensor]) -> Tensor:
    return network.classify(run_blocks(network.seed(x), blocks, keeping))


def _lean_blocks(rnet: FlatResNet) -> list:
    """Return a folded ResNet's blocks for `run_blocks`: their convolutions alone, without a module call."""
    blocks = []
    for shortcut, block in rnet.shortcuts_and_blocks():
        convs = [module for module in block.children() if isinstance(module, nn.Conv2d)]
        branch = functools.partial(_branch, [(c.weight, c.bias, c.stride, c.padding) for c in convs])
        blocks.append((_unchanged if isinstance(shortcut, nn.Identity) else shortcut, branch))
    return blocks


def _unchanged(x: Tensor) -> Tensor:
    return x


def _branch(convs: list[tuple], x: Tensor, residual: Tensor) -> Tensor:
    for conv in convs[:-1]:
        x = F.relu_(torch.conv2d(x, *conv))
    return F.relu_(torch.conv2d(x, *convs[-1]).add_(residual))


class Prepared:
    """A ResNet, alone or under a policy network, ready for inference. Made by `prepare`."""

    def __init__(self, rnet: FlatResNet, agent: Policy | None, precision: str, device: torch.device):
        self.precision = precision
        self.eager = Eager(rnet, agent, DTYPES[precision], device)
        self.blocks = self.eager.blocks
        self.device = self.eager.rnet.fc.weight.device
        self.ways: dict[torch.Size, Eager | SingleImage] = {}  # of one image on CUDA, by its shape
        self.note = "eager"

    def __call__(self, x: Tensor, policy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, classes) of images (N, 3, H, W); with an agent, the policy (N, K) too.

        `policy`: run this one instead of the agent's. Alone and without one, every block is kept.
        ValueError for a policy of another shape or with values other than 0 and 1, and for anything
        but RGB images on the network's device.
        """
        with self._mode():
            x = self._input(x)
            way = self._way(x)
            if policy is not None:
                self.eager.rnet.check_policy(policy, len(x))
                kept = policy.cpu()
                if not ((kept == 0) | (kept == 1)).all():
                    raise ValueError("policy has values other than 0 (drop) and 1 (keep)")
            elif self.eager.agent is None:
                return way.alone(x)
            else:
                policy = way.decide(x)
                kept = policy.cpu()
            logits = way.under(x, kept.bool())
            return logits if self.eager.agent is None else (logits, policy)

    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K) for images (N, 3, H, W)."""
        with self._mode():
            x = self._input(x)
            return self._way(x).decide(x)

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and policy as a call does, but compute every block and hide what is dropped."""
        with self._mode():
            x = self._input(x)
            policy = self.eager.decide(x)
            return self.eager.rnet(x, policy).float(), policy

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """No gradients; on CUDA, this GPU, and fp32 in full or as TF32, whatever the process has chosen."""
        if self.device.type != "cuda":
            with torch.inference_mode():
                yield
            return
        backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
        before = [backend.fp32_precision for backend in backends]
        with torch.inference_mode(), torch.cuda.device(self.device):
            for backend in backends:
                backend.fp32_precision = "tf32" if self.precision == "tf32" else "ieee"
            try:
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision

    def _input(self, x: Tensor) -> Tensor:
        """Return images in the network's precision and memory format."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(x.shape)}, expected (N, 3, H, W)")
        if x.device != self.device:
            raise ValueError(f"the images are on {x.device}, the network on {self.device}: move one of them")
        return x.to(DTYPES[self.precision], memory_format=torch.channels_last)

    def _way(self, x: Tensor) -> Eager | SingleImage:
        """Return the captured way for one image on CUDA; where capture fails, `note` says why."""
        if len(x) != 1 or self.device.type != "cuda":
            return self.eager
        if x.shape not in self.ways:
            capture = functools.partial(captured, pool=torch.cuda.graph_pool_handle())
            try:
                self.ways[x.shape] = SingleImage(self, x, capture)
                self.note = "CUDA graphs"
            except RuntimeError as error:
                self.ways[x.shape] = self.eager
                self.note = f"eager, because CUDA graphs failed: {error}"
        return self.ways[x.shape]


def prepare(
    rnet: FlatResNet,
    agent: Policy | None = None,
    precision: str = "fp32",
    device: torch.device | str | None = None,
) -> Prepared:
    """Return `rnet`, alone or under `agent`, made ready for inference; both stay untouched.

    Batch norm folded, channels last, weights in `precision` ("fp32", "tf32", "bf16" or "fp16") on
    `device` (None: where `rnet` is). Alone, `net(x)` gives logits (N, classes); with an agent, logits
    and policy (N, K). Any batch size; blocks are computed for the images that keep them and no
    others. A single image on CUDA runs as CUDA graphs; `net.note` says so, or why not.
    ValueError for an unknown precision or one that the device lacks.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(DTYPES)}")
    device = torch.device(device) if device is not None else rnet.fc.weight.device
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not has_tf32:
        raise ValueError(f'{device} has no {precision}: choose precision "fp32"')
    return Prepared(rnet, agent, precision, device)
