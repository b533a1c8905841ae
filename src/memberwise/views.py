"""One member of a stack as a live module: its parameters and buffers are views into the stack, `.grad` too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from memberwise._torch.dispatch import DisableTorchFunctionSubclass
from memberwise._torch.views import leaf_on, take_gradient
from memberwise.engine.rows import CopiedApart
from memberwise.engine.slots import Place
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import StateError, fail


class MemberView(CopiedApart, torch.Tensor):
    """Member i's part of a stacked parameter or buffer: a leaf on the same memory, whose `.grad` is a view as well.

    Shapes: `(*s)`, of a stacked `(M, *s)`; of a shared tensor it is the whole. What autograd accumulates in it goes
    into the stack's `.grad`. Copies (`clone`, `copy.deepcopy`, pickles) are ordinary tensors of their own. Once the
    stack's tensor lies elsewhere (after `.to()`), every use raises StateError [MW304].
    """

    of_memberwise = True
    _place: Place
    _member: int | None

    @classmethod
    def of(cls, place: Place, member: int) -> MemberView:
        """The view of member `member` into the tensor at `place`."""
        whole = place.owner[place.name]
        values = whole.detach() if place.shared else whole.detach()[member]
        view = leaf_on(cls, values, whole.requires_grad)
        view._place, view._member = place, None if place.shared else member
        if place.is_parameter:
            view._is_param = True  # type: ignore[attr-defined] # isinstance(view, nn.Parameter) holds
        if view.requires_grad:
            view.register_post_accumulate_grad_hook(MemberView._pass_on)
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            for arg in _flat(args):
                if isinstance(arg, MemberView):
                    arg._whole()
            return func(*args, **(kwargs or {}))

    def _whole(self) -> torch.Tensor:
        """The stack's tensor; raises if this is no view of it any more."""
        whole = self._place.owner.get(self._place.name)
        if whole is None or self._is_stale(whole):
            self._refuse()
        return whole

    def _is_stale(self, whole: Any) -> bool:
        if isinstance(whole, MemberTensor):  # inside a call of the stack its own tensor is away for a while
            return False
        with DisableTorchFunctionSubclass():
            return whole is None or whole.dtype != self.dtype or _memory(whole) != _memory(self)

    def _refuse(self) -> NoReturn:
        what = f"{self._name()} is no view of the stack any more: one of them was moved, cast or assigned"
        fail(StateError, "MW304", what, do="Take the member from the stack again, stack[i], after such a change")

    def _name(self) -> str:
        return f"{'the shared' if self._member is None else f'member {self._member}:'} '{self._place.key}'"

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override] # torch has an attribute of C here
        """This member's part of the stack's gradient, or None while the stack has none."""
        self._pass_on()
        grad = self._whole().grad
        return grad if grad is None or self._member is None else grad[self._member]

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        take_gradient(self)
        whole = self._whole()
        if self._member is None:
            whole.grad = value
        elif value is not None:
            _add_grad(whole, self._member, value, replace=True)
        elif whole.grad is not None:
            with torch.no_grad():
                whole.grad[self._member] = 0

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def _pass_on(self) -> None:
        """Add what autograd has accumulated here to the stack's gradient."""
        with DisableTorchFunctionSubclass():
            own = take_gradient(self)
            if own is not None:
                _add_grad(self._whole(), self._member, own)

    def _own(self) -> torch.Tensor:
        values = self.detach().clone()
        return nn.Parameter(values, self.requires_grad) if self._place.is_parameter else values

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        stale = self._is_stale(self._place.owner.get(self._place.name))
        return f"<{self._name()} of a stack{', stale' if stale else f': {self.detach()!r}'}>"


class MemberBuffers(dict[str, Any]):
    """A member's buffers: what its forward assigns to one goes into the stack, as what it writes in place does.

    A value with a history stays in place too, so that its gradient is not cut.
    """

    def __init__(self, buffers: dict[str, Any]) -> None:
        super().__init__(buffers)
        self._views = {name: buffer for name, buffer in buffers.items() if isinstance(buffer, MemberView)}

    def __setitem__(self, name: str, value: Any) -> None:
        view = self._views.get(name)
        if view is not None and value is not view and _fits(value, view):
            with torch.no_grad():
                view.copy_(value)
            value = value if value.requires_grad else view
        super().__setitem__(name, value)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # copies are buffers of a module of its own


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _add_grad(whole: torch.Tensor, member: int | None, own: torch.Tensor, replace: bool = False) -> None:
    """Add a member's gradient to its part of the stack's; a gradient with a history (create_graph) keeps it."""
    if member is None:
        whole.grad = own if whole.grad is None else whole.grad + own
        return
    before = torch.zeros_like(whole) if whole.grad is None else whole.grad
    if own.requires_grad or before.requires_grad:
        one = own.unsqueeze(0)
        at = torch.tensor([member], device=own.device)
        whole.grad = before.index_copy(0, at, one) if replace else before.index_add(0, at, one)
        return
    with torch.no_grad():
        before[member] = own if replace else before[member] + own
    whole.grad = before


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield from _flat(value)
        else:
            yield value


def _fits(value: Any, view: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.shape == view.shape and value.dtype == view.dtype and value.device == view.device


def make_live(module: nn.Module) -> nn.Module:
    """A module that holds views, with what makes it one member's: see `MemberBuffers`, and state dicts of clones.

    (A state dict of views would keep, and save, the memory of all members.)
    """
    for sub in module.modules():
        vars(sub)["_buffers"] = MemberBuffers(sub._buffers)
        sub.register_state_dict_post_hook(_clone_own)
    return module


def _clone_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in (*module._parameters, *module._buffers):
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and not isinstance(value, MemberView):  # keep_vars=True wants the views
            state_dict[prefix + name] = value.clone()
