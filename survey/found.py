"""What one run of a trial gave: outputs, gradients and buffers by name; and whether two runs gave the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memberwise.testing.tolerance import tolerance
from memberwise.trees import Each, tree_leaves

Found = dict[str, Any]
"""Tensors with M first (summed over members where one input serves all); of what is no tensor, a list."""


def tracked(inputs: Any) -> dict[str, torch.Tensor]:
    """The inputs that require gradients, by name."""
    leaves = [leaf.value if isinstance(leaf, Each) else leaf for leaf in tree_leaves(inputs)]
    pairs = [(f"input {k}", leaf) for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return {name: leaf for name, leaf in pairs if leaf.requires_grad}


def gathered(
    out: Any,
    members: Sequence[int],
    wanted: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    *,
    shared: bool,
    orders: int,
) -> Found:
    """What a run of `members` gave, with gradients of fixed weighted sums of all outputs, up to `orders` times."""
    leaves = tree_leaves(out)
    found: Found = {f"output {k}": leaf for k, leaf in enumerate(leaves)}
    roots = {name: leaf for name, leaf in found.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    for order in range(1, orders + 1):
        if not roots or not wanted:
            break
        weights = [_weights(root, [0] if _is_sum(name, shared) else members) for name, root in roots.items()]
        more = order < orders
        grads = torch.autograd.grad(
            [*roots.values()], [*wanted.values()], weights, create_graph=more, allow_unused=True
        )
        named = {f"gradient {order} of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        zeros = {f"gradient {order} of {name}": torch.zeros_like(tensor) for name, tensor in wanted.items()}
        found |= {name: zeros[name] if grad is None else grad for name, grad in named.items()}
        roots = {name: grad for name, grad in named.items() if grad is not None and grad.requires_grad}
    found |= {f"buffer {name}": buffer for name, buffer in buffers.items()}
    return {name: _plain(leaf) if isinstance(leaf, torch.Tensor) else leaf for name, leaf in found.items()}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sparse gradient, its values."""
    return tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()


def joined(columns: Sequence[Found], shared: bool) -> Found:
    """One of several members' findings."""
    return {name: _joined([column[name] for column in columns], _is_sum(name, shared)) for name in columns[0]}


def _joined(column: list[Any], is_sum: bool) -> Any:
    if not isinstance(column[0], torch.Tensor):
        return column
    return torch.stack(column).sum(0) if is_sum else torch.stack(column)


def _is_sum(name: str, shared: bool) -> bool:
    return shared and " of input" in name


def _weights(root: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """The same numbers for each member, whoever runs beside it."""
    own = torch.arange(root.numel() // len(members), dtype=torch.float64)
    return torch.stack([torch.cos(own + member) for member in members]).to(root.dtype).view(root.shape)


# -- comparison


def kinds_differ(ours: Found, lone: Found) -> str:
    """The first difference of number, shape or dtype, as a sentence; "" where there is none."""
    for name, theirs in lone.items():
        mine = ours.get(name)
        if not isinstance(theirs, torch.Tensor):
            continue
        if not isinstance(mine, torch.Tensor):
            return f"{name} is missing"
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return f"{name} is {_kind(mine)}, alone {_kind(theirs)}"
    return ""


def values_differ(ours: Found, lone: Found, truth: Callable[[], Found | None], narrow: bool = False) -> str:
    """The first value further off than the table allows, and than twice the lone run's error against the truth.

    `narrow`: results of any type went through bfloat16; gradients, sums of many such, are not compared.
    """
    for name, theirs in lone.items():
        mine = ours[name]
        if narrow and name.startswith("gradient"):
            continue
        if not isinstance(theirs, torch.Tensor):
            if mine not in (theirs, theirs[0]):
                return f"{name} is {mine}, alone {theirs}"
            continue
        used = _used(mine, theirs, narrow)
        if used > 1 and not _errs_as_little(mine, theirs, name, truth()):
            return f"{name} is off by {_off(mine, theirs):.1e}, {used:.2g} times what is allowed"
    return ""


def _errs_as_little(mine: torch.Tensor, theirs: torch.Tensor, name: str, truth: Found | None) -> bool:
    return truth is not None and _off(mine, truth[name]) <= 2 * _off(theirs, truth[name])


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def _apart(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.to(kind), b.to(kind)
    apart = (a - b).abs().nan_to_num(torch.inf)
    return apart.masked_fill_((a == b) | (a.isnan() & b.isnan()), 0), b.abs()


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(_apart(a, b)[0].max()) if b.numel() else 0.0


def _used(mine: torch.Tensor, theirs: torch.Tensor, narrow: bool) -> float:
    """The largest difference as a share of what the table allows there."""
    if not theirs.numel():
        return 0.0
    rtol, atol = tolerance(torch.bfloat16 if narrow and theirs.is_floating_point() else theirs.dtype)
    apart, size = _apart(mine, theirs)
    return float((apart / (atol + rtol * size)).nan_to_num(0, posinf=torch.inf).max())
