"""Dispatch modes and autograd nodes at the speed of C.

Public torch enters a mode with `with mode:` (2 us: Python-level bookkeeping for infra modes) and applies a
Function with `Function.apply` (1.5 us of checks for functorch, which the callers here have made). What is
missing is a public push and pop of one mode, and an `apply` without the functorch preamble.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = [
    "DisableTorchFunctionSubclass",
    "DispatchMode",
    "applier",
    "composites_must_stand_aside",
    "forward_of_function",
    "functorch_active",
    "has_tangents",
    "is_made_of_others",
    "make_wrapper",
    "mode_depth",
    "modes",
    "pop_mode",
    "push_mode",
    "run_as_others",
    "shorten_backward",
    "suspended",
    "top_mode",
]

make_wrapper = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined] # the only wrapper factory
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
push_mode: Callable[[Any], None] = torch._C._push_on_torch_dispatch_stack
mode_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
without_dispatch = torch._C._DisableTorchDispatch


pop_mode: Callable[[], Any] = partial(torch._C._pop_torch_dispatch_stack, None)
"""Take the innermost dispatch mode off and return it."""


def top_mode() -> Any:
    """The innermost dispatch mode, or None."""
    depth = mode_depth()
    return torch._C._get_dispatch_stack_at(depth - 1) if depth else None


def modes() -> list[Any]:
    """The dispatch modes that are on, innermost first."""
    return [torch._C._get_dispatch_stack_at(place) for place in reversed(range(mode_depth()))]


@contextmanager
def suspended(mode: Any) -> Iterator[None]:
    """Run without `mode`, if it is the innermost one; modes that a user pushed inside stay."""
    if top_mode() is not mode:
        yield
        return
    pop_mode()
    try:
        yield
    finally:
        push_mode(mode)


def is_made_of_others(func: Any) -> bool:
    """Whether an operation has a kernel that calls other operations.

    Autograd runs it above all dispatch, so that only inference mode hands such an operation over whole. Operations of
    the scripting language alone (`prim::layout`) have no kernel at all, and torch fails where it is asked which.
    """
    name = func.name()
    if not torch._C._dispatch_has_kernel(name):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def run_as_others(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation by that kernel; `func.decompose` may take another one, written for tracers."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the functorch preamble; only for use where no transform is active."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)


def has_tangents() -> bool:
    """Whether forward-mode differentiation is under way, torch's or functorch's."""
    return forward_ad._current_level >= 0


def shorten_backward(function: type[torch.autograd.Function]) -> None:
    """Let autograd call `function.backward` at once; torch's own `apply` looks first which of four it is to call."""
    backward = function.backward
    function._backward_cls.apply = lambda ctx, *grads: backward(ctx, *grads)  # type: ignore[attr-defined] # made by torch's metaclass, for this class alone


def forward_of_function() -> bool:
    """Whether, gradients being off, this code runs in the forward of an `autograd.Function`: it turns both modes off,
    where `torch.no_grad()` turns off one."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


_hooks_of_saving = torch._C._autograd._top_saved_tensors_default_hooks  # called by each layer: found once


def composites_must_stand_aside() -> bool:
    """Whether something is on that looks between an operation and its kernels: functorch transforms, autocast,
    saved-tensor hooks (checkpoint among them) or forward-mode differentiation."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or _hooks_of_saving(True) is not None
        or has_tangents()
    )


def saving_is_watched() -> bool:
    """Whether saved-tensor hooks are on: a checkpoint's count what is saved."""
    return _hooks_of_saving(True) is not None
