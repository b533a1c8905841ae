"""The part that runs inside pytest: points torch's names at Memberwise, and writes each test's outcome down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from survey.torch_tests import pointing

OUTCOMES = "MEMBERWISE_TORCH_TESTS_OUTCOMES"
"""Names the file that gets one line a test."""
COUNT = "MEMBERWISE_TORCH_TESTS_COUNT"
"""Names the file that gets the number of tests."""
POINTED = "MEMBERWISE_TORCH_TESTS_POINTED"
"""Set: the names lead to Memberwise. Not set: to torch, for comparison."""


def pytest_configure() -> None:
    """Before any test file is imported."""
    if POINTED in os.environ:
        pointing.point()


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many there are, for the bar."""
    Path(os.environ[COUNT]).write_text(str(len(session.items)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """One line a test: of its call, or of what kept it from one."""
    report = yield
    if report.when == "setup":
        pointing.calls.clear()
    if report.when == "call" or report.outcome == "failed" or (report.when == "setup" and report.skipped):
        _write(item, report, call)
    return report


def _write(item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[Any]) -> None:
    error = "" if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}"
    what = error.partition("\n\nTo execute this test")[0].strip()
    expected = bool(getattr(report, "wasxfail", "")) or (
        call.excinfo is not None and call.excinfo.typename == "XFailed"
    )
    line = {
        "test": f"{Path(str(item.path)).name}::{item.nodeid.partition('::')[2]}",
        "outcome": report.outcome,
        "calls": dict(pointing.calls),
        "what": what or str(report.longrepr or "").strip(),
        "expected": expected,
    }
    with open(os.environ[OUTCOMES], "a") as file:
        file.write(json.dumps(line) + "\n")
