"""Products of matrices on the CPU, all members' in one call: `torch.bmm` and `torch.mm` by a kernel of ours.

torch multiplies by MKL, which on processors other than Intel's uses AVX2 at most. On a Zen 5 with two cores ours take
0.4 to 0.7 of the time, from 32 x 16 x 64 to 1024 x 256 x 1024. Of many small members memory is asked for ahead, which
gains a third on a Zen 3, too, that has AVX2 alone. Where torch's are as fast, they stay:
`memberwise.capture.ours` measures each.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from memberwise.kernels.library import library, operation


@functools.cache
def _kernel() -> Any:
    found = library("product").memberwise_products
    tensor, number, strides = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64 * 3
    found.argtypes, found.restype = [tensor] * 4 + [ctypes.c_int] + [number] * 5 + [strides] * 2, None
    return found


def _run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _multiplied(None, 0, a, b)


def _run_plus(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _multiplied(bias.data_ptr(), bias.stride(0) if bias.ndim == 3 and len(bias) > 1 else 0, a, b)


def _multiplied(bias: int | None, apart: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = _empty(a, b)
    left, right, results = (one if one.ndim == 3 else one.unsqueeze(0) for one in (a, b, out))
    strides = (ctypes.c_int64 * 3)(*left.stride()), (ctypes.c_int64 * 3)(*right.stride())
    pointers = out.data_ptr(), bias, a.data_ptr(), b.data_ptr()
    _kernel()(*pointers, a.element_size(), *results.shape, a.shape[-1], apart, *strides)
    return out


def _empty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _empty_plus(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _empty(a, b)


product = operation("product(Tensor a, Tensor b) -> Tensor", "product", _run, _empty, torch.Tag.flexible_layout)
"""`a @ b` of `(M, m, k)` and `(M, k, n)`, or of `(m, k)` and `(k, n)`, on the CPU, of any strides; dense. Of bfloat16
(summed in float32), float32 or float64."""

product_plus = operation(
    "product_plus(Tensor bias, Tensor a, Tensor b) -> Tensor",
    "product",
    _run_plus,
    _empty_plus,
    torch.Tag.flexible_layout,
)
"""`bias + a @ b`, of bfloat16, rounded once; the bias (M, 1, n), (1, 1, n) or (n), dense along its columns."""
