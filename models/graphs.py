"""CUDA graphs: a function captured once and replayed without the host's work for each kernel."""

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.base import run_blocks

Capture = Callable[[Callable[[], object]], Callable[[], object]]  # returns what does the same again
_held = []  # graphs that are never replayed, but to which PyTorch's allocator or generator may still refer


def captured(function: Callable[[], object], pool: tuple) -> Callable[[], None]:
    """Return what replays a function as a CUDA graph; `pool`: the memory it shares with other graphs.

    Graphs that share a pool must not run at the same time.
    Source: PyTorch's documentation, "CUDA semantics", CUDA graphs.
    """
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up on first use, which can't be captured
                function()
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        _capture(graph, function, stream, pool)
    except BaseException:
        # Before PyTorch 2.14 the failed capture leaves the generator in capture mode, and the next random
        # number fails. A capture that ends well ends that mode.
        _held.append(graph)
        _capture_nothing(stream)
        raise
    return graph.replay


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of a device's captures: with several, each would hold memory of cuBLAS."""
    stream = torch.cuda.Stream(device)
    # In PyTorch 2.10 after a first capture in inference mode no other would succeed outside it.
    with torch.inference_mode(False):
        _capture_nothing(stream)
    return stream


def _capture_nothing(stream: torch.cuda.Stream) -> None:
    _held.append(torch.cuda.CUDAGraph())
    _capture(_held[-1], lambda: torch.zeros(1, device=stream.device), stream)


def _capture(
    graph: torch.cuda.CUDAGraph, function: Callable, stream: torch.cuda.Stream, pool: tuple | None = None
) -> None:
    # The outer context: PyTorch leaves the capture's stream in use where capture fails. The mode:
    # other threads, such as a loader's that pins memory, may go on using CUDA.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        function()


def agree(found: object, expected: object, tolerance: float = 0.01) -> bool:
    """Tell whether tensors, or tuples of them, differ by less than a share of their norms."""
    if isinstance(expected, Tensor):
        return bool(torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected))
    return all(agree(x, y, tolerance) for x, y in zip(found, expected, strict=True))


def copies(results: object) -> object:
    """Return a tensor, or a tuple of tensors and tuples, in memory that no replay overwrites."""
    return results.clone() if isinstance(results, Tensor) else tuple(map(copies, results))


class Graph:
    """A function captured as one CUDA graph: called with other tensors of the same shapes, it replays.

    Arguments that are no tensors stay those of the capture. RuntimeError where that fails.
    """

    def __init__(self, function: Callable, *args: object, capture: Capture):
        self.inputs = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]

        def run() -> None:
            self.results = function(*self.inputs)

        self.replay = capture(run)

    def __call__(self, *args: object) -> object:
        for kept, given in zip(self.inputs, args, strict=True):
            if isinstance(given, Tensor):
                kept.copy_(given)
        self.replay()
        return copies(self.results)


class Graphs:
    """A `models.inference.Eager` that needs nothing from the host, captured for one shape of batch.

    RuntimeError where that fails, or gives other results.
    """

    def __init__(self, eager, images: Tensor, capture: Capture):
        def graph(function: Callable, *examples: Tensor) -> Graph:
            found = Graph(function, *examples, capture=capture)
            others = [1 - example for example in examples]
            if not agree(found(*others), function(*others)):
                raise RuntimeError("the captured function gave other results")
            return found

        images = images.contiguous()  # as the kernel takes them
        # Compared under 1 - policy: there, too, some blocks run.
        policy = torch.arange(eager.resnet.num_blocks, device=images.device) % 2
        policy = policy.float().repeat(len(images), 1)
        if eager.agent is None:
            self.alone = graph(eager.alone, images)
            self.under = graph(eager.under, images, policy)
        else:
            self.decide = graph(eager.decide, images)
            self.follow = graph(eager.both, images)
            self.instead = graph(eager.both, images, policy)

    def both(self, images: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits under the agent's policy, or a given one instead, and the policy."""
        return self.follow(images) if policy is None else self.instead(images, policy)


class SingleImage:
    """A `models.inference.Eager` for one image, block by block: steps captured once and chained by a policy.

    Every step reads and writes tensors that stay where they are, as CUDA graphs need it: a dropped
    block leaves its tensor alone, or, where the shape changes, runs its shortcut.
    RuntimeError where that fails, or gives other results.
    """

    def __init__(self, eager, image: Tensor, capture: Capture):
        self.targets = []  # to be held: a graph doesn't hold the memory it was captured with

        def step(target: Tensor, function: Callable[..., Tensor], *args: object) -> Callable[[], object]:
            self.targets.append(target)
            return capture(lambda: target.copy_(function(*args)))

        rnet = eager.resnet.rnet
        self.image = image.clone()
        x = rnet.seed(self.image)
        self.seed = step(x, rnet.seed, self.image)
        self.kept, self.dropped = [], []
        for block in eager.resnet.blocks:
            shortcut, _ = block
            target = shortcut(x)
            self.kept.append(step(target, run_blocks, x, [block], [True]))
            self.dropped.append(None if target is x else step(target, shortcut, x))
            x = target
        self.logits = rnet.classify(x).float()
        self.classify = step(self.logits, rnet.classify, x)
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

        image = 1 - image  # not the captured one: a step that ignores its input is noticed
        if eager.agent is None:
            pairs = [(replayed(self.alone, image), eager.alone(image))]
        else:
            pairs = [(replayed(self.decide, image), eager.decide(image))]
        every_second = torch.arange(len(self.kept))[None] % 2
        for policy in (every_second, 1 - every_second):
            pairs.append((replayed(self.under, image, policy), eager.under(image, policy)))
        if not all(agree(*pair) for pair in pairs):
            raise RuntimeError("the captured steps gave other results")

    def alone(self, image: Tensor) -> Tensor:
        """Return logits (1, classes) under the one policy, or every block kept."""
        self.image.copy_(image)
        self.all()
        return self.logits.clone()

    def decide(self, image: Tensor) -> Tensor:
        """Return the agent's policy (1, K)."""
        self.image.copy_(image)
        self.decision()
        return self.policy.clone()

    def under(self, image: Tensor, policy: Tensor) -> Tensor:
        """Return logits (1, classes) under a policy (1, K) on the host."""
        self.image.copy_(image)
        self.seed()
        for keeps, keep, drop in zip(policy[0].tolist(), self.kept, self.dropped, strict=True):
            if keeps:
                keep()
            elif drop is not None:
                drop()
        self.classify()
        return self.logits.clone()

    def both(self, image: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits under the agent's policy, or a given one on the host instead, and the policy."""
        decided = self.decide(image)
        if policy is None:
            return self.under(image, decided), decided
        decided.cpu()  # waited for, as `under` waits for it
        return self.under(image, policy), policy


def one_graph(step: Callable, device: torch.device, why_not: str | None = None) -> Callable:
    """Return a training step that on CUDA runs as one graph; on the CPU the step itself.

    It takes and returns what `step` does: networks, optimizers or lists of them, tensors, numbers; anything
    else is taken as it was on the first call. Each shape of tensors, number and object gets its own graph on
    its first call, which leaves weights, optimizers and random numbers as they were. Where that can't
    be, for the reason `why_not` or because it fails, the step runs as it is, and a line says so. ValueError
    for a device's name.
    """
    if isinstance(device, str):
        raise ValueError(f"device is {device!r} again: run the cell below the settings, too")
    if device.type != "cuda":
        return step
    if dist.is_initialized():
        why_not = "several processes train together"
    if why_not:
        _say_why_not(step, why_not)
        return step
    return CapturedStep(step, device, functools.partial(captured, pool=torch.cuda.graph_pool_handle()))


def _say_why_not(step: Callable, reason: str) -> None:
    print(f"{step.__name__} runs without CUDA graphs: {reason}")


class CapturedStep:
    """A training step, captured for each shape of batch. Made by `one_graph`."""

    def __init__(self, step: Callable, device: torch.device, capture: Capture):
        self.step, self.device, self.capture = step, device, capture
        self.graphs: dict[tuple, Graph] | None = {}

    def __call__(self, *args: object) -> object:
        key = tuple(_key(arg) for arg in args)
        if self.graphs is not None and key not in self.graphs:
            try:
                self.graphs[key] = self._captured(args)
            except RuntimeError as error:
                _say_why_not(self.step, str(error.__context__ or error).partition("\n")[0])
                self.graphs = None
        # Not above, where the error still holds the failed step's tensors.
        return self.step(*args) if self.graphs is None else self.graphs[key](*args)

    def _captured(self, args: tuple) -> Graph:
        """Return the step as a graph; its warming up leaves weights, optimizers and random numbers alone."""
        parts = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
        _move_to_device([part for part in parts if isinstance(part, torch.optim.Optimizer)], self.device)
        # Detached: a copy with a gradient would tie the weight's gradient to this stream, not the capture's.
        before = {id(tensor): tensor.detach().clone() for tensor in _state(parts)}
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                return Graph(self.step, *args, capture=self.capture)
        finally:
            with torch.no_grad():
                for tensor in _state(parts):
                    # New are the optimizers' means of gradients, which start from 0.
                    tensor.copy_(before[id(tensor)] if id(tensor) in before else torch.zeros_like(tensor))


def _key(arg: object) -> object:
    """Return what decides whether a graph serves an argument: shape and type, a number, or the object."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.dtype
    return arg if isinstance(arg, int | float | str) else id(arg)


def _move_to_device(optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
    """Have optimizers read learning rate and step count on the device: a graph would keep the host's."""
    for optimizer in optimizers:
        optimizer.defaults["fused"] = True  # few kernels for `zero_grad`, too
        optimizer._warned_capturable_if_run_uncaptured = True  # no warning that the warm-up is not captured
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            group["fused"] = True  # the other implementations have the host read the learning rate
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)


def _state(parts: list) -> list[Tensor]:
    """Return the tensors of networks and optimizers that a step changes."""
    tensors = []
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
        elif isinstance(part, torch.optim.Optimizer):
            states = part.state.values()
            tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return tensors
