"""Capture: a whole training step recorded as one program, compiled once, and replayed without Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, overload

from memberwise.capture.several import several_steps
from memberwise.capture.step import CapturedStep
from memberwise.capture.within import Within
from memberwise.errors import ArgumentError, fail

__all__ = ["CapturedStep", "compile"]

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("inductor", "fx")


@overload
def compile(
    step: Callable[P, R],
    *,
    chunk: int | Literal["auto"] = ...,
    backend: str = ...,
    steps_per_call: int = ...,
    max_memory: int | None = ...,
) -> Callable[P, R]: ...


@overload
def compile(
    step: None = None,
    *,
    chunk: int | Literal["auto"] = ...,
    backend: str = ...,
    steps_per_call: int = ...,
    max_memory: int | None = ...,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def compile(
    step: Any = None,
    *,
    chunk: Any = "auto",
    backend: str = "inductor",
    steps_per_call: int = 1,
    max_memory: int | None = None,
) -> Any:
    """Capture a training step: the same function, replayed as one compiled program from its third call on.

    The first call of each kind runs eagerly and is recorded: forward, backward, clipping and optimizer, below
    autograd. The second call of that kind compiles the recording (seconds), and from then on a call is: compare
    guards, draw random numbers, run the program, which writes parameters, buffers, gradients and optimizer state
    in place. What the recording takes for granted is watched: shapes, dtypes, modes and M, closure variables,
    globals, module attributes, options of optimizers. A change is recorded anew; it is never ignored. Learning
    rates and other hyperparameters of `memberwise.optim` are tensors, and changing them records nothing.

    A step that cannot be recorded (it reads a tensor's value on the host, it changes Python state) runs eagerly,
    and a `StackWarning` says why, and on which line [MW501]. So it is where there is no C++ compiler [MW502].

    Returned tensors carry no gradient graph; the backward has to be inside the step. Printing and other side
    effects happen when a call is recorded (or chunks are tried), and not when it is replayed.

    Args:
        step: any function. Tensors among its arguments may differ from call to call; it may be a method.
        chunk: how many members run at once. "auto" measures at the first use, on copies of the state: all, or so many
            at a time as are worth a call, one if that is long enough, one chunk after the other or one on each core;
            and remembers the choice beside what the compiler keeps, in `$TORCHINDUCTOR_CACHE_DIR`. A number of members
            that does not divide M leaves a smaller last chunk. A step whose members depend on each other, or with no
            stack or optimizer of ours in it, runs all at once.
        backend: "inductor", or "fx" to replay the recorded operations one by one, uncompiled.
        steps_per_call: more than one says that a call has the data of several steps. All tensors among the arguments
            have one dimension more, the first, with an entry a step, about so many (a last call may have fewer); what
            the steps return is stacked there. In chunks, a few members at a time go through all of them, and what they
            need stays in the processor's caches. Gradients that steps leave are written for the last one only. Learning
            rates are those at the start of the call.
        max_memory: bytes that a step may take at a time beside its state: activations, and the gradients of the members
            under way. As many members as fit run through the whole step, then the next; so a stack trains whose
            activations would not fit at once. How many do is found out before the first run, on copies of one member
            and of two, where side effects happen as well. A step whose members depend on each other, or that leaves
            tensors in attributes, runs all at once, and a `StackWarning` says so [MW505]. One that picks members by
            their numbers does so in each part. (`memberwise.estimate` tells how many members fit.)

    Returns:
        The captured function. Its attribute `captured` is a `CapturedStep`, which knows what was recorded and why not.

    Raises:
        ArgumentError: (a ValueError) `step` is not callable, or another argument is wrong [MW504]; a call for several
            steps has no data for each [MW506]; one member takes more than `max_memory` [MW507].

    >>> import torch
    >>> weight = torch.ones(3, 2, requires_grad=True)              # M = 3
    >>> def step(x):
    ...     losses = (weight * x).sum(1)
    ...     losses.sum().backward()
    ...     with torch.no_grad():
    ...         weight.sub_(weight.grad, alpha=0.1)
    ...     weight.grad = None
    ...     return losses
    >>> captured = compile(step, backend="fx")
    >>> for _ in range(3):
    ...     losses = captured(torch.ones(2))
    >>> losses
    tensor([1.6000, 1.6000, 1.6000])
    >>> captured.captured.recorded, captured.captured.replayed
    (1, 2)
    """
    if step is None:
        return functools.partial(
            compile, chunk=chunk, backend=backend, steps_per_call=steps_per_call, max_memory=max_memory
        )
    if not callable(step):
        fail(ArgumentError, "MW504", f"expected a function, found a {type(step).__name__}")
    if chunk != "auto" and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        fail(ArgumentError, "MW504", f"chunk: expected 'auto' or a number of members, found {chunk!r}")
    if backend not in BACKENDS:
        fail(ArgumentError, "MW504", f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if not isinstance(steps_per_call, int) or isinstance(steps_per_call, bool) or steps_per_call < 1:
        fail(ArgumentError, "MW504", f"steps_per_call: expected a number of steps, found {steps_per_call!r}")
    if max_memory is not None and (not isinstance(max_memory, int) or isinstance(max_memory, bool) or max_memory < 1):
        fail(ArgumentError, "MW504", f"max_memory: expected a number of bytes, found {max_memory!r}")
    captured = CapturedStep(step, chunk, backend, steps_per_call)
    calls: Any = captured if max_memory is None else Within(captured, max_memory)
    run = calls if steps_per_call == 1 else functools.partial(several_steps, calls)

    @functools.wraps(step, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(args, kwargs)

    call.captured = captured  # type: ignore[attr-defined] # a function, so that it binds as a method does
    return call
