"""Rules broken on purpose: members permuted, results dropped, gradients cut. Each must turn some test red.

A mutation is put in place of one entry of the tables in `memberwise.rules.registry`, and taken out again. It knows
whether it changed anything, so that a test which passes under one that changed nothing is not blamed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules import registry
from memberwise.rules.composite import Composite

Change = Callable[[torch.Tensor], torch.Tensor]


def permuted(value: torch.Tensor) -> torch.Tensor:
    """Each member's value with its neighbour."""
    return value.roll(1, 0)


def dropped(value: torch.Tensor) -> torch.Tensor:
    """Nothing in place of the value."""
    return torch.zeros_like(value)


@dataclass
class Mutation:
    """One rule, broken in one way.

    Attributes:
        target: the operation, or the torch function of a composite rule.
        kind: what is done to it.
        effects: how many calls it changed while it was in place.
    """

    target: Any
    kind: str
    put: Callable[[Mutation], AbstractContextManager[None]]
    effects: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """The broken rule by its name: an operation's, or a torch function's."""
        return str(getattr(self.target, "_name", None) or getattr(self.target, "__name__", self.target))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The rule is broken inside."""
        self.effects = 0
        with self.put(self):
            yield

    def apply(self, change: Change, value: Any) -> Any:
        """The changed value, if it is a tensor; counts whether it differs."""
        if not isinstance(value, torch.Tensor) or not value.numel():
            return value
        new = change(value)
        self.effects += not _equal(new, value)
        return new


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is equal to NaN here


# -- which rules are used, and how


@dataclass
class Uses:
    """What ran while it was watched: targets, and of composite rules the places of arguments and gradients."""

    targets: set[Any] = field(default_factory=set)
    places: dict[tuple[Any, str], set[int]] = field(default_factory=lambda: defaultdict(set))

    def note(self, function: Any, which: str, values: Any) -> None:
        """Some of a composite's arguments or gradients are tensors."""
        found = {place for place, value in enumerate(values) if isinstance(value, torch.Tensor)}
        self.places[function, which] |= found


@contextmanager
def watching() -> Iterator[Uses]:
    """A record to which every rule adds its target when it is used."""
    uses = Uses()
    rules = dict(registry.RULES)
    with ExitStack() as stack:
        for op, rule in rules.items():
            stack.callback(_replace, op, rule)
            _replace(op, _noting_rule(rule, uses, op))
        for function, call in composites().items():
            stack.enter_context(_noting_composite(function, call, uses))
        yield uses


def _noting_rule(rule: Callable[..., Any], uses: Uses, op: Any) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        uses.targets.add(op)
        return rule(*args, **kwargs)

    return noting


@contextmanager
def _noting_composite(function: Any, call: Composite, uses: Uses) -> Iterator[None]:
    forward, backward, again, below = call.forward, call.backward, call.again, call.below

    def noting_forward(info: Any, dims: Any, *args: Any) -> Any:
        uses.targets.add(function)
        uses.note(function, "forward", args)
        return forward(info, dims, *args)

    def noting_below(info: Any, dims: Any, *args: Any) -> Any:
        uses.targets.add(function)
        uses.note(function, "forward", args)
        wanted = [arg if isinstance(arg, torch.Tensor) and arg.requires_grad else None for arg in args]
        uses.note(function, "backward", wanted)
        assert below is not None
        return below(info, dims, *args)

    def noting(which: str, original: Any) -> Any:
        def gradients(*args: Any) -> Any:
            found = list(original(*args))
            uses.note(function, which, found)
            return found

        return gradients

    call.forward, call.backward = noting_forward, noting("backward", backward)
    call.again = again and noting("again", again)
    if below is not None:
        call.below = noting_below
    try:
        yield
    finally:
        call.forward, call.backward, call.again, call.below = forward, backward, again, below


# -- rules of single operations


def of_rules() -> list[Mutation]:
    """Each rule with its members permuted, and with its result dropped."""
    return [
        Mutation(op, kind, _broken_rule(op, change))
        for op in registry.RULES
        for kind, change in (("permute members", permuted), ("drop the result", dropped))
    ]


def _broken_rule(op: Any, change: Change) -> Any:
    @contextmanager
    def put(mutation: Mutation) -> Iterator[None]:
        original = registry.RULES[op]

        def broken(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(info, in_dims, *args, **kwargs)
            if type(found) is Decline:
                return found
            out, dims = found
            return _changed(mutation, change, out, dims, args), dims

        _replace(op, broken)
        try:
            yield
        finally:
            _replace(op, original)

    return put


def _replace(op: Any, rule: Any) -> None:
    registry.RULES[op] = rule
    for tell in registry._listeners:
        tell(op)


def _changed(mutation: Mutation, change: Change, out: Any, dims: Any, args: Any) -> Any:
    if isinstance(out, list | tuple):
        each = dims if isinstance(dims, list | tuple) else [dims] * len(out)
        pairs = zip(out, each, strict=True)
        return type(out)(_changed(mutation, change, entry, dim, args) for entry, dim in pairs)
    if dims != 0:
        return out
    new = mutation.apply(change, out)
    in_place = isinstance(out, torch.Tensor) and any(out is arg for arg in args)
    return out.copy_(new) if in_place else new


# -- composite rules


def of_composites(uses: Uses) -> list[Mutation]:
    """Each composite rule with its results permuted, each argument ignored, each gradient cut or permuted."""
    mutations = []
    for function, call in composites().items():
        mutations.append(Mutation(function, "permute members", _broken_forward(call, _permute_out)))
        for place in sorted(uses.places[function, "forward"]):
            mutations += [
                Mutation(function, f"ignore argument {place}", _broken_forward(call, _ignored(place))),
                Mutation(function, f"forget what is written to argument {place}", _broken_forward(call, _kept(place))),
            ]
        for place in sorted(uses.places[function, "backward"]):
            mutations += [
                Mutation(function, f"cut gradient {place}", _broken_backward(call, "backward", place, dropped)),
                Mutation(function, f"permute gradient {place}", _broken_backward(call, "backward", place, permuted)),
            ]
        for place in sorted(uses.places[function, "again"]):
            again = _broken_backward(call, "again", place, dropped)
            mutations.append(Mutation(function, f"cut gradient {place} of the gradient", again))
    return mutations


def composites() -> dict[Any, Composite]:
    """Each torch function with a composite rule, and the pair of functions behind it."""
    return {function: _composite(rule) for function, rule in registry.COMPOSITES.items()}


def _composite(rule: Any) -> Composite:
    """The entry itself, or, where it arranges its arguments first, what it calls."""
    if isinstance(rule, Composite):
        return rule
    cells = [cell.cell_contents for cell in rule.__closure__ or ()]
    return next(content for content in cells if isinstance(content, Composite))


def _broken_forward(call: Composite, change: Callable[[Mutation, Callable[..., Any], Any, Any], Any]) -> Any:
    @contextmanager
    def put(mutation: Mutation) -> Iterator[None]:
        original, below = call.forward, call.below
        call.forward = lambda info, dims, *args: change(mutation, lambda *own: original(info, dims, *own), dims, args)
        if below is not None:
            call.below = _broken_below(below, lambda *given: change(mutation, *given))
        try:
            yield
        finally:
            call.forward, call.below = original, below

    return put


def _broken_below(below: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    def broken(info: Any, dims: Any, *args: Any) -> Any:
        def forward(*own: Any) -> Any:
            found = below(info, dims, *own)
            return found if type(found) is Decline else (found, ())

        found = change(forward, dims, args)
        return found if type(found) is Decline else found[0]

    return broken


def _permute_out(mutation: Mutation, forward: Callable[..., Any], dims: Any, args: Any) -> Any:
    found = forward(*args)
    if type(found) is Decline:
        return found
    out, kept = found
    many = isinstance(out, list | tuple)
    new = [mutation.apply(permuted, entry) for entry in (out if many else [out])]
    return (type(out)(new) if many else new[0]), kept


def _ignored(place: int) -> Any:
    def forward(mutation: Mutation, original: Callable[..., Any], dims: Any, args: Any) -> Any:
        if len(args) <= place or not isinstance(args[place], torch.Tensor):
            return original(*args)
        return original(*args[:place], mutation.apply(dropped, args[place]), *args[place + 1 :])

    return forward


def _kept(place: int) -> Any:
    def forward(mutation: Mutation, original: Callable[..., Any], dims: Any, args: Any) -> Any:
        if len(args) <= place or not isinstance(args[place], torch.Tensor):
            return original(*args)
        before = args[place].clone()
        found = original(*args)
        if not _equal(before, args[place]):
            args[place].copy_(mutation.apply(lambda _: before, args[place]))
        return found

    return forward


def _broken_backward(call: Composite, which: str, place: int, change: Change) -> Any:
    @contextmanager
    def put(mutation: Mutation) -> Iterator[None]:
        original, below = getattr(call, which), call.below

        def broken(*args: Any) -> Any:
            grads = list(original(*args))
            if len(grads) > place:
                grads[place] = mutation.apply(change, grads[place])
            return grads

        def broken_below(info: Any, dims: Any, *args: Any) -> Any:
            assert below is not None
            own = list(args)
            if len(own) > place and isinstance(own[place], torch.Tensor) and own[place].requires_grad:
                own[place] = own[place].view_as(own[place])
                if dims[place] == 0 or change is dropped:
                    own[place].register_hook(lambda grad: mutation.apply(change, grad))
            return below(info, dims, *own)

        setattr(call, which, broken)
        if below is not None:
            call.below = broken_below if which == "backward" else None  # torch's own second derivatives are not ours
        try:
            yield
        finally:
            setattr(call, which, original)
            call.below = below

    return put
