"""The CTC loss: the sequences of all members in one batch. torch has no batching rule for it."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.rules.axis import expanded
from memberwise.rules.folding import into_channels, out_of_channels
from memberwise.rules.registry import LONE_CONTIGUOUS, register_rule

_aten = torch.ops.aten
_forward, _backward = _aten._ctc_loss.Tensor, _aten._ctc_loss_backward.Tensor
LONE_CONTIGUOUS.update({_forward, _backward})


def _batch(values: Any, dims: Any, size: int) -> tuple[torch.Tensor, ...]:
    """`(T, M * N, C)`, `(M * N, S)`, `(M * N)`, `(M * N)` of log-probabilities, targets and both lengths."""
    full = (expanded(value, dim, size) for value, dim in zip(values, dims, strict=False))
    x, targets, of_inputs, of_targets = full
    of_inputs, of_targets = of_inputs.reshape(size, -1), of_targets.reshape(size, -1)
    if targets.ndim == 2:
        targets, of_targets = _padded(targets, of_targets)
    return into_channels(x), targets.reshape(-1, targets.shape[-1]), of_inputs.reshape(-1), of_targets.reshape(-1)


def _padded(targets: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(M, N, S)` from targets one after another, `(M, S)`, of `(M, N)` lengths. Where a member's lengths do not add up
    to S, an error alone, they become too long, which is an error too."""
    size, most = targets.shape
    starts = (lengths.cumsum(1) - lengths).to(targets.device).unsqueeze(2)
    places = (starts + torch.arange(most, device=targets.device)).clamp_(0, max(most - 1, 0))
    fits = lengths.sum(1, keepdim=True) == most
    return targets.gather(1, places.view(size, -1)).view(places.shape), lengths.where(fits, most + 1)


@register_rule(_forward)
def ctc_loss(
    info: Any,
    in_dims: Any,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Any:
    """Loss and log alpha of each sequence; log alpha is as wide as the longest target of any member."""
    own = _batch((log_probs, targets, input_lengths, target_lengths), in_dims, info.batch_size)
    found = _forward(*own, blank, zero_infinity)
    return tuple(value.unflatten(0, (info.batch_size, -1)) for value in found), 0


@register_rule(_backward)
def ctc_loss_backward(
    info: Any,
    in_dims: Any,
    grad: Any,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    loss: Any,
    alpha: Any,
    blank: int,
    zero_infinity: bool = False,
) -> Any:
    """As `ctc_loss`."""
    size = info.batch_size
    own = _batch((log_probs, targets, input_lengths, target_lengths), in_dims[1:5], size)
    dims = in_dims[0], in_dims[5], in_dims[6]
    of_each = (expanded(value, dim, size).flatten(0, 1) for value, dim in zip((grad, loss, alpha), dims, strict=True))
    grad, loss, alpha = of_each
    return out_of_channels(_backward(grad, *own, loss, alpha, blank, zero_infinity), size), 0
