"""The ways to run a ResNet under a policy, fast: prepared once, dropped blocks not computed."""

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.base import keepers, run_blocks
from models.graphs import Graphs, SingleImage, agree, captured
from models.policy import Policy, greedy_policy
from models.resnet import FlatResNet, FlatResNet32

# TF32 holds fp32 values and multiplies them with 10 bits of mantissa, on CUDA GPUs.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUSED_TOLERANCE = {"bf16": 0.05, "fp16": 0.01}  # relative, against the blocks one by one
MOST_SHAPES = 16  # of batches, whose CUDA graphs are kept
_on_cuda = threading.Lock()  # held by a call: threads share captured ways, and how PyTorch multiplies fp32


def fold(network: nn.Module) -> nn.Module:
    """Return a copy for inference: eval mode, no gradients, batch norms folded into convolutions."""
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


class BlockByBlock:
    """A folded ResNet whose blocks run one after the other; its weights say device, precision and format.

    `last`: a layer in fp32 that follows.
    """

    def __init__(self, rnet: FlatResNet, last: nn.Module | None = None):
        self.rnet, self.blocks, self.num_blocks = rnet, [], rnet.num_blocks
        self.last = nn.Identity() if last is None else last
        for shortcut, block in rnet.shortcuts_and_blocks():  # `forward`: without a module's call
            convs = [module for module in block.children() if isinstance(module, nn.Conv2d)]
            branch = functools.partial(_branch, [(c.weight, c.bias, c.stride, c.padding) for c in convs])
            self.blocks.append((shortcut.forward, branch))

    def __call__(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under policies (N, K), which the host reads."""
        keeping = [True] * len(self.blocks) if policy is None else keepers(policy.cpu() > 0, x.device)
        return self.last(self.rnet.classify(run_blocks(self.rnet.seed(x), self.blocks, keeping)).float())

    def decide(self, x: Tensor) -> Tensor:
        """Return policies (N, outputs) for images (N, 3, H, W), with the logits of a policy network."""
        return greedy_policy(torch.sigmoid(self(x)))


def _branch(convs: list[tuple], x: Tensor, residual: Tensor) -> Tensor:
    for conv in convs[:-1]:
        x = F.relu_(torch.conv2d(x, *conv))
    return F.relu_(torch.conv2d(x, *convs[-1]).add_(residual))


class Eager:
    """A ResNet, with a policy network or one policy (K,), as plain functions, which `models.graphs` captures.

    The networks are folded. `run` makes a `BlockByBlock` or `FusedResNet` of each.
    """

    def __init__(self, run: Callable, rnet: FlatResNet, agent: Policy | None, policy: Tensor | None):
        self.resnet, self.agent, self.policy = run(rnet), agent, policy
        self.decision = None if agent is None else run(agent.features, last=agent.logit)

    def alone(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) under the one policy, or every block kept."""
        return self.resnet(x, None if self.policy is None else self.policy.expand(len(x), -1))

    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K)."""
        return self.decision.decide(self.agent.view(x))

    def under(self, x: Tensor, policy: Tensor) -> Tensor:
        """Return logits (N, classes) under policies (N, K)."""
        return self.resnet(x, policy)

    def both(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits under the agent's policy, and the policy; with a `policy` under that one instead."""
        decided = self.decide(x)
        if policy is None:
            policy = decided
        else:
            decided.to(policy.device)  # block by block the host waits for the decision, then too
        return self.under(x, policy), policy


class Prepared:
    """`rnet`, alone, under `agent`, or under one policy (K,) for all, ready for inference.

    All three stay untouched. Batch norm is folded, weights are in `precision` ("fp32", "tf32", "bf16" or
    "fp16") on `device` (None: where `rnet` is). Alone, `net(x)` gives logits (N, classes); with an agent,
    logits and policy (N, K). Any batch size; blocks are computed for the images that keep them and no others.
    On CUDA networks for 32x32 images run as one kernel in fp16 and bf16, others block by block; `net.note`
    says which, and why not.
    ValueError for an unknown precision or one that the device lacks, and for a policy of another shape or
    with values other than 0 and 1.
    """

    def __init__(
        self,
        rnet: FlatResNet,
        agent: Policy | None = None,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        policy: Tensor | None = None,
    ):
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(DTYPES)}")
        device = torch.device(device) if device is not None else rnet.fc.weight.device
        has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "tf32" and not has_tf32:
            raise ValueError(f'{device} has no {precision}: choose precision "fp32"')
        if policy is not None:
            policy = policy.cpu()
            rnet.check_policy(policy[None], 1)
        self.precision, self.num_blocks = precision, rnet.num_blocks
        in_full = device.type == "cuda" and precision == "fp32"
        layout = torch.contiguous_format if in_full else torch.channels_last  # the faster one
        self.form = {"dtype": DTYPES[precision], "device": device, "memory_format": layout}
        rnet, agent = fold(rnet), None if agent is None else fold(agent).to(device)

        def block_by_block(net: FlatResNet, last: nn.Module | None = None) -> BlockByBlock:
            return BlockByBlock(copy.deepcopy(net).to(**self.form), last)

        self.eager = Eager(block_by_block, rnet, agent, policy)
        self.device = self.eager.resnet.rnet.conv1.weight.device
        # Captured ways have one place for images and results: streams take turns, as threads do.
        self.done = torch.cuda.Event() if device.type == "cuda" else None
        self.ways: dict[torch.Size, Eager | Graphs | SingleImage] = {}  # captured ones, by the batch's shape
        self.how = "block by block"
        self.fused = None  # until it is known to work
        self.fused = self._fused(rnet, agent, policy)
        self.note = self.how

    def _fused(self, rnet: FlatResNet, agent: Policy | None, policy: Tensor | None) -> Eager | None:
        """Return the way by one kernel; None where it isn't for this network, or, as `how` says, fails."""
        fits = isinstance(rnet, FlatResNet32) and self.precision in FUSED_TOLERANCE
        if self.device.type != "cuda" or not fits:
            return None
        try:
            from models.fused import FusedResNet  # here: not every PyTorch comes with Triton

            fuse = functools.partial(FusedResNet, dtype=DTYPES[self.precision], device=self.device)
            fused = Eager(fuse, rnet, agent, None if policy is None else policy.to(self.device))
            with self._mode():
                images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(self.device)
                policies = (torch.arange(2 * self.num_blocks) % 3 > 0).float().view(2, -1).to(self.device)
                rounded = images.to(**self.form)
                found = [fused.alone(images), fused.under(images, policies)]
                expected = [self.eager.alone(rounded), self.eager.under(rounded, policies)]
                if agent is not None:
                    # Probabilities: where bias and weights nearly cancel, rounding changes logits by much.
                    found.append(torch.sigmoid(fused.decision(images)))
                    expected.append(torch.sigmoid(self.eager.decision(rounded)))
                if not agree(found, expected, FUSED_TOLERANCE[self.precision]):
                    apart = [float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
                    raise RuntimeError(f"its results are {100 * max(apart):.2g} % apart")
        except Exception as error:  # a compiler fails in many ways
            torch.cuda.synchronize(self.device)  # raises where the error has broken the device's context
            self.how = f"block by block (one kernel for all failed: {str(error).partition(chr(10))[0]})"
            return None
        self.how = "one kernel for all blocks"
        return fused

    def __call__(self, x: Tensor, policy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, classes) of images (N, 3, H, W); with an agent, the policy (N, K) too.

        `policy` (N, K): run this one instead; the agent decides all the same, so that it takes as long.
        ValueError for another shape or values other than 0 and 1, and for anything but RGB images on the
        network's device. The one kernel reads a policy on its device without waiting for the host: there,
        other values give logits that are not a number.
        """
        with self._mode():
            x, way, fused = self._way(x)
            if policy is not None:
                policy = policy if fused else policy.cpu()
                self.eager.resnet.rnet.check_policy(policy, len(x))
                policy = policy.to(self.device) if fused else policy
            if self.eager.agent is not None:
                return way.both(x, policy)
            return way.alone(x) if policy is None else way.under(x, policy)

    def decide(self, x: Tensor) -> Tensor:
        """Return the agent's policy (N, K) for images (N, 3, H, W). ValueError without an agent."""
        if self.eager.agent is None:
            raise ValueError("there is no policy network to decide: prepare(rnet, agent) has one")
        with self._mode():
            x, way, _ = self._way(x)
            return way.decide(x)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """No gradients, no autocast; on CUDA, this GPU, and fp32 in full or as TF32, whatever was chosen.

        The one kernel heeds neither autocast nor TF32, and a single image would wait for them to change.
        """
        plain = contextlib.nullcontext() if self.fused else torch.autocast(self.device.type, enabled=False)
        if self.device.type != "cuda":
            with torch.inference_mode(), plain:
                yield
            return
        backends = () if self.fused else (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
        wanted = "tf32" if self.precision == "tf32" else "ieee"
        with _on_cuda, torch.inference_mode(), plain, torch.cuda.device(self.device):
            captures = torch.cuda.is_current_stream_capturing()
            if not captures:
                torch.cuda.current_stream().wait_event(self.done)  # of a call on another stream
            before = {backend: backend.fp32_precision for backend in backends}
            try:
                for backend in backends:
                    backend.fp32_precision = wanted
                yield
            finally:
                for backend, precision in before.items():
                    backend.fp32_precision = precision
                if not captures:
                    self.done.record()

    def _way(self, x: Tensor) -> tuple[Tensor, Eager | Graphs | SingleImage, bool]:
        """Return images as a way takes them, the way, and whether it is by one kernel.

        On CUDA one kernel is captured for every shape of batch, block by block for a single image.
        Where capture fails, `note` says why.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(x.shape)}, expected (N, 3, H, W)")
        if x.device != self.device:
            raise ValueError(f"the images are on {x.device}, the network on {self.device}: move one of them")
        fused = self.fused is not None and x.shape[2:] == (32, 32)
        x, eager = (x.float(), self.fused) if fused else (x.to(**self.form), self.eager)
        can_capture = self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        if not can_capture or len(x) == 0 or (len(x) > 1 and not fused):
            return x, eager, fused
        if x.shape not in self.ways:
            if len(self.ways) == MOST_SHAPES:
                self.ways.clear()
            capture = functools.partial(captured, pool=torch.cuda.graph_pool_handle())
            how = self.how if fused or self.fused is None else "block by block"
            try:
                self.ways[x.shape] = (Graphs if fused else SingleImage)(eager, x, capture)
                self.note = f"{how}, as CUDA graphs"
            except RuntimeError as error:
                self.ways[x.shape] = eager
                reason = str(error.__context__ or error).partition("\n")[0]
                self.note = f"{how}, without CUDA graphs, which failed: {reason}"
        return x, self.ways[x.shape], fused


prepare = Prepared  # the verb that notebooks use; the class is what they get


def agreement(network: Prepared, exact: Prepared, batches: Iterable) -> tuple[int, float]:
    """Return for how many images two networks predict the same, and the relative distance of their logits.

    `batches`: pairs of images and labels. With a policy network, each network decides for itself.
    """
    same, apart, whole = 0, 0.0, 0.0
    for images, _ in batches:
        found, expected = (
            net(images) if net.eager.agent is None else net(images)[0] for net in (network, exact)
        )
        same += (found.argmax(1) == expected.argmax(1)).sum().item()
        apart += (found - expected).square().sum().item()
        whole += expected.square().sum().item()
    return same, (apart / whole) ** 0.5
