"""Reads by the host that no operation shows: seen as calls of torch's Python functions while a step is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memberwise.capture.refusals import Refusal, user_line
from memberwise.trees import tree_leaves

_VALUES = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__reduce_ex__", "storage"})
_POINTERS = frozenset({"data_ptr", "untyped_storage"})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined] # a descriptor, which the stubs call a Tensor
_EXCHANGES = frozenset({_SET_DATA, torch.Tensor.set_, torch.Tensor.resize_})
_FROM_HOST = frozenset({"tensor", "new_tensor", "as_tensor", "asarray", "scalar_tensor"})
_READS_INDICES = frozenset({torch.tensor_split, torch.Tensor.tensor_split})
_ASKING = (str(Path(__file__).parent.parent), str(Path(torch.nn.__file__).parent))
"""Code that asks which tensors share memory, and not for values."""


class HostReads(TorchFunctionMode):
    """Reports reads of values to `refuse` and lets everything happen.

    Attributes:
        call: name and arguments of the torch function that runs, or None outside any.
    """

    def __init__(self, refuse: Callable[[Refusal], None]) -> None:
        super().__init__()
        self._refuse = refuse
        self.call: tuple[str, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        try:
            found = _read(func, name, args, kwargs)
        except Exception:  # a wrong call: torch itself will say what is wrong with it
            found = None
        if found is not None:
            self._refuse(found)
        self.call, outer = (name, (args, kwargs)), self.call
        try:
            return func(*args, **kwargs)
        finally:
            self.call = outer

    def made_from(self) -> str:
        """What host data the running call makes a tensor from, where a recording must not freeze it; or ""."""
        if self.call is None:
            return "data that torch did not make"
        leaves = tree_leaves(self.call[1])
        arrays = [leaf for leaf in leaves if hasattr(leaf, "__array_interface__")]
        return "a NumPy value" if arrays else ""


def _read(func: Any, name: str, args: Any, kwargs: Any) -> Refusal | None:
    if name in _VALUES:
        return Refusal("host-read", f"Tensor.{name}", user_line())
    if name in _POINTERS and not sys._getframe(2).f_code.co_filename.startswith(_ASKING):
        return Refusal("host-read", f"Tensor.{name}", user_line())
    if func in _EXCHANGES:
        return Refusal("memory", f"Tensor.{name if name != '__set__' else 'data'} is set", user_line())
    if name in _FROM_HOST and _holds_tensor(args, kwargs):
        return Refusal("host-read", f"torch.{name} of a list of tensors reads their values", user_line())
    if func in _READS_INDICES and isinstance((*args, *kwargs.values())[1], torch.Tensor):
        return Refusal("host-read", "tensor_split reads its indices", user_line())
    return None


def _holds_tensor(args: Any, kwargs: Any) -> bool:
    """Whether the data is a list with tensors in it; one tensor alone is copied by an operation, and recorded."""
    data = kwargs.get("data", args[-1] if args else None)
    return not isinstance(data, torch.Tensor) and any(isinstance(x, torch.Tensor) for x in tree_leaves(data))
