"""Where kernels come from: each is one `.cpp` of this folder, after what it builds on, built once on a machine; and how
one becomes an operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memberwise._torch.building import built
from memberwise._torch.inductor import Shim, put_shim

_HERE = Path(__file__).parent
_BEFORE = {"convolution": ("multiply.h", "schemes.h", "tiles.h"), "product": ("multiply.h", "pairs.h")}
"""What stands before a `.cpp`, where that is more than products."""
_OPERATIONS = torch.library.Library("memberwise", "FRAGMENT")
_IN_C = {"Tensor": "AtenTensorHandle", "int": "int64_t", "bool": "int32_t", "float": "double"}
"""Types of arguments, and what a function in C takes for them."""


def operation(schema: str, file: str, run: Callable[..., Any], made: Callable[..., Any], lies: torch.Tag) -> Any:
    """The operation of this schema, on the CPU.

    Args:
        schema: without the namespace.
        file: the kernel that it lies in, with its function in C, `aoti_torch_cpu_` and its name.
        run: what Python calls.
        made: its results without values, of arguments without values.
        lies: how its arguments have to.
    """
    _OPERATIONS.define(schema, tags=(lies, torch.Tag.pt2_compliant_tag))
    name = schema.partition("(")[0]
    _OPERATIONS.impl(name, run, "CPU")
    torch.library.register_fake(f"memberwise::{name}", made, lib=_OPERATIONS)
    found = getattr(torch.ops.memberwise, name).default
    types = [_IN_C[str(one.type)] for one in found._schema.arguments]
    types += [f"{_IN_C[str(one.type)]}*" for one in found._schema.returns]
    declared = f"AOTITorchError aoti_torch_cpu_{name}({', '.join(types)})"
    put_shim(found, Shim(declared, lambda: str(library(file)._name)))
    return found


@functools.cache
def library(name: str) -> Any:
    """The functions of `name.cpp`; the first call builds it, and raises what Inductor does where it cannot."""
    return built(source(name))


def source(name: str) -> str:
    """The text of `name.cpp`, and what stands before it."""
    return "".join((_HERE / file).read_text() for file in (*_BEFORE.get(name, ("multiply.h",)), f"{name}.cpp"))


@functools.cache
def available(name: str) -> bool:
    """Whether it can be built here."""
    try:
        library(name)
    except Exception:  # no compiler, or another processor
        return False
    return True
