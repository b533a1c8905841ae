"""Reads of memory that no dispatch sees: `x.tolist()`, `x.numpy()`, `f"{x:.3f}"`.

Where all members hold the same, the value is given; where they differ, or where what is handed out is the memory
itself, the members part ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise._torch.dlpack import by_method
from memberwise._torch.nested import is_left_aligned
from memberwise._torch.packing import pack_padded_sequence
from memberwise.engine.lengths import TAKES_LENGTHS
from memberwise.engine.nested import goes_nested
from memberwise.engine.packing import RECURRENT, pack
from memberwise.engine.signals import part_ways
from memberwise.engine.sparse import EMBEDDINGS
from memberwise.engine.tensor import MemberTensor

_T = torch.Tensor


def _agreed(read: Callable[..., Any]) -> Callable[..., Any]:
    """A value that may be given if all members agree in it."""

    def handler(member: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(member, MemberTensor):
            return read(member, *args, **kwargs)
        if not member._batched:
            return read(member._inner, *args, **kwargs)
        values = [read(own, *args, **kwargs) for own in member._inner.detach().unbind(0)]
        if any(value != values[0] for value in values):
            part_ways(member._region, f"Tensor.{read.__name__} reads values in which the members differ")
        return values[0]

    return handler


def _memory(name: str) -> Callable[..., Any]:
    """Memory itself: one member's, so only a run by members can give it."""

    def handler(member: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _GIVES and isinstance(member, MemberTensor) and not member._batched and not member._outside:
            return getattr(member._inner, name)(*args, **kwargs)
        found = member if isinstance(member, MemberTensor) else next(a for a in args if isinstance(a, MemberTensor))
        return part_ways(found._region, f"Tensor.{name} hands out one member's memory")

    return handler


_GIVES = frozenset(("numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"))
"""What only gives memory out: a tensor made inside, and equal in all members, gives its own."""


def _format(member: Any, spec: str) -> str:
    if member.dim() or not isinstance(member, MemberTensor):
        return object.__format__(member, spec)
    return _agreed(_T.item)(member).__format__(spec)


HOST: dict[Any, Callable[..., Any]] = {
    _T.tolist: _agreed(_T.tolist),
    pack_padded_sequence: pack,
    is_left_aligned: goes_nested,
    **TAKES_LENGTHS,
    **RECURRENT,
    **EMBEDDINGS,
    _T.__format__: _format,
    _T.data.__set__: _memory("data"),  # type: ignore[attr-defined] # a getset descriptor
    **{getattr(_T, name): _memory(name) for name in ("numpy", "data_ptr", "untyped_storage", "set_")},
    **{getattr(_T, name): _memory(name) for name in ("__array__", "__dlpack__", "storage", "share_memory_")},
    **{getattr(_T, name): _memory(name) for name in ("apply_", "map_", "map2_")},  # they write it, in C++
}
"""Torch function -> what it does with a member tensor."""

by_method(MemberTensor)
