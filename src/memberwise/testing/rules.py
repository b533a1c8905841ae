"""check_rule: one rule against a plain loop, over every way in which its arguments can be stacked or shared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from memberwise.engine import trace
from memberwise.engine.boundary import vmap
from memberwise.engine.strict import strict
from memberwise.rules.registry import COMPOSITES, composites_disabled
from memberwise.testing.tolerance import assert_equal

_ALL_CHOICES = 4
"""With more tensor arguments than this, not every combination is run (see `combinations`)."""


@dataclass
class Checked:
    """What `check_rule` ran.

    Attributes:
        by_rule: the runs that the rule served, by variant and `in_dims`.
        declined: those that went on down the ladder, and why; their results were compared as well.
    """

    by_rule: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Case:
    """One way to run: arguments (stacked ones with M first), and where each has its member axis."""

    run: Callable[..., Any]
    name: str
    args: list[Any]
    dims: tuple[int | None, ...]
    size: int
    grad: bool
    state: Sequence[int]
    composite: bool
    twice: bool = False
    inside: bool = False
    strides: bool = False

    def leaf_dims(self) -> list[int | None]:
        return [dim for arg, dim in zip(self.args, self.dims, strict=True) for _ in _tensors(arg)]

    def own(self, index: int) -> list[Any]:
        """One member's arguments, copies of its own."""
        pairs = zip(self.args, self.dims, strict=True)
        return self.fresh([_map(lambda t, d=dim: t if d is None else t.select(0, index), arg) for arg, dim in pairs])

    def fresh(self, args: list[Any]) -> list[Any]:
        """Copies that are leaves; what can have a gradient gets one."""
        return [
            _map(lambda t, tracked=self.grad and k not in self.state: _leaf(t, tracked), arg)
            for k, arg in enumerate(args)
        ]


def check_rule(
    op: Callable[..., Any],
    *sample: Any,
    batch_dims: Sequence[int | None] | None = None,
    stacked: Sequence[Sequence[int]] | None = None,
    state: Sequence[int] = (),
    grad: bool = True,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16, torch.complex128),
    thorough: bool = True,
    autocast: bool = True,
    **options: Any,
) -> Checked:
    """Compare the rule of `op` with a loop over members: values, gradients, double backward, inputs, strides, dtypes.

    `sample` are one member's arguments, best in float64, where results must agree to 1e-10. They are run with every
    combination of stacked and shared tensors, with M = 1 and 3, from other memory orders, with a batch of 0 and 1
    (`batch_dims`), in other dtypes and under autocast. What the rule declines goes down the ladder and is compared all
    the same; what a lone run refuses (a dtype that the operation does not have), the stack must refuse.

    Args:
        op: an operator (`torch.ops.aten.mm.default`, or a custom op), or a torch function with a composite rule.
        sample: tensors, lists of tensors and other values, as one member passes them. Members get other values:
            floats in another order and scale, integers in another order, so that indices stay in range, masks turned.
        batch_dims: for each of `sample`, the dimension that is the batch, or None.
        stacked: the places of the tensors to stack in each run, instead of every combination.
        state: places of tensors that take no gradient (and are written, mostly).
        grad: whether gradients are compared, and gradients of gradients where the lone operation has them.
        dtypes: further dtypes for the float64 tensors of `sample`.
        thorough: False leaves out M = 1, other memory, and gradients taken inside.
        autocast: whether an operator is run under autocast, too (composite rules stand aside there).
        options: keyword arguments of `op`.

    Returns:
        which runs the rule served, and which it declined.

    Raises:
        AssertionError: a run differs from the loop, or no run went through the rule; the message says which run, by
            `in_dims`, and how far it is off.
        EngineError: the rule raised what no member raises alone [MW211], or its answer has not the form [MW213].

    >>> checked = check_rule(torch.ops.aten.mm.default, torch.ones(2, 3).double(), torch.ones(3, 4).double())
    >>> checked.by_rule[:3]
    ['(0, 0)', '(0, None)', '(None, 0)']
    """
    places = [tuple(choice) for choice in (combinations(sample) if stacked is None else stacked)]
    base = _Case(lambda *args: op(*args, **options), "", [], (), 3, grad, state, op in COMPOSITES)
    checked = Checked()
    cases = _cases(base, list(sample), places, batch_dims, dtypes, thorough)
    if autocast and not base.composite:
        low = [_as_dtype(value, torch.float32) for value in sample]
        cases = itertools.chain(cases, [_case(_autocast(base), "autocast", low, places[0])])
    for case in cases:
        with strict():
            record = _compare(case)
        if record is not None:
            _note(checked, case.name, op, case.composite, record)
    if not checked.by_rule:
        raise AssertionError(f"no run of {op} went through its rule: {checked.declined}")
    return checked


def combinations(sample: Sequence[Any]) -> Iterator[tuple[int, ...]]:
    """Places of the tensors to stack: every non-empty choice; of many tensors all, all but one, and each alone.

    >>> list(combinations([torch.ones(2), 3, torch.ones(2)]))
    [(0, 2), (0,), (2,)]
    """
    places = [k for k, value in enumerate(sample) if _tensors(value)]
    if len(places) > _ALL_CHOICES:
        yield tuple(places)
        yield from (tuple(p for p in places if p != left_out) for left_out in places)
        yield from ((place,) for place in places)
        return
    for count in range(len(places), 0, -1):
        yield from itertools.combinations(places, count)


def _cases(
    base: _Case, sample: list[Any], choices: list[Any], batch_dims: Any, dtypes: Sequence[torch.dtype], thorough: bool
) -> Iterator[_Case]:
    whole = choices[0]
    for places in choices:
        all_stacked = places == whole and thorough
        yield replace(_case(base, "", sample, places), twice=True, inside=all_stacked, strides=True)
    if thorough:
        yield _case(replace(base, size=1), "M=1", sample, whole)
        other = [_map(_swapped_in_memory, value) for value in sample]
        for places in choices:
            case = _case(base, "other memory", other, places)
            args = [
                arg if dim is None else _map(_members_innermost, arg)
                for arg, dim in zip(case.args, case.dims, strict=True)
            ]
            yield replace(case, args=args)
    for size in (0, 1):
        if batch_dims is None:
            break
        pairs = zip(sample, batch_dims, strict=True)
        small = [
            value if dim is None else _map(lambda t, d=dim, n=size: t.narrow(d, 0, n), value) for value, dim in pairs
        ]
        for places in choices:
            yield _case(base, f"batch {size}", small, places)
    for dtype in dtypes:
        yield _case(base, str(dtype), [_as_dtype(value, dtype) for value in sample], whole)


def _autocast(base: _Case) -> _Case:
    """Results under autocast: their types, and their values as far as bfloat16 goes."""

    def run(*args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outs = _tensors(base.run(*args))
        return [out.bfloat16() if out.is_floating_point() else out for out in outs], [out.new_zeros(()) for out in outs]

    return replace(base, run=run, grad=False)


def _case(base: _Case, name: str, sample: list[Any], places: tuple[int, ...]) -> _Case:
    args = [_map(lambda t: _members(t, base.size), value) if k in places else value for k, value in enumerate(sample)]
    dims = tuple(0 if k in places else None for k in range(len(sample)))
    return replace(base, name=f"{name} {dims}".strip(), args=args, dims=dims)


def _compare(case: _Case) -> trace.Record | None:
    """The loop, then the stack; gradients taken from outside, and inside the mapped function.

    Answers how the operations ran forward, or None where both refuse the call.
    """
    lone_args = [case.own(i) for i in range(case.size)]
    ours, seen = case.fresh(case.args), []
    try:
        lone = [_tensors(case.run(*args)) for args in lone_args]
    except Exception as error:
        _must_raise(case, ours, error)
        return None

    def watched(*args: Any) -> Any:
        out = case.run(*args)
        seen.extend((leaf.shape, leaf.stride()) for leaf in _tensors(out))
        return out

    with trace.recording() as record:
        outs = _tensors(_mapped(watched, case)(*ours))
    assert len(outs) == len(lone[0]), f"{case.name}: {len(outs)} results, in the loop {len(lone[0])}"
    for k, out in enumerate(outs):
        assert_equal(out, torch.stack([row[k] for row in lone]), f"{case.name}: result {k}")
    if case.strides:
        _same_strides(case, seen[-len(lone[0]) :], lone[0])
    _same_inputs(case, ours, lone_args)
    if case.grad and any(out.requires_grad for out in lone[0]):
        _compare_gradients(case, outs, ours, lone, lone_args)
        if case.inside:
            _compare_inside(case)
    return record


def _must_raise(case: _Case, ours: list[Any], error: Exception) -> None:
    """What a lone run refuses, the stack refuses."""
    try:
        _mapped(case.run, case)(*ours)
    except type(error):
        return
    raise AssertionError(f"{case.name}: alone it raises {error!r}, stacked it does not")


def _mapped(func: Callable[..., Any], case: _Case, *more: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with nullcontext() if case.composite else composites_disabled():
            return vmap(func, (*more, *case.dims))(*args)

    return call


def _compare_gradients(case: _Case, outs: Any, ours: list[Any], lone: list[Any], lone_args: list[Any]) -> None:
    dims = case.leaf_dims()
    expected: list[list[Any]] = []
    twice = case.twice
    for i, row in enumerate(lone):
        given = [_random((case.size, *out.shape), k, out)[i] for k, out in enumerate(row)]
        try:
            found, twice = _lone_gradients(case, row, _tensors(lone_args[i]), given, twice, lone_args[i])
        except RuntimeError:
            return  # torch's own backward refuses this call
        expected.append(found)
    given = [_random(out.shape, k, out) for k, out in enumerate(outs)]
    leaves = _tensors(ours)
    for order, grads in enumerate(_gradients(outs, leaves, given, twice, dims)):
        for k, mine in enumerate(grads):
            what = f"{case.name}: gradient of order {order + 1} of argument {k}"
            _same_gradient(what, mine, [row[order][k] for row in expected], dims[k])


def _lone_gradients(
    case: _Case, outs: list[torch.Tensor], leaves: list[torch.Tensor], given: Any, twice: bool, args: list[Any]
) -> tuple[list[Any], bool]:
    """A member's gradients, and those of the second order if the operation has them."""
    if twice:
        try:
            return _gradients(outs, leaves, given, True, [None] * len(leaves)), True
        except (RuntimeError, NotImplementedError):
            outs = _tensors(case.run(*args))
    return _gradients(outs, leaves, given, False, [None] * len(leaves)), False


def _gradients(
    outs: list[torch.Tensor], leaves: list[torch.Tensor], given: list[torch.Tensor], twice: bool, dims: list[Any]
) -> list[list[torch.Tensor | None]]:
    """`[gradients]`, or these and the gradients of a fixed combination of them; None where there is none."""
    tracked = [k for k, out in enumerate(outs) if out.requires_grad]
    wanted = [k for k, leaf in enumerate(leaves) if leaf.requires_grad and leaf.is_leaf]
    first = torch.autograd.grad(
        [outs[k] for k in tracked],
        [leaves[k] for k in wanted],
        [given[k] for k in tracked],
        create_graph=twice,
        retain_graph=True,
        allow_unused=True,
    )
    found = [_at(wanted, first, len(leaves))]
    pairs = [(k, grad) for k, grad in zip(wanted, first, strict=True) if grad is not None and grad.requires_grad]
    if twice and pairs:
        parts = [(grad * _random(grad.shape[dims[k] is not None :], 50 + k, grad)).sum() for k, grad in pairs]
        second = torch.autograd.grad(torch.stack(parts).sum(), [leaves[k] for k in wanted], allow_unused=True)
        found.append(_at(wanted, second, len(leaves)))
    return found


def _at(places: list[int], values: Sequence[Any], count: int) -> list[Any]:
    found = dict(zip(places, values, strict=True))
    return [found.get(k) for k in range(count)]


def _same_gradient(what: str, mine: Any, rows: list[Any], dim: int | None) -> None:
    known = [row for row in (mine, *rows) if row is not None]
    if mine is None or all(row is None for row in rows):
        assert not any(row.ne(0).any() for row in known), f"{what} is {mine}, in the loop {rows}"
        return
    like = next(row for row in rows if row is not None)
    whole = torch.stack([torch.zeros_like(like) if row is None else row for row in rows])
    assert_equal(mine.detach(), (whole if dim == 0 else whole.sum(0)).detach(), what)


def _compare_inside(case: _Case) -> None:
    """`torch.autograd.grad` written inside the mapped function, as in a gradient penalty."""

    def gradients(given: list[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        own = case.fresh(list(args))
        pairs = [(out, g) for out, g in zip(_tensors(case.run(*own)), given, strict=True) if out.requires_grad]
        wanted = [leaf for leaf in _tensors(own) if leaf.requires_grad and leaf.is_leaf]
        outs, starts = [out for out, _ in pairs], [g for _, g in pairs]
        return list(torch.autograd.grad(outs, wanted, starts, allow_unused=True, materialize_grads=True))

    shapes = _tensors(case.run(*case.own(0)))
    given = [_random((case.size, *out.shape), k, out) for k, out in enumerate(shapes)]
    found = _mapped(gradients, case, 0)(given, *case.args)
    rows = [gradients([g[i] for g in given], *case.own(i)) for i in range(case.size)]
    for k, mine in enumerate(found):
        assert_equal(mine, torch.stack([row[k] for row in rows]), f"{case.name}: gradient {k} taken inside")


def _same_strides(case: _Case, seen: list[Any], lone: list[torch.Tensor]) -> None:
    """A member sees a result as it lies alone; where a dimension has one entry, its stride says nothing."""
    for k, ((shape, strides), alone) in enumerate(zip(seen, lone, strict=True)):
        mine, theirs = ([s for s, n in zip(own, shape, strict=True) if n > 1] for own in (strides, alone.stride()))
        assert mine == theirs or 0 in shape, f"{case.name}: result {k} has strides {strides}, alone {alone.stride()}"


def _same_inputs(case: _Case, ours: list[Any], lone: list[list[Any]]) -> None:
    """What an operation writes into its arguments."""
    rows = [_tensors(row) for row in lone]
    for k, (mine, dim) in enumerate(zip(_tensors(ours), case.leaf_dims(), strict=True)):
        whole = rows[-1][k] if dim is None else torch.stack([row[k] for row in rows])
        assert_equal(mine.detach(), whole.detach(), f"{case.name}: argument {k} after the call")


def _note(checked: Checked, name: str, op: Any, composite: bool, record: trace.Record) -> None:
    """Whether the rule served: as a composite, or on each of the operation's own entries."""
    entries = record.entries.values()
    if composite:
        own = [entry for entry in entries if entry.op.startswith("composite::")]
        reasons = [] if own else ["the composite rule declined"]
    else:
        name_of_op = getattr(op, "_opoverload", op)._schema.name
        own = [entry for entry in entries if entry.op == name_of_op]
        reasons = [f"{entry.path}: {entry.reason}" for entry in own if entry.path not in ("rule", "shared")]
    reasons += [f"retreat: {entry.reason}" for entry in entries if entry.path == "retreat"]
    if own and not reasons:
        checked.by_rule.append(name)
    else:
        checked.declined[name] = "; ".join(reasons) or "it was not run"


def _map(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map(function, entry) for entry in value)
    return function(value) if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in _tensors(entry)]
    return [value] if isinstance(value, torch.Tensor) else []


def _leaf(value: torch.Tensor, tracked: bool) -> torch.Tensor:
    return value.detach().clone().requires_grad_(tracked and (value.is_floating_point() or value.is_complex()))


def _members(value: torch.Tensor, size: int) -> torch.Tensor:
    """`size` members' values from one: another order and scale each, so that signs and ranges stay; masks turn."""
    rows = [value.flatten().roll(i).view(value.shape) for i in range(size)]
    if value.is_floating_point() or value.is_complex():
        rows = [row * (1 + i / 4) for i, row in enumerate(rows)]
    if value.dtype is torch.bool:
        rows = [row ^ bool(i % 2) for i, row in enumerate(rows)]
    return torch.stack(rows)


def _swapped_in_memory(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim > 1 else value


def _members_innermost(value: torch.Tensor) -> torch.Tensor:
    return value.movedim(0, -1).contiguous().movedim(-1, 0)


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if value is torch.float64:
        return dtype
    turned = 1 + 0.5j if dtype.is_complex else 1
    return _map(lambda t: (t * turned).to(dtype) if t.dtype == torch.float64 else t, value)


def _random(shape: Any, seed: int, like: torch.Tensor) -> torch.Tensor:
    """Fixed normal numbers; a member's are the same whatever else is stacked."""
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * (1 - 0.5j) if like.is_complex() else numbers).to(like)
