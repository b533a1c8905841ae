"""What one member looks like: everything about a module that the members of one stack must have in common."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from memberwise._torch.modules import is_persistent
from memberwise.names import named
from memberwise.places import Entry, Tree
from memberwise.settings import settings_of


class TensorForm(NamedTuple):
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
    tree = Tree(module)
    modules = dict(module.named_modules())
    model_class, class_name = _class_of(module)
    return Form(
        model_class=model_class,
        class_name=class_name,
        tensors={name: _tensor_form(tree.entries[name]) for name, _ in tree.tensors()},
        ties=tree.ties,
        classes={path: _qualified_class(sub) for path, sub in modules.items()},
        modes={path: sub.training for path, sub in modules.items()},
        settings=settings_of(module),
    )


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of `module` once, by its first name."""
    tree = Tree(module)
    return {name: tensor for name, tensor in tree.tensors() if tree.ties.get(name, (name,))[0] == name}


def _tensor_form(entry: Entry) -> TensorForm:
    table, key, owner = entry
    tensor, is_parameter = table[key], table is owner._parameters
    return TensorForm(
        kind="parameter" if is_parameter else "buffer",
        shape=None if is_lazy(tensor) else tuple(tensor.shape),
        dtype=tensor.dtype,
        device=tensor.device,
        layout=tensor.layout,
        requires_grad=tensor.requires_grad,
        persistent=is_parameter or is_persistent(owner, key),
    )


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
