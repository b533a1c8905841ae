"""docs/errors.md and the table of codes say the same."""

from __future__ import annotations

from memberwise.capture.refusals import REASONS
from memberwise.errors import CODES
from tests.architecture.checks import differing_codes, unused_codes
from tests.architecture.sources import ROOT, package


def test_page_and_table_agree() -> None:
    assert differing_codes(CODES, (ROOT / "docs" / "errors.md").read_text()) == []


def test_every_code_is_raised_somewhere() -> None:
    assert unused_codes(CODES, package()) == []


def test_page_has_the_reasons_of_refused_captures() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {meaning} |" for name, meaning in REASONS.items()]
