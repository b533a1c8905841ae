"""What a rival is: one way to train all members of a case, started once and then stepped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks import feed
from benchmarks.case import Batch, Case


class Cannot(Exception):
    """A rival says itself why it does not run a case."""


@dataclass(frozen=True)
class Running:
    """A started rival.

    `step(batch)` is one training step of all members (zero_grad, forward, backward, clipping, optimizer) and
    returns their losses, (M,), or one prediction, (M, ...). `state()` gives the trained parameters and the buffers as
    they are now, each (M, ...), by a member's names.

    With `together` more than one, `step` takes the batches of as many steps, stacked, or of fewer.

    Such a rival, and one that is no torch code, has its own `feed`, which takes all batches and answers what makes call
    number i of them; the latter says how many bytes it needs, `memory`.
    """

    step: Callable[[Batch], Tensor]
    state: Callable[[], dict[str, Tensor]]
    feed: Callable[[feed.Data], Callable[[int], object]] | None = None
    memory: Callable[[Batch], int] | None = None
    together: int = 1


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
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""
    alone: bool = False
    """Whether it runs the first member only."""
    draws_alone: bool = False
    """Whether its members draw the random numbers that each draws alone."""

    @property
    def ours(self) -> bool:
        """Whether it is compared with the others, or one of those."""
        return self.family.startswith("memberwise")
