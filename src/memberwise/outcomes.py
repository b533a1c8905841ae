"""What a stack gives, and what its members give alone: the two runs that `verify` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from memberwise.engine.boundary import vmap
from memberwise.generators import drawing_from, make_generators
from memberwise.module import Stack
from memberwise.trees import Each, tree_leaves, tree_map

WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
"""The dtypes of the reference; float64 for all other floating ones."""


@dataclass(frozen=True)
class Outcome:
    """What one run left behind.

    Attributes:
        tensors: by (kind, name); of members stacked, M first.
        values: outputs that are no tensors, one a member.
        streams: where each member's random stream stands.
        drew: whether any stream moved.
    """

    tensors: dict[tuple[str, str], torch.Tensor]
    values: dict[str, list[Any]]
    streams: torch.Tensor
    drew: bool


@dataclass(frozen=True)
class Case:
    """What is run: a stack or its members, on inputs (`each()` marks what has a member axis), through a loss or not."""

    stack: Stack
    inputs: tuple[Any, ...]
    loss_fn: Callable[..., Any] | None

    def only(self, members: list[int]) -> Case:
        """The same with copies of these members alone, each with a random stream of its own."""
        part = self.stack.select(members)
        if part.generators is None:
            place = next((tensor.device for tensor in self.tensors()), torch.device("cpu"))
            part.generators = make_generators(range(len(members)), place if place.type != "meta" else "cpu")
        return Case(part, tree_map(lambda leaf: _chosen(leaf, members), self.inputs), self.loss_fn)

    def with_inputs_of(self, members: Sequence[int]) -> Case:
        """The same, with the inputs of these members of a larger group."""
        return replace(self, inputs=tree_map(lambda leaf: _chosen(leaf, [*members]), self.inputs))

    def tensors(self) -> list[torch.Tensor]:
        """All that the run starts from."""
        inputs = [leaf.value if isinstance(leaf, Each) else leaf for leaf in tree_leaves(self.inputs)]
        return [*self.stack.parameters(), *self.stack.buffers(), *(t for t in inputs if isinstance(t, torch.Tensor))]

    def outputs(self) -> Any:
        """What the stack gives: one call for all members."""
        if self.loss_fn is None:
            return self.stack(*self.inputs)
        dims = (0, *(tree_map(lambda _: None, entry) for entry in self.inputs))
        return vmap(self.loss_fn, dims)(self.stack, *self.inputs)

    def copied(self, wide: bool) -> Case:
        """Copies of everything, for one run; in float64 if `wide`."""
        part = self.stack.select(range(len(self.stack)))
        if wide:
            part._apply(lambda tensor: tensor.to(wide_dtype(tensor.dtype)))
        return Case(part, tree_map(lambda leaf: _fresh(leaf, wide), self.inputs), self.loss_fn)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the reference for a tensor of `dtype`."""
    return WIDE.get(dtype, dtype) if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def together(case: Case, wide: bool = False) -> Outcome:
    """The stack: one call for all members, one backward."""
    run = case.copied(wide)
    stack, streams = run.stack, run.stack.generators or ()
    before = _standing(streams)
    out = run.outputs()
    tracked = [leaf.value if isinstance(leaf, Each) else leaf for leaf in _tracked(run.inputs)]
    grads = _gradients(out, [*stack.parameters(), *tracked], len(stack))
    names = _gradient_names(stack, len(tracked))
    tensors = {("gradient", name): grad for name, grad in zip(names, grads, strict=True)}
    tensors |= {("buffer", name): buffer for name, buffer in stack.named_buffers()}
    values: dict[str, list[Any]] = {}
    for k, leaf in enumerate(tree_leaves(out)):
        if isinstance(leaf, torch.Tensor):
            tensors["output", str(k)] = leaf
        else:
            values[str(k)] = leaf if isinstance(leaf, list) else [leaf] * len(stack)
    return Outcome(tensors, values, _standing(streams), not torch.equal(before, _standing(streams)))


def alone(case: Case, wide: bool = False) -> Outcome:
    """The members, unstacked: each forward, then backward, before the next one starts, in plain PyTorch."""
    run = case.copied(wide)
    streams = run.stack.generators or ()
    before = _standing(streams)
    models = run.stack.unstack()
    outs, columns = [], []
    for i, (model, stream) in enumerate(zip(models, streams, strict=True)):
        own = tree_map(lambda leaf, i=i: _entry(leaf, i), run.inputs)
        with drawing_from(stream):
            out = model(*own) if run.loss_fn is None else run.loss_fn(model, *own)
            columns.append(_gradients(out, [*model.parameters(), *_tracked(own)], 1))
        outs.append([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(out)])
    tensors = _joined_gradients(run, models[0], columns)
    shared = run.stack.__memberwise_slots__().shared
    for name, first in models[0].named_buffers():
        column = [model.get_buffer(name) for model in models]
        tensors["buffer", name] = first if name in shared else torch.stack(column)
    values: dict[str, list[Any]] = {}
    for k, column in enumerate(zip(*outs, strict=True)):
        if isinstance(column[0], torch.Tensor):
            tensors["output", str(k)] = torch.stack(column)
        else:
            values[str(k)] = [*column]
    return Outcome(tensors, values, _standing(streams), not torch.equal(before, _standing(streams)))


def _joined_gradients(run: Case, model: nn.Module, columns: list[list[torch.Tensor]]) -> dict[Any, torch.Tensor]:
    """One gradient a name: members' stacked where they have one each, summed where they share."""
    shared = run.stack.__memberwise_slots__().shared
    tracked = _tracked(run.inputs)
    dims = [None if name in shared else 0 for name, _ in model.named_parameters()]
    dims += [leaf.dim if isinstance(leaf, Each) else None for leaf in tracked]
    found: dict[Any, torch.Tensor] = {}
    for name, dim, column in zip(_gradient_names(model, len(tracked)), dims, zip(*columns, strict=True), strict=True):
        found["gradient", name] = torch.stack(column).sum(0) if dim is None else torch.stack(column, dim)
    return found


def _gradient_names(module: nn.Module, inputs: int) -> list[str]:
    return [*(name for name, _ in module.named_parameters()), *(f"input {k}" for k in range(inputs))]


def _chosen(leaf: Any, members: list[int]) -> Any:
    if not isinstance(leaf, Each):
        return leaf
    index = torch.tensor(members, device=leaf.value.device)
    own = leaf.value.detach().index_select(leaf.dim, index)
    return Each(own.requires_grad_(leaf.value.requires_grad), leaf.dim)


def _fresh(leaf: Any, wide: bool) -> Any:
    """A copy of an input, a leaf of its own."""
    if isinstance(leaf, Each):
        return Each(_fresh(leaf.value, wide), leaf.dim)
    if not isinstance(leaf, torch.Tensor):
        return leaf
    copy = leaf.detach().clone()
    return (copy.to(wide_dtype(copy.dtype)) if wide else copy).requires_grad_(leaf.requires_grad)


def _entry(leaf: Any, member: int) -> Any:
    """Member `member`'s own input."""
    if not isinstance(leaf, Each):
        return leaf
    return leaf.value.detach().select(leaf.dim, member).clone().requires_grad_(leaf.value.requires_grad)


def _tracked(inputs: Any) -> list[Any]:
    """The inputs that require a gradient."""
    found = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor | Each)]
    return [leaf for leaf in found if (leaf.value if isinstance(leaf, Each) else leaf).requires_grad]


def _gradients(out: Any, wanted: list[torch.Tensor], members: int) -> list[torch.Tensor]:
    """Gradients of a fixed weighted sum of all outputs; zeros where there is none."""
    roots = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    tracked = [tensor for tensor in wanted if tensor.requires_grad]
    found: dict[int, torch.Tensor | None] = {}
    if roots and tracked:
        weights = [_weights(root, members) for root in roots]
        grads = torch.autograd.grad(roots, tracked, weights, allow_unused=True)
        found = {id(tensor): grad for tensor, grad in zip(tracked, grads, strict=True)}
    pairs = [(tensor, found.get(id(tensor))) for tensor in wanted]
    return [torch.zeros_like(tensor) if grad is None else grad.detach() for tensor, grad in pairs]


def _weights(root: torch.Tensor, members: int) -> torch.Tensor:
    """The same numbers for each member, so that they do not depend on who runs together."""
    count = root.numel() // members
    own = torch.cos(torch.arange(1, count + 1, dtype=torch.float64, device=root.device)).to(root.dtype)
    return own.repeat(members).view(root.shape)


def _standing(streams: Sequence[torch.Generator]) -> torch.Tensor:
    return torch.stack([stream.get_state() for stream in streams])
