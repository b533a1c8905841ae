"""The way out of a call: member tensors become plain ones with the member axis at `out_dims`."""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.dispatch import DisableTorchFunctionSubclass, functorch_active
from memberwise._torch.pytree import broadcast_to_and_flatten, tree_flatten
from memberwise.engine.ambient import Region
from memberwise.engine.crossing import leave
from memberwise.engine.layout import settle
from memberwise.engine.tensor import MemberTensor
from memberwise.engine.values import is_own
from memberwise.engine.written import from_outside
from memberwise.errors import ArgumentError, EngineError, fail
from memberwise.trees import is_open, tree_leaves, tree_map


def outputs(out: Any, out_dims: Any, region: Region, name: str) -> Any:
    """`out` with each tensor plain; other leaves are returned as they are."""
    with DisableTorchFunctionSubclass():  # else each look at a member tensor costs 3 us
        if isinstance(out, torch.Tensor) and type(out_dims) is int:
            return _leaf(out, out_dims, region, name)
        dims = iter(leaf_dims(name, out, out_dims))
        return tree_map(lambda leaf: _leaf(leaf, next(dims), region, name), out)


def _leaf(leaf: Any, dim: int | None, region: Region, name: str) -> Any:
    if is_own(leaf):
        return [*leaf._values]
    if not isinstance(leaf, torch.Tensor):
        return _object(leaf, dim, region, name) if is_open(leaf) else leaf
    inside = isinstance(leaf, region.tensor_class) or functorch_active()
    if isinstance(leaf, MemberTensor):
        settle(leaf)  # as torch.stack of the lone results lies
    if dim is None:
        if isinstance(leaf, MemberTensor) and leaf._batched:
            bad(f"vmap({name}, ...): `{name}` can not return a BatchedTensor when out_dim is None")
        return leave(leaf, region)[0] if inside else leaf
    stacked = from_outside(leaf) if isinstance(leaf, region.tensor_class) else None
    if stacked is None:
        stacked = leave(leaf, region) if inside else _of_all(leaf, region)
    if not -stacked.ndim <= dim < stacked.ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-stacked.ndim}, {stacked.ndim - 1}], but got {dim})"
        )
    return stacked.movedim(0, dim) if dim else stacked


def _object(leaf: Any, dim: int | None, region: Region, name: str) -> Any:
    """An object that holds member tensors (a cache) as one that holds plain ones; it is one leaf to `out_dims`."""
    if not any(isinstance(held, MemberTensor) for held in tree_leaves(leaf, objects=True)):
        return leaf

    def out(held: Any) -> Any:
        return _leaf(held, dim, region, name) if isinstance(held, torch.Tensor) else held

    return tree_map(out, leaf, objects=True)


def _of_all(leaf: torch.Tensor, region: Region) -> torch.Tensor:
    """A plain result, for each member."""
    if leaf.is_nested:
        fail(EngineError, "MW203", "vmap: a nested tensor is returned, which is not stacked", do="Use out_dims=None")
    return leaf.expand(region.batch_size, *leaf.shape)


def leaf_dims(name: str, out: Any, out_dims: Any) -> list[int | None]:
    """One entry for each leaf of `out`, in the order in which `tree_map` meets them."""
    leaves = tree_leaves(out)
    if isinstance(out_dims, int) or out_dims is None:
        return [out_dims] * len(leaves)
    if isinstance(out, torch.Tensor):
        if isinstance(out_dims, tuple) and len(out_dims) == 1:
            return list(out_dims)
        dims, spec = None, "one Tensor"
    else:
        _, spec = tree_flatten(out)
        dims = broadcast_to_and_flatten(out_dims, spec)
    if dims is None or len(dims) != len(leaves):
        bad(
            f"vmap({name}, ..., out_dims={out_dims})(<inputs>): out_dims is not compatible with the structure "
            f"of `outputs`, which is {spec}"
        )
    return dims


def check_out_dims(name: str, out_dims: Any) -> None:
    """Refuse out_dims that are neither ints nor None, before anything runs."""
    for dim in (out_dims,) if type(out_dims) is int else tree_leaves(out_dims):
        if not (dim is None or isinstance(dim, int)):
            what = "`out_dims` must be an int, None or a python collection of ints"
            bad(f"vmap({name}, ..., out_dims={out_dims}): {what}")


def bad(what: str) -> Any:
    """Refuse an argument of `vmap`."""
    fail(ArgumentError, "MW201", what)
