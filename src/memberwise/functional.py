"""functional_call: run a module with other tensors in place of its parameters and buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memberwise._torch.checkpoint import recomputed_inside
from memberwise.errors import ArgumentError, KindError, StateError, fail
from memberwise.swap import Swap, Tensors


class _Local(threading.local):
    watchers: tuple[Watcher, ...] = ()


_local = _Local()


class Watcher:
    """While active in this thread, is shown each module before it is called with other tensors."""

    def __enter__(self) -> None:
        self._others = _local.watchers
        _local.watchers = (*self._others, self)

    def __exit__(self, *exc_info: object) -> None:
        _local.watchers = self._others

    def notice(self, module: nn.Module) -> None:
        raise NotImplementedError


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: Tensors | Sequence[Tensors],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call `module` with the given tensors in place of its parameters and buffers: `torch.func.functional_call`.

    What the module reassigns (`self.count = self.count + 1`) is found in the dict that the name came from, the
    module itself is left as it was. Beyond torch: a submodule that is reachable by two paths is left as it was too;
    given `(params, buffers)`, reassigned buffers are found in `buffers`; what `torch.utils.checkpoint` recomputes in
    backward, it recomputes with the given tensors; the keys of `stack_module_state` keep ties for a template that
    lost its own by `.to("meta")`; a name that a parametrization computes (`weight` of a `weight_norm`) replaces
    the computed value, differentiably.

    Args:
        module: the module to call.
        parameter_and_buffer_dicts: a dict from names to tensors, or several with different keys.
        args: the arguments; what is not a tuple is one argument.
        kwargs: the keyword arguments.
        tie_weights: whether a value given for a tied tensor stands under its other names too.
        strict: whether the names given must be those of the module, all of them and no others.

    Raises:
        ArgumentError: (a ValueError) what is given are not dicts, a name is in two of them, or tied names get
            different values [MW110].
        StateError: (a RuntimeError) under `strict`, names are missing or unexpected; or the module is a ScriptModule
            or DataParallel [MW110]; or a part of it that is on the meta device, and was given no values, met a
            tensor that has some [MW111].
        KindError: (a TypeError) a value is not a tensor, or `module` not a module [MW110].

    >>> functional_call(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, torch.ones(2))
    tensor([2.])
    """
    dicts = _dicts(parameter_and_buffer_dicts)
    _refuse_unswappable(module)
    for watcher in _local.watchers:
        watcher.notice(module)
    if args is None:
        args = ()
    elif not isinstance(args, tuple):
        args = (args,)
    swap = Swap(module, dicts, tie_weights, strict)
    if torch.compiler.is_compiling():  # torch.compile gives a checkpoint its parameters itself
        with swap:
            return module(*args, **(kwargs or {}))
    with recomputed_inside(lambda: swap), swap:
        return module(*args, **(kwargs or {}))


def _dicts(given: Any) -> list[Tensors]:
    dicts = [given] if isinstance(given, dict) else given
    if not isinstance(dicts, Sequence):
        fail(ArgumentError, "MW110", f"expected a dict or a sequence of dicts, got a {type(given).__name__}")
    if not all(isinstance(one, dict) for one in dicts):
        kinds = ", ".join(type(one).__name__ for one in dicts)
        fail(ArgumentError, "MW110", f"expected all elements of parameter_and_buffer_dicts to be dicts, got {kinds}")
    seen: set[str] = set()
    repeated = [name for one in dicts for name in one if name in seen or seen.add(name)]
    if repeated:
        what = f"{repeated} appeared in multiple dictionaries"
        fail(ArgumentError, "MW110", what, do="Give each name in one of them")
    return [*dicts]


def _refuse_unswappable(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        fail(KindError, "MW110", f"expected an nn.Module to call, got a {type(module).__name__}")
    jitted = torch.jit.ScriptModule, torch.jit.ScriptFunction
    if isinstance(module, jitted) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # public
        fail(StateError, "MW110", "functional_call can't be used with Jitted modules")
    if isinstance(module, nn.DataParallel):
        fail(StateError, "MW110", "functional_call can't be used with nn.DataParallel modules", do="Call its module")
