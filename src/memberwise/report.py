"""explain(): how each operation of a call ran for all members, why so, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memberwise.engine import trace
from memberwise.generators import global_generators, restoring
from memberwise.grouped import Group
from memberwise.module import Stack
from memberwise.tables import render
from memberwise.trees import tree_leaves, tree_map

SLOW = ("loop", "retreat")
"""The paths that take a step a member."""


@dataclass(frozen=True)
class Row:
    """One operation by one path.

    Attributes:
        op: the ATen operation, a composite rule, or the module or function that ran member by member.
        phase: "forward" or "backward".
        path: "rule", "vmap" (torch's batching of this operation), "loop" (this operation member by member),
            "retreat" (a module or the function member by member), "undone" (a stacked run of it that came to where
            members part ways: the next calls do not try), "agreement" (a value that the host read), or
            "shared" (no member's value took part: it ran once).
        reason: why by no faster path; "" where there is nothing to say.
        count: how often.
        seconds, share: the time it took, and as a share of all recorded operations.
    """

    op: str
    phase: str
    path: str
    reason: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
        rows: one for each operation and path, the costliest first.
        seconds: of the whole run, forward and backward; what no row accounts for is Python and autograd.
        plans: of a compiled step, for each of its programs, how its members run, and what was measured to choose so;
            or why it is not replayed.
    """

    rows: list[Row]
    seconds: float
    plans: tuple[str, ...] = ()

    @property
    def slow(self) -> list[Row]:
        """The rows that ran member by member."""
        return [row for row in self.rows if row.path in SLOW]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        recorded = sum(row.seconds for row in self.rows)
        title = f"{1e3 * self.seconds:.2f} ms, of which {1e3 * recorded:.2f} ms in {len(self.rows)} kinds of operation"
        columns = ["operation", "phase", "path", ">count", ">ms", ">share", "reason"]
        cells = (
            [row.op, row.phase, row.path, str(row.count), f"{1e3 * row.seconds:.3f}", f"{row.share:.1%}", row.reason]
            for row in self.rows
        )
        return "\n".join([render(title, columns, cells), *(f"plan: {plan}" for plan in self.plans)])

    __repr__ = __str__


def explain(stack_or_fn: Stack | Group | Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Run a stack, or a function, and tell how each operation ran for all members, forward and backward.

    Of a stack a copy runs, twice (the first time to warm up): it stays as it is, and so do its streams and
    gradients, and the global streams. A function is called once, with all that it does. Backward runs from the
    tensors of the result that require gradients, into nothing: no `.grad` changes.

    Shapes: inputs as in `stack(*inputs)`, or as the function takes them.

    Args:
        stack_or_fn: a `Stack`, a `Group`, or a function that runs members: `vmap(loss_fn, (0, None, None))`, a training
            step. Of one made by `memberwise.compile`, which runs no operations one by one once it is replayed, its
            plans are told.
        inputs, kwargs: what it is called with.

    >>> import memberwise
    >>> stack = memberwise.build(lambda: torch.nn.Linear(3, 2), seeds=range(4))
    >>> {row.path for row in explain(stack, torch.ones(5, 3)).rows}
    {'rule'}
    """
    if not isinstance(stack_or_fn, Stack | Group):
        return _observed(stack_or_fn, inputs, kwargs)
    with restoring(global_generators()):
        copy = stack_or_fn.select(range(len(stack_or_fn)))
        own = tree_map(_own, (inputs, kwargs))
        _observed(copy, *own)
        return _observed(copy, *own)


def _own(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _observed(func: Callable[..., Any], args: Any, kwargs: Any) -> Explanation:
    start = trace.clock()
    with trace.recording() as forward:
        out = func(*args, **kwargs)
    with trace.recording() as backward:
        _backward(out)
    seconds = trace.clock() - start
    phases = [("forward", forward), ("backward", backward)]
    found = [(phase, entry) for phase, record in phases for entry in record.entries.values()]
    total = sum(entry.seconds for _, entry in found) or 1.0
    rows = [
        Row(entry.op, phase, entry.path, entry.reason, entry.count, entry.seconds, entry.seconds / total)
        for phase, entry in found
    ]
    return Explanation(sorted(rows, key=lambda row: -row.seconds), seconds, _plans(func))


def _plans(func: Any) -> tuple[str, ...]:
    """What a compiled step has come to know of itself."""
    captured = getattr(func, "captured", None)
    if captured is None:
        return ()
    said = "a recording was refused" if captured.replayed else "not replayed"
    return *captured.plans, *(f"{said}: {refusal.sentence()}" for refusal in captured.refusals)


def _backward(out: Any) -> None:
    """Backward from every tensor in `out`, to every leaf it depends on, whose `.grad` stay as they are."""
    roots = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]
    wanted = [*_leaves(root.grad_fn for root in roots)]
    if wanted:
        torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)


def _leaves(nodes: Iterator[Any]) -> Iterator[torch.Tensor]:
    """The leaves of a graph, once each."""
    waiting, seen = [*nodes], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(below for below, _ in node.next_functions)
