"""What a workload is: a model, its data and a loss, all three written for one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One workload of the table, run with each number of members in `members`.

    `shared` says whether all members train on the same batch (an ensemble) or each on its own
    (seeds with their own order of the data); then every tensor of a batch has a leading member axis.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[..., Tensor]
    members: tuple[int, ...]
    shared: bool = True

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        """Of `(model, *batch)`, as `torch.vmap` and `memberwise.vmap` take them."""
        width = len(self.batch(torch.Generator()))
        return (0, *((None if self.shared else 0,) * width))

    def models(self, members: int, seed: int = 0) -> list[nn.Module]:
        """Member i is what `torch.manual_seed(seed + i)` makes of the model."""
        made = []
        with torch.random.fork_rng(devices=[]):
            for member in range(members):
                torch.manual_seed(seed + member)
                made.append(self.model())
        return made

    def batches(self, members: int, count: int, seed: int = 0) -> list[Batch]:
        """`count` different batches; unless shared, each tensor is (M, ...)."""
        generator = torch.Generator().manual_seed(seed)
        if self.shared:
            return [self.batch(generator) for _ in range(count)]
        return [
            tuple(torch.stack(parts) for parts in zip(*(self.batch(generator) for _ in range(members)), strict=True))
            for _ in range(count)
        ]

    def of_member(self, batch: Batch, member: int) -> Batch:
        """What one member sees of a batch."""
        return batch if self.shared else tuple(part[member] for part in batch)
