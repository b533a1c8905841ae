"""Results on the way to other results: `return features, head(features)`.

What leaves a call is beside the graph inside of it, not on it: outside, nothing would lead from the second result to
the first, and a gradient asked of it, or a hook on it, would miss what flows through. So such a result leaves the call
where it is made, and comes in again: what is computed from it then leads through what is outside.

Which function of the call makes it is found by running once more, with all that functions return kept; from then on it
is known for calls of this kind. What is known is watched: where it is not so this time, nothing is taken out.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from memberwise._torch.dispatch import (
    DisableTorchFunctionSubclass,
    functorch_active,
    mode_depth,
    pop_mode,
    push_mode,
    saving_is_watched,
    top_mode,
)
from memberwise._torch.graph import made_after
from memberwise._torch.versions import version
from memberwise.engine.crossing import Enter, enter, leave
from memberwise.engine.layout import settle
from memberwise.engine.lowering import code_of, raise_
from memberwise.engine.parted import signature_of
from memberwise.engine.signals import Retreat
from memberwise.engine.tensor import MemberTensor
from memberwise.trees import tree_leaves

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region
    from memberwise.engine.arguments import Arguments


class _Local(threading.local):
    watch: Watch | None = None


_local = _Local()
watching: list[Watch] = []
"""Of all threads; the engine looks here once a function."""


class Watch:
    """Counts the functions of a call; takes out what those in `places` return, or keeps what all return (`keeps`).

    `places`: None, if nothing is to be done about it.
    """

    def __init__(self, region: Region, places: frozenset[int] | None, *, keeps: bool = False) -> None:
        self.region = region
        self.places = places
        self.made: list[Any] | None = [] if keeps else None
        self._count = 0
        self._views: list[tuple[torch.Tensor, int]] = []

    def __enter__(self) -> None:
        self._count, self.made = 0, None if self.made is None else []
        self._views.clear()
        if self.places or self.made is not None:
            watching.append(self)
            _local.watch = self

    def __exit__(self, *_: Any) -> None:
        if self in watching:
            watching.remove(self)
        _local.watch = None

    def result(self, out: Any) -> Any:
        """What a function has returned, taken out of the call and in again if it is a waypoint."""
        place, self._count = self._count, self._count + 1
        if self.made is not None:
            self.made.append(out)
        return self._passed(out) if self.places and place in self.places else out

    def _passed(self, out: Any) -> Any:
        if mode_depth() != self.region.depth + 1 or top_mode() is not self.region:
            return out  # within another mode: the graph is not the call's own
        pop_mode()
        try:
            return self._outside(out)
        finally:
            push_mode(self.region)

    def _outside(self, out: Any) -> Any:
        with DisableTorchFunctionSubclass():
            if isinstance(out, list | tuple) and not any(_is_view(one) for one in out):
                for one in out:
                    self._pass(one)
                return out
            return self._pass(out)

    def _pass(self, member: Any) -> Any:
        """A result itself, its graph going on outside; of a view another tensor that shows the same."""
        region = self.region
        if type(member) is not region.tensor_class or not member.requires_grad or member._lowered:
            return member
        settle(member)
        outside = leave(member, region)
        if not _is_view(member):
            member._inner, member._batched = outside, True
            raise_([member])
            return member
        self._views += [(member, version(member)), (outside, version(outside))]
        return enter([outside], [True], region)[0]

    def holds(self) -> bool:
        """Whether no view that was taken out has been written since, which its base would not have told it."""
        return all(version(tensor) == count for tensor, count in self._views)

    def place_of(self, member: MemberTensor) -> int | None:
        """Which function has returned it last."""
        made = self.made or []
        found = (k for k in reversed(range(len(made))) if any(one is member for one in _tensors(made[k])))
        return next(found, None)


def taken() -> Watch | None:
    """The watch of this thread, which is off until `put_back`."""
    watch, _local.watch = _local.watch, None
    return watch


def put_back(watch: Watch) -> None:
    """Watch on."""
    _local.watch = watch


class Missed(Retreat):
    """The call is to be run again, under another watch."""

    def __init__(self, region: Region, watch: Watch) -> None:
        super().__init__("a result leads to another", region)
        self.watch = watch


_Places = dict[Hashable, frozenset[int] | None]
_known: weakref.WeakKeyDictionary[Any, _Places] = weakref.WeakKeyDictionary()
MOST = 256
"""Entries of one function; who calls with ever new shapes is not remembered for ever."""


def known(func: Callable[..., Any], arguments: Arguments, region: Region) -> Watch | None:
    """How to watch a call that begins now."""
    if not _known:
        return None
    places = _known.get(_holder(func, arguments))
    if places is None:
        return None
    kind = _kind(func, arguments, region)
    return Watch(region, places[kind]) if kind in places else None


def remember(func: Callable[..., Any], arguments: Arguments, watch: Watch) -> None:
    """A call has run under this watch."""
    places = _known.setdefault(_holder(func, arguments), {})
    if len(places) >= MOST:
        places.clear()
    places[_kind(func, arguments, watch.region)] = watch.places


def _holder(func: Callable[..., Any], arguments: Arguments) -> Any:
    return arguments.slots[0] if arguments.slots else code_of(func)


def _kind(func: Callable[..., Any], arguments: Arguments, region: Region) -> Hashable:
    return code_of(func), torch.is_grad_enabled(), signature_of(func, arguments, region.randomness)


def check(out: Any, region: Region) -> None:
    """At the end of a call: raise `Missed`, if a result leads to another and does not lie on the graph outside."""
    if isinstance(out, torch.Tensor) or not torch.is_grad_enabled() or region.level or functorch_active():
        return
    watch = region.watch
    if watch is not None and watch.places is None:
        return
    with DisableTorchFunctionSubclass():
        lost = _lost(_tensors(out), region)
    if watch is None:
        if lost and not saving_is_watched():
            raise Missed(region, Watch(region, frozenset(), keeps=True))
        return
    if watch.made is None:
        if lost or not watch.holds():
            raise Missed(region, Watch(region, None))
        return
    places = [watch.place_of(member) for member in lost]
    found = None if None in places else frozenset(place for place in places if place is not None)
    raise Missed(region, Watch(region, found))


def _lost(results: Iterable[Any], region: Region) -> list[MemberTensor]:
    """Those which others were computed from, inside alone."""
    own = [one for one in results if type(one) is region.tensor_class and one.requires_grad and not one._lowered]
    members: list[MemberTensor] = [*{id(one): one for one in own}.values()]
    if len(members) < 2:
        return []
    inside = [one for one in members if point_of(one) is None and not one._backward_hooks and not one._outside]
    return [
        one for one in inside if any(made_after(other.grad_fn, one.grad_fn) for other in members if other is not one)
    ]


def point_of(member: MemberTensor) -> torch.Tensor | None:
    """The tensor outside whose graph a raised member tensor goes on from, where nobody listens on the way."""
    node, inner = member.grad_fn, member._inner
    if not issubclass(getattr(node, "_forward_cls", object), Enter) or not inner.requires_grad or not member._batched:
        return None
    if member._backward_hooks or member.retains_grad or member._differs or functorch_active():
        return None
    edge = inner.grad_fn, inner.output_nr
    return inner if edge[0] is not None and edge in node.next_functions else None  # type: ignore[union-attr] # a node


def _is_view(member: Any) -> bool:
    return isinstance(member, torch.Tensor) and member._is_view()


def _tensors(out: Any) -> list[Any]:
    return [out] if isinstance(out, torch.Tensor) else tree_leaves(out)
