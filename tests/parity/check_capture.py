"""The captured step, compiled: 50 steps of each kind of model. Minutes of compiling, so it is asked for by name:

pytest tests/parity/check_capture.py
"""

from __future__ import annotations

import pytest

from tests.parity.test_capture import INPUTS, check, training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", INPUTS)
def test_fifty_compiled_steps(kind: str, optimizer: str) -> None:
    check(kind, lambda: training(kind, optimizer), backend="inductor")


@pytest.mark.parametrize("kind", INPUTS)
def test_fifty_compiled_steps_without_seeds(kind: str) -> None:
    check(kind, lambda: training(kind, "adamw", seeded=False), backend="inductor")
