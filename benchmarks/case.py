"""What a workload is: a model, its data and a loss, all three written for one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.recipe import ADAM, Recipe

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Unwritten:
    """Why a case has no twin: no code that computes the same in another form."""

    why: str


@dataclass(frozen=True)
class Case:
    """One workload of the table, run with each number of members in `members`.

    `shared` says whether all members train on the same batch (an ensemble) or each on its own
    (seeds with their own order of the data); then every tensor of a batch has a leading member axis.
    """

    name: str
    about: str
    model: Callable[..., nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[..., Tensor]
    members: tuple[int, ...]
    shared: bool = True
    workload: str = ""
    """Its name in the table of workloads, `W1` to `W12`."""
    recipe: Recipe = ADAM
    trains: bool = True
    """If not, a step is a prediction in evaluation mode without gradients: what `loss` returns, (M, ...)."""
    still: Callable[[], nn.Module] | None = None
    """Of a model that draws random numbers: the same without. Rivals that draw otherwise are checked with it."""
    common: Callable[[], nn.Module] | None = None
    """The frozen part that all members hold: made once and handed to `model`, which keeps it as `trunk`."""
    rows: int | None = None
    """Of how many rows of data a step picks its batch, within the timed region; None if batches come ready."""
    precision: torch.dtype | None = None
    """The dtype that limits how far two right results lie apart, where it is not that of the parameters."""
    steps: int | None = None
    """How many steps are checked, where the usual number would take minutes; a captured step compiles in the third."""
    objective: str = ""
    """The loss by its name, for the twins: `cross_entropy`, `mse`, or `` for a prediction."""
    folded: Callable[..., tuple[Tensor, dict[str, Tensor]]] | Unwritten = Unwritten("no folded form is written")
    """`folded(params, buffers, *inputs, training=...)`: the model of all members by hand, each tensor (M, ...)."""
    in_jax: str | Unwritten = Unwritten("no model in JAX is written")
    """A module of `in_jax/`, with the model of one member."""
    ahead: bool = False
    """Whether its steps are short, and their data known ahead, so that one would hand over that of several at once."""
    flops: int | None = None
    """Of one member's step, where torch's counter does not see them."""

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        """Of `(model, *batch)`, as `torch.vmap` and `memberwise.vmap` take them."""
        width = len(self.batch(torch.Generator()))
        return (0, *((None if self.shared else 0,) * width))

    @property
    def randomness(self) -> str:
        """As `torch.vmap` takes it."""
        return "error" if self.still is None else "different"

    def without_draws(self) -> Case:
        """The same workload with the model that draws nothing."""
        return self if self.still is None else replace(self, model=self.still, still=None)

    def models(self, members: int, seed: int = 0) -> list[nn.Module]:
        """Member i is what `torch.manual_seed(seed + i)` makes of the model."""
        with torch.random.fork_rng(devices=[]):
            part = self.part(seed)
            return [self.member(seed + member, part) for member in range(members)]

    def part(self, seed: int = 0) -> tuple[nn.Module, ...]:
        """What all members hold, as the model takes it."""
        if self.common is None:
            return ()
        torch.manual_seed(seed)
        return (self.common().requires_grad_(False),)

    def member(self, seed: int, part: tuple[nn.Module, ...] = ()) -> nn.Module:
        """One member; torch's global stream is left where its draws go on."""
        torch.manual_seed(seed)
        return self.model(*part).train(self.trains)

    def batches(self, members: int, count: int, seed: int = 0) -> list[Batch]:
        """`count` different batches; unless shared, each tensor is (M, ...)."""
        generator = torch.Generator().manual_seed(seed)
        if self.shared:
            return [self.batch(generator) for _ in range(count)]
        return [side_by_side([self.batch(generator) for _ in range(members)]) for _ in range(count)]

    def of_member(self, batch: Batch, member: int) -> Batch:
        """What one member sees of a batch."""
        return batch if self.shared else tuple(part[member] for part in batch)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Each tensor of all of them, stacked."""
    return tuple(map(torch.stack, zip(*batches, strict=True)))


def watched(model: nn.Module) -> dict[str, Tensor]:
    """What a step may change: the parameters that are trained, and the buffers."""
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def stacked(models: list[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the trained parameters and of the buffers of all members, (M, ...); what is frozen stays behind."""
    held = [watched(model) for model in models]
    whole = {name: torch.stack([each[name].detach() for each in held]) for name in held[0]}
    trained = {name for name, _ in models[0].named_parameters()}
    return (
        {name: value for name, value in whole.items() if name in trained},
        {name: value for name, value in whole.items() if name not in trained},
    )
