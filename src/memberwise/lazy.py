"""Lazy models get their sizes from one call on example inputs, and nothing else of that call stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memberwise.errors import StateError, build
from memberwise.trees import Each, tree_map


class Examples:
    """What each model is called with to get its sizes; `each()` marks what has an entry a member.

    Args:
        args: positional arguments; what is not a tuple or list is one argument. None: models are not called.
        kwargs: keyword arguments.
    """

    def __init__(self, args: Any = None, kwargs: Mapping[str, Any] | None = None) -> None:
        self._given = args is not None or kwargs is not None
        self.args = tuple(args) if isinstance(args, tuple | list) else () if args is None else (args,)
        self.kwargs = dict(kwargs or {})

    def materialised(self, models: Iterable[Any]) -> Iterator[Any]:
        """The models, each with values in all its parameters and buffers."""
        member = 0
        for model in models:
            self.materialise(model, member)
            yield model
            del model
            member += 1  # noqa: SIM113 `enumerate` would hold a model while the next one is made

    def materialise(self, model: Any, member: int) -> None:
        """Call a lazy model as it would be called alone, in its own mode; then undo what is not materialisation."""
        if not self._given or not isinstance(model, nn.Module) or not any(map(is_lazy, _tensors(model))):
            return
        device = next(_tensors(model)).device
        args, kwargs = tree_map(lambda leaf: _own(leaf, member, device), (self.args, self.kwargs))
        try:
            with _Before(model):
                model(*args, **kwargs)
        except Exception as error:
            what = f"member {member}: {type(model).__name__} fails on the example inputs: {error}"
            do = "Give example_inputs as a tuple of what one model is called with, and example_kwargs as a dict"
            raise build(StateError, "MW104", what, do=do) from error


class _Before:
    """A context manager that puts back what modules held: before the block, or right after they were materialised."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[nn.Module, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for module in self._model.modules():
            self._note(module)
            if any(map(is_lazy, _tensors(module, recurse=False))):  # runs after torch's own hook, which materialises
                self._hooks.enter_context(module.register_forward_pre_hook(self._note_materialised))

    def _note_materialised(self, module: nn.Module, args: Any) -> None:
        self._note(module)
        for sub in module.modules():
            if sub not in self._known:
                self._note(sub)

    def _note(self, module: nn.Module) -> None:
        attributes = dict(vars(module))
        self._known[module] = attributes, {name: dict(attributes[name]) for name in _TABLES if name in attributes}
        for tensor in _tensors(module, recurse=False):
            if not is_lazy(tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                self._values[tensor] = tensor.detach().clone()

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        for module, (attributes, tables) in self._known.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in tables.items():
                attributes[name].clear()
                attributes[name].update(entries)
        with torch.no_grad():
            for tensor, value in self._values.items():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


_TABLES = ("_parameters", "_buffers", "_modules")


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[torch.Tensor]:
    return chain(module.parameters(recurse), module.buffers(recurse))


def _own(leaf: Any, member: int, device: torch.device) -> Any:
    """A member's own example, which it may write to, where the model is."""
    value = leaf.value.select(leaf.dim, member) if isinstance(leaf, Each) else leaf
    return value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
