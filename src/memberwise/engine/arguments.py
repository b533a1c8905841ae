"""The arguments of a vmapped call, flat: which leaf has a member axis and where; and what one member sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memberwise.engine.ambient import Region
from memberwise.engine.crossing import enter
from memberwise.engine.flattening import broadcast_dims, flatten, unflatten
from memberwise.engine.slots import Slots, Swap
from memberwise.errors import ArgumentError, EngineError, fail
from memberwise.strangers import is_foreign
from memberwise.trees import Each, tree_leaves, tree_map


def slots_of(leaf: Any) -> Slots | None:
    """The slots of a stack; a class takes part by one method, `__memberwise_slots__`."""
    method = getattr(type(leaf), "__memberwise_slots__", None)
    return None if method is None else method(leaf)


class Arguments:
    """Flat leaves with a member axis (an int) or without (None).

    Attributes:
        leaves, dims: each leaf, and where its member axis is; a `Slots` stands for a stack.
        build: puts leaves back into `(args, kwargs)`.
        counts: how many leaves each argument has; None where each leaf is one.
        slots: the stacks among the leaves.
        size: M.
    """

    def __init__(
        self,
        leaves: list[Any],
        dims: list[int | None],
        build: Callable[[list[Any]], Any],
        size: int | None = None,
        counts: list[int] | None = None,
    ) -> None:
        self.leaves = leaves
        self.dims = dims
        self.build = build
        self.counts = counts
        self.slots = [leaf for leaf in leaves if type(leaf) is Slots]
        self.size = _size(leaves, dims) if size is None else size

    def enter(self, region: Region) -> tuple[list[Any], list[tuple[Slots, Swap]]]:
        """Leaves as code inside sees them."""
        inside = self.leaves.copy()
        swaps: list[tuple[Slots, Swap]] = []
        for places in self._places(region):
            tensors = [_first(inside[k], self.dims[k]) for k in places]
            entered = enter(tensors, [self.dims[k] is not None for k in places], region, lowered=region.lowers)
            for k, member in zip(places, entered, strict=True):
                inside[k] = member
        if not self.slots:
            return inside, swaps
        try:
            for k, leaf in enumerate(inside):
                if isinstance(leaf, Slots):
                    swaps.append((leaf, leaf.enter(region)))
                    inside[k] = leaf.template
        except BaseException:
            for slots, swap in swaps:
                slots.restore(swap)
            raise
        return inside, swaps

    def _places(self, region: Region) -> list[list[int]]:
        """Where the tensors are, those apart that one node takes in: it must not tie what is asked of one argument (the
        gradient of `x`) to what is asked of another (those of all parameters)."""
        places = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        if region.lowers:
            return [places] if places else []
        tracked = [k for k in places if self.leaves[k].requires_grad]
        if len(tracked) < 2:
            return [places] if places else []
        owners = range(len(self.leaves)) if self.counts is None else self._owners(self.counts)
        groups: dict[int, list[int]] = {}
        for k in tracked:
            groups.setdefault(owners[k], []).append(k)
        rest = [k for k in places if not self.leaves[k].requires_grad]
        return [*groups.values(), rest] if rest else [*groups.values()]

    def _owners(self, counts: list[int]) -> list[int]:
        owners = [n for n, count in enumerate(counts) for _ in range(count)]
        return owners + [len(counts)] * (len(self.leaves) - len(owners))

    def strangers(self) -> str | None:
        """Why no stacked run sees what happens to an argument: the operations of a subclass are its own."""
        if _USUAL.issuperset(map(type, self.leaves)):
            return None
        found = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor) and is_foreign(leaf)]
        return f"an argument is a {type(found[0]).__name__}, whose operations are its own" if found else None

    def streams(self) -> Sequence[torch.Generator] | None:
        """The random streams that the stacks among the leaves bring along: one a member, or None."""
        if len(self.slots) < 2:
            return self.slots[0].generators if self.slots else None
        found = [slots.generators for slots in self.slots if slots.generators is not None]
        if any([*map(id, streams)] != [*map(id, found[0])] for streams in found):
            what = "vmap: the stacks bring different random streams, and a member has one"
            fail(ArgumentError, "MW201", what, do="Pass generators=first.generators, or set second.generators to these")
        return found[0] if found else None


def _first(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    return tensor if not dim else tensor.movedim(dim, 0)


_USUAL = frozenset({Slots, torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None)})
_PLAIN = frozenset({torch.Tensor, bool, int, float, str, type(None)})


def called(slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a stack's own call: `each()` marks what has a member axis, all else is shared."""
    if not kwargs and _PLAIN.issuperset(map(type, args)):
        return Arguments([slots, *args], [None] * (len(args) + 1), _positional, slots.size())
    structure = (slots, *args), kwargs
    leaves = tree_leaves(structure)
    dims = [_dim_of_each(leaf) if type(leaf) is Each else None for leaf in leaves]
    return Arguments([*map(_unmark, leaves)], dims, functools.partial(_rebuilt, structure))


def _positional(inside: list[Any]) -> Any:
    return inside, {}


def _rebuilt(structure: Any, inside: list[Any]) -> Any:
    values = iter(inside)
    return tree_map(lambda _: next(values), structure)


def _dim_of_each(leaf: Each) -> int:
    if not -leaf.value.ndim <= leaf.dim < leaf.value.ndim:
        _bad(f"each(value, dim={leaf.dim})", f"value of shape {tuple(leaf.value.shape)} has no such dimension")
    return leaf.dim % leaf.value.ndim


def mapped(name: str, in_dims: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of `vmap(func, in_dims)(*args, **kwargs)`, validated as `torch.vmap` does."""
    quick = _simple(in_dims, args) if not kwargs and type(in_dims) is tuple and len(in_dims) == len(args) else None
    if quick is not None:
        return Arguments(quick, list(in_dims), _positional)

    def where() -> str:
        return f"vmap({name}, in_dims={in_dims}, ...)(<inputs>)"

    if not isinstance(in_dims, int | tuple):
        _bad(where(), f"expected `in_dims` to be int or a (potentially nested) tuple, got {type(in_dims)}")
    if not args and not kwargs:
        _bad(f"vmap({name})(<inputs>)", "got no inputs; a function without inputs cannot be mapped")
    given: list[Any] = []
    counts: list[int] = []
    shapes = []
    for arg in args:
        before = len(given)
        shapes.append(flatten(arg, given))
        counts.append(len(given) - before)
    dims = broadcast_dims(in_dims, args, counts)
    if dims is None:
        _bad(where(), f"in_dims is not compatible with the structure of `inputs`, which is {shapes}")
    kwargs_shape = flatten(kwargs, given) if kwargs else None
    dims += [None] * (len(given) - len(dims))
    leaves = given.copy()
    for k, leaf in enumerate(given):
        if isinstance(leaf, torch.Tensor):
            if dims[k] == 0 and leaf.ndim:
                continue
        else:
            leaves[k] = _unmark(leaf)
        if dims[k] is not None or leaves[k] is not leaf:
            dims[k] = _check_dim(where, k, leaf, dims[k])

    def build(inside: list[Any]) -> Any:
        rest = iter(inside)
        return [unflatten(shape, rest) for shape in shapes], unflatten(kwargs_shape, rest) if kwargs else {}

    return Arguments(leaves, dims, build, counts=counts)


def _simple(in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any] | None:
    """The leaves of a call whose arguments are stacks and tensors, each with 0 or None; None if it is another."""
    leaves: list[Any] = []
    for arg, dim in zip(args, in_dims, strict=True):
        if type(arg) is torch.Tensor:
            if dim is not None and (type(dim) is not int or dim or not arg.ndim):
                return None
            leaves.append(arg)
        else:
            slots = slots_of(arg)
            if slots is None or type(dim) is not int or dim:
                return None
            leaves.append(slots)
    return leaves


def _unmark(leaf: Any) -> Any:
    if type(leaf) is Each:
        return leaf.value
    return slots_of(leaf) or leaf


def _check_dim(where: Callable[[], str], place: int, leaf: Any, dim: Any) -> int | None:
    if type(leaf) is Each:
        return leaf.dim % max(leaf.value.ndim, 1)
    if dim is not None and not isinstance(dim, int):
        _bad(where(), f"got in_dim={dim} for input {place}; it must be an int or None")
    if dim is None:
        return None
    if slots_of(leaf) is not None:
        if dim != 0:
            _bad(where(), f"got in_dim={dim} for a stack, whose members are at 0")
        return 0
    if not isinstance(leaf, torch.Tensor):
        _bad(where(), f"Got in_dim={dim} for an input but the input is of type {type(leaf)}; use None for it")
    if not -leaf.ndim <= dim < leaf.ndim:
        _bad(
            where(),
            f"Got in_dim={dim} for some input, but that input is a Tensor of dimensionality {leaf.ndim}, "
            f"so expected in_dim to satisfy -{leaf.ndim} <= in_dim < {leaf.ndim}",
        )
    return dim % leaf.ndim


def _bad(where: str, what: str) -> Any:
    fail(ArgumentError, "MW201", f"{where}: {what}")


def _size(leaves: list[Any], dims: list[int | None]) -> int:
    try:
        sizes = [
            leaf.size() if isinstance(leaf, Slots) else leaf.shape[dim]
            for leaf, dim in zip(leaves, dims, strict=True)
            if dim is not None or isinstance(leaf, Slots)
        ]
    except RuntimeError:
        if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in leaves):
            what = "vmap: an input with a member axis is a nested tensor, whose members have sizes of their own"
            fail(EngineError, "MW204", what, do="Pad it (torch.nested.to_padded_tensor), or share it (in_dims=None)")
        raise
    sizes = [size for size in sizes if size is not None]
    if not sizes:
        _bad("vmap", "Expected at least one Tensor (or stack) to vmap over")
    if any(size != sizes[0] for size in sizes):
        _bad("vmap", f"Expected all tensors to have the same size in the mapped dimension, got sizes {sizes}")
    if sizes[0] == 0:
        _bad("vmap", "the mapped dimension has size 0; there is no member to run")
    return sizes[0]
