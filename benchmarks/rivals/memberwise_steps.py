"""Memberwise with the same step captured, and the data of eight steps handed over in one call."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

import memberwise
from benchmarks import feed
from benchmarks.case import Case
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import memberwise_eager

STEPS = 8


def start(case: Case, models: list[nn.Module]) -> Running:
    if not (case.ahead and case.trains):
        raise Cannot("a step is long, or no training: it has one call")
    capture = partial(memberwise.compile, steps_per_call=STEPS)
    running = memberwise_eager.start(case, models, capture)
    return replace(running, together=STEPS, feed=lambda data: feed.together(feed.in_torch(data), STEPS))


RIVAL = Rival(
    "memberwise-steps",
    f"memberwise captured, {STEPS} steps a call",
    "the same step through memberwise.compile with steps_per_call",
    start,
    draws_alone=True,
)
