"""Fixtures of the parity suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from memberwise.rules.registry import composites_disabled


@pytest.fixture(params=["composites", "rules"])
def composites(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test twice: with composite rules, and by the rules of single operations alone."""
    with composites_disabled() if request.param == "rules" else nullcontext():
        yield
