"""Products of float32 matrices on the CPU, all members' in one call: `torch.bmm` and `torch.mm` by a kernel of ours.

torch multiplies by MKL, which on processors other than Intel's uses half of their vector width, and whose small
products wait for each other. On a Zen 5 with two cores ours take 0.4 to 0.7 of the time, from 32 x 16 x 64 to
1024 x 256 x 1024. Where torch's are as fast, they stay: `memberwise.capture.products` measures each.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from memberwise._torch.inductor import Shim, built, put_shim

_SOURCE = Path(__file__).with_suffix(".cpp")
_LIBRARY = torch.library.Library("memberwise", "FRAGMENT")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))

product = torch.ops.memberwise.product.default
"""`a @ b` of `(M, m, k)` and `(M, k, n)`, or of `(m, k)` and `(k, n)`: float32, on the CPU, of any strides; dense."""


@functools.cache
def available() -> bool:
    """Whether the kernel can be built here; the first call builds it."""
    try:
        _library()
    except Exception:  # whatever Inductor raises: no compiler, another processor
        return False
    return True


@functools.cache
def _library() -> Any:
    library = built(_SOURCE.read_text())
    tensor, number, strides = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64 * 3
    library.memberwise_products.argtypes = [tensor] * 3 + [number] * 4 + [strides] * 2
    library.memberwise_products.restype = None
    return library


def _run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = _empty(a, b)
    left, right, results = (one if one.ndim == 3 else one.unsqueeze(0) for one in (a, b, out))
    members, m, n = results.shape
    pointers = out.data_ptr(), a.data_ptr(), b.data_ptr()
    strides = (ctypes.c_int64 * 3)(*left.stride()), (ctypes.c_int64 * 3)(*right.stride())
    _library().memberwise_products(*pointers, members, m, n, a.shape[-1], *strides)
    return out


def _empty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


_LIBRARY.impl("product", _run, "CPU")
torch.library.register_fake("memberwise::product", _empty, lib=_LIBRARY)
put_shim(
    product,
    Shim(
        "AOTITorchError aoti_torch_cpu_product(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)",
        lambda: _library()._name,
    ),
)
