"""Where code and values come from: what a library brings does not change under a recording, and is not followed."""

from __future__ import annotations

import argparse
import dis
import sys
import sysconfig
import types
from typing import Any

LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "memberwise", "numpy"}
"""The first names of modules whose functions and classes are taken as they are."""

_SITE = sysconfig.get_paths()["purelib"]


def names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Global names and attribute names that code refers to, functions inside it included."""
    names: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_names, inner_attributes = names_in(constant)
            names |= inner_names
            attributes |= inner_attributes
    return names, attributes


def is_installed(function: types.FunctionType) -> bool:
    return function.__code__.co_filename.startswith(_SITE)


def root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def is_library_value(value: Any) -> bool:
    """Functions, classes and modules of torch, NumPy, Memberwise and the standard library."""
    if isinstance(value, types.ModuleType):
        return root(value.__name__) in LIBRARIES
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return root(value.__module__) in LIBRARIES
    return False


def is_opaque(kind: type) -> bool:
    """Objects of the standard library and NumPy: locks, loggers, paths; namespaces are the exception."""
    if kind in (types.SimpleNamespace, argparse.Namespace):
        return False
    return root(kind.__module__) in LIBRARIES - {"torch", "memberwise"}
