"""Adam and AdamW, member by member."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from memberwise._torch import fused
from memberwise.optim import formulas
from memberwise.optim.group import Column, Group
from memberwise.optim.optimizer import MemberOptimizer
from memberwise.optim.stepping import Row
from memberwise.optim.values import Hyper


class Adam(MemberOptimizer):
    """Adam on stacked parameters: member i is updated as by a `torch.optim.Adam` of its own.

    `params`: tensors of shape (M, *s), names with tensors, or groups, as torch takes them. `lr`, both `betas`,
    `eps` and `weight_decay` are each one number, or M numbers (a list, or a tensor of shape (M,)), one a member;
    so are they when set later in `param_groups`, where M numbers become a tensor that torch's schedulers can
    drive. `amsgrad`, `maximize` and `decoupled_weight_decay` hold for all members. A parameter with the attribute
    `_memberwise_shared = True` has no member axis, and needs one value for all. `foreach`, `capturable` and
    `fused` are there for torch's sake; `fused=False` computes by formula, at any other value a step takes fused
    kernels where they exist. Floating or complex dtypes.

    Raises ArgumentError for a wrong number of values (MW401), values out of range (MW402), values that must be
    one (MW403), and parameters that have different M (MW404).

    Source: Kingma and Ba, https://arxiv.org/abs/1412.6980; AMSGrad, https://openreview.net/forum?id=ryQu7f-RZ

    >>> import torch
    >>> weight = torch.zeros(3, 2, requires_grad=True)
    >>> optimizer = Adam([weight], lr=[0.1, 0.01, 0.0])
    >>> weight.grad = torch.ones(3, 2)
    >>> optimizer.step()
    >>> weight[:, 0]
    tensor([-0.1000, -0.0100,  0.0000], grad_fn=<SelectBackward0>)
    """

    columns: ClassVar[dict[str, Column]] = {
        "lr": Column("lr"),
        "beta1": Column("betas", 0, below=1.0),
        "beta2": Column("betas", 1, below=1.0),
        "eps": Column("eps"),
        "weight_decay": Column("weight_decay"),
    }
    options: ClassVar[tuple[str, ...]] = ("amsgrad", "decoupled_weight_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults)

    def _kept(self, group: Group) -> tuple[str, ...]:
        return _KEPT_AMSGRAD if group["amsgrad"] else _KEPT

    def _fused(self, group: Group, lists: list[list[torch.Tensor]], taken: float, **values: float) -> None:
        params, grads, steps, exp_avgs, exp_avg_sqs, *maxima = lists
        kernel = fused.adamw_ if group["decoupled_weight_decay"] else fused.adam_
        kernel(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            maxima[0] if maxima else [],
            steps,
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            **values,
        )

    def _formula(self, group: Group, row: Row, **values: torch.Tensor) -> None:
        formulas.adam(*row, decoupled=group["decoupled_weight_decay"], maximize=group["maximize"], **values)


_KEPT = ("step", "exp_avg", "exp_avg_sq")
_KEPT_AMSGRAD = (*_KEPT, "max_exp_avg_sq")


class AdamW(Adam):
    """AdamW on stacked parameters: member i is updated as by a `torch.optim.AdamW` of its own.

    Arguments, shapes and errors as in `Adam`; weight decay acts on the parameters, not on the gradients.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101

    >>> import torch
    >>> weight = torch.ones(2, 3, requires_grad=True)
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=[0.0, 1.0])
    >>> weight.grad = torch.zeros(2, 3)
    >>> optimizer.step()
    >>> weight[:, 0]
    tensor([1.0000, 0.9000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also where Adam's state was loaded
