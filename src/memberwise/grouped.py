"""Group: models of different architectures as one `nn.Module`, in as few stacks as can run as one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, cast, overload

import torch
from torch import nn

from memberwise.engine.grouped import Parts, classes, over_parts
from memberwise.errors import ArgumentError, MemberIndexError, fail
from memberwise.members import Memo, local, note_part, positions
from memberwise.module import Stack


class Group(nn.Module):
    """M models of any architectures as one module: made by `group(models)`.

    Models that can run as one are one stack (`stacks`, an `nn.ModuleList`); `places[k]` says which members stack k
    has. All else is in the members' own order, as in a `Stack`: calls, `vmap(loss_fn, (0, None))(group, x)`, `select`,
    `unstack`, `group[i]`, `train(members=...)`, generators, and hyperparameters of one value a member in the
    optimizers of `memberwise.optim`. State-dict keys begin with `stacks.k`.

    Shapes: `group(x)` gives every member the same `x`, `group(each(xs))` gives member i `xs[i]`. Where all members'
    results have one structure, shape and dtype, the answer is stacked, (M, ...); otherwise it is a list of M results.

    Args:
        stacks: the stacks.
        places: for each, the numbers of its members.

    >>> import memberwise
    >>> models = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Linear(3, 2)]
    >>> group = memberwise.group(models)
    >>> group(torch.zeros(5, 3)).shape, group.places
    (torch.Size([3, 5, 2]), [[0, 2], [1]])
    """

    stacks: nn.ModuleList
    places: list[list[int]]

    def __init__(self, stacks: Iterable[Stack], places: Iterable[Sequence[int]]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)
        self.places = [[*members] for members in places]

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all members: each sees the arguments, of those marked by `each()` its own entry."""
        return over_parts(_call, (self, *args), kwargs, (0, *[None] * len(args)), 0, "group")

    def __memberwise_parts__(self) -> Parts:
        return [*zip(self._all(), self.places, strict=True)]

    def _all(self) -> list[Stack]:
        return cast("list[Stack]", [*self.stacks])

    @property
    def generators(self) -> Sequence[torch.Generator] | None:
        """One random stream a member, which its calls advance; None: the global stream."""
        found: dict[int, torch.Generator] = {}
        for stack, members in self.__memberwise_parts__():
            if stack.generators is None:
                return None
            found |= zip(members, stack.generators, strict=True)
        return [found[member] for member in sorted(found)]

    @generators.setter
    def generators(self, generators: Sequence[torch.Generator] | None) -> None:
        if generators is not None and len(generators) != len(self):
            what = f"expected one generator for each of {len(self)} members, got {len(generators)}"
            fail(ArgumentError, "MW303", what)
        for stack, members in self.__memberwise_parts__():
            stack.generators = None if generators is None else [generators[member] for member in members]

    # -- members

    def __len__(self) -> int:
        """M."""
        return sum(map(len, self.places))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[member] for member in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Group: ...
    def __getitem__(self, index: SupportsIndex | slice) -> nn.Module | Group:
        """A member as a live module of its own class, as of a `Stack`; of a slice, a new Group."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        member, size = operator.index(index), len(self)
        if not -size <= member < size:
            fail(MemberIndexError, "MW305", f"expected a member from 0 to {size - 1}, got {member}")
        stack, place = self._where(member % size)
        return stack[place]

    def _where(self, member: int) -> tuple[Stack, int]:
        """The stack that has a member, and the member's place in it."""
        return next(
            (stack, members.index(member)) for stack, members in self.__memberwise_parts__() if member in members
        )

    def select(self, indices: Iterable[int] | torch.Tensor | slice) -> Group:
        """A new Group of these members, in this order, with their gradients and streams; as `Stack.select`."""
        return self.__select_members__(positions(indices, len(self)), {})

    def __select_members__(self, indices: torch.Tensor, memo: Memo) -> Group:
        chosen = [(stack, *local(members, indices)) for stack, members in self.__memberwise_parts__()]
        chosen = [(stack, own, places) for stack, own, places in chosen if places]
        out = Group([s.__select_members__(own, memo) for s, own, _ in chosen], [places for *_, places in chosen])
        out.training = out.stacks.training = self.training
        return out

    def unstack(self) -> list[nn.Module]:
        """M independent modules of the members' own classes; as `Stack.unstack`."""
        found = {}
        for stack, members in self.__memberwise_parts__():
            found |= zip(members, stack.unstack(), strict=True)
        return [found[member] for member in sorted(found)]

    # -- modes, parameters

    def train(self, mode: bool = True, *, members: Iterable[int] | torch.Tensor | slice | None = None) -> Group:
        """Put all members, or some only, in training mode (or evaluation mode); as `Stack.train`."""
        if members is None:
            return super().train(mode)
        wanted = positions(members, len(self))
        for stack, own in self.__memberwise_parts__():
            inside, _ = local(own, wanted)
            if len(inside):
                stack.train(mode, members=inside)
        return self

    def eval(self, *, members: Iterable[int] | torch.Tensor | slice | None = None) -> Group:
        """Put all members, or some only, in evaluation mode; see `train`."""
        return self.train(False, members=members)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module. Each parameter knows which members it holds, for the optimizers of `memberwise.optim`."""
        for stack, members in self.__memberwise_parts__():
            for parameter in stack.parameters():
                note_part(parameter, members, len(self))  # anew each time, as copies lose attributes
        return super().named_parameters(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{len(self)} members in {len(self.stacks)} stacks"


def _call(members: Sequence[int], stack: Stack, *args: Any, **kwargs: Any) -> Any:
    return stack(*args, **kwargs)


classes.add(Group)
