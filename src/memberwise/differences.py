"""What differs between members, listed in full: errors for what a stack cannot hold, a warning for the rest."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

from memberwise.errors import MemberwiseError, StackWarning, StateError, build, text
from memberwise.form import Form, TensorForm
from memberwise.settings import Named

Comparison = Callable[[Form, Form], Iterator[str]]

SHOWN = 10
FIRST = "member 0"
MISSING = "missing"

ASPECTS: tuple[tuple[str, str, str], ...] = (
    ("kind", "is a {}", "it is a {} in " + FIRST),
    ("shape", "has shape {}", FIRST + " has {}"),
    ("dtype", "has dtype {}", FIRST + " has {}"),
    ("device", "is on {}", "in " + FIRST + " it is on {}"),
    ("layout", "has layout {}", FIRST + " has {}"),
    ("requires_grad", "has requires_grad={}", FIRST + " has {}; every member's must be the same"),
    ("persistent", "has persistent={}", FIRST + " has {}"),
)
"""What two tensors of one name must have in common: attribute, what is found, what was expected."""

MODES = {True: "training", False: "eval"}

GROUP_THEM = "group(models) makes a stack of each kind and runs them as one; or bring the models into line"
HEADS: dict[str, tuple[str, str]] = {
    "MW102": ("expected all models to be of the same class", GROUP_THEM),
    "MW104": (
        "expected all parameters and buffers to have values, but some are uninitialised",
        "Let stack(models, example_inputs=(x,)) call each lazy model once, or do so yourself, or give its sizes",
    ),
    "MW103": (
        "expected all models to be the same but for the values of their parameters and buffers "
        "(same names, same shapes, same .requires_grad, same ties, same training/eval mode)",
        GROUP_THEM,
    ),
    "MW105": (
        "expected what is declared shared, and nothing else, to be one object in all members",
        "Name it in shared=, or give each member its own copy",
    ),
}
"""What was expected, and what to do, by code; the first that occurs heads the list of all differences."""


class Differences:
    """Takes one member's form after the other, and compares each with the first.

    Args:
        modes: whether members must be in one mode.

    Attributes:
        modes: by member, the modes of the modules of those whose modes are not the first's.

    >>> from torch import nn
    >>> from memberwise.form import form_of
    >>> seen = Differences()
    >>> for model in (nn.Linear(2, 2), nn.Linear(3, 2)):
    ...     seen.take(form_of(model))
    >>> seen.fits, seen.lines["MW103"]
    (False, ["member 1: parameter 'weight' has shape (2, 3), member 0 has (2, 2)"])
    """

    def __init__(self, *, modes: bool = True) -> None:
        self.count = 0
        self.modes: dict[int, dict[str, bool]] = {}
        self._comparisons = _COMPARISONS if modes else tuple(one for one in _COMPARISONS if one is not _modes)
        self.first: Form | None = None
        self.lines: defaultdict[str, list[str]] = defaultdict(list)
        self._odd: defaultdict[str, dict[int, Any]] = defaultdict(dict)

    @property
    def fits(self) -> bool:
        """Whether all members so far fit into one stack."""
        return not self.lines

    def take(self, form: Form) -> None:
        """Compare the next member's form."""
        index, self.count = self.count, self.count + 1
        if self.first is None:
            self.first = form
        for code, line in (*_lazy(form), *_compared(self.first, form, self._comparisons)):
            self.lines[code].append(f"member {index}: {line}")
        modes = {path: form.modes.get(path, mode) for path, mode in self.first.modes.items()}
        if modes != self.first.modes:
            self.modes[index] = modes
        for path, value in _odd_settings(self.first, form):
            self._odd[path][index] = value

    def note(self, code: str, line: str) -> None:
        """Add a difference that the forms do not show."""
        self.lines[code].append(line)

    def settings(self) -> dict[str, tuple[Any, ...]]:
        """What differs outside the tensors: by path, one value a member."""
        if self.first is None:
            return {}
        usual = {**self.first.settings, **_class_settings(self.first)}
        return {
            path: tuple(odd.get(index, usual.get(path, MISSING)) for index in range(self.count))
            for path, odd in self._odd.items()
        }

    def error(self, caller: str) -> MemberwiseError | None:
        """The error that lists every difference, or None if there is none."""
        if self.fits:
            return None
        code, *others = (one for one in HEADS if one in self.lines)
        lines = [line for one in (code, *others) for line in self.lines[one]]
        expected, do = HEADS[code]
        return build(StateError, code, f"{caller}: {expected}:\n{listed(lines)}", do=do)

    def warn(self, do: str, stacklevel: int) -> None:
        """One StackWarning that lists the settings in which members differ, if there are any."""
        differing = self.settings()
        if not differing:
            return
        warn_of_settings(differing, do, stacklevel + 1)


def warn_of_settings(differing: Mapping[str, tuple[Any, ...]], do: str, stacklevel: int) -> None:
    """One StackWarning that lists settings in which members differ: by path, one value a member."""
    lines = [f"{path} is {_by_value(values)}" for path, values in differing.items()]
    message = text("MW106", f"the members differ outside their tensors:\n{listed(lines)}", do=do)
    warnings.warn(message, StackWarning, stacklevel=stacklevel + 1)


def listed(lines: Iterable[str]) -> str:
    """The first ten lines, and how many more there are.

    >>> print(listed(f"line {i}" for i in range(12)).splitlines()[-1])
      and 2 more
    """
    lines = list(lines)
    shown = [f"  {line}" for line in lines[:SHOWN]]
    return "\n".join([*shown, f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else shown)


def members(indices: Iterable[int]) -> str:
    """Members by name.

    >>> members([0, 1, 2, 5]), members([3])
    ('members 0-2, 5', 'member 3')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    spans = ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)
    return f"member{'' if spans.isdigit() else 's'} {spans}"


def _by_value(values: tuple[Any, ...]) -> str:
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value if isinstance(value, str) else repr(value), []).append(index)
    return ", ".join(f"{_short(value)} in {members(indices)}" for value, indices in groups.items())


def _short(value: str) -> str:
    return value if len(value) <= 130 else f"{value[:60]}...{value[-60:]}"


def _lazy(form: Form) -> Iterator[tuple[str, str]]:
    for name in form.lazy():
        yield "MW104", f"{form.tensors[name].kind} '{name}' has no values yet"


def kind_of(form: Form) -> Hashable:
    """What models that can run as one have in common: what a stack needs equal, and what no call takes a value each of.

    Numbers and texts are left out: a call takes them, or they are names.
    """
    flags = {
        path: value
        for path, value in form.settings.items()
        if isinstance(value, bool | Named) or not isinstance(value, str | bytes | tuple | Number)
    }
    parts = form.tensors, form.ties, form.classes, flags
    return form.model_class, *(frozenset(part.items()) for part in parts)


def _compared(first: Form, form: Form, comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str]]:
    if form is first:
        return
    if form.model_class != first.model_class:
        yield "MW102", _class_line(first, form)
        return
    for compare in comparisons:
        for line in compare(first, form):
            yield "MW103", line


def _class_line(first: Form, form: Form) -> str:
    if form.class_name != first.class_name:
        return f"it is a {form.class_name}, {FIRST} is a {first.class_name}"
    what = "runs other code" if isinstance(form.model_class, tuple) else "is of another class of that name"
    return f"it is a {form.class_name} as {FIRST} is, but {what}"


def _names(first: Form, form: Form) -> Iterator[str]:
    for name, tensor in first.tensors.items():
        if name not in form.tensors:
            yield f"{tensor.kind} '{name}' is missing, {FIRST} has one of shape {tensor.shape}"
    for name, tensor in form.tensors.items():
        if name not in first.tensors:
            yield f"{tensor.kind} '{name}' of shape {tensor.shape} is extra, {FIRST} has none"


def _tensors(first: Form, form: Form) -> Iterator[str]:
    for name, expected in first.tensors.items():
        found = form.tensors.get(name)
        if found is not None and found != expected and None not in (found.shape, expected.shape):
            yield from _aspects(name, expected, found)


def _aspects(name: str, expected: TensorForm, found: TensorForm) -> Iterator[str]:
    for attribute, has, had in ASPECTS:
        now, then = getattr(found, attribute), getattr(expected, attribute)
        if now != then:
            yield f"{found.kind} '{name}' {has.format(now)}, {had.format(then)}"


def _modes(first: Form, form: Form) -> Iterator[str]:
    for path, mode in form.modes.items():
        expected = first.modes.get(path, mode)
        if mode != expected:
            what = f"module '{path}'" if path else "the model"
            yield f"{what} is in {MODES[mode]} mode, in {FIRST} it is in {MODES[expected]} mode"


def _ties(first: Form, form: Form) -> Iterator[str]:
    for name in first.tensors:
        found, expected = form.ties.get(name, ()), first.ties.get(name, ())
        if name in form.tensors and found != expected:
            yield f"'{name}' is {_tied(name, found)}, in {FIRST} it is {_tied(name, expected)}"


def _tied(name: str, names: tuple[str, ...]) -> str:
    others = ", ".join(f"'{other}'" for other in names if other != name)
    return f"tied to {others}" if others else "not tied"


_COMPARISONS: tuple[Comparison, ...] = (_names, _tensors, _modes, _ties)


def _class_settings(form: Form) -> dict[str, str]:
    """The classes of the submodules, as settings; a path that one member lacks is a difference too."""
    return {path: name for path, name in form.classes.items() if path}


def _odd_settings(first: Form, form: Form) -> Iterator[tuple[str, Any]]:
    if form is first:
        return
    for path, value in form.settings.items():
        if path in first.settings and first.settings[path] != value:
            yield path, value
    usual, found = _class_settings(first), _class_settings(form)
    for path in {**usual, **found}:
        if usual.get(path) != found.get(path):
            yield path, found.get(path, MISSING)
