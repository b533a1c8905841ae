"""Parameter groups by what a parameter is to one member: weights decay, biases and scales do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memberwise.optim.adoption import is_shared
from memberwise.optim.values import Hyper

Named = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


def param_groups(model: nn.Module | Named, weight_decay: Hyper = 0.01, **options: Any) -> list[dict[str, Any]]:
    """Two groups for an optimizer: parameters of two or more dimensions with weight decay, the others without.

    Dimensions are those of one *member*: a stacked bias (M, n) has one, a stacked weight (M, n, k) two; a shared
    parameter has its own. `model` is a stack or another module, or its parameters, named or not; those that
    require no grad are left out. `weight_decay` is one number or M; `options` (lr, betas, ...) go into both.

    >>> import torch
    >>> weight, bias = (torch.zeros(3, *shape, requires_grad=True) for shape in [(4, 2), (4,)])
    >>> decay, rest = param_groups([("weight", weight), ("bias", bias)], weight_decay=0.1)
    >>> [name for name, _ in decay["params"]], decay["weight_decay"]
    (['weight'], 0.1)
    >>> [name for name, _ in rest["params"]], rest["weight_decay"]
    (['bias'], 0.0)
    """
    entries = list(model.named_parameters()) if isinstance(model, nn.Module) else list(model)
    decay: list[Any] = []
    rest: list[Any] = []
    for entry in entries:
        parameter = entry[1] if isinstance(entry, tuple) else entry
        if parameter.requires_grad:
            (decay if _member_ndim(parameter) >= 2 else rest).append(entry)
    names = {"param_names": []} if entries and isinstance(entries[0], tuple) else {}  # torch adds the names it finds
    return [
        {"params": decay, "weight_decay": weight_decay, **options, **names},
        {"params": rest, "weight_decay": 0.0, **options, **names},
    ]


def _member_ndim(parameter: torch.Tensor) -> int:
    return parameter.ndim if is_shared(parameter) else parameter.ndim - 1
