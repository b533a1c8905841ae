"""Random module trees: recipes, from which any number of members can be made with values of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int8, torch.uint8, torch.bool),
)
FLOATING = DTYPES[:6]


@dataclass(frozen=True)
class Tensor:
    """A parameter or buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    requires_grad: bool
    persistent: bool
    absent: bool
    turned: bool


@dataclass(frozen=True)
class Node:
    """A module: its tensors, its layers, its children, and what in it is one object."""

    tensors: tuple[Tensor, ...]
    layers: tuple[str, ...]
    children: tuple[Node, ...] = ()
    ties: tuple[tuple[int, int], ...] = ()
    doubled: bool = False
    training: bool = True


LAYERS = {
    "linear": lambda: nn.Linear(2, 3),
    "norm": lambda: nn.BatchNorm1d(3),
    "embedding": lambda: nn.Embedding(4, 2),
    "lstm": lambda: nn.LSTM(2, 2),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(2, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 3)),
    "channels_last": lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),
}

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    parameter = draw(st.booleans())
    dtype = draw(st.sampled_from(FLOATING if parameter else DTYPES))
    return Tensor(
        shape=draw(shapes),
        dtype=dtype,
        parameter=parameter,
        requires_grad=draw(st.booleans()) and dtype in FLOATING,
        persistent=draw(st.booleans()),
        absent=draw(st.integers(0, 9)) == 0,
        turned=draw(st.booleans()),
    )


@st.composite
def nodes(draw: st.DrawFn, depth: int = 2) -> Node:
    own = draw(st.lists(tensors(), max_size=3).map(tuple))
    pairs = st.tuples(st.integers(0, max(len(own) - 1, 0)), st.integers(0, max(len(own) - 1, 0)))
    return Node(
        tensors=own,
        layers=draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=2).map(tuple)),
        children=draw(st.lists(nodes(depth - 1), max_size=2).map(tuple)) if depth else (),
        ties=tuple(draw(st.lists(pairs, max_size=2))) if own else (),
        doubled=draw(st.booleans()),
        training=draw(st.booleans()),
    )


class Tree(nn.Module):
    """The one class of all members and all their inner modules."""


def make(node: Node, generator: torch.Generator) -> nn.Module:
    """One member, with values of its own."""
    model = Tree()
    for index, tensor in enumerate(node.tensors):
        register(model, f"t{index}", tensor, None if tensor.absent else values(tensor, generator))
    for number, (first, second) in enumerate(node.ties):
        tie(model, f"t{first}", f"t{second}", f"tie{number}")
    for index, layer in enumerate(node.layers):
        model.add_module(f"l{index}", LAYERS[layer]())
    for index, child in enumerate(node.children):
        model.add_module(f"c{index}", make(child, generator))
    if node.doubled and node.children:
        model.add_module("again", model.c0)
    return model.train(node.training)


def register(model: nn.Module, name: str, tensor: Tensor, value: torch.Tensor | None) -> None:
    if not tensor.parameter:
        model.register_buffer(name, value, persistent=tensor.persistent)
        if value is not None and tensor.requires_grad:
            value.requires_grad_()
    else:
        held = None if value is None else nn.Parameter(value, requires_grad=tensor.requires_grad)
        model.register_parameter(name, held)


def tie(model: nn.Module, first: str, second: str, name: str) -> None:
    """A second name for one tensor, and a third for another: of the same kind, as modules have it."""
    for source, target in ((first, name), (second, f"{name}_too")):
        if source in model._parameters:
            model.register_parameter(target, model._parameters[source])
        else:
            model.register_buffer(target, model._buffers[source], persistent=len(target) % 2 == 0)


def values(tensor: Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random bits, read as the dtype: NaNs of any payload, infinities and denormals among them."""
    shape = tensor.shape[::-1] if tensor.turned else tensor.shape
    if tensor.dtype is torch.bool:
        out = torch.rand(shape, generator=generator) > 0.5
    else:
        size = torch.empty((), dtype=tensor.dtype).element_size()
        raw = torch.randint(256, (*shape, size), generator=generator, dtype=torch.uint8)
        out = raw.view(tensor.dtype).reshape(shape)
    return out.permute(tuple(reversed(range(out.ndim)))) if tensor.turned else out


@dataclass
class Case:
    """A recipe, M members made from it, and what they were made with."""

    node: Node
    models: list[nn.Module]
    fresh: nn.Module = field(repr=False)


@st.composite
def cases(draw: st.DrawFn, most: int = 4) -> Case:
    node = draw(nodes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    models = [make(node, generator) for _ in range(draw(st.integers(1, most)))]
    return Case(node, models, make(node, generator))


def bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """Shape, dtype and every byte of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1).clone()
    return tuple(tensor.shape), tensor.dtype, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
