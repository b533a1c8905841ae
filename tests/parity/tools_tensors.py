"""Tensors of other kinds, as state, as inputs and inside: subclasses, masks, nested, sparse, quantised ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map

from tests.parity.tools_table import BY_MEMBERS, WORKS, Section, Using

TABLE = row = Section("Tensors of other kinds")


class Marked(torch.Tensor):
    """A subclass of `__torch_function__` alone, torch's default."""


class Doubling(torch.Tensor):
    """A subclass whose operations are its own: each sum is doubled."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is torch.Tensor.sum else out


class Logging(torch.Tensor):
    """A wrapper of `__torch_dispatch__`, as in torch's docs."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, elem.size(), dtype=elem.dtype, requires_grad=elem.requires_grad)
        made.elem = elem.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda t: t.elem if isinstance(t, Logging) else t, (args, kwargs or {}))
        return tree_map(lambda t: Logging(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


def parameter_of(kind: Any) -> Any:
    def make(model: Using) -> None:
        model.first.weight = nn.Parameter(kind(model.first.weight.detach()))

    return make


def buffer_of(make: Any) -> Any:
    return lambda model: model.register_buffer("kept", make(torch.randn(5, 5, dtype=torch.float64)))


def attribute_of(make: Any) -> Any:
    return lambda model: setattr(model, "kept", make(torch.randn(5, 5, dtype=torch.float64)))


row.add("a parameter of a subclass (`__torch_function__`)", "MW113", make=parameter_of(lambda t: t.as_subclass(Marked)))
row.add("a parameter of a wrapper subclass (`__torch_dispatch__`)", "MW113", make=parameter_of(Logging))


@row("a subclass made inside", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * self.hidden(x).detach().as_subclass(Doubling).sum().as_subclass(torch.Tensor))


@row("a wrapper subclass made inside", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) + (Logging(self.hidden(x).detach()) * 2).elem)


row.add(
    "`nn.Buffer`",
    WORKS,
    lambda self, x: self.last(self.hidden(x) + self.kept),
    make=lambda model: setattr(model, "kept", nn.Buffer(torch.randn(4, dtype=torch.float64), persistent=False)),
)


@row("`MaskedTensor`, `torch.masked`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    masked = masked_tensor(hidden, hidden.detach() > 0).sum(-1).get_data().nan_to_num()
    return self.last(hidden * (masked + torch.masked.sum(hidden, -1, mask=hidden > 0)).unsqueeze(-1))


@row("nested tensors, jagged", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(torch.nested.nested_tensor_from_jagged(self.hidden(x), torch.tensor([0, 2, 5])).values())


@row("nested tensors, strided", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    nested = torch.nested.as_nested_tensor([self.hidden(x[:2]), self.hidden(x[2:])])
    return self.last(nested.to_padded_tensor(0.0).flatten(0, 1))


@row("a sparse tensor of constants", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(torch.sparse.mm(torch.eye(5, dtype=x.dtype).to_sparse(), self.hidden(x)))


@row("a sparse tensor of constants, CSR", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(torch.eye(5, dtype=x.dtype).to_sparse_csr() @ self.hidden(x))


@row("a sparse tensor of members' values", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(torch.sparse.mm(self.first.weight.detach().to_sparse(), x.T).T)


@row("the same, CSR", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last((self.first.weight.detach().to_sparse_csr() @ x.T).T)


_ONE = torch.eye(5, dtype=torch.float64).to_sparse()
by_kept = {"body": lambda self, x: self.last(torch.sparse.mm(self.kept, self.hidden(x)))}
row.add("a sparse buffer", "MW113", make=buffer_of(torch.Tensor.to_sparse), **by_kept)
row.add("a sparse buffer, CSR", "MW113", make=buffer_of(torch.Tensor.to_sparse_csr), **by_kept)
row.add("a sparse attribute of each member", WORKS, make=attribute_of(torch.Tensor.to_sparse), **by_kept)
row.add("a sparse attribute, one object in all", WORKS, make=lambda model: setattr(model, "kept", _ONE), **by_kept)


@row("quantised tensors inside", WORKS, note="each operation by member [MW206]")
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    quantised = torch.quantize_per_tensor(self.hidden(x).detach().float(), 0.1, 0, torch.qint8)
    return self.last(self.hidden(x) + quantised.dequantize().to(x.dtype))


row.add(
    "a quantised buffer",
    WORKS,
    lambda self, x: self.last(self.hidden(x) + self.kept.dequantize()[:4, :4].sum(0).to(x.dtype)),
    make=buffer_of(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    note="each operation by member [MW206]",
)


@row("float8, and packed bits", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    low = hidden.detach().to(torch.float8_e4m3fn).to(x.dtype)
    return self.last(hidden + low + ((hidden.detach() * 8).to(torch.uint8) & 15).to(x.dtype))


@row("mkldnn tensors", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x).float().to_mkldnn().to_dense().to(x.dtype))


@row("`x.numpy()`, `np.sin(x)`", BY_MEMBERS, note="of a tensor equal in all members: works")
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * torch.as_tensor(np.sin(self.hidden(x).detach())))


@row("`torch.from_numpy` of constants", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) + torch.from_numpy(np.ones(4)))


@row("DLPack", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * torch.from_dlpack(self.hidden(x).detach()))


@row("DLPack by `to_dlpack`", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * torch.from_dlpack(torch.utils.dlpack.to_dlpack(self.hidden(x).detach())))


@row("`x.apply_`, `x.map_`", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    halves = self.hidden(x).detach().apply_(lambda value: value / 2)
    return self.last(self.hidden(x) * halves.map_(x.detach(), lambda a, b: a * b))


@row("`x.data_ptr()`, `x.untyped_storage()`", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    return self.last(hidden) * (hidden.untyped_storage().nbytes() + bool(hidden.data_ptr()))
