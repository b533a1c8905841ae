"""Medians and ratios with their uncertainty: 95% percentile bootstrap, the same resamples every time."""

from __future__ import annotations

from typing import NamedTuple

import torch

RESAMPLES = 4000


class Interval(NamedTuple):
    """A median and the bounds of its 95% interval."""

    median: float
    low: float
    high: float


def of_median(samples: list[float]) -> Interval:
    """
    >>> of_median([3.0, 1.0, 2.0])
    Interval(median=2.0, low=1.0, high=3.0)
    """
    values = torch.tensor(samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(samples), (RESAMPLES, len(samples)), generator=generator)
    medians = values[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(values.quantile(0.5).item(), low, high)


def of_ratio(above: list[float], below: list[float]) -> Interval:
    """The median of the ratios `above / below` of neighbours, over the rounds that both have.

    >>> of_ratio([2.0, 4.0, 6.0], [1.0, 2.0]).median
    2.0
    """
    return of_median([a / b for a, b in zip(above, below, strict=False)])
