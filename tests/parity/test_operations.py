"""The first sample of every operation in torch's own table, all arguments stacked, forward and backward.

`make check-operations` runs all samples, in float32 too, with arguments shared by turns.
"""

from __future__ import annotations

import warnings

import pytest
import torch

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
