"""Fixtures of the parity suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from memberwise.engine import lowering, parted
from memberwise.rules.registry import composites_disabled


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """What calls are known for goes by the code of their function, and tests with other parameters have the same."""
    parted.of_functions.clear()
    lowering.raised = lowering.Raised()


@pytest.fixture(params=["composites", "rules"])
def composites(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test twice: with composite rules, and by the rules of single operations alone."""
    with composites_disabled() if request.param == "rules" else nullcontext():
        yield
