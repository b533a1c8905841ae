"""docs/coverage.md says what the results of the sweeps say, and nothing runs member by member without a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from survey import coverage_page, records
from survey.justified import BECAUSE, IN_THE_PROGRAM, WHY, unjustified
from survey.records import Record


def test_the_page_is_what_its_command_writes() -> None:
    assert coverage_page.PAGE.read_text() == coverage_page.page(), "run python -m survey.coverage_page"


@pytest.mark.parametrize("name", ["modules", "more_modules"])
def test_nothing_is_wrong_and_what_is_slow_has_its_reason(name: str) -> None:
    _, found = records.read(name)
    assert not [record for record in found if record.verdict == records.WRONG]
    assert unjustified(found) == []


def test_no_operation_is_wrong() -> None:
    _, found = records.read("operations")
    assert not [record for record in found if record.verdict == records.WRONG]


def test_every_reason_is_needed() -> None:
    """A name that no longer runs member by member leaves the table."""
    heads = {name: records.read(name)[0] for name in coverage_page.present()}
    if any(head.get("done") != head.get("of") for head in heads.values()):
        pytest.skip("a sweep has not come to its end: what it has not run yet may need a reason")
    found = [record for name in coverage_page.present() for record in records.read(name)[1]]
    used = {name for record in found for op in record.slow for name in (op, record.name)}
    assert not WHY.keys() - used
    told = [reason for record in found for reason in record.slow.values()]
    assert not [reason for reason in IN_THE_PROGRAM if not any(reason in own for own in told)]
    assert sum(map(len, BECAUSE.values())) == len(WHY), "one sentence a name"


def test_what_nobody_has_justified_is_seen() -> None:
    """The check can fail."""
    slow = Record("nn.Strange", "train", records.RIGHT, slow={"aten::strange": "torch has no batching rule for it"})
    assert unjustified([slow, replace(slow, slow={})]) == [
        "nn.Strange (train): aten::strange (torch has no batching rule for it)"
    ]
