"""What one member looks like: everything about a module that the members of one stack must have in common."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from memberwise._torch.modules import is_persistent
from memberwise.names import named
from memberwise.settings import settings_of


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A parameter or buffer without its values; `shape` is None while it is uninitialised (lazy)."""

    kind: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    requires_grad: bool
    persistent: bool


@dataclass(frozen=True, slots=True)
class Form:
    """A module without its tensors' values.

    Attributes:
        model_class: what `type(module)` says, except that classes made for one instance count as one.
        class_name: the name of the class.
        tensors: by name, every name of every parameter and buffer, tied ones by each of theirs.
        ties: for each name of a tied tensor, all names of that tensor, the first one first.
        classes: the qualified class name of each submodule by path; the module itself has the path "".
        modes: `training` of each submodule by path.
        settings: what `settings.settings_of` finds.
    """

    model_class: object
    class_name: str
    tensors: dict[str, TensorForm]
    ties: dict[str, tuple[str, ...]]
    classes: dict[str, str]
    modes: dict[str, bool]
    settings: dict[str, Any]

    def lazy(self) -> list[str]:
        """Names of tensors that have no values yet."""
        return [name for name, tensor in self.tensors.items() if tensor.shape is None]

    def key(self, name: str) -> str:
        """`name` as a key of a stacked dict: knowing its ties, and where a state dict has it."""
        names = self.ties.get(name, (name,))
        return named(name, names[1:], tuple(one for one in names if self.tensors[one].persistent))


def form_of(module: nn.Module) -> Form:
    """Describe `module`.

    >>> form_of(nn.Linear(3, 2)).tensors["weight"].shape
    (2, 3)
    """
    tensors: dict[str, TensorForm] = {}
    names: dict[int, list[str]] = {}
    for name, kind, tensor, persistent in _tensors(module):
        tensors[name] = _tensor_form(kind, tensor, persistent)
        names.setdefault(id(tensor), []).append(name)
    model_class, class_name = _class_of(module)
    return Form(
        model_class=model_class,
        class_name=class_name,
        tensors=tensors,
        ties={name: tuple(group) for group in names.values() if len(group) > 1 for name in group},
        classes={path: _qualified_class(sub) for path, sub in module.named_modules()},
        modes={path: sub.training for path, sub in module.named_modules()},
        settings=settings_of(module),
    )


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of `module` once, by its first name; parameters first."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, _, tensor, _ in _tensors(module):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor, bool]]:
    """`(name, kind, tensor, persistent)` of every name, in the order of `named_parameters` and `named_buffers`."""
    for name, tensor in module.named_parameters(remove_duplicate=False):
        yield name, "parameter", tensor, True
    for prefix, sub in module.named_modules(remove_duplicate=False):
        for name, tensor in sub.named_buffers(prefix, recurse=False, remove_duplicate=False):
            yield name, "buffer", tensor, is_persistent(sub, name.rpartition(".")[2])


def _tensor_form(kind: str, tensor: torch.Tensor, persistent: bool) -> TensorForm:
    shape = None if is_lazy(tensor) else tuple(tensor.shape)
    return TensorForm(kind, shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, persistent)


def _class_of(module: nn.Module) -> tuple[object, str]:
    """A class to compare, and its name: modules that torch gives a class each compare by what they run."""
    if isinstance(module, fx.GraphModule):
        return (fx.GraphModule, module.code), "GraphModule"
    kind = parametrize.type_before_parametrizations(module)
    return kind, kind.__name__


def _qualified_class(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return f"GraphModule of code {zlib.crc32(module.code.encode()):08x}"
    kind = parametrize.type_before_parametrizations(module)
    return f"{kind.__module__}.{kind.__qualname__}"
