"""Standard errors, rank correlations, headroom, and break-even of what was found on images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.96  # standard errors on each side hold 95 % of a normal distribution
SHUFFLES = 20


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values (N,); nan of a single one."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")


def points(hits: Tensor, others: Tensor) -> tuple[float, float]:
    """Return the difference of two accuracies in points and its standard error; hits: (N,), 1 where right."""
    differences = 100 * (hits - others)
    return differences.mean().item(), standard_error(differences)


def headroom(right: Tensor) -> dict[str, float]:
    """Return how much choosing among M policies could bring on N images; `right`: (N, M), 1 where right.

    `best_one`: accuracy of the best policy for all. `oracle`: accuracy if each image gets a right policy
    where there is one. `chance`: the oracle's with each policy's hits shuffled among the images.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(SHUFFLES, *right.shape, generator=generator).argsort(1)
    shuffled = right.expand(SHUFFLES, -1, -1).gather(1, order)
    return {
        "policies": right.shape[1],
        "best_one": right.mean(0).max().item(),
        "oracle": right.amax(1).mean().item(),
        "chance": shuffled.amax(2).mean().item(),
    }


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two series (N,): ties share their mean rank; nan if constant."""

    def ranks(values: Tensor) -> Tensor:
        _, position, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2).double()[position]

    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def correlation_interval(x: Tensor, y: Tensor) -> list[float]:
    """Return the 95 % interval of the rank correlation of two series (N,), by Fisher's transform.

    Standard error: Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", Psychometrika 2000.
    """
    correlation = torch.tensor(rank_correlation(x, y), dtype=torch.float64)
    error = ((1 + correlation**2 / 2) / (len(x) - 3)).sqrt()
    return (correlation.atanh() + NORMAL_95 * error * torch.tensor([-1, 1])).tanh().tolist()


def break_even(levels: Sequence[int], times: Mapping[object, Mapping[str, float]]) -> list[float]:
    """Return the most blocks that BlockDrop may keep before it is slower, and the range by the quartiles.

    `times`: {"sole", and each number of blocks kept among the rising `levels`: {"seconds", "low", "high"}}.
    Between the levels the time is a line; where it would fall it stays.
    """
    return [
        float(np.interp(times["sole"][its], np.maximum.accumulate([times[k][ours] for k in levels]), levels))
        for ours, its in (("seconds", "seconds"), ("high", "low"), ("low", "high"))
    ]


def saving(times: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Return the seconds that "blockdrop" saves per image against "sole", least and most by the quartiles."""
    ours, its = times["blockdrop"], times["sole"]
    return [its["seconds"] - ours["seconds"], its["low"] - ours["high"], its["high"] - ours["low"]]


def spread_evenly(values: Tensor, number: int) -> Tensor:
    """Return the indices (number,) of values (N,) that lie evenly between low and high ones; shuffled."""
    evenly = ((torch.arange(number) + 0.5) * len(values) / number).long()
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    return values.argsort(stable=True)[evenly][order]
