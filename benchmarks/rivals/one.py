"""One model alone, the first member, in eager PyTorch: what a step of all members is compared with."""

from __future__ import annotations

from torch import nn

from benchmarks.case import Case
from benchmarks.rival import Rival, Running
from benchmarks.rivals import loop


def start(case: Case, models: list[nn.Module]) -> Running:
    return loop.start(case, models[:1], **({"fused": True} if case.trains else {}))


RIVAL = Rival("one", "one model", "one model alone, torch's fused optimizer", start, alone=True)
