"""Stacked tensors as the members' own, for members that run one by one.

A row shares the stacked tensor's memory, and is no view of it in autograd's eyes: what a member hooks, or writes into
its row with gradients off, finds a tensor that has one node, as alone. (torch 2.13 ends the process at a hook on a
view that was written so.) One node takes all rows out of the stacked tensor, and stacks their gradients.

With the memory a row shares the count of writes by which autograd knows that a tensor it has saved was changed. So the
counts start anew for each member: what one writes is no change of what another keeps. At the end they stand at the
highest, so that a later write to the stacked tensor is one for every member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memberwise._torch.dispatch import functorch_active, has_tangents
from memberwise._torch.versions import set_versions, version
from memberwise.engine.lowering import raise_for_function


class Rows:
    """The rows handed out in one run by members.

    >>> rows, x = Rows(), torch.zeros(2, 3)
    >>> first, second = rows.of(x)
    >>> for row in (first, second):
    ...     with rows.turn():
    ...         _ = row.add_(1.0)
    >>> x._version
    1
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[int, int], _Column] = {}
        self._bases: list[torch.Tensor] = []
        self._before: list[int] = []
        self._highest: list[int] = []

    def of(self, tensor: torch.Tensor, dim: int = 0, *, whole: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """One row a member; the same rows, if the tensor has been asked for before.

        `whole`: the stack's parameter that the rows are of; by default the tensor, if it is one.
        """
        column = self._columns.get((id(tensor), dim))
        if column is None:
            column = self._columns[id(tensor), dim] = _Column(tensor, dim)
            whole = tensor if whole is None and isinstance(tensor, nn.Parameter) and tensor.is_leaf else whole
            for member, row in enumerate(column.rows if whole is not None else ()):
                row.__class__ = ParameterRow
                row._whole, row._member, row._began = whole, member, whole.grad is not None  # type: ignore[attr-defined,union-attr] # so
            self._bases.append(tensor)
            self._before.append(version(tensor))
            self._highest.append(version(tensor))
        return column.rows

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One member's run."""
        set_versions(self._bases, self._before)
        try:
            yield
        finally:
            self._highest = [max(was, version(base)) for was, base in zip(self._highest, self._bases, strict=True)]
            set_versions(self._bases, self._highest)

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether any member wrote to its row."""
        k = next(k for k, base in enumerate(self._bases) if base is tensor)
        return self._highest[k] > self._before[k]

    def write_back(self) -> None:
        """After the last turn: what members computed into their rows, the stacked tensors have computed."""
        for column in self._columns.values():
            column.write_back()
        set_versions(self._bases, self._highest)


class _Column:
    """The rows of one tensor, and the nodes that autograd knew them by when they were handed out."""

    def __init__(self, tensor: torch.Tensor, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._are_views = functorch_active() or has_tangents()  # which follow no node of ours
        if self._are_views:
            self.rows: Sequence[torch.Tensor] = [tensor.select(dim, i) for i in range(tensor.shape[dim])]
        elif tensor.requires_grad and not torch.is_inference_mode_enabled():
            raise_for_function((tensor,))
            with torch.enable_grad():  # alone a parameter requires a gradient where gradients are off, too
                self.rows = _TakeOut.apply(tensor, dim)  # type: ignore[assignment] # a tuple of tensors
        else:
            self.rows = _rows(tensor, dim)
        self._nodes = [None if self._are_views else row.grad_fn for row in self.rows]

    def write_back(self) -> None:
        if self._are_views or all(
            now is node or now is None for now, node in zip(map(_node, self.rows), self._nodes, strict=True)
        ):
            return
        with torch.enable_grad():
            own = [*map(_as_handed_out, self.rows, self._tensor.detach().unbind(self._dim))]
            self._tensor.copy_(torch.stack(own, self._dim))


def _as_handed_out(row: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A row in the shape that it had; a member may have transposed it in place."""
    if (row.shape, row.stride()) == (own.shape, own.stride()):
        return row
    return row.as_strided(own.shape, own.stride(), own.storage_offset())


class _TakeOut(torch.autograd.Function):
    """Each member's row of a stacked tensor; their gradients, stacked."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int) -> Any:
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        return tuple(_rows(tensor, dim))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None
        return torch.stack([torch.zeros_like(some) if grad is None else grad for grad in grads], ctx.dim), None


def _rows(tensor: torch.Tensor, dim: int) -> list[torch.Tensor]:
    rows = [tensor.select(dim, i) for i in range(tensor.shape[dim])]
    return rows if tensor.is_inference() else [row.detach() for row in rows]  # else such rows could be written


class CopiedApart:
    """What is a part of a stack, and is copied and pickled as a tensor that `_own()` makes of it."""

    __slots__ = ()
    _own: Callable[[], torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._own()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._own().__reduce_ex__(protocol)


class ParameterRow(CopiedApart, torch.Tensor):
    """A row of a parameter: to who asks, a leaf, of which `copy.deepcopy` makes a parameter, as in MAML."""

    of_memberwise = True
    __torch_function__ = nn.Parameter.__torch_function__  # operations give plain tensors

    _whole: torch.Tensor
    _member: int
    _began: bool
    is_leaf = property(lambda self: True)  # type: ignore[assignment] # torch has an attribute of C here
    grad_fn = property(lambda self: None)  # type: ignore[assignment] # likewise
    grad_dtype = property(lambda self: self._whole.grad_dtype)  # type: ignore[assignment] # likewise; a leaf has one

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override] # likewise
        """This member's part of the stack's gradient, or None if neither it nor an earlier step has one."""
        whole = self._whole.grad
        own = None if whole is None else whole[self._member]
        return own if own is not None and (self._began or own.any()) else None

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        whole = self._whole
        if whole.grad is None and value is not None:
            whole.grad = torch.zeros_like(whole)
        if whole.grad is not None:
            with torch.no_grad():
                whole.grad[self._member] = 0 if value is None else value

    def _own(self) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


_node: Any = torch.Tensor.grad_fn.__get__  # type: ignore[attr-defined] # a getset descriptor
