"""A smaller case that fails in the same way: each part of it left out or made plain, as long as that is so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from survey.fuzz.programs import Program

PLAIN = {"calls": 1, "backward": "once", "through": "vmap", "composites": True, "training": False}


Case = TypeVar("Case")


def shrunk(case: Case, fails: Callable[[Case], bool], smaller: Callable[[Case], Iterator[Case]]) -> Case:
    """The smallest case on the way down that still fails."""
    while True:
        less = next((one for one in smaller(case) if fails(one)), None)
        if less is None:
            return case
        case = less


def smaller_program(program: Program) -> Iterator[Program]:
    """Each a little less."""
    steps = program.steps
    for k in range(len(steps)):
        yield program.with_steps(steps[:k] + steps[k + 1 :])
    for name, value in PLAIN.items():
        if getattr(program, name) != value:
            yield replace(program, **{name: value})
    for k, step in enumerate(steps):
        for plainer in (replace(step, under=""), replace(step, first=0), replace(step, second=0)):
            if plainer != step:
                yield program.with_steps((*steps[:k], plainer, *steps[k + 1 :]))
