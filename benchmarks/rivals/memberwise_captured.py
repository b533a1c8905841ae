"""Memberwise with the same step captured by `memberwise.compile`."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.rival import Rival, Running
from benchmarks.rivals import memberwise_eager


def start(case: Case, models: list) -> Running:
    import memberwise  # here, so that the other rivals can run without capture

    return memberwise_eager.start(case, models, capture=memberwise.compile)


RIVAL = Rival("memberwise-captured", "memberwise captured", "the same step through memberwise.compile", start)
