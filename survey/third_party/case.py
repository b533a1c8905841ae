"""A case of the survey: how one model is made, what goes in, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]


def call(model: nn.Module, **inputs: torch.Tensor) -> Any:
    """The model on its inputs, as keywords."""
    return model(**inputs)


def call_in_order(model: nn.Module, **inputs: torch.Tensor) -> Any:
    """The model on its inputs, by position."""
    return model(*inputs.values())


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: of the architecture, with what is special about the case.
        package: the distribution it comes from.
        make: a new model; called after `torch.manual_seed`.
        inputs: what one member gets, drawn from a generator; floating tensors get gradients.
        run: one forward, written for one model: `run(model, **inputs)`; any structure comes out.
        steps: calls in a row, each with its backward, so that state which a call leaves is met by the next.
        untracked: the names of floating inputs that shall not get gradients.
        modes: those in which the model has a backward.
        dtype: float64, but where the architecture has operations that take no such numbers.
        exact: float32 where the architecture computes in float32 inside whatever it is given (a softmax, say), so that
            results can be no better than that.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    run: Callable[..., Any] = call_in_order
    steps: int = 2
    untracked: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("train", "eval")
    dtype: torch.dtype = torch.float64
    exact: torch.dtype = torch.float64


def randn(*shape: int) -> Callable[[torch.Generator], Inputs]:
    """Inputs of one floating tensor."""
    return lambda generator: {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}


def tokens(generator: torch.Generator, *shape: int, below: int, least: int = 0) -> torch.Tensor:
    """Random ids."""
    return torch.randint(least, below, shape, generator=generator)
