"""Memberwise with the same step captured by `memberwise.compile`."""

from __future__ import annotations

from functools import partial

import memberwise
from benchmarks.rival import Rival
from benchmarks.rivals import memberwise_eager

RIVAL = Rival(
    "memberwise-captured",
    "memberwise captured",
    "the same step through memberwise.compile",
    partial(memberwise_eager.start, capture=memberwise.compile),
    draws_alone=True,
)
