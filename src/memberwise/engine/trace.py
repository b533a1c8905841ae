"""A passive record of how each operation ran; `memberwise.explain` reads it."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from memberwise.errors import StackWarning, text

_NOT_USER = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


@dataclass
class Entry:
    """One operation by one path: how often, how long (seconds), and why not by a faster path."""

    op: str
    path: str
    reason: str = ""
    count: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """All entries of one observed run."""

    entries: dict[tuple[str, str, str], Entry] = field(default_factory=dict)

    def note(self, op: str, path: str, reason: str, seconds: float) -> None:
        """Count one operation."""
        key = (op, path, reason)
        entry = self.entries.setdefault(key, Entry(op, path, reason))
        entry.count += 1
        entry.seconds += seconds


active: Record | None = None
"""The record being written, or None; the engine looks here once an operation."""

clock = perf_counter


@contextmanager
def recording() -> Iterator[Record]:
    """Record every operation that the engine runs inside the block."""
    global active
    before, active = active, Record()
    try:
        yield active
    finally:
        active = before


def name_of(func: Any) -> str:
    """The name `explain` prints for an operation."""
    return str(getattr(func, "__name__", func)) if not hasattr(func, "_schema") else str(func)


_warned: set[tuple[str, str]] = set()


def warn_slow(code: str, what: str, do: str, came_from: Any = None) -> None:
    """Warn of a slow path, once for each place in the user's code (of a traceback, or of the running code)."""
    place = user_line(traceback.extract_stack() if came_from is None else traceback.extract_tb(came_from))
    if (what, place) in _warned:
        return
    _warned.add((what, place))
    warnings.warn(StackWarning(text(code, f"{what}, at {place}", do=do)), stacklevel=2)


def user_line(stack: traceback.StackSummary) -> str:
    """`file:line` of the innermost frame outside torch and Memberwise."""
    for frame in reversed(stack):
        if not any(part in frame.filename for part in _NOT_USER):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"
