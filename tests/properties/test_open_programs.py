"""What random programs have found and what stays open, each at its smallest; `docs/design.md` says what stands in the
way. One that comes right fails here, and moves to `tests/parity/test_found_by_programs.py`."""

from __future__ import annotations

from typing import Any

import pytest

from survey.fuzz.compare import RIGHT, compared
from survey.fuzz.programs import Program, Step

pytestmark = pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")


def _program(*steps: tuple[Any, ...], backward: str, through: str = "vmap", calls: int = 1) -> Program:
    return Program(
        steps=tuple(Step(name, first, second, under) for name, first, second, under in steps),
        through=through, training=False, calls=calls, backward=backward, dtype="float64", composites=True,
    )  # fmt: skip


OPEN = {
    "a recomputation changes an attribute, between two calls": (
        _program(
            ("index by member", 0, 7, ""),
            ("Counting", 0, 0, "reentrant checkpoint"),
            backward="each",
            through="functional_call",
            calls=2,
        ),
        "members that run one by one in functional_call: the second call does not find what it left (808: 7168)",
    ),
    "a gradient of a smallest number that is not finite": (
        _program(("min of all", 0, 0, ""), ("norm of zeros", 6, 0, ""), backward="double"),
        "torch's formula multiplies by a mask, for a subclass, where it fills one in alone (71028)",
    ),
}


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, id=name, marks=pytest.mark.xfail(strict=True, reason=why))
        for name, (program, why) in OPEN.items()
    ],
)
def test_open(program: Program) -> None:
    verdict = compared(program)
    assert verdict.kind == RIGHT, verdict.what
