"""The first sample of every operation in torch's own table, all arguments stacked, forward and backward.

`make check-operations` runs all samples, in float32 too, with arguments shared by turns.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from survey import coverage_page, operations, records
from survey.op_table import TABLE, name_of
from survey.op_verdict import judged
from survey.operations import trials

PARTS = 4
REFUSED = {"masked_select": "MW203", "sparse.sampled_addmm": "MW203"}
"""The code, where there is one."""


@pytest.mark.parametrize("part", range(PARTS))
def test_first_sample_of_each(part: int) -> None:
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in TABLE[part::PARTS]:
            if torch.float64 not in op.supported_dtypes("cpu"):
                continue
            trial = next((trial for trial in trials(op, torch.float64, "", 1) if trial.follows), None)
            if trial is None:
                continue
            alone = trial.loop()
            found = judged(trial.stack(), alone, trial)
            if found.verdict == "wrong" or found.code != REFUSED.get(name_of(op), ""):
                wrong.append(f"{name_of(op)}: {found.verdict} {found.what}")
    assert not wrong, "\n".join(wrong)


def test_a_stopped_sweep_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(op: Any, *_: Any) -> list[records.Record]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(name_of(op))
        return [records.Record(name_of(op), "float64", records.RIGHT)]

    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(operations, "TABLE", TABLE[:3])
    monkeypatch.setattr(operations, "apart", run)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    with pytest.raises(KeyboardInterrupt):
        operations.main([])
    assert "The first 2 of 3 are recorded" in coverage_page.page()
    monkeypatch.setattr(operations, "apart", lambda op, *_: [records.Record(name_of(op), "float32", records.RIGHT)])
    assert operations.main(["--resume"]) == 0
    head, found = records.read("operations")
    assert head["done"] == 3 and [record.variant for record in found] == ["float64", "float64", "float32"]
    assert "are recorded" not in coverage_page.page()
    monkeypatch.setattr(machine, "commit", lambda: "def")
    operations.main(["--resume"])
    assert {record.variant for record in records.read("operations")[1]} == {"float32"}, "of another commit, all anew"


def test_torch_func_is_asked_for_gradients_too() -> None:
    op = next(op for op in TABLE if name_of(op) == "mul")
    for trial in trials(op, torch.float64, "", 1):
        assert judged(trial.torch_func(), trial.loop(), trial).verdict == records.RIGHT or not trial.follows
