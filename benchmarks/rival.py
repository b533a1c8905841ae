"""What a rival is: one way to train all members of a case, started once and then stepped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.case import Batch, Case

LR = 1e-3
"""The learning rate of every rival's Adam; its other arguments are torch's defaults."""


@dataclass(frozen=True)
class Running:
    """A started rival.

    `step(batch)` is one training step of all members (zero_grad, forward, backward, Adam) and returns
    their losses, (M,). `state()` gives the parameters and buffers as they are now, each (M, ...), by the
    names of a member's state dict.
    """

    step: Callable[[Batch], Tensor]
    state: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Rival:
    """One way to train a case's members.

    A column of the published table is a `family`: what its fastest rival takes, row by row, so that
    nobody is compared with a poor form of what they use.
    """

    name: str
    family: str
    about: str
    start: Callable[[Case, list[nn.Module]], Running]

    @property
    def ours(self) -> bool:
        """Whether it is compared with the others, or one of those."""
        return self.family.startswith("memberwise")
