"""verify(): a stack against its own members, run one after another in plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import torch

from memberwise.differences import listed
from memberwise.errors import ParityError, build
from memberwise.generators import global_generators, restoring
from memberwise.grouped import Group
from memberwise.module import Stack
from memberwise.outcomes import Case, Outcome, alone, together, wide_dtype
from memberwise.tables import render
from memberwise.testing.tolerance import tolerance

KINDS = ("output", "gradient", "buffer", "stream")


@dataclass(frozen=True)
class Deviation:
    """How far one tensor of the stack lies from that of the lone members.

    Attributes:
        kind: "output", "gradient", "buffer" or "stream" (where a member's random stream stands).
        name: of the parameter, buffer or input, or the number of the output.
        dtype: in which the run was made.
        member: the member that deviates most, as a number of the verified stack.
        deviation: the largest absolute difference there is.
        used: the largest difference as a share of what the table of tolerances allows there; right up to 1.
        error, lone_error: the largest errors of stack and lone members against lone members in float64, where known.
        right: whether the deviation is within the table, or the stack's error at most twice the lone members' own.
    """

    kind: str
    name: str
    dtype: str
    member: int
    deviation: float
    used: float
    error: float | None
    lone_error: float | None
    right: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a table.

    Attributes:
        members: the members that were compared.
        rows: the largest deviation of each tensor, in each dtype.
        notes: what could not be compared, and why.
    """

    members: list[int]
    rows: list[Deviation]
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Deviation]:
        """The rows that deviate too far."""
        return [row for row in self.rows if not row.right]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        columns = [" ", "kind", "name", "dtype", ">member", ">deviation", ">of tolerance", ">error", ">lone error"]
        title = (
            f"{len(self.members)} members against their lone runs: {len(self.wrong)} of {len(self.rows)} tensors wrong"
        )
        return render(title, columns, map(_cells, self.rows), self.notes)

    __repr__ = __str__


def verify(
    stack: Stack | Group, *inputs: Any, loss_fn: Callable[..., Any] | None = None, members: int = 8
) -> Verification:
    """Compare a stack with its own members, each unstacked and run alone in plain PyTorch.

    Compared are outputs, gradients (of parameters, and of inputs that require one), buffers after the call and where
    the random streams stand, in the stack's dtype and in float64. Everything runs on copies: the stack, its streams,
    the inputs and the global generators stay exactly as they are.

    Shapes: inputs as in `stack(*inputs)`: shared, or `each(x)` with M first.

    Args:
        stack: the stack, or group of stacks, in the mode it shall be verified in.
        inputs: what the stack, or `loss_fn` after the model, is called with.
        loss_fn: `loss_fn(model, *inputs)`, written for one model; by default the model's own outputs.
        members: compare at most so many members, the first and the last among them.

    Returns:
        the table of the largest deviations; printing it shows it.

    Raises:
        ParityError: (an AssertionError) the stack deviates by more than the table of tolerances allows, and errs more
            than twice as much as the lone members do against float64 [MW601]; it cannot run where they can [MW602].
            Its `report` is the table.

    >>> import memberwise
    >>> stack = memberwise.build(lambda: torch.nn.Linear(3, 2), seeds=range(4))
    >>> verify(stack, torch.ones(5, 3)).wrong
    []
    """
    chosen = _spread(len(stack), members)
    rows: list[Deviation] = []
    notes: list[str] = []
    with _undisturbed():
        for prefix, case, compared in _cases(stack, inputs, loss_fn, chosen):
            found, more = _compared(case, compared)
            rows += [replace(row, name=prefix + row.name) for row in found]
            notes += more
    report = Verification(chosen, rows, notes)
    if report.wrong:
        _complain(report)
    return report


def _cases(
    stack: Stack | Group, inputs: tuple[Any, ...], loss_fn: Any, chosen: list[int]
) -> Iterator[tuple[str, Case, list[int]]]:
    """A case a stack: how its names begin, itself, and the members that it compares."""
    if isinstance(stack, Stack):
        yield "", Case(stack, inputs, loss_fn).only(chosen), chosen
        return
    for k, (part, members) in enumerate(stack.__memberwise_parts__()):
        places = [place for place, member in enumerate(members) if member in chosen]
        if places:
            own = Case(part, inputs, loss_fn).with_inputs_of(members)
            yield f"stacks.{k}.", own.only(places), [members[place] for place in places]


def _spread(size: int, most: int) -> list[int]:
    """At most so many members, the first and the last among them."""
    if size <= most:
        return [*range(size)]
    return sorted({round(k * (size - 1) / max(most - 1, 1)) for k in range(max(most, 1))})


def _compared(case: Case, chosen: list[int]) -> tuple[list[Deviation], list[str]]:
    """All deviations, and notes of what could not be compared."""
    lone = alone(case)
    ours = _together(case)
    if all(tensor.dtype == wide_dtype(tensor.dtype) for tensor in case.tensors()):
        return _deviations(ours, lone, None, chosen), []
    with _no_autocast():
        try:
            reference = alone(case, wide=True)
        except Exception as error:
            note = f"not compared in float64: a lone member fails there ({type(error).__name__}: {error})"
            return _deviations(ours, lone, None, chosen), [note]
        in_wide = _deviations(_together(case, wide=True), reference, None, chosen)
    truth = None if lone.drew else reference  # a draw in float64 may be another
    return _deviations(ours, lone, truth, chosen) + in_wide, []


def _together(case: Case, wide: bool = False) -> Outcome:
    try:
        return together(case, wide)
    except Exception as error:
        what = f"the stack fails where its members alone do not: {type(error).__name__}: {error}"
        raise build(ParityError, "MW602", what) from error


def _deviations(ours: Outcome, lone: Outcome, truth: Outcome | None, chosen: list[int]) -> list[Deviation]:
    rows = [
        _row(key, ours.tensors.get(key), theirs, None if truth is None else truth.tensors.get(key), chosen)
        for key, theirs in sorted(lone.tensors.items(), key=lambda item: KINDS.index(item[0][0]))
    ]
    for name, values in lone.values.items():
        mine = ours.values.get(name, [])
        apart = [i for i, value in enumerate(values) if i >= len(mine) or mine[i] != value]
        rows.append(_exact("output", name, apart, chosen))
    if lone.drew or ours.drew:
        pairs = zip(ours.streams, lone.streams, strict=True)
        rows.append(_exact("stream", "state", [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)], chosen))
    return rows


def _exact(kind: str, name: str, apart: list[int], chosen: list[int]) -> Deviation:
    off = float("inf") if apart else 0.0
    return Deviation(kind, name, "", chosen[apart[0] if apart else 0], off, off, None, None, not apart)


def _row(
    key: tuple[str, str],
    ours: torch.Tensor | None,
    theirs: torch.Tensor,
    truth: torch.Tensor | None,
    chosen: list[int],
) -> Deviation:
    dtype = str(theirs.dtype).removeprefix("torch.")
    if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Deviation(*key, dtype, chosen[0], float("inf"), float("inf"), None, None, False)
    off, used, place = _difference(ours, theirs)
    member = chosen[place] if theirs.ndim and theirs.shape[0] == len(chosen) else chosen[0]
    if truth is None:
        return Deviation(*key, dtype, member, off, used, None, None, used <= 1)
    error, lone_error = _difference(ours, truth)[0], _difference(theirs, truth)[0]
    return Deviation(*key, dtype, member, off, used, error, lone_error, used <= 1 or error <= 2 * lone_error)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, int]:
    """Largest absolute difference; the largest as a share of what is allowed, and its place in the first dimension."""
    if not theirs.numel():
        return 0.0, 0.0, 0
    rtol, atol = tolerance(theirs.dtype)
    kind = torch.complex128 if theirs.is_complex() else torch.float64
    a, b = ours.detach().to(kind), theirs.detach().to(kind)
    apart = (a - b).abs().nan_to_num(torch.inf)
    apart[(a == b) | (a.isnan() & b.isnan())] = 0
    used = (apart / (atol + rtol * b.abs())).nan_to_num(0, posinf=torch.inf)
    used[(apart == torch.inf)] = torch.inf
    rows = used.reshape(len(used), -1).amax(1) if used.ndim else used.reshape(1)
    return float(apart.max()), float(rows.max()), int(rows.argmax())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random streams as they are."""
    python = random.getstate()
    with restoring(global_generators()):
        try:
            yield
        finally:
            random.setstate(python)


@contextmanager
def _no_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# -- texts


def _complain(report: Verification) -> NoReturn:
    what = f"the stack deviates from its members alone:\n{listed(map(_sentence, report.wrong))}\n"
    do = "If the members share an architecture, this is a fault of Memberwise; explain() shows how each operation ran"
    error = build(ParityError, "MW601", what, do=do)
    error.report = report  # type: ignore[attr-defined] # a ParityError has one
    raise error


def _cells(row: Deviation) -> list[str]:
    errors = ["" if value is None else f"{value:.1e}" for value in (row.error, row.lone_error)]
    mark = " " if row.right else "✗"
    member = str(row.member)
    return [mark, row.kind, row.name, row.dtype, member, f"{row.deviation:.1e}", f"{row.used:.0%}", *errors]


def _sentence(row: Deviation) -> str:
    dtype = f" ({row.dtype})" if row.dtype else ""
    if row.kind == "stream":
        return f"member {row.member}: its random stream stands elsewhere than after its lone run"
    what = f"member {row.member}: {row.kind} '{row.name}'{dtype}"
    if row.deviation == float("inf"):
        return f"{what} is another than its lone run's"
    return f"{what} is off by {row.deviation:.1e}, {row.used:.3g} times what is allowed"
