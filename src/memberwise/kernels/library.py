"""Where kernels come from: each is one `.cpp` of this folder, after `multiply.h`, built once on a machine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from memberwise._torch.inductor import built

_HERE = Path(__file__).parent


@functools.cache
def library(name: str) -> Any:
    """The functions of `name.cpp`; the first call builds it, and raises what Inductor does where it cannot."""
    return built("".join((_HERE / file).read_text() for file in ("multiply.h", f"{name}.cpp")))


@functools.cache
def available(name: str) -> bool:
    """Whether it can be built here."""
    try:
        library(name)
    except Exception:  # no compiler, or another processor
        return False
    return True
