"""Activation checkpoints that are recomputed inside the surroundings they were recorded in.

Missing in public torch: `checkpoint(f, ...)` runs `f` again during backward, outside whatever context managers
were active when it was called. `context_fn=` can mend that only for who writes the call, which is the user's
module. So, while a call of ours runs, and no longer, the two classes that `torch.utils.checkpoint` makes its
records with are replaced: `_CheckpointFrame` (use_reentrant=False), whose first argument is the function to
recompute and whose `save_inputs` keeps what it is given, and `CheckpointFunction` (use_reentrant=True, public). What
they do in other threads is unchanged.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

StopRecomputation = torch_checkpoint._StopRecomputationError
"""What ends a recomputation early, once all that backward needs is there."""

Surroundings = Callable[[], contextlib.AbstractContextManager[Any]]


class _Local(threading.local):
    active: tuple[Surroundings, ...] = ()


_local = _Local()
_lock = threading.Lock()
_installed = 0
_originals: tuple[Any, Any]


class recomputed_inside:  # a context manager, named as one; a class costs a third of a generator
    """While active in this thread, checkpoints made are recomputed inside `surroundings()`, outermost first.

    Surroundings that must remember the moment of the checkpoint have a method `recorded(frame)`, which is called then
    and returns what is called instead. Where the checkpoint is no frame (use_reentrant=True), what is returned may have
    methods `began(args)` and `finished()`, called in a backward pass: with what is recomputed from, and when the pass
    has gone through the checkpoint. Those that have a method `given(args)` are shown its inputs before it keeps them.
    `instead`: they take the place of the innermost that are active.
    """

    __slots__ = ("_before", "_instead", "_surroundings")

    def __init__(self, surroundings: Surroundings, *, instead: bool = False) -> None:
        self._surroundings = surroundings
        self._instead = instead

    def __enter__(self) -> None:
        self._before = _local.active
        kept = self._before[:-1] if self._instead else self._before
        _local.active = (*kept, self._surroundings)
        _install()

    def __exit__(self, *exc_info: object) -> None:
        _uninstall()
        _local.active = self._before


def is_of_checkpoint(frame: FrameType) -> bool:
    """Whether what lies above this frame of the stack is what a checkpoint runs."""
    return frame.f_code.co_filename == torch_checkpoint.__file__


def surroundings() -> tuple[Surroundings, ...]:
    """What is active in this thread, outermost first."""
    return _local.active


def _install() -> None:
    global _installed, _originals
    with _lock:
        if not _installed:
            _originals = torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction
            torch_checkpoint._CheckpointFrame = _frame  # type: ignore[misc, assignment]  # put back by _uninstall
            torch_checkpoint.CheckpointFunction = _FUNCTION  # type: ignore[misc, assignment]  # likewise
        _installed += 1


def _frame(recompute: Callable[..., Any], *rest: Any) -> Any:
    frame = _originals[0](_surrounded(recompute, _recorded(frame=True)), *rest)
    frame.save_inputs = partial(_save, frame)
    return frame


def _save(frame: Any, *inputs: Any) -> Any:
    del frame.save_inputs  # which keeps the frame
    _show(inputs)
    return frame.save_inputs(*inputs)


def _apply(run: Callable[..., Any], *rest: Any) -> Any:
    _show(rest)
    active = _recorded(frame=False)
    out = _originals[1].apply(_surrounded(run, active, first_plain=True), *rest)
    ends = [around.finished for around in active if hasattr(around, "finished")]
    node = _node_of(out) if ends else None
    if node is not None:
        node.register_hook(lambda *_: _call_all(ends))
    return out


def _node_of(out: Any) -> Any:
    """The checkpoint's node; None where none of its results, or only a view that autograd refuses, leads to it."""
    for leaf in tree_leaves(out):
        with contextlib.suppress(RuntimeError):  # of a view that was made with gradients off, and is written
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                return leaf.grad_fn
    return None


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _recorded(frame: bool) -> list[Surroundings]:
    """What is active now, as it is to be called later."""
    return [getattr(around, "recorded", lambda _, kept=around: kept)(frame) for around in _local.active]


def _show(inputs: tuple[Any, ...]) -> None:
    for surroundings in _local.active:
        given = getattr(surroundings, "given", None)
        if given is not None:
            given(inputs)


_FUNCTION = SimpleNamespace(apply=_apply)


def _uninstall() -> None:
    global _installed
    with _lock:
        _installed -= 1
        if not _installed:
            torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction = _originals


def _surrounded(run: Callable[..., Any], active: list[Surroundings], first_plain: bool = False) -> Callable[..., Any]:
    """`run` inside what was active; `first_plain`: not in its first call, the forward itself."""
    made_in = _local.active
    if not made_in:
        return run

    def again(*args: Any, **kwargs: Any) -> Any:
        nonlocal first_plain
        if first_plain:
            first_plain = False
            return run(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for surroundings in active:
                if hasattr(surroundings, "began"):
                    surroundings.began(args)
                stack.enter_context(surroundings())
            stack.enter_context(_active_again(made_in))
            return run(*args, **kwargs)

    return again


@contextlib.contextmanager
def _active_again(active: tuple[Surroundings, ...]) -> Iterator[None]:
    """Checkpoints inside a recomputed one are recomputed inside the same surroundings."""
    before = _local.active
    _local.active = active
    _install()
    try:
        yield
    finally:
        _uninstall()
        _local.active = before
