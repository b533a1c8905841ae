"""Updates of one stacked parameter by plain pointwise operators: what runs under `make_fx`.

Each takes tensors `(M, *s)` with (M,) hyperparameters, or `(*s)` with () ones for a shared parameter, and writes in
place. Numbers of a member alone are computed in the hyperparameters' float64, as Python would, then cast; half
precision is computed in float32, and rounded once, as the fused kernels do.
"""

from __future__ import annotations

import torch

_HALF = {torch.float16, torch.bfloat16}


def adam(
    param: torch.Tensor,
    grad: torch.Tensor,
    step: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    max_exp_avg_sq: torch.Tensor | None = None,
    *,
    lr: torch.Tensor,
    beta1: torch.Tensor,
    beta2: torch.Tensor,
    eps: torch.Tensor,
    weight_decay: torch.Tensor,
    decoupled: bool,
    maximize: bool,
) -> None:
    """Adam (https://arxiv.org/abs/1412.6980), its AMSGrad variant (https://openreview.net/forum?id=ryQu7f-RZ)
    if `max_exp_avg_sq` is given, and AdamW (https://arxiv.org/abs/1711.05101) if `decoupled`.

    `step` counts the step under way.
    """
    # exp rather than pow: Inductor computes what contains an exp once a member, and a pow anew for each element
    # (a captured step of the MLP 32-64-64-10 at M = 256: 1.06 ms against 4.23 ms).
    count = step.to(lr.dtype)
    correction1 = 1 - torch.exp(count * torch.log(beta1))
    correction2 = torch.sqrt(1 - torch.exp(count * torch.log(beta2)))
    p, m, v = _working(param), _working(exp_avg), _working(exp_avg_sq)
    g = -_working(grad) if maximize else _working(grad)
    if decoupled:
        p.mul_(_beside(1 - lr * weight_decay, p))
    else:
        g = _decayed(g, p, weight_decay)
    m.lerp_(g, _beside(1 - beta1, p))
    v.mul_(_beside(beta2, p)).add_(g * g * _beside(1 - beta2, p))
    top = v
    if max_exp_avg_sq is not None:
        top = torch.maximum(_working(max_exp_avg_sq), v)
        max_exp_avg_sq.copy_(top)
    denominator = torch.sqrt(top).div_(_beside(correction2, p)).add_(_beside(eps, p))
    p.sub_((m * _beside(lr / correction1, p)).div_(denominator))
    _store(param, p)
    _store(exp_avg, m)
    _store(exp_avg_sq, v)


def sgd(
    param: torch.Tensor,
    grad: torch.Tensor,
    step: torch.Tensor | None = None,
    momentum_buffer: torch.Tensor | None = None,
    *,
    lr: torch.Tensor,
    momentum: torch.Tensor,
    dampening: torch.Tensor,
    weight_decay: torch.Tensor,
    nesterov: bool,
    maximize: bool,
) -> None:
    """SGD, with momentum (http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf) if there is a buffer.

    `step` counts the steps with momentum, the one under way too. Members whose momentum is 0 keep their buffer.
    """
    p, g = _working(param), _working(grad)
    g = _decayed(-g if maximize else g, p, weight_decay)
    if step is not None and momentum_buffer is not None:
        moving = _beside(momentum != 0, p)
        old, rate = _working(momentum_buffer), _beside(momentum, p)
        new = torch.where(_beside(step == 1, p), g, old * rate + g * _beside(1 - dampening, p))
        momentum_buffer.copy_(torch.where(moving, new, old))
        g = torch.where(moving, g + new * rate if nesterov else new, g)
    _store(param, p.sub_(g * _beside(lr, p)))


def _decayed(grad: torch.Tensor, param: torch.Tensor, weight_decay: torch.Tensor) -> torch.Tensor:
    """`grad + weight_decay * param`, and `grad` itself for no decay: 0 times an infinite parameter is no 0."""
    decay = _beside(weight_decay, param)
    return torch.where(decay == 0, grad, grad + param * decay)


def _working(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _store(kept: torch.Tensor, new: torch.Tensor) -> None:
    """Round what was computed in `_working` precision; nothing to do where that was the tensor itself."""
    if new is not kept:
        kept.copy_(new)


def _beside(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(M,) values, shaped and typed to broadcast against `(M, *s)`."""
    values = values if values.dtype == torch.bool else values.to(like.dtype)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
