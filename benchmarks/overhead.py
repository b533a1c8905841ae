"""Microseconds an operation costs in Python: on a plain tensor, inside torch.vmap, inside memberwise.vmap.

    python -m benchmarks.overhead                print, and write results/overhead.json
    python -m benchmarks.overhead --out other.json

The tensors are so small (8 x 8, four members) that arithmetic does not show. A chain of one operation runs
inside one region; what the region costs when it is empty is measured beside it, taken off, and given in a
table of its own. Before it is timed, each chain's values and gradients are compared with the plain ones.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import memberwise
from benchmarks import intervals, machine, run, schema, summary, timing
from memberwise.testing.tolerance import assert_equal

MEMBERS, SIDE = 4, 8
LENGTH = 50
"""Operations in a chain."""

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of x (8, 8), a weight (8, 8) and a bias (8): one step of a chain, of the shape of x."""

OPERATIONS: dict[str, Operation] = {
    "relu": lambda x, weight, bias: torch.relu(x),
    "add": lambda x, weight, bias: x + bias,
    "view": lambda x, weight, bias: x.view(SIDE, SIDE),
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, (SIDE,), bias, bias),
}

RIVALS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "torch": lambda function: function,
    "torch.vmap": torch.vmap,
    "memberwise.vmap": memberwise.vmap,
}
"""How a function of one member's tensors is run. Plain torch runs it for one member, as it is."""


def chain(operation: Operation, length: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    for _ in range(length):
        x = operation(x, weight, bias)
    return x


@dataclass(frozen=True)
class Way:
    """With or without gradients: whether inputs require them, and whether backward runs too."""

    requires_grad: bool
    backward: bool = False


WAYS = {
    "no grad": Way(requires_grad=False),
    "forward": Way(requires_grad=True),
    "forward and backward": Way(requires_grad=True, backward=True),
}


def inputs(rival: str, way: Way) -> list[Tensor]:
    """x, weight and bias, with a leading member axis except for plain torch, which gets member 0's."""
    generator = torch.Generator().manual_seed(0)
    stacked = [
        torch.randn(MEMBERS, SIDE, SIDE, generator=generator),
        torch.randn(MEMBERS, SIDE, SIDE, generator=generator) / SIDE,
        torch.randn(MEMBERS, SIDE, generator=generator),
    ]
    mine = [tensor[0].clone() for tensor in stacked] if rival == "torch" else stacked
    return [tensor.requires_grad_(way.requires_grad) for tensor in mine]


def call(rival: str, operation: Operation, length: int, way: Way) -> Callable[[], list[Tensor]]:
    """A whole region with a chain in it; it returns the result and, after a backward, x's gradient."""
    function = RIVALS[rival](partial(chain, operation, length))
    tensors = inputs(rival, way)

    def once() -> list[Tensor]:
        out = function(*tensors)
        return [out, *torch.autograd.grad(out.sum(), tensors[:1])] if way.backward else [out]

    return once


def check(operation: Operation, way: Way) -> None:
    """Member 0 of every rival's chain of three equals plain torch's; AssertionError if not."""
    alone = call("torch", operation, 3, way)()
    for rival in RIVALS:
        if rival != "torch":
            for stacked, expected in zip(call(rival, operation, 3, way)(), alone, strict=True):
                assert_equal(stacked[0], expected, rival)


def costs(name: str, way_name: str, pace: timing.Pace) -> list[dict[str, Any]]:
    """Of one operation, for each rival: what a chain costs more than an empty region, per operation."""
    operation, way = OPERATIONS[name], WAYS[way_name]
    check(operation, way)
    calls = {(rival, length): call(rival, operation, length, way) for rival in RIVALS for length in (0, LENGTH)}
    samples = timing.interleaved({key: lambda number, once=once: once() for key, once in calls.items()}, pace)
    return [
        {"operation": name, "way": way_name, "rival": rival, "members": 1 if rival == "torch" else MEMBERS}
        | {"us": microseconds([a - b for a, b in zip(samples[rival, LENGTH], samples[rival, 0], strict=False)], LENGTH)}
        for rival in RIVALS
    ]


def empty(pace: timing.Pace) -> list[dict[str, Any]]:
    """What a region with nothing in it costs: three tensors in, one of them out."""
    calls = {rival: call(rival, OPERATIONS["relu"], 0, WAYS["no grad"]) for rival in RIVALS if rival != "torch"}
    samples = timing.interleaved({rival: lambda number, once=once: once() for rival, once in calls.items()}, pace)
    return [{"rival": rival, "members": MEMBERS, "us": microseconds(each, 1)} for rival, each in samples.items()]


def microseconds(seconds: list[float], operations: int) -> dict[str, float]:
    return schema.rounded(intervals.of_median([1e6 * each / operations for each in seconds]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--block", type=float, default=0.01, help="seconds of a chain in a round")
    parser.add_argument("--out", type=Path, default=run.RESULTS / "overhead.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    before, pace = machine.machine(), timing.Pace(options.rounds, options.block, budget_s=60)
    document = {
        "schema": schema.VERSION,
        "kind": "overhead",
        "date": datetime.date.today().isoformat(),
        "machine": before,
        "versions": machine.versions(),
        "threads": 1,
        "operations": [cost for name in OPERATIONS for way in WAYS for cost in costs(name, way, pace)],
        "empty": empty(pace),
    }
    console = Console()
    run.print_cells(summary.overhead(document), console)
    console.print(summary.origin(document), highlight=False, soft_wrap=True)
    run.write(document, options.out)
    console.print(f"written: {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
