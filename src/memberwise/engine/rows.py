"""Stacked tensors as the members' own, for members that run one by one.

A row shares the stacked tensor's memory, and with it the count of writes by which autograd knows that a tensor it has
saved was changed. So the counts start anew for each member: what one writes is no change of what another keeps. At the
end they stand at the highest, so that a later write to the stacked tensor is one for every member.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from memberwise._torch.versions import set_versions, version


class Rows:
    """The rows handed out in one run by members.

    >>> rows, x = Rows(), torch.zeros(2, 3)
    >>> first, second = rows.of(x)
    >>> for row in (first, second):
    ...     with rows.turn():
    ...         _ = row.add_(1.0)
    >>> x._version
    1
    """

    def __init__(self) -> None:
        self._bases: list[torch.Tensor] = []
        self._before: list[int] = []
        self._highest: list[int] = []

    def of(self, tensor: torch.Tensor, dim: int = 0) -> Sequence[torch.Tensor]:
        """One view a member; single views, which may be written where several of one node may not."""
        self._bases.append(tensor)
        self._before.append(version(tensor))
        self._highest.append(version(tensor))
        return _Column(tensor, dim)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One member's run."""
        set_versions(self._bases, self._before)
        try:
            yield
        finally:
            self._highest = [max(was, version(base)) for was, base in zip(self._highest, self._bases, strict=True)]
            set_versions(self._bases, self._highest)

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether any member wrote to its row."""
        k = next(k for k, base in enumerate(self._bases) if base is tensor)
        return self._highest[k] > self._before[k]


class _Column(Sequence[torch.Tensor]):
    """The rows of one tensor, each made when it is asked for: a view of before another's write would not know of it."""

    def __init__(self, tensor: torch.Tensor, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._made: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self._tensor.shape[self._dim]

    def __getitem__(self, i: Any) -> Any:
        if i not in self._made:
            if i >= len(self):
                raise IndexError(i)
            self._made[i] = self._tensor.select(self._dim, i)
        return self._made[i]
