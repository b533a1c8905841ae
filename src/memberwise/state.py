"""The state of M modules as dicts of tensors with a member axis, and back: nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from memberwise.differences import listed
from memberwise.errors import ArgumentError, fail
from memberwise.form import form_of
from memberwise.gathering import gather
from memberwise.names import saved


def stack_module_state(
    models: Iterable[nn.Module],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Stack the parameters and buffers of M modules of one class, by state-dict names.

    Shapes: a parameter or buffer `(*s)` becomes `(M, *s)`; dtypes and devices stay. The stacked parameters are new
    leaves, unrelated to the originals, with the members' `requires_grad`. A tied tensor is stored once, under its
    first name. From an iterator the models are taken one by one: no more is held than the stack and one member.

    Args:
        models: a sequence, `nn.ModuleList` or iterator of modules.

    Returns:
        `(params, buffers)`, to be given to `functional_call`, `vmap`, an optimizer, `unstack_module_state`.

    Raises:
        StateError: (a RuntimeError) there is no model [MW101], the classes differ [MW102], or names, shapes, dtypes,
            devices, `requires_grad`, modes or ties do [MW103], or a lazy module has no values yet [MW104]. Every
            difference is listed.
        KindError: (a TypeError) something is not a module [MW108].

    Warns:
        StackWarning: members differ outside their tensors, in a dropout rate for example [MW106], or tensors of
            one member share memory, which their stack does not [MW107].

    >>> params, buffers = stack_module_state([nn.BatchNorm1d(4) for _ in range(3)])
    >>> params["weight"].shape, buffers["num_batches_tracked"].shape
    (torch.Size([3, 4]), torch.Size([3]))
    """
    gathered = gather(models, stacklevel=2)
    return gathered.params, gathered.buffers


def unstack_module_state(
    params: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    *,
    like: nn.Module | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Take M members' state apart: the inverse of `stack_module_state`, lossless to the bit.

    Shapes: `(M, *s)` becomes M times `(*s)`; dtypes and devices stay. Each dict is a plain state dict of copies that
    `load_state_dict(strict=True)` takes: tied tensors under all their names, non-persistent buffers left out.

    Args:
        params, buffers: as `stack_module_state` gave them; values may be others by now, detached or not.
        like: a module of the members' class. The keys of `stack_module_state` know ties and persistence, and keep
            knowing through `dict(params)` or `{k: f(v) for k, v in params.items()}`. If the dicts went through
            JSON or safetensors, which keep plain strings only, `like` tells it again.

    Raises:
        ArgumentError: (a ValueError) there is no tensor, a tensor has no member axis or another M, or a name
            appears twice [MW109].

    >>> models = [nn.Linear(3, 2) for _ in range(4)]
    >>> first, *_ = unstack_module_state(*stack_module_state(models))
    >>> models[1].load_state_dict(first, strict=True)
    <All keys matched successfully>
    """
    count = _member_count({**params, **buffers}, {*params} & {*buffers})
    known = None if like is None else form_of(like)
    members: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, stacked in (*params.items(), *buffers.items()):
        names = saved(known.key(name) if known and name in known.tensors else name)
        for member, tensor in zip(members, stacked.detach().unbind(), strict=True):
            member.update(dict.fromkeys(names, tensor.clone()) if names else {})
    return members


def _member_count(tensors: Mapping[str, Any], twice: set[str]) -> int:
    """M of all tensors, or an error that lists those that do not fit."""
    lines = [f"'{name}' is a parameter and a buffer" for name in sorted(twice)]
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            lines.append(f"'{name}' is a {type(tensor).__name__}, expected a tensor")
        elif not tensor.ndim:
            lines.append(f"'{name}' has no dimension, expected a member axis")
        else:
            sizes[name] = tensor.shape[0]
    if not tensors:
        lines.append("there is no tensor to tell the number of members")
    count = next(iter(sizes.values()), 0)
    for name, size in sizes.items():
        if size != count:
            lines.append(f"'{name}' holds {size} members, '{next(iter(sizes))}' holds {count}")
    if lines:
        what = f"expected dicts of tensors that all have the member axis first:\n{listed(lines)}"
        fail(ArgumentError, "MW109", what, do="Give the two dicts that stack_module_state returned")
    return count
