"""`torch.utils.dlpack.to_dlpack`, which asks no subclass: of one without memory it gives out none, and whoever reads
that ends the process. So it is replaced, under its public names, by one that asks first; for other tensors it does
what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import dlpack

_original = dlpack.to_dlpack
_asked: list[type] = []


def _to_dlpack(tensor: Any) -> Any:
    return tensor.__dlpack__() if isinstance(tensor, (*_asked,)) else _original(tensor)


dlpack.to_dlpack = torch.to_dlpack = _to_dlpack


def by_method(kind: type) -> None:
    """From here on `to_dlpack` of a `kind` is its `__dlpack__`."""
    _asked.append(kind)
