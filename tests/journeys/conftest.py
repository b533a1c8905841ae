"""What journeys run under, beside what every test does."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def collected_tests_stay_out_of_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured row lets go of all that was frozen: the thousands of tests that were collected too, at each of its
    collections a third of a second."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
