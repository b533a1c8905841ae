"""Attention in float32 on the CPU, and its gradient: torch's flash attention by a kernel of ours.

torch's multiplies by MKL, see `memberwise.kernels.product`, and lets each head's gradient wait for whole rows of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from memberwise._torch.inductor import Shim, put_shim
from memberwise.kernels.library import library

_LIBRARY = torch.library.Library("memberwise", "FRAGMENT")
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_SETTINGS = "bool is_causal, float scale"
_LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

attention = torch.ops.memberwise.attention.default
"""`softmax(scale * q @ k.mT) @ v`, and the logarithms of the softmax's sums, of `(B, H, T, D)`, `(B, H, S, D)` and
`(B, H, S, E)`: float32, on the CPU, of any strides. With `is_causal` row i sees the keys up to i."""

attention_backward = torch.ops.memberwise.attention_backward.default
"""The gradients of q, k and v, given that of the result, the arguments and both results."""


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


def _empty_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
    return _dense(q), _dense(k), _dense(v)


def _dense(like: torch.Tensor) -> torch.Tensor:
    """One of its shape, without gaps, in the order of its strides."""
    order = sorted(range(like.ndim), key=lambda dim: -like.stride(dim))
    made = like.new_empty([like.shape[dim] for dim in order])
    return made.permute([order.index(dim) for dim in range(like.ndim)])


_TENSOR, _RESULT, _NUMBERS = "AtenTensorHandle", "AtenTensorHandle*", "int32_t, double"
for _name, _run_it, _fake, _given, _results in (
    ("attention", _run, _empty, 3, 2),
    ("attention_backward", _run_backward, _empty_backward, 6, 3),
):
    _LIBRARY.impl(_name, _run_it, "CPU")
    torch.library.register_fake(f"memberwise::{_name}", _fake, lib=_LIBRARY)
    _types = ", ".join([_TENSOR] * _given + [_NUMBERS] + [_RESULT] * _results)
    put_shim(
        getattr(torch.ops.memberwise, _name).default,
        Shim(f"AOTITorchError aoti_torch_cpu_{_name}({_types})", lambda: str(library("attention")._name)),
    )
