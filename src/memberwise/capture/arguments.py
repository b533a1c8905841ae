"""A step's arguments, flat: tensors to hand to a program, and an outline that must not change."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch

from memberwise.capture.reach import PLAIN
from memberwise.trees import Each


class Arguments:
    """What a step is called with.

    Attributes:
        tensors: all tensors in `args` and `kwargs`.
        objects: what is neither a tensor, nor plain, nor a structure: a stack, an optimizer.
        outline: the rest, as one value.
        marked: the tensors given with `each()`, and where their member axis is.
        firsts: for each tensor, the position of the first that is the same object.

    >>> import torch
    >>> Arguments((torch.ones(2), 3), {}).outline
    ('tensor', (<class 'int'>, 3))
    """

    __slots__ = ("firsts", "marked", "objects", "outline", "tensors")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.objects: list[Any] = []
        self.marked: list[tuple[torch.Tensor, int]] = []
        self.outline: Any = tuple(map(self._outline, args))
        if kwargs:
            self.outline = (*self.outline, self._outline(kwargs))
        ids = list(map(id, self.tensors))
        self.firsts = None if len(set(ids)) == len(ids) else [ids.index(key) for key in ids]

    def _outline(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            return "tensor"
        kind = type(value)
        if isinstance(value, PLAIN):
            return kind, value
        if kind is Each:
            self.tensors.append(value.value)
            self.marked.append((value.value, value.dim % max(value.value.ndim, 1)))
            return kind, value.dim
        if isinstance(value, list | tuple):
            return kind, *map(self._outline, value)
        if isinstance(value, Mapping):
            return kind, *[(key, self._outline(entry)) for key, entry in value.items()]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return kind, *[self._outline(getattr(value, field.name)) for field in fields]
        self.objects.append(value)
        return "object"

    def like(self, other: Arguments) -> bool:
        """Whether all but the tensors is the same."""
        return (
            self.outline == other.outline
            and self.firsts == other.firsts
            and all(map(operator.is_, self.objects, other.objects))
        )

    def forget(self) -> None:
        """Let go of the tensors; `like` still works."""
        self.tensors, self.marked = [], []
