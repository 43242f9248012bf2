"""CUDA graphs: a function captured once and replayed without the host's work for each kernel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.base import run_blocks


def captured(function: Callable[[], object], pool: tuple) -> Callable[[], None]:
    """Return what replays a function as a CUDA graph; `pool`: the memory it shares with other graphs.

    Graphs with a common pool may run one after the other alone.
    Source: PyTorch's documentation, "CUDA semantics", CUDA graphs.
    """
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


class SingleImage:
    """A prepared network for one image, as steps that are captured once and chained by a policy.

    Every step reads and writes tensors that stay where they are, as CUDA graphs need it: a dropped
    block leaves its tensor alone, or, where the shape changes, runs its shortcut.
    `net`: a `models.inference.Prepared`. `capture` turns a function into one that does the same again.
    RuntimeError where that fails.
    """

    def __init__(self, net, image: Tensor, capture: Callable[[Callable[[], object]], Callable[[], None]]):
        self.targets = []  # to be held: a graph doesn't hold the memory it was captured with

        def step(target: Tensor, function: Callable[..., Tensor], *args: object) -> Callable[[], None]:
            self.targets.append(target)
            return capture(lambda: target.copy_(function(*args)))

        eager = net.eager
        self.image = image.clone(memory_format=torch.channels_last)
        x = eager.rnet.seed(self.image)
        self.seed = step(x, eager.rnet.seed, self.image)
        self.kept, self.dropped = [], []
        for block in eager.blocks:
            shortcut, _ = block
            target = shortcut(x)
            self.kept.append(step(target, run_blocks, x, [block], [True]))
            self.dropped.append(None if target is x else step(target, shortcut, x))
            x = target
        self.logits = eager.rnet.classify(x).float()
        self.classify = step(self.logits, eager.rnet.classify, x)
        if eager.agent is None:
            self.all = step(self.logits, eager.alone, self.image)
        else:
            self.policy = eager.decide(self.image)
            self.decision = step(self.policy, eager.decide, self.image)
        self._compare_with(eager, image)

    def _compare_with(self, eager, image: Tensor) -> None:
        """Raise RuntimeError where the steps don't give what the network gives without capture."""

        def replayed(run: Callable[..., Tensor], *args: Tensor) -> Tensor:
            for target in self.targets:  # what a step that does nothing would leave
                target.fill_(math.nan)
            return run(*args)

        image = 1 - image  # another one than that of which the targets are left
        pairs = [(replayed(self.alone, image), eager.alone(image))] if eager.agent is None else []
        every_second = torch.arange(len(self.kept))[None] % 2 == 0
        for kept in (every_second, ~every_second):
            pairs.append((replayed(self.under, image, kept), eager.under(image, kept)))
        for ours, expected in pairs:
            if not torch.linalg.norm(ours - expected) <= 0.01 * torch.linalg.norm(expected):
                raise RuntimeError("the captured steps gave other logits")
        if eager.agent is not None and not torch.equal(replayed(self.decide, image), eager.decide(image)):
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
