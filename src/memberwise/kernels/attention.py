"""Attention in float32 on the CPU, and its gradient: torch's flash attention by a kernel of ours.

torch's multiplies by MKL, see `memberwise.kernels.product`, and lets each head's gradient wait for whole rows of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from memberwise.kernels.library import library, operation


class _Heads(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.POINTER(ctypes.c_int64)),
        ("stride", ctypes.POINTER(ctypes.c_int64)),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Heads:
        size, stride = ((ctypes.c_int64 * 4)(*numbers) for numbers in (tensor.shape, tensor.stride()))
        return cls(tensor.data_ptr(), size, stride)


def _called(name: str, tensors: Sequence[torch.Tensor], is_causal: bool, scale: float) -> None:
    heads = (_Heads * len(tensors))(*map(_Heads.of, tensors))
    getattr(library("attention"), name)(heads, ctypes.c_bool(is_causal), ctypes.c_double(scale))


def _run(q: Any, k: Any, v: Any, *settings: Any) -> Any:
    out, sums = _empty(q, k, v)
    _called("memberwise_attention", (q, k, v, out, sums.unsqueeze(-1)), *settings)
    return out, sums


def _empty(q: Any, k: Any, v: Any, *_: Any) -> Any:
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2), q.new_empty(batch, rows, heads).transpose(1, 2)


def _run_backward(*args: Any) -> Any:
    *tensors, sums, is_causal, scale = args
    found = _empty_backward(*args)
    _called("memberwise_attention_backward", (*tensors, sums.unsqueeze(-1), *found), is_causal, scale)
    return found


def _run_dropout(q: Any, k: Any, v: Any, drawn: Any, factor: float, is_causal: bool) -> Any:
    found = _empty_dropout(q, k, v)
    _called("memberwise_attention_dropout", (q, k, v, drawn, *found), is_causal, factor)
    return found


def _empty_dropout(q: Any, k: Any, v: Any, *_: Any) -> Any:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1)


def _run_dropout_backward(*args: Any) -> Any:
    *tensors, factor, is_causal = args
    found = _empty_dropout_backward(*args)
    _called("memberwise_attention_dropout_backward", (*tensors, *found), is_causal, factor)
    return found


def _empty_dropout_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _empty_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
    return _dense(q), _dense(k), _dense(v)


def _dense(like: torch.Tensor) -> torch.Tensor:
    """One of its shape, without gaps, in the order of its strides, if each head then lies by rows or by columns."""
    order = sorted(range(like.ndim), key=lambda dim: -like.stride(dim))
    if order[-1] < like.ndim - 2:
        return like.new_empty(like.shape)
    made = like.new_empty([like.shape[dim] for dim in order])
    return made.permute([order.index(dim) for dim in range(like.ndim)])


attention = operation(
    "attention(Tensor q, Tensor k, Tensor v, bool is_causal, float scale) -> (Tensor, Tensor)",
    "attention",
    _run,
    _empty,
    torch.Tag.flexible_layout,
)
"""`softmax(scale * q @ k.mT) @ v`, and the logarithms of the softmax's sums, of `(B, H, T, D)`, `(B, H, S, D)` and
`(B, H, S, E)`: float32, on the CPU, of any strides. With `is_causal` row i sees the keys up to i."""

attention_backward = operation(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor sums, "
    "bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    "attention",
    _run_backward,
    _empty_backward,
    torch.Tag.flexible_layout,
)
"""The gradients of q, k and v, given that of the result, the arguments and the sums."""

attention_dropout = operation(
    "attention_dropout(Tensor q, Tensor k, Tensor v, Tensor drawn, float factor, bool is_causal) -> (Tensor, Tensor)",
    "attention",
    _run_dropout,
    _empty_dropout,
    torch.Tag.flexible_layout,
)
"""`(safe_softmax(q @ k) * drawn * factor) @ v`, and the logarithms of the softmax's sums, of `(B, H, T, D)`,
`(B, H, D, S)`, `(B, H, S, E)` and `(B, H, T, S)`: float32, on the CPU, of any strides."""

attention_dropout_backward = operation(
    "attention_dropout_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor drawn, Tensor sums, "
    "float factor, bool is_causal) -> (Tensor, Tensor, Tensor)",
    "attention",
    _run_dropout_backward,
    _empty_dropout_backward,
    torch.Tag.flexible_layout,
)
"""The gradients of q, k and v, given that of the result, the arguments and the sums."""
