"""MemberValue: one plain value a member, where one model has one: a dropout rate, a mode, a width.

It stands in the attributes in which members differ. Inside a call, arithmetic gives another such value, computed for
each member as it is alone; what a tensor meets becomes a tensor with a member axis (`engine.numbers`). Where Python
asks for the one value that there is alone (`if self.flag:`, a dict's key, a shape), it is given if all members agree;
otherwise they part ways.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NoReturn

import torch

from memberwise.engine.signals import part_ways
from memberwise.errors import StackAttributeError, fail
from memberwise.trees import tree_map

exist = False
"""Whether there has been one in this process: torch functions look for them among their arguments only then."""


class MemberValue:
    """M values, of which code sees its own.

    Args:
        values: one a member.
        region: the running call, or None outside of calls.
    """

    __slots__ = ("_region", "_values")
    stands_for_members = True

    # Set by `memberwise.engine.function`, as for member tensors.
    _on_function: Callable[..., Any]

    def __init__(self, values: Sequence[Any], region: Any = None) -> None:
        global exist
        exist = True
        self._values = tuple(values)
        self._region = region

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls._on_function(func, types, args, kwargs)

    @property
    def __class__(self) -> type:  # type: ignore[override] # isinstance(self.p, float) holds inside, as it does alone
        kinds = {*map(type, self._values)}
        return kinds.pop() if self._region is not None and len(kinds) == 1 and kinds <= _ATOMS else MemberValue

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return combined(lambda value: getattr(value, name), self)

    def __getitem__(self, key: Any) -> Any:
        return combined(operator.getitem, self, key)

    def __iter__(self) -> Iterator[Any]:
        if len({*map(len, self._values)}) > 1:
            self.asked("the host goes through")
        return iter([_handed(row, self._region) for row in zip(*self._values, strict=True)])

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.asked("the code calls")

    def __repr__(self) -> str:
        return f"MemberValue{self._values}"

    def __format__(self, spec: str) -> str:
        if self._region is None:
            return f"MemberValue({', '.join(format(value, spec) for value in self._values)})"
        return _reading(format, "the host prints")(self, spec)

    def __str__(self) -> str:
        return repr(self) if self._region is None else format(self)

    def __reduce__(self) -> Any:
        return MemberValue, (self._values,)

    def __deepcopy__(self, memo: Any) -> MemberValue:
        return MemberValue(copy.deepcopy(self._values, memo), self._region)

    def asked(self, why: str) -> NoReturn:
        """The one value is wanted, and there are several."""
        if self._region is not None:
            part_ways(
                self._region, f"{why} a value in which the members differ: {', '.join(map(_shown, self._values))}"
            )
        what = f"expected one value, and the members have {', '.join(map(_shown, self._values))}"
        fail(StackAttributeError, "MW306", what, do="Ask a member, stack[i], or set the attribute for all")


_ATOMS = {float, int, complex, str, bytes}


def is_own(value: Any) -> bool:
    """Whether it is a MemberValue, whatever it shows."""
    return type(value) is MemberValue


def own(values: Sequence[Any], region: Any = None) -> Any:
    """One value a member; the value itself, where all have the same."""
    return values[0] if all(_same(value, values[0]) for value in values[1:]) else MemberValue(values, region)


def _same(value: Any, first: Any) -> bool:
    if value is first or type(value) is not type(first):
        return value is first
    try:
        return bool(value == first)
    except Exception:  # a class may refuse to be compared
        return False


def combined(function: Callable[..., Any], *operands: Any) -> Any:
    """What `function` gives each member, of its own values."""
    given = next(operand for operand in operands if is_own(operand))
    rows = [operand._values if is_own(operand) else (operand,) * len(given._values) for operand in operands]
    return _handed([function(*row) for row in zip(*rows, strict=True)], given._region)


def _handed(values: Sequence[Any], region: Any) -> Any:
    """As `own`, to running code: what it may tell apart by `is`, it does not get."""
    found = own(values, region)
    if region is not None and is_own(found) and any(map(by_identity, values)):
        found.asked("the code asks for")
    return found


def by_identity(value: Any) -> bool:
    """Whether code tells such values apart by `is`, or calls them: None, flags, functions, classes, dtypes."""
    return isinstance(value, _SINGLE) or callable(value)


_SINGLE = (type(None), bool, Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)


def for_member(tree: Any, member: int) -> Any:
    """A structure as one member has it."""
    return tree_map(lambda leaf: leaf._values[member] if is_own(leaf) else leaf, tree)


def for_members(tree: Any, members: Sequence[int]) -> Any:
    """A structure as some members have it."""
    return tree_map(lambda leaf: own([leaf._values[i] for i in members]) if is_own(leaf) else leaf, tree)


def bound(tree: Any, region: Any) -> Any:
    """A structure as a running call (or, with None, no call) sees it."""
    return tree_map(lambda leaf: MemberValue(leaf._values, region) if is_own(leaf) else leaf, tree)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _operator(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An operator of two operands, and the same from the right. Tensors ask for it as they ask for any operation."""
    function = getattr(operator, name)

    def left(self: Any, other: Any) -> Any:
        return NotImplemented if isinstance(other, torch.Tensor) else combined(function, self, other)

    def right(self: Any, other: Any) -> Any:
        return NotImplemented if isinstance(other, torch.Tensor) else combined(function, other, self)

    return left, right


def _unary(self: MemberValue, function: Callable[..., Any]) -> Any:
    return combined(function, self)


def _reading(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """What is answered if all members agree in it."""

    def read(self: MemberValue, *args: Any) -> Any:
        found = [function(value, *args) for value in self._values]
        if any(type(one) is not type(found[0]) or one != found[0] for one in found):
            self.asked(why)
        return found[0]

    return read


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _left, _right = _operator(_name)
    setattr(MemberValue, f"__{_name}__", _left)
    setattr(MemberValue, f"__r{_name}__", _right)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(MemberValue, f"__{_name}__", _operator(_name)[0])
for _name in ("neg", "pos", "abs"):
    setattr(MemberValue, f"__{_name}__", functools.partialmethod(_unary, getattr(operator, _name)))

_READS: dict[str, tuple[Callable[..., Any], str]] = {
    "bool": (bool, "a condition asks for"),
    "float": (float, "the host reads"),
    "int": (int, "the host reads"),
    "complex": (complex, "the host reads"),
    "index": (operator.index, "a size or an index is"),
    "hash": (hash, "a key is"),
    "len": (len, "the host asks for the length of"),
    "contains": (operator.contains, "the host looks into"),
}
"""Special methods by which Python asks for one value."""

for _name, (_function, _why) in _READS.items():
    setattr(MemberValue, f"__{_name}__", _reading(_function, _why))
