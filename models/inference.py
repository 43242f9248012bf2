"""The ways to run a ResNet under a policy, fast: prepared once, dropped blocks not computed."""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.base import as_nhwc, gather, indices_keeping
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


class Prepared:
    """A ResNet, alone or under a policy network, ready for inference. Made by `prepare`."""

    def __init__(self, rnet: FlatResNet, agent: Policy | None, precision: str, device: torch.device):
        self.precision, self.dtype = precision, DTYPES[precision]
        to = {"dtype": self.dtype, "device": device, "memory_format": torch.channels_last}
        self.rnet = fold(rnet).to(**to)
        self.device = self.rnet.fc.weight.device
        self.blocks = _flattened(self.rnet)
        self.agent = None
        if agent is not None:
            self.agent = fold(agent).to(**to)
            self.agent.logit.float()  # it decides in fp32, as in training
            self.agent_blocks = _flattened(self.agent.features)
        self.single: dict[torch.Size, _SingleImage | None] = {}  # by the image's shape
        self.note = "eager"

    def __call__(self, x: Tensor, policy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, classes) of images (N, 3, H, W); with an agent, the policy (N, K) too.

        `policy`: run this one instead of the agent's. Alone and without one, every block is kept.
        ValueError for a policy of another shape or with values other than 0 and 1, and for anything
        but RGB images on the network's device.
        """
        with self._mode():
            x = self._input(x)
            if policy is not None:
                kept = self._checked(policy, len(x))
            single = self._single(x)
            if policy is None:
                if self.agent is None:
                    return single.alone(x) if single else self._alone(x)
                policy = single.decide(x) if single else self._decide(x)
                kept = policy.cpu().bool()
            logits = single.under(x, kept) if single else self._under(self.rnet.seed(x), kept, 0)
            return logits if self.agent is None else (logits, policy)

    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K) for images (N, 3, H, W)."""
        with self._mode():
            x = self._input(x)
            single = self._single(x)
            return single.decide(x) if single else self._decide(x)

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and policy as a call does, but compute every block and hide what is dropped."""
        with self._mode():
            x = self._input(x)
            policy = self._decide(x)
            return self.rnet(x, policy).float(), policy

    def under_each(self, x: Tensor, policies: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (N, classes) of images (N, 3, H, W) under each of several policies (N, K).

        What they share is computed once: the first blocks, as far as all of them keep those for
        every image, and images for which a policy is the same as the first one.
        """
        with self._mode():
            x = self._input(x)
            kept = [self._checked(policy, len(x)) for policy in policies]
            kept_by_all = torch.stack(kept).all(0).all(0).tolist()
            shared = [*kept_by_all, False].index(False)
            x = self._blocks(self.rnet.seed(x), kept[0], 0, shared)
            differs = [(other != kept[0]).any(1).nonzero().flatten() for other in kept[1:]]
            images = torch.cat([torch.arange(len(x)), *differs])
            policy = torch.cat([kept[0], *(p[i] for p, i in zip(kept[1:], differs, strict=True))])
            logits = self._under(gather(x, images.to(x.device)), policy, shared)
            first, *others = logits.split([len(x), *map(len, differs)])
            return [
                first,
                *(
                    first.index_copy(0, index.to(first.device), other)
                    for index, other in zip(differs, others, strict=True)
                ),
            ]

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """No gradients; on CUDA, this GPU, and fp32 in full or as TF32, whatever the process has chosen."""
        if self.device.type != "cuda":
            with torch.inference_mode():
                yield
            return
        with torch.inference_mode(), torch.cuda.device(self.device):
            backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            before = [backend.fp32_precision for backend in backends]
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
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _single(self, x: Tensor) -> "_SingleImage | None":
        """Return the captured form for one image on CUDA; where capture fails, None, and a note says why."""
        if len(x) != 1 or self.device.type != "cuda":
            return None
        if x.shape not in self.single:
            try:
                self.single[x.shape] = _SingleImage(self, x, _captured(torch.cuda.graph_pool_handle()))
                self.note = "CUDA graphs"
            except RuntimeError as error:
                self.single[x.shape] = None
                self.note = f"eager, because CUDA graphs failed: {error}"
        return self.single[x.shape]

    def _alone(self, x: Tensor) -> Tensor:
        return self.rnet.classify(_all_blocks(self.blocks, self.rnet.seed(x))).float()

    def _decide(self, x: Tensor) -> Tensor:
        features = self.agent.features
        x = features.classify(_all_blocks(self.agent_blocks, features.seed(self.agent.view(x))))
        return greedy_policy(torch.sigmoid(self.agent.logit(x.float())))

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

    def _under(self, x: Tensor, kept: Tensor, first: int) -> Tensor:
        """Run what follows block `first` - 1 on the images that keep it; return logits."""
        x = self._blocks(x, kept, first, len(self.blocks))
        return self.rnet.classify(x).float()

    def _blocks(self, x: Tensor, kept: Tensor, first: int, last: int) -> Tensor:
        """Run blocks `first` up to `last` on the images that keep them; `x` is overwritten.

        `kept`: (N, K) booleans on the host. Blocks that all images keep, or none, cost no gather.
        """
        num_images = len(x)
        counts = kept.sum(0).tolist()
        keeping = indices_keeping(kept, x.device) if num_images > 1 else ()
        for k in range(first, last):
            shortcut, branch = self.blocks[k]
            passed = x if shortcut is None else shortcut(x)
            if counts[k] == 0:
                x = passed
            elif counts[k] == num_images:
                x = branch(x, passed)
            else:
                inputs = gather(x, keeping[k])
                out = branch(inputs, inputs if shortcut is None else gather(passed, keeping[k]))
                x = passed
                as_nhwc(x).index_copy_(0, keeping[k], as_nhwc(out))
        return x


class _SingleImage:
    """A prepared network for one image, as steps that are captured once and chained by a policy.

    Every step reads and writes tensors that stay where they are, as CUDA graphs need it: a dropped
    block leaves its tensor alone, or, where the shape changes, runs its shortcut.
    `capture` turns a function into one that does the same again. RuntimeError where that fails.
    """

    def __init__(self, net: Prepared, image: Tensor, capture: Callable[[Callable], Callable]):
        def step(target: Tensor, function: Callable[..., Tensor], *args: Tensor) -> Callable:
            return capture(lambda: target.copy_(function(*args)))

        rnet = net.rnet
        self.image = image.clone(memory_format=torch.channels_last)
        x = rnet.seed(self.image)
        self.seed = step(x, rnet.seed, self.image)
        self.states = [x]  # to be held: a graph doesn't hold the memory it was captured with
        self.kept, self.dropped = [], []
        for shortcut, branch in net.blocks:
            if shortcut is None:
                self.kept.append(step(x, branch, x, x))
                self.dropped.append(None)
            else:
                passed = shortcut(x)
                self.kept.append(step(passed, functools.partial(_shape_changing, shortcut, branch), x))
                self.dropped.append(step(passed, shortcut, x))
                x = passed
                self.states.append(x)
        self.logits = rnet.classify(x).float()
        self.classify = step(self.logits, rnet.classify, x)
        self.results = [self.logits]
        if net.agent is None:
            self.all = step(self.logits, net._alone, self.image)
        else:
            self.policy = net._decide(self.image)
            self.decision = step(self.policy, net._decide, self.image)
            self.results.append(self.policy)
        self._compare_with(net, image)

    def _compare_with(self, net: Prepared, image: Tensor) -> None:
        """Raise RuntimeError where the steps don't give what the network gives without capture."""

        def replayed(run: Callable[..., Tensor], *args: Tensor) -> Tensor:
            for result in self.results:  # what a step that does nothing would leave
                result.fill_(math.nan)
            return run(*args)

        image = 1 - image  # another one than that of which the states are left
        pairs = [(replayed(self.alone, image), net._alone(image))] if net.agent is None else []
        for first in (0, 1):  # every second block
            kept = torch.arange(first, first + len(self.kept))[None] % 2 == 0
            pairs.append((replayed(self.under, image, kept), net._under(net.rnet.seed(image), kept, 0)))
        for ours, expected in pairs:
            if not torch.linalg.norm(ours - expected) <= 0.01 * torch.linalg.norm(expected):
                raise RuntimeError("the captured steps gave other logits")
        if net.agent is not None and not torch.equal(replayed(self.decide, image), net._decide(image)):
            raise RuntimeError("the captured steps gave another policy")

    def alone(self, image: Tensor) -> Tensor:
        """Return logits (1, classes), every block kept."""
        self.image.copy_(image)
        self.all()
        return self.logits.clone()

    def decide(self, image: Tensor) -> Tensor:
        """Return the agent's policy (1, K)."""
        self.image.copy_(image)
        self.decision()
        return self.policy.clone()

    def under(self, image: Tensor, kept: Tensor) -> Tensor:
        """Return logits (1, classes) under a policy (1, K) of booleans on the host."""
        self.image.copy_(image)
        self.seed()
        for keeps, keep, drop in zip(kept[0].tolist(), self.kept, self.dropped, strict=True):
            if keeps:
                keep()
            elif drop is not None:
                drop()
        self.classify()
        return self.logits.clone()


def _shape_changing(shortcut: nn.Module, branch: Callable, x: Tensor) -> Tensor:
    return branch(x, shortcut(x))


def _captured(pool: tuple) -> Callable[[Callable], Callable]:
    """Return what turns a function without arguments into a CUDA graph's replay.

    The graphs share their scratch memory, so they may run one after the other alone.
    Source: PyTorch's documentation, "CUDA semantics", CUDA graphs.
    """

    def capture(function: Callable) -> Callable:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up on first use, which can't be captured
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context: older PyTorch leaves the capture's stream in use where capture fails. The
        # mode: other threads, such as a loader's that pins memory, may go on using CUDA.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay

    return capture


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
    if not _has(device, precision):
        raise ValueError(f'{device} has no {precision}: choose precision "fp32"')
    return Prepared(rnet, agent, precision, device)


def _has(device: torch.device, precision: str) -> bool:
    """Tell whether a device computes in a precision, be it slowly."""
    if precision == "tf32":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return True
