"""torch's own batching of one operation, called from below `__torch_dispatch__`.

Public `torch.vmap` costs a pytree walk each way, and cannot be called there at all: in a dispatch handler all
keys above Python are excluded in this thread, functorch's among them, and a vmap crashes or returns garbage.
Missing is a public way to apply one batching rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._C import _functorch
from torch._functorch.vmap import lazy_load_decompositions

_KEYS = torch._C.DispatchKey
_RESTORED = [
    key
    for name, key in _KEYS.__members__.items()
    if name.startswith("FuncTorch") or name in ("Conjugate", "Negative", "ZeroTensor")
]


def restored_keys() -> AbstractContextManager[Any]:
    """Put back the keys that a kernel may need of itself: `linalg_lstsq` squares by `conj()`, lazily."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _RESTORED:
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(include, exclude)


is_transformed: Callable[[torch.Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to a transform of `torch.func` that is under way."""


class Unbatchable(Exception):
    """torch has no batching rule for this call."""


def batch(
    func: Callable[..., Any],
    dims: Sequence[int | None],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    size: int,
    randomness: str,
) -> Any:
    """Run `func` once for all members by torch's batching rule; every tensor result is batched at 0.

    `dims` holds 0 or None for each argument, and lists of them for lists.
    """
    lazy_load_decompositions()
    with restored_keys():
        was_enabled = _functorch._is_vmap_fallback_enabled()
        level = _functorch._vmap_increment_nesting(size, randomness)
        _functorch._set_vmap_fallback_enabled(False)
        try:
            wrapped = [_wrap(arg, dim, level) for arg, dim in zip(args, dims, strict=True)]
            out = func(*wrapped, **kwargs)
            return _unwrap(out, level, size)
        except RuntimeError as error:
            raise Unbatchable(str(error)) from error
        finally:
            _functorch._set_vmap_fallback_enabled(was_enabled)
            _functorch._vmap_decrement_nesting()


def _wrap(arg: Any, dim: Any, level: int) -> Any:
    if dim is None:
        return arg
    if isinstance(dim, list):
        return [_wrap(entry, at, level) for entry, at in zip(arg, dim, strict=True)]
    return _functorch._add_batch_dim(arg, dim, level)


def _unwrap(out: Any, level: int, size: int) -> Any:
    if isinstance(out, torch.Tensor):
        found = _functorch._remove_batch_dim(out, level, size, 0)
        if found.shape[0] != size:  # `linalg_pinv` of an empty matrix that all share
            raise Unbatchable("torch's batching gives a result without members")
        return found
    if isinstance(out, list | tuple):
        return type(out)(_unwrap(entry, level, size) for entry in out)
    return out
