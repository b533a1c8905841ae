"""SGD, member by member."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from memberwise._torch import fused
from memberwise._torch.tracing import tracing
from memberwise.optim import formulas
from memberwise.optim.group import Column, Group
from memberwise.optim.optimizer import MemberOptimizer
from memberwise.optim.stepping import Row
from memberwise.optim.values import Hyper, MemberValues, numbers


class SGD(MemberOptimizer):
    """SGD on stacked parameters: member i is updated as by a `torch.optim.SGD` of its own.

    `params`: tensors of shape (M, *s), names with tensors, or groups, as torch takes them. `lr`, `momentum`,
    `dampening` and `weight_decay` are each one number, or M numbers (a list, or a tensor of shape (M,)), one a
    member; so are they when set later in `param_groups`, where M numbers become a tensor that torch's schedulers
    can drive. `nesterov` and `maximize` hold for all members. A parameter with the attribute
    `_memberwise_shared = True` has no member axis, and needs one value for all. `foreach` and `fused` are there for
    torch's sake; `fused=False` computes by formula, at any other value a step takes fused kernels where they
    exist. Floating or complex dtypes.

    Raises ArgumentError for a wrong number of values (MW401), values out of range (MW402), values that must be
    one (MW403), and parameters that have different M (MW404).

    Source of the momentum: Sutskever et al., http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf

    >>> import torch
    >>> weight = torch.zeros(3, 2, requires_grad=True)
    >>> optimizer = SGD([weight], lr=[0.1, 0.01, 0.0], momentum=0.9)
    >>> weight.grad = torch.ones(3, 2)
    >>> optimizer.step()
    >>> weight[:, 0]
    tensor([-0.1000, -0.0100,  0.0000], grad_fn=<SelectBackward0>)
    """

    columns: ClassVar[dict[str, Column]] = {
        "lr": Column("lr"),
        "momentum": Column("momentum"),
        "dampening": Column("dampening", least=float("-inf")),
        "weight_decay": Column("weight_decay"),
    }
    options: ClassVar[tuple[str, ...]] = ("nesterov",)

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        momentum: Hyper = 0.0,
        dampening: Hyper = 0.0,
        weight_decay: Hyper = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults)

    def _complaints(self, group: Group) -> Iterator[str]:
        members = group.members or 1
        pairs = zip(numbers(group["momentum"], members), numbers(group["dampening"], members), strict=True)
        bad = [f"member {i}: {pair}" for i, pair in enumerate(pairs) if pair[0] <= 0 or pair[1] != 0]
        if group["nesterov"] and bad:
            yield f"nesterov: expected a momentum and no dampening, found {', '.join(bad[:10])}"

    def _kept(self, group: Group) -> tuple[str, ...]:
        return () if _is_zero(group["momentum"]) else ("step", "momentum_buffer")

    def _increment(self, group: Group, device: torch.device) -> torch.Tensor | None:
        if not tracing() and all(numbers(group["momentum"], 1)):
            return None
        return self._tensors(group, device)["momentum"] != 0

    def _fused(self, group: Group, lists: list[list[torch.Tensor]], taken: float, **values: float) -> None:
        params, grads, *kept = lists
        fused.sgd_(
            params,
            grads,
            kept[1] if values["momentum"] else [],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=taken == 0,
            **values,
        )

    def _formula(self, group: Group, row: Row, **values: torch.Tensor) -> None:
        formulas.sgd(*row, nesterov=group["nesterov"], maximize=group["maximize"], **values)


def _is_zero(momentum: object) -> bool:
    """Whether no member has momentum, as far as it is known without reading tensors."""
    return not isinstance(momentum, MemberValues) and momentum == 0
