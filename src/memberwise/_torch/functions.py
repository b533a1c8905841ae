"""Backward code of users' autograd Functions, run inside the call whose forward made it.

Such code makes tensors (`torch.zeros(x.shape)`) and writes members' values into them; without the region's mode
they would be plain. torch has no public hook around a node's backward that also ends when it raises, so while a
region runs, `Function.apply` is replaced by one that gives each new node an `apply` of its own. The replacement
ends with the call; the node's own attribute lives as long as the node.

To replace it makes Python forget what it knows of all classes below `Function`, 142 of torch's own, which takes 27 us
a call in a training step. So it is done only where users' Functions exist: `Function.__init_subclass__`, which torch
leaves to Python, takes note of them. That stays; it looks at a new class and does nothing to it.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import FunctionType
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

_lock = threading.Lock()
_depth = 0
_original: Any = Function.__dict__["apply"]


_TORCHS_OWN = ("torch.", "memberwise.")


def _is_users(cls: type[Function]) -> bool:
    """Whether code of others runs in its backward; torch makes such classes too: custom operations, compiled code."""
    if cls.__module__.startswith(("torch._library.", "torch._functorch.")):
        return not _registered_by(cls).startswith(_TORCHS_OWN)
    return not cls.__module__.startswith(_TORCHS_OWN)


def _registered_by(cls: type[Function]) -> str:
    """The module of the operation that torch made the class for, or "".

    The class is made around what the operation is registered with: its own function, or its backward formula.
    """
    held = {"orig_backward": inspect.getattr_static(cls, "backward", None)}  # one for lists of tensors wraps another
    while "orig_backward" in held:
        backward = inspect.unwrap(getattr(held["orig_backward"], "__func__", held["orig_backward"]))
        held = _held(backward) if isinstance(backward, FunctionType) else {}
    info = held.get("info")
    function = getattr(info, "_init_fn", None) or getattr(info, "_backward_fn", None)
    return getattr(function, "__module__", None) or ""


def _held(function: FunctionType) -> dict[str, Any]:
    """What a function has in its closure; a class that is being made is not in it yet."""
    held: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            held[name] = cell.cell_contents
    return held


def _note(cls: type[Function], **kwargs: Any) -> None:
    global _known
    super(Function, cls).__init_subclass__(**kwargs)
    _known = _known or _is_users(cls)


Function.__init_subclass__ = classmethod(_note)  # type: ignore[assignment] # see above
_known = any(map(_is_users, Function.__subclasses__()))


def users_functions() -> bool:
    """Whether there may be Functions that are not torch's own."""
    return _known


def _nowhere(_: bool) -> None:
    """No region runs."""


_around: Callable[[bool], Callable[[], AbstractContextManager[Any]] | None] = _nowhere
_prepare: Callable[[Any], Any] = tuple


_VALUES = frozenset({int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.Size})


def _may_run_modules(cls: type[Function], args: tuple[Any, ...]) -> bool:
    """Whether a Function's backward may call modules: it is given something else than tensors and plain values (the
    function of a differential equation), or is made where it can see some. Checkpoints, torch's own, see to it."""
    if cls.__module__.startswith(_TORCHS_OWN):
        return False
    return "<locals>" in cls.__qualname__ or not all(map(_is_value, args))


def _is_value(arg: Any) -> bool:
    if type(arg) in (list, tuple):
        return all(map(_is_value, arg))
    return type(arg) in _VALUES or isinstance(arg, torch.Tensor)


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    ours = cls.__module__.startswith("memberwise.")  # nodes at a call's border, whose backward is outside of it
    around = None if ours else _around(_may_run_modules(cls, args))
    if around is not None:
        args = _prepare(args)
    out = _original.__get__(None, cls)(*args, **kwargs)
    if around is not None:
        for value in out if isinstance(out, tuple | list) else (out,):
            node = value.grad_fn if isinstance(value, torch.Tensor) else None
            if isinstance(node, BackwardCFunction) and "apply" not in node.__dict__:
                node.apply = _inside(node, around)  # type: ignore[method-assign] # this node's alone
    return out


def _inside(node: Any, around: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """The node's own `apply` inside `around()`; it does not keep the node, which keeps it."""
    own = weakref.ref(node)

    def run(*grads: Any) -> Any:
        node = own()
        with around():
            return type(node).apply(node, *grads)

    return run


_patched = classmethod(_apply)


def enter_functions(around: Callable[[bool], Any], prepare: Callable[[Any], Any]) -> None:
    """From here on, nodes of users' Functions run their backward inside `around(modules)()`.

    `around` answers for the calling thread, with None where no region runs in it; it is told whether the backward may
    call modules. `prepare` is given the arguments of
    a Function, which torch does not show to anybody.
    """
    global _depth, _around, _prepare
    with _lock:
        _depth += 1
        _around, _prepare = around, prepare
        if _depth == 1:
            Function.apply = _patched  # type: ignore[assignment] # taken back when the last region ends


def leave_functions() -> None:
    """End what `enter_functions` began."""
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            Function.apply = _original
