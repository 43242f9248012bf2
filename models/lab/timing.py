"""Time: functions against each other, the machine they ran on, and whether it was busy."""

import contextlib
import functools
import math
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from models.inference import Prepared
from models.lab.device import device_name, synchronize

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
EARLIEST_END, KNOWN_TO = 10, 0.01  # rounds, and share of the median: measuring may end early
SHORT = 0.01  # seconds of a call, from which on a GPU's caches make no difference
CALIBRATION_ROUNDS = 50
TRIAL_SECONDS = 0.2  # spent on each number of threads
WATCHED_SECONDS = 0.5
SAME_CALIBRATION = 1.25  # two calibrations of a machine differ by less than this factor
STEADY = 1.2  # on a quiet machine, quartiles and means of rounds stay within this factor


def measure(
    functions: Mapping[object, Callable[[], object]],
    device: torch.device | str,
    seconds: float = 0.5,
    parts: int = 1,
) -> dict[object, dict[str, float]]:
    """Return each function's {"seconds": median over rounds, "low", "high": quartiles, "mean", "rounds"}.

    A round calls each one once and waits for the device; every second round goes backward, so that a machine
    that gets slower or faster is the same for all. One round warms up. On CUDA a call of less than 10 ms
    follows one that is not timed: it finds code and weights in the caches, as where one network runs all the
    time. Rounds go on until all together have taken `seconds` each, 3 to 200 of them: what is slow gets fewer
    rounds, not more time. On a steady machine they end earlier: after 10 or more, once each function's
    quartiles, over the root of the rounds, lie within 1 % of its median. Data should lie on the device
    already. Times are given per part, such as an image, of the `parts` that a call computes.
    """
    times: dict[object, list[float]] = {name: [] for name in functions}
    order, end = list(functions), math.inf
    on_cuda = torch.device(device).type == "cuda"
    for number in range(MOST_ROUNDS + 1):
        if number == 1:
            end = time.perf_counter() + seconds * len(functions)
        if number > FEWEST_ROUNDS and time.perf_counter() > end:
            break
        if number > EARLIEST_END and all(_is_known(taken) for _, *taken in times.values()):
            break
        for name in order:
            if on_cuda and times[name] and parts * times[name][-1] < SHORT:
                functions[name]()
            synchronize(device)
            called = time.perf_counter()
            functions[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - called) / parts)
        order.reverse()
    found = {}
    for name, (_, *taken) in times.items():
        low, median, high = np.quantile(taken, (0.25, 0.5, 0.75)).tolist()
        found[name] = {"seconds": median, "low": low, "high": high, "mean": sum(taken) / len(taken),
                       "rounds": len(taken)}  # fmt: skip
    return found


def _is_known(taken: Sequence[float]) -> bool:
    """Tell whether the rounds' times lie so close together that more of them would move the median little."""
    low, median, high = np.quantile(taken, (0.25, 0.5, 0.75))
    return high - low <= KNOWN_TO * median * math.sqrt(len(taken))


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which times of about so many seconds read well, and how many a second has."""
    return ("ms", 1e3) if seconds >= 1e-5 else ("µs", 1e6)


def rounds_of(
    networks: Mapping[str, Callable], blockdrop: Prepared, levels: Iterable[int], images: Tensor, size: int
) -> dict[object, Callable[[], object]]:
    """Return functions that run images (n, 3, H, W) in batches of `size`.

    One per prepared network, by its name, and one per k in `levels`, which runs the policy network and k
    random blocks of the ResNet per image.
    """
    inputs = images.split(size)
    calls = {name: functools.partial(_in_turn, network, inputs) for name, network in networks.items()}
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(images), blockdrop.num_blocks, generator=generator).argsort(1)
    for k in levels:
        policies = (order < k).float().to(images.device).split(size)
        calls[k] = functools.partial(_in_turn, blockdrop, inputs, policies)
    return calls


def _in_turn(function: Callable, *batches: Sequence[Tensor]) -> None:
    for batch in zip(*batches, strict=True):
        function(*batch)
        synchronize(batch[0].device)


@contextlib.contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Have PyTorch compute with so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(functions: Sequence[Callable[[], object]], device: torch.device) -> tuple[int, float]:
    """Return how many threads are faster for some functions in the mean, all or one, and their seconds.

    Threads that wait for each other are slow now and then, which the mean shows. On CUDA: all.
    """
    most = torch.get_num_threads()

    def run(threads: int) -> None:
        with num_threads(threads):
            for function in functions:
                function()

    choices = sorted({1, most}) if device.type == "cpu" else [most]
    times = measure({n: functools.partial(run, n) for n in choices}, device, TRIAL_SECONDS)
    best = min(choices, key=lambda n: times[n]["mean"])
    return best, times[best]["seconds"]


def busy_cores() -> float:
    """Return how many CPU cores other programs keep busy, watched for half a second; this one waits."""
    return psutil.cpu_percent(WATCHED_SECONDS) / 100 * psutil.cpu_count()


def busy_words(busy_before: float, device: torch.device, times: Iterable[Mapping[str, float]]) -> str:
    """Say in a sentence that a machine was busy and what to do, or return an empty text.

    `busy_before`: the `busy_cores` before anything was computed. `times`: of `measure`, since then.
    """
    own, cores = torch.get_num_threads() if device.type == "cpu" else 1, psutil.cpu_count()
    reasons = []
    if busy_before + own > cores + 0.3:
        reasons.append(f"other programs kept {busy_before:.1f} of {cores} CPU cores busy")
    unsteady = max(max(t["mean"] / t["seconds"], t["high"] / t["low"]) for t in times)
    if unsteady > STEADY:
        reasons.append(f"rounds of the same work differ by a factor of {unsteady:.1f}")
    if not reasons:
        return ""
    return (
        f"The machine was busy: {' and '.join(reasons)}. "
        "Don't trust the times: stop other programs, or raise seconds, and run this again."
    )


def machine_record(device: torch.device | str) -> dict[str, object]:
    """Return what a machine is known by: name, instructions, threads, PyTorch's version, `calibration`.

    The calibration is the seconds that one fixed convolution takes on one thread, the fastest of many.
    """
    device = torch.device(device)
    return {
        "name": device_name(device),
        "instructions": _instructions(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "calibration": _calibration(device),
    }


def same_machine(*records: Mapping) -> bool:
    """Tell whether all records are of the same machine; where one is known by its name only, they are not."""
    calibrations = [record.get("calibration") for record in records]
    if not records or None in calibrations or max(calibrations) >= SAME_CALIBRATION * min(calibrations):
        return False
    first, *others = ({**record, "calibration": None} for record in records)
    return all(other == first for other in others)


def same_kind(*records: Mapping) -> bool:
    """Tell whether all records are of CPUs, or all of GPUs; old ones, without instructions, are of CPUs."""
    # A GPU's instructions are its compute capability, a number.
    return len({record.get("instructions", "")[:1].isdigit() for record in records}) == 1


def _instructions(device: torch.device) -> str:
    """Return a CPU's vector instructions, such as "avx512 bf16 amx", or a GPU's compute capability."""
    if device.type == "cuda":
        return "{}.{}".format(*torch.cuda.get_device_capability(device))
    has = getattr(torch.cpu, "get_capabilities", dict)()
    found = [torch.backends.cpu.get_cpu_capability().lower()]
    found += ["bf16"] if has.get("avx512_bf16") or has.get("bf16") else []
    found += ["amx"] if has.get("amx_tile") else []
    return " ".join(found)


@functools.cache
def _calibration(device: torch.device) -> float:
    """Return the seconds of a convolution of 64 images of 32 by 32 pixels, 16 channels to 16."""
    images = torch.ones(64, 16, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 3, 3, device=device)

    def convolution() -> None:
        F.conv2d(images, weight, padding=1)
        synchronize(device)

    with num_threads(1), torch.inference_mode():
        return min(timeit.repeat(convolution, number=1, repeat=CALIBRATION_ROUNDS))
