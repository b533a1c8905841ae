"""Random programs: what a lone run can do, all members do at once, with its numbers, gradients, state and draws.

`make check-fuzz` runs many more of them.
"""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from survey.fuzz.compare import WRONG, compared
from survey.fuzz.programs import Program, Step, drawn


@settings(max_examples=200, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_any_program(random: Random) -> None:
    verdict = compared(drawn(random))
    assert verdict.kind != WRONG, f"{verdict.what}: {verdict.program}"


def test_a_program_survives_json() -> None:
    program = Program((Step("sin", 0, 1), Step("Linear", 2, 0, "checkpoint")), "stack", calls=2, backward="double")
    assert Program.from_json(program.to_json()) == program


def test_a_wrong_stack_is_found() -> None:
    """A member's value that reached its neighbour would be seen."""
    from survey.fuzz import compare

    program = Program((Step("mul", 0, 0), Step("Linear", 0, 0)), "stack")
    with compare._quiet(program):
        found = compare.runnable(program)
        assert found is not None
        whole = compare.together(program)
        assert compare.difference(found[0], found[1], whole) is None
        grad = whole.grads["gradient of layers.Linear.weight"]
        assert grad is not None
        grad[1] += 1e-6
        assert "layers.Linear.weight of member 1" in str(compare.difference(found[0], found[1], whole))
