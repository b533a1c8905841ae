"""What the schema of an ATen operation says, read once: what it writes, what it returns, how it behaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from memberwise._torch.dispatch import is_made_of_others
from memberwise.engine.counted import COUNTED
from memberwise.rules.registry import LONE_CONTIGUOUS, RULES, on_change

_WRITES_UNSAID = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}
"""Operations that write arguments which their schema declares untouched."""

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclass(slots=True)
class Operation:
    """One `OpOverload` as the ladder sees it.

    Attributes:
        written: positions of the arguments it writes; names, where they are keyword-only.
        returned: for each return, the argument that comes back as it, or None.
        is_view: whether the results alias the first argument.
        is_alias: whether they are that argument as it lies.
        is_random: whether it draws.
        is_host: whether it returns a value to the host.
        swaps_memory: whether it gives a tensor other memory.
        moves_in_place: whether it changes the shape or strides of its argument (`squeeze_`).
        counted: whether members may part ways in its backward, see `memberwise.engine.counted`.
        quick: whether a rule may be tried with no further look.
        counts: whether its writes count for autograd: those that its schema does not tell of do not.
        made_of_others: whether it has no rule, and is run as the operations that it calls.
        lone_contiguous: whether its lone result is contiguous, whatever the arguments.
    """

    func: Any
    name: str
    rule: Any
    written: tuple[int | str, ...]
    returned: tuple[int | str | None, ...]
    is_view: bool
    is_random: bool
    is_host: bool
    moves_in_place: bool = False
    swaps_memory: bool = False
    lone_contiguous: bool = False
    counts: bool = True
    made_of_others: bool = False
    counted: bool = False
    quick: bool = False
    is_alias: bool = False

    def __post_init__(self) -> None:
        apart = self.written or self.is_random or self.is_host or self.moves_in_place or self.counted
        self.quick = self.rule is not None and not apart

    @property
    def twin(self) -> Operation | None:
        """The same operation out of place (`addmm` of `addmm_`), where there is one."""
        space, _, name = self.name.partition("::")
        if self.written != (0,) or not name.endswith("_") or self.is_random or self.moves_in_place:
            return None
        packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
        other = getattr(packet, self.func._schema.overload_name or "default", None)
        return None if other is None or other._schema.is_mutable else describe(other)

    def positional(self, names: tuple[str, ...]) -> Operation:
        """The same, with the named arguments behind the others."""
        return replace(self, func=Positional(self.func, names))


@dataclass(frozen=True)
class Positional:
    """An operation whose keyword arguments are given as positional ones, after the others."""

    func: Any
    names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = len(args) - len(self.names)
        return self.func(*args[:count], **dict(zip(self.names, args[count:], strict=True)), **kwargs)

    @property
    def tags(self) -> Any:
        """Of the operation."""
        return self.func.tags

    @property
    def _schema(self) -> Any:
        return self.func._schema


def has_mask(indices: Iterable[Any]) -> bool:
    """Whether one of an indexing's indices is a mask: only then does the shape of its result depend on values."""
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def written_among(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Those of the arguments that an operation writes to."""
    found: list[Any] = []
    for place in describe(func).written:
        value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
        found += [x for x in (value if isinstance(value, list | tuple) else [value]) if x is not None]
    return found


_KNOWN: dict[Any, Operation] = {}


def describe(func: Any) -> Operation:
    """The cached description of `func`."""
    known = _KNOWN.get(func)
    if known is None:
        known = _KNOWN[func] = _read(func)
    return known


on_change(lambda op: _KNOWN.pop(op, None))


def _read(func: Any) -> Operation:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator
        return Operation(func, str(func), RULES.get(func), (), (), False, False, False)
    places = [arg.name if arg.kwarg_only else k for k, arg in enumerate(schema.arguments)]
    written = [
        place
        for place, arg in zip(places, schema.arguments, strict=True)
        if arg.alias_info is not None and arg.alias_info.is_write
    ]
    sets = {
        next(iter(arg.alias_info.before_set), None): place
        for place, arg in zip(places, schema.arguments, strict=True)
        if arg.alias_info is not None and arg.alias_info.is_write
    }
    returned = tuple(
        None if ret.alias_info is None else sets.get(next(iter(ret.alias_info.before_set), None))
        for ret in schema.returns
    )
    unsaid = _WRITES_UNSAID.get(schema.name.removeprefix("aten::"), ())
    return Operation(
        func,
        schema.name,
        RULES.get(func),
        (*written, *unsaid),
        returned if any(place is not None for place in returned) else (),
        bool(getattr(func, "is_view", False)),
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.data_dependent_output in func.tags,
        torch.Tag.inplace_view in func.tags,
        schema.name == "aten::set_",
        func in LONE_CONTIGUOUS,
        not unsaid,
        func not in RULES and is_made_of_others(func),
        schema.name in COUNTED,
        is_alias=func in _ALIASES,
    )
