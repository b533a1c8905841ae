"""Where kernels come from: each is one `.cpp` of this folder, after what it builds on, built once on a machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from memberwise._torch.inductor import built

_HERE = Path(__file__).parent
_BEFORE = {"convolution": ("multiply.h", "tiles.h")}
"""What stands before a `.cpp`, where that is more than products."""


@functools.cache
def library(name: str) -> Any:
    """The functions of `name.cpp`; the first call builds it, and raises what Inductor does where it cannot."""
    return built("".join((_HERE / file).read_text() for file in (*_BEFORE.get(name, ("multiply.h",)), f"{name}.cpp")))


@functools.cache
def available(name: str) -> bool:
    """Whether it can be built here."""
    try:
        library(name)
    except Exception:  # no compiler, or another processor
        return False
    return True
