"""A smaller program that fails in the same way: each part of it left out or made plain, as long as that is so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from survey.fuzz.programs import Program

PLAIN = {"calls": 1, "backward": "once", "through": "vmap", "composites": True, "training": False}


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program on the way down that still fails."""
    while True:
        smaller = next((one for one in _smaller(program) if fails(one)), None)
        if smaller is None:
            return program
        program = smaller


def _smaller(program: Program) -> Iterator[Program]:
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
