"""Medians and ratios with their uncertainty: 95% percentile bootstrap, the same resamples every time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
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
    values = np.array(samples)
    medians = np.median(values[_picks(len(samples))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975]).tolist()
    return Interval(float(np.median(values)), low, high)


@functools.cache
def _picks(count: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (RESAMPLES, count), generator=generator).numpy()


def of_ratio(above: list[float], below: list[float]) -> Interval:
    """The median of the ratios `above / below` of neighbours, over the rounds that both have.

    >>> of_ratio([2.0, 4.0, 6.0], [1.0, 2.0]).median
    2.0
    """
    return of_median([a / b for a, b in zip(above, below, strict=False)])
