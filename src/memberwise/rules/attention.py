"""Attention: members among the batch of torch's CPU kernel; as one node where it has no mask and no dropout.

On other devices torch's own batching folds members into the batch too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise._torch.dispatch import without_dispatch
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.composite import composite
from memberwise.rules.folding import into_batch, out_of_batch
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _masked(mask: torch.Tensor | None, size: int, batch: int) -> torch.Tensor | None:
    """A mask, `(T, S)` or `(B, H, T, S)`, with or without M in front, for a batch of `M * B`."""
    if mask is None or mask.ndim == 2:
        return mask
    if mask.ndim == 3:
        mask = mask[:, None, None]
    if mask.ndim == 4:
        mask = mask[None]
    return into_batch(mask.expand(size, batch, *mask.shape[2:]))


def _flash_for_cpu(info: Any, in_dims: Any, values: Any, tensors: int, call: Any, *rest: Any, **named: Any) -> Any:
    size = info.batch_size
    full = [expanded(value, dim, size) for value, dim in zip(values, in_dims[:tensors], strict=True)]
    named["attn_mask"] = _masked(named.get("attn_mask"), size, full[0].shape[1])
    found = call(*map(into_batch, full), *rest, **named)
    return tuple(out_of_batch(value, size) for value in found), 0


_flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_FLASH = 1


@register_rule(_flash)
def flash_attention_for_cpu(info: Any, in_dims: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
    """torch has no batching rule for it. A small transformer's, M = 32: 1.45 ms member by member, 0.74 here."""
    return _flash_for_cpu(info, in_dims, (q, k, v), 3, _flash, *rest, **named)


@register_rule(_flash_backward)
def flash_attention_for_cpu_backward(info: Any, in_dims: Any, *args: Any, **named: Any) -> Any:
    """As `flash_attention_for_cpu`."""
    return _flash_for_cpu(info, in_dims, args[:6], 6, _flash_backward, *args[6:], **named)


def _signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:  # F.scaled_dot_product_attention's own names
    if attn_mask is not None or dropout_p or enable_gqa:
        return Decline("a mask, dropout or grouped queries")
    if query.device.type != "cpu" or query.ndim != 4 or key.ndim != 4 or value.ndim != 4 or 0 in query.shape:
        return Decline("off the CPU, or shapes that torch's CPU kernel does not take")
    return query, key, value, is_causal, scale


def _plain(query: Any, key: Any, value: Any, is_causal: bool, scale: float | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)


@composite(F.scaled_dot_product_attention, signature=_signature)
class Attention:
    """`softmax(q @ k.T * scale) @ v` (Vaswani et al., 2017), by the kernel that torch would choose.

    It keeps its arguments as the kernel took them: where members are no part of the batch without a copy, as behind
    `nn.MultiheadAttention`, what they were copied from goes, and backward copies nothing.
    """

    plain, lies_as_alone = _plain, True
    saves = ()

    @staticmethod
    def forward(info: Any, in_dims: Any, q: Any, k: Any, v: Any, is_causal: bool, scale: Any) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        size = info.batch_size
        folded = [into_batch(expanded(value, dim, size)) for value, dim in zip((q, k, v), in_dims, strict=False)]
        with without_dispatch():  # it looks at shapes alone, and is tagged as a draw
            choice = _aten._fused_sdp_choice.default(*folded, None, 0.0, is_causal, scale=scale)
        if choice != _FLASH:
            return Decline("torch chooses single operations")
        out, sums = _flash(*folded, 0.0, is_causal, scale=scale)
        out, *kept = (out_of_batch(value, size) for value in (out, sums, *folded))
        return out, (out, *kept)

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        *_, is_causal, scale = inputs
        out, sums, *tensors = map(into_batch, kept)
        found = _flash_backward(into_batch(grad), *tensors, out, sums, 0.0, is_causal, scale=scale)
        return *(out_of_batch(one, info.batch_size) for one in found), None, None

    @staticmethod
    def again(needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        """torch has no derivative of it, and says so when it is asked for: here, too."""
        *_, is_causal, scale = inputs
        out, sums, *tensors = kept
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        return *_flash_backward(grad, *tensors, out, sums, 0.0, is_causal, scale=scale), None, None
