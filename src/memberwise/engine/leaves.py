"""A model's own tensors as code inside sees them: leaves, that can be copied, registered in another module, or kept.

Alone a parameter is a leaf, has no `grad_fn`, and `copy.deepcopy` makes another leaf of it (as in MAML). Inside a call
it has come in through an autograd node, and in a run by members it is a row of the stacked one.
"""

from __future__ import annotations

from typing import Any

import torch

from memberwise.engine import lowering
from memberwise.engine.crossing import Enter
from memberwise.engine.host import HOST
from memberwise.engine.signals import part_ways
from memberwise.engine.tensor import MemberTensor, stacked, wrap

_T = torch.Tensor
_ENTRIES = Enter._backward_cls, lowering._Raise._backward_cls  # type: ignore[attr-defined] # made by torch's metaclass


def is_leaf(member: Any) -> bool:
    """`x.is_leaf`, as alone."""
    return member.is_leaf or (isinstance(member, MemberTensor) and _has_come_in(member))


def _has_come_in(member: MemberTensor) -> bool:
    own = member._outside and member._root is None and member._inner.is_leaf
    return own and isinstance(member.grad_fn, (*_ENTRIES, type(None)))


def grad_fn(member: Any) -> Any:
    """`x.grad_fn`, as alone."""
    return None if is_leaf(member) else member.grad_fn


def gradient(member: Any) -> Any:
    """`x.grad`: what a backward inside, or an earlier step, has accumulated in the stack."""
    whole = _whole(member)
    if whole is None or whole.grad is None:
        return member.grad
    if not member._batched:
        part_ways(member._region, "the gradient of a tensor that all members share is read")
    found = whole.grad._inner if isinstance(whole.grad, MemberTensor) else whole.grad
    known = member.__dict__.get("_grad")
    if known is None or known._inner is not found:
        known = member._grad = wrap(found, member._region)
        known._outside = True
    return known


def set_gradient(member: Any, value: Any) -> None:
    """`x.grad = value`."""
    whole = _whole(member)
    if whole is None:
        member.grad = value
        return
    if not member._batched:
        part_ways(member._region, "the gradient of a tensor that all members share is set")
    member._region.note_backward([whole])
    whole.grad = None if value is None else stacked(value, member._region).detach()


def _whole(member: Any) -> Any:
    """The tensor outside of a member tensor that has come in."""
    return member._inner if isinstance(member, MemberTensor) and _has_come_in(member) else None


def deep_copy(member: MemberTensor, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(x)`: a leaf of its own, or torch's refusal."""
    if id(member) not in memo:
        if not is_leaf(member):
            return _T.__deepcopy__(member, memo)  # raises
        if getattr(member, "_lowered", False):
            lowering.unlower(member._region, "a copy is made of it")
        with torch.no_grad():
            own = torch.ops.aten.clone.default(member)
        memo[id(member)] = own.requires_grad_(member.requires_grad)
        if getattr(member, "_is_param", False):
            own._is_param = True  # isinstance(own, nn.Parameter) holds
    return memo[id(member)]


def reduce(member: MemberTensor, protocol: Any) -> Any:
    """`pickle.dumps(x)`, `torch.save(x)`: a file has one member's values."""
    if member._batched:
        part_ways(member._region, "one member's values are pickled")
    return member._inner.detach().requires_grad_(member.requires_grad).__reduce_ex__(protocol)


HOST[_T.is_leaf.__get__] = is_leaf  # type: ignore[attr-defined] # a getset descriptor
HOST[_T.grad_fn.__get__] = grad_fn  # type: ignore[attr-defined] # likewise
HOST[_T.grad.__get__] = gradient  # type: ignore[attr-defined] # likewise
HOST[_T.grad.__set__] = set_gradient  # type: ignore[attr-defined] # likewise
MemberTensor.__deepcopy__ = deep_copy  # type: ignore[method-assign] # this file knows what lies below
MemberTensor.__reduce_ex__ = reduce  # type: ignore[method-assign] # likewise
