"""Attention: members among the batch."""

from __future__ import annotations

from typing import Any

import torch

from memberwise.rules.axis import expanded
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


@register_rule(_aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention_for_cpu(info: Any, in_dims: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
    """torch has no batching rule for it: with 4 members it ran four times."""
    call = _aten._scaled_dot_product_flash_attention_for_cpu.default
    return _flash_for_cpu(info, in_dims, (q, k, v), 3, call, *rest, **named)


@register_rule(_aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_for_cpu_backward(info: Any, in_dims: Any, *args: Any, **named: Any) -> Any:
    """As `flash_attention_for_cpu`."""
    call = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return _flash_for_cpu(info, in_dims, args[:6], 6, call, *args[6:], **named)
