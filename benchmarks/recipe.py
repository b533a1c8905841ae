"""How a case trains: its optimizer and clipping, in each form that a rival needs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import memberwise

LR = 1e-3
"""The learning rate of every rival's Adam; its other arguments are torch's defaults."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Adam at its defaults, or SGD where there is a `momentum`; `clip` is the largest norm of a member's gradient."""

    lr: float = LR
    momentum: float | None = None
    clip: float | None = None

    @property
    def about(self) -> str:
        name = "Adam" if self.momentum is None else f"SGD, momentum {self.momentum:g}"
        return name if self.clip is None else f"clipping at {self.clip:g}, {name}"

    @property
    def passes(self) -> int:
        """How often an update reads or writes a parameter's bytes: itself and its moments, each there and back."""
        return 6 if self.momentum is None else 4

    def of_torch(self, params: Iterable[Tensor], **options: bool) -> torch.optim.Optimizer:
        """torch's own; `fused=True` is its fastest form."""
        if self.momentum is None:
            return torch.optim.Adam(params, lr=self.lr, **options)
        options.pop("capturable", None)  # it keeps no count, so that it always is
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, **options)

    def of_memberwise(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.momentum is None:
            return memberwise.optim.Adam(params, lr=self.lr)
        return memberwise.optim.SGD(params, lr=self.lr, momentum=self.momentum)

    def moments(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor]:
        """What `update_` keeps, at the start.

        The count is float64, (1,): with a float32 one the bias corrections miss torch's by 1e-8, and Inductor
        (torch 2.13) loses what is written to a float64 tensor of no dimension.
        """
        first, second = ({name: torch.zeros_like(param) for name, param in params.items()} for _ in range(2))
        device = next(iter(params.values())).device
        return first, second if self.momentum is None else {}, torch.zeros(1, dtype=torch.float64, device=device)

    def update_(self, params: Tensors, grads: Tensors, moments: tuple[Tensors, Tensors, Tensor]) -> None:
        """The optimizer's step as a pure function of tensors, in place: what a compiler takes whole."""
        first, second, count = moments
        if self.momentum is None:
            return _adam_(self.lr, params, grads, first, second, count)
        for name, param in params.items():  # a first step has a momentum of its gradient: 0 and that
            first[name].mul_(self.momentum).add_(grads[name])
            param.sub_(first[name], alpha=self.lr)

    def clipped(self, grads: Tensors, *, stacked: bool) -> Tensors:
        """As `torch.nn.utils.clip_grad_norm_` does it; if `stacked`, for each member of (M, ...) by itself."""
        if self.clip is None:
            return grads
        parts = [grad.flatten(1) if stacked else grad.reshape(1, -1) for grad in grads.values()]
        norms = torch.stack([part.norm(dim=1) for part in parts]).norm(dim=0)
        scale = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        return {name: grad * (_along(scale, grad) if stacked else scale[0]) for name, grad in grads.items()}


def _along(scale: Tensor, grad: Tensor) -> Tensor:
    """(M,) -> (M, 1, ...)."""
    return scale.view(-1, *(1,) * (grad.ndim - 1))


def _adam_(lr: float, params: Tensors, grads: Tensors, first: Tensors, second: Tensors, count: Tensor) -> None:
    """One step of Adam (Kingma and Ba, 2015) with torch's default betas and eps."""
    count.add_(1)
    dtype = next(iter(params.values())).dtype
    scale1, scale2 = (1 - 0.9**count).to(dtype), (1 - 0.999**count).to(dtype)
    for name, param in params.items():
        first[name].lerp_(grads[name], 0.1)
        second[name].mul_(0.999).addcmul_(grads[name], grads[name], value=0.001)
        param.sub_(lr / scale1 * first[name] / ((second[name] / scale2).sqrt() + 1e-8))


ADAM = Recipe()
