"""The same loop with the optimizer's `fused=True`, the fastest form of torch's own."""

from __future__ import annotations

from torch import nn

from benchmarks.case import Case
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import loop


def start(case: Case, models: list[nn.Module]) -> Running:
    if not case.trains:
        raise Cannot("a prediction has no optimizer: it is the loop")
    return loop.start(case, models, fused=True)


RIVAL = Rival("loop-fused", "loop", "the same loop with the fused form of torch's optimizer", start)
