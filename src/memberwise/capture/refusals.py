"""Why a step cannot be captured: a stable reason, what was found, and the user's line that did it."""

from __future__ import annotations

import linecache
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from memberwise.errors import StackWarning, text

REASONS: dict[str, str] = {
    "host-read": "the host reads a tensor's value, which a recording would freeze",
    "dynamic-shape": "an operation's result has a shape that depends on values",
    "host-data": "a tensor is made from data on the host, which a recording would freeze",
    "unknown-tensor": "a tensor comes from where a later call cannot look it up again",
    "memory": "the memory or the shape of a tensor is exchanged behind its operations",
    "aliased": "two tensors share memory that the step writes to",
    "random-values": "a draw depends on values that the step computes",
    "random-state": "the step sets or moves a random stream in a way that cannot be repeated",
    "python-state": "the step changes Python state, which a replay could not",
    "iterator": "the step can reach an iterator, and what it yields next cannot be recorded",
    "too-large": "the step can reach more Python values than can be watched",
    "needs-graph": "a returned or kept tensor still needs its gradient graph",
    "returned-object": "a returned object cannot be built anew",
    "layout": "a tensor is sparse, or of another layout than strides",
    "higher-order": "an operation takes functions as arguments",
    "internal": "the recorder met something it does not know",
    "not-compiled": "the compiler could not translate the recorded step",
}
"""The stable names of the reasons; the docs list them, tests and reports name them."""

_ADVICE: dict[str, str] = {
    "host-read": "Return the tensor and read it after the step, or branch with torch.where",
    "host-data": "Pass the data to the step as tensors",
    "unknown-tensor": "Pass it to the step as an argument",
    "python-state": "Keep what changes in a tensor, or change it outside the step",
    "iterator": "Take the next batch outside and pass it to the step",
    "too-large": "Pass data as arguments instead of reaching for it",
    "needs-graph": "Run the backward inside the step, or return a detached tensor",
    "random-state": "Seed outside the step",
    "returned-object": "Return tensors, numbers, and structures of them",
}


class Refusal(NamedTuple):
    """One reason why a step runs eagerly.

    Attributes:
        reason: a key of `REASONS`.
        found: what was found, in words.
        where: "file:line: source" of the user's code, or "".
    """

    reason: str
    found: str
    where: str = ""

    def sentence(self) -> str:
        """The reason, what was found and where, in one sentence."""
        at = f", at {self.where}" if self.where else ""
        return f"{REASONS[self.reason]}: {self.found}{at}"

    def advice(self) -> str:
        """What the user can do about it."""
        return _ADVICE.get(self.reason, "Results are right, only slower")


_STDLIB = str(Path(linecache.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_NO_FILES = ("<eval_with_key", "<frozen", "<string>")


def is_library(filename: str) -> bool:
    """Whether code comes from torch, from Memberwise, from the standard library or from no file at all."""
    if filename.startswith(_STDLIB):
        return "site-packages" not in filename or filename.startswith((_TORCH, _OURS))
    return filename.startswith((_TORCH, _OURS, *_NO_FILES))


def user_frame() -> FrameType | None:
    """The innermost frame of the running code that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def user_line() -> str:
    """Where `user_frame` stands, as "file:line: source"."""
    frame = user_frame()
    if frame is None:
        return ""
    filename = frame.f_code.co_filename
    return f"{Path(filename).name}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"


def warn(code: str, what: str, do: str) -> None:
    """A `StackWarning` that points at the user's line."""
    frame = user_frame()
    if frame is None:
        warnings.warn(text(code, what, do=do), StackWarning, stacklevel=2)
        return
    message, registry = text(code, what, do=do), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, StackWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)
