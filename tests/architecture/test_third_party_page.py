"""docs/third_party.md follows from its results, and these hold no fault."""

from __future__ import annotations

from survey import records
from survey.third_party import page


def test_the_page_is_written_from_the_results() -> None:
    assert page.PAGE.read_text() == page.text(), "run python -m survey.third_party.page"


def test_each_architecture_is_right_or_refused_by_name() -> None:
    _, found = records.read("third_party")
    assert len({record.name for record in found}) > 80
    assert [
        f"{record.name}, {record.variant}: {record.what}" for record in found if record.verdict == records.WRONG
    ] == []
    assert all(record.code for record in found if record.verdict == records.REFUSED)
