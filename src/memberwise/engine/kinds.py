"""What a torch function does with a tensor: it looks at its shape and type, computes with it, or asks for its graph.

A function that is not known to do one of the first two is taken to ask, or to change what others ask for.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch

LOOKS, COMPUTES, ASKS = "looks", "computes", "asks"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOOKING = _words("""
    shape dtype device ndim layout itemsize nbytes size dim ndimension numel nelement element_size stride get_device
    storage_offset requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_sparse_csr is_quantized is_nested
    is_mkldnn is_contiguous is_floating_point is_complex is_conj is_neg is_inference is_signed is_same_size
    is_coalesced __len__ __hash__ __repr__ __format__
    tolist numpy data_ptr untyped_storage storage __array__ __dlpack__ share_memory_
    apply_ map_ map2_
""")
"""By name. What reads memory is here too: it has a handler of its own (`memberwise.engine.host`)."""

_COMPUTING = _words("""
    T mT H mH real imag rsub rpow rdiv rmatmul radd rmul rmod rfloordiv iadd isub imul idiv imod ifloordiv truediv
    mod invert iter getitem setitem contains reversed bool int long short byte char half float double bfloat16 cfloat
    cdouble type unique index complex nonzero
""")
"""By name, less underscores: operations that are called otherwise than in ATen."""

_ASKING = _words("""
    grad backward _backward retain_grad requires_grad_ detach_ set_ set_data data is_leaf output_nr _version
""")
"""By name: what ATen has among its operations, too."""

_MODULES = frozenset(("torch.nn.functional", "torch.functional"))
_OPERATORS = type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor)


@cache
def kind_of(func: Any) -> str:
    """LOOKS, COMPUTES or ASKS, of what `__torch_function__` is given."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property of tensors
        name = func.__self__.__name__
        return LOOKS if name in _LOOKING else COMPUTES if name in _COMPUTING else ASKS
    if name in _LOOKING:
        return LOOKS
    if name in _ASKING:
        return ASKS
    return COMPUTES if name.strip("_") in _COMPUTING or _is_operation(func, name) else ASKS


def _is_operation(func: Any, name: str) -> bool:
    if isinstance(func, _OPERATORS):
        return True
    if isinstance(func, FunctionType) and func.__module__ in _MODULES:
        return True
    plain = name.strip("_")
    return any(hasattr(torch.ops.aten, each) for each in (name, plain, f"{plain}_"))
