"""What a module holds besides tensors and bears on what it computes: dropout rates, eps, activations.

Settings are scalars, strings, callables (by qualified name) and tuples, lists, dicts and dataclasses of them. Left
out, as they come from running a module and not from building it, or name it only: what starts with an underscore,
caches, labels, lambdas, tensors of more than one element and long tables. Lists and dicts give one entry an item,
so that two that have grown to different lengths compare where both have something.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memberwise._torch.modules import forward_hooks

ATOMS = (str, bytes, types.NoneType, enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
LABELS = frozenset({"id", "uid", "uuid", "name", "training"})
CACHES = re.compile(r"(^|_)(caches?|cached|memo|history)(_|$)", re.IGNORECASE)
DEPTH = 4
LONGEST = 64
OTHER = "..."
"""Stands for a value that is no setting, where others beside it are."""


class Named(str):
    """A callable as a setting, by its qualified name."""

    __slots__ = ()


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Setting by path, of the module and all modules in it.

    >>> settings_of(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))["1.p"]
    0.1
    """
    return {
        f"{path}.{name}" if path else name: value
        for path, sub in module.named_modules()
        for name, value in _of_one(sub)
    }


def _of_one(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not _passed_over(name):
            yield from _entries(name, value, DEPTH)
    hooks = filter(None, map(qualified_name, forward_hooks(module)))
    yield "(forward hooks)", Named(", ".join(hooks) or "none")


@functools.lru_cache(1024)  # names recur in every module of every member
def _passed_over(name: str) -> bool:
    return name.startswith("_") or is_by_the_way(name)


def is_by_the_way(name: str) -> bool:
    """Whether an attribute of that name comes from running a module, or names it only."""
    return name in LABELS or CACHES.search(name) is not None


def _entries(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """One entry for a plain value, one an item for lists, dicts, dataclasses and namespaces."""
    items = _items(value)
    if items is None:
        plain = _plain(value, depth)
        if plain != OTHER:
            yield path, plain
    elif depth and len(items) <= LONGEST:
        for key, one in items.items():
            if not _passed_over(key):
                yield from _entries(path + key if key.startswith("[") else f"{path}.{key}", one, depth - 1)


def _items(value: Any) -> dict[str, Any] | None:
    if isinstance(value, list):
        return {f"[{index}]": one for index, one in enumerate(value[: LONGEST + 1])}
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if isinstance(key, str)}
    if isinstance(value, types.SimpleNamespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, OTHER) for field in dataclasses.fields(value)}
    return None


def _plain(value: Any, depth: int) -> Any:
    """The value in a form that `==` compares and `repr` shows, or OTHER."""
    if isinstance(value, torch.Tensor):
        return _plain(value.item(), depth) if _is_one_number(value) else OTHER
    if isinstance(value, numbers.Number):
        return "nan" if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, tuple):
        return tuple(_plain(one, depth - 1) for one in value) if depth else OTHER
    if isinstance(value, nn.Module):
        return OTHER
    name = qualified_name(value)
    return OTHER if name is None else Named(name)


def _is_one_number(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a plain scalar, and not the result of a run."""
    return type(tensor) is torch.Tensor and tensor.numel() == 1 and not tensor.is_meta and tensor.grad_fn is None


def qualified_name(value: Any) -> str | None:
    """`module.qualname` of a function, class, bound method or partial; None for lambdas and what is no callable."""
    if isinstance(value, functools.partial):
        inner = qualified_name(value.func)
        return inner and f"partial({', '.join((inner, *_arguments(value)))})"
    if not callable(value):
        return None
    named = value if hasattr(value, "__qualname__") else type(value)
    name, module = named.__qualname__, getattr(named, "__module__", None)
    if "<lambda>" in name:
        return None
    return f"{module}.{name}" if module else name


def _arguments(value: functools.partial[Any]) -> Iterator[str]:
    """The arguments that are settings themselves."""
    for name, one in (*(("", arg) for arg in value.args), *value.keywords.items()):
        plain = _plain(one, DEPTH)
        if plain != OTHER:
            yield f"{name}={plain!r}" if name else repr(plain)
