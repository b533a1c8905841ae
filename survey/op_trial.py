"""One call of an operation for M members: as a loop over them, as a stack, and by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

import memberwise
from memberwise.generators import make_generators
from survey.op_samples import MEMBERS, Sample

SEEDS = range(10, 10 + MEMBERS)


@dataclass
class Outcome:
    """What a run gave, or the error that ended it.

    Attributes:
        results: of a loop, each member's; of a stack, one structure with the member axis first.
        grads: one gradient for each input that needs one, with the member axis where the input has it.
        inputs: the inputs after the run, with the member axis where they have it.
        seen: shape, strides and dtype of the results as the last member saw them.
        states: the members' random streams afterwards.
        error: what ended it.
    """

    results: Any = None
    grads: list[Any] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    seen: Any = None
    states: list[torch.Tensor] = field(default_factory=list)
    error: Exception | None = None


class Trial:
    """One sample, some of its tensors stacked and the others shared (member 0's).

    Args:
        name: of the operation.
        call: the operation, on `(input, *args, **kwargs)`.
        sample: the arguments of M members.
        stacked: for each tensor of the sample, whether each member has its own.
        in_place: whether `call` writes its first argument.
        follows: whether gradients are asked for. Without them a member looks at its results' strides instead, and
            writes into them, which must reach the inputs as it does alone.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        sample: Sample,
        stacked: Sequence[bool],
        *,
        in_place: bool,
        follows: bool,
    ) -> None:
        self.name = name
        self.call = call
        self.sample = sample
        self.stacked = [*stacked]
        self.in_place = in_place
        self.follows = follows
        self.needs = [follows and column[0].requires_grad for column in sample.columns]
        pairs = zip(sample.columns, stacked, strict=True)
        self.given = [_stack_alike(column) if own else column[0].detach() for column, own in pairs]
        self.draws = False
        self.seen: Any = None

    def in_double(self) -> Trial:
        """The same in float64, as far as the operation lets itself be told by its tensors."""
        columns = [[_in_double(one) for one in column] for column in self.sample.columns]
        sample = replace(self.sample, columns=columns)
        return Trial(self.name, self.call, sample, self.stacked, in_place=self.in_place, follows=self.follows)

    # -- the program, written for one member

    def program(self, tensors: list[torch.Tensor]) -> Any:
        """The results, and those of them that autograd may follow: in a transform no tensor says whether it does."""
        if self.follows:
            return self._following(tensors)
        with torch.no_grad():
            return self._looking(tensors), []

    def _following(self, tensors: list[torch.Tensor]) -> Any:
        if self.in_place:
            firsts = self.sample.firsts
            tensors = [*(tensor.clone() for tensor in tensors[:firsts]), *tensors[firsts:]]
        out = self._called(tensors)
        leaves = tree_leaves(self.sample.finish(out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return out, [leaf for leaf in tensors if leaf.is_floating_point() or leaf.is_complex()]

    def _looking(self, tensors: list[torch.Tensor]) -> Any:
        out = self._called(tensors)
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]
        self.seen = [(tuple(leaf.shape), _steps(leaf), leaf.dtype) for leaf in leaves]
        kept = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, out)
        apart = all(self.stacked) and not self.in_place  # a later member would see what one writes into a shared input
        for leaf in leaves:
            if apart and 0 not in _steps(leaf):
                leaf.zero_()
        return kept

    def _called(self, tensors: list[torch.Tensor]) -> Any:
        first, args, kwargs = self.sample.arguments(tensors)
        return self.call(first, *args, **kwargs)

    # -- the ways to run it

    def loop(self) -> Outcome:
        """Each member alone."""
        leaves = self._leaves()
        outs, states, rows = [], [], []
        try:
            for i, seed in enumerate(SEEDS):
                own = [leaf[i].clone() if own else leaf for leaf, own in zip(leaves, self.stacked, strict=True)]
                rows.append([leaf.requires_grad_(needs) for leaf, needs in zip(own, self.needs, strict=True)])
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                outs.append(self.program(rows[-1]))
                states.append(torch.get_rng_state())
                self.draws = self.draws or not torch.equal(before, states[-1])
            columns = [*zip(*rows, strict=True)]
            grads = self._grads_of_loop([_needing(leaves) for _, leaves in outs], columns)
        except Exception as error:
            return Outcome(error=error)
        inputs = [
            given if _has_moved(column[0], given[0] if own else given) else _joined(column, own)
            for column, own, given in zip(columns, self.stacked, self.given, strict=True)
        ]
        return Outcome([out for out, _ in outs], grads, inputs, self.seen, states)

    def stack(self) -> Outcome:
        """All members by `memberwise.vmap`."""
        streams = make_generators(SEEDS) if self.draws else None
        outcome = self._mapped(lambda call, dims: memberwise.vmap(call, dims, generators=streams))
        if getattr(outcome.error, "code", "") == "MW202":  # a draw of no numbers, which moves no stream
            self.draws = True
            return self.stack()
        outcome.states = [stream.get_state() for stream in streams or ()]
        return outcome

    def torch_func(self) -> Outcome:
        """All members by `torch.func.vmap`."""
        return self._mapped(lambda call, dims: torch.func.vmap(call, dims, randomness="different"))

    def _mapped(self, vmap: Callable[..., Any]) -> Outcome:
        leaves = [leaf.requires_grad_(needs) for leaf, needs in zip(self._leaves(), self.needs, strict=True)]
        dims = [0 if own else None for own in self.stacked]
        self.seen = None
        try:
            out, followed = vmap(lambda _, own: self.program(own), (0, dims))(torch.arange(MEMBERS), leaves)
            followed = _needing(followed)
            grads = _grads(followed, leaves, [_cotangent(leaf.shape[1:], leaf.dtype) for leaf in followed])
        except Exception as error:
            return Outcome(error=error)
        return Outcome(out, grads, [leaf.detach() for leaf in leaves], self.seen)

    def _leaves(self) -> list[torch.Tensor]:
        pairs = zip(self.given, self.stacked, strict=True)
        return [_stack_alike([*leaf]) if own else leaf.clone() for leaf, own in pairs]

    def _grads_of_loop(self, followed: list[list[Any]], columns: list[Any]) -> list[Any]:
        """Of one sum over all members, so that a shared input gets the sum of its gradients."""
        flat = [
            leaf for column, own in zip(columns, self.stacked, strict=True) for leaf in (column if own else column[:1])
        ]
        cotangents = [_cotangent(leaf.shape, leaf.dtype)[i].clone() for i, own in enumerate(followed) for leaf in own]
        grads = iter(_grads([leaf for own in followed for leaf in own], flat, cotangents))
        rows = [[next(grads) for _ in range(MEMBERS if own else 1)] for own, needs in self._wanted() if needs]
        owns = [own for own, needs in self._wanted() if needs]
        return [None if row[0] is None else _joined(row, own) for row, own in zip(rows, owns, strict=True)]

    def _wanted(self) -> list[tuple[bool, bool]]:
        return [*zip(self.stacked, self.needs, strict=True)]


def _needing(leaves: list[Any]) -> list[Any]:
    return [leaf for leaf in leaves if leaf.requires_grad]


def _in_double(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(kind).requires_grad_(tensor.requires_grad)


def _has_moved(leaf: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether an operation gave the object another shape (`squeeze_`): in a call it is another object."""
    return leaf.layout is torch.strided and (leaf.shape != given.shape or leaf.stride() != given.stride())


def _joined(row: Sequence[torch.Tensor], own: bool) -> torch.Tensor:
    return torch.stack([leaf.detach() for leaf in row]) if own else row[0].detach()


def _grads(followed: list[Any], leaves: list[Any], cotangents: list[Any]) -> list[Any]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not followed or not wanted:
        return [None] * len(wanted)
    return [*torch.autograd.grad(followed, wanted, cotangents, allow_unused=True)]


def _cotangent(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The gradients of one result, `(M, *shape)`."""
    return torch.randn(MEMBERS, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def _stack_alike(column: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(M, *s)` whose rows lie in memory as the members' tensors do, where these lie densely."""
    rows = [row.detach() for row in column]
    if rows[0].layout is not torch.strided:
        return torch.stack(rows)
    like = torch.empty_like(rows[0])
    out = torch.empty_strided((len(rows), *like.shape), (max(like.numel(), 1), *like.stride()), dtype=like.dtype)
    for row, one in zip(out, rows, strict=True):
        row.copy_(one)
    return out


def _steps(leaf: torch.Tensor) -> tuple[int, ...]:
    """The strides that matter: a dimension of one element has none."""
    return tuple(step for step, size in zip(leaf.stride(), leaf.shape, strict=True) if size > 1) if leaf.numel() else ()
