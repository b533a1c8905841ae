"""Capture: a whole training step recorded as one program, compiled once, and replayed without Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from memberwise.capture.step import CapturedStep

__all__ = ["CapturedStep", "compile"]

P = ParamSpec("P")
R = TypeVar("R")


def compile(step: Callable[P, R], *, chunk: int | str = "auto", backend: str = "inductor") -> Callable[P, R]:
    captured = CapturedStep(step, backend)

    @functools.wraps(step)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return captured(args, kwargs)

    call.captured = captured
    return call
