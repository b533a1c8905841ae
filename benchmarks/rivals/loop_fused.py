"""The same loop with `Adam(fused=True)`, the fastest form of torch's own optimizer."""

from __future__ import annotations

from functools import partial

from benchmarks.rival import Rival
from benchmarks.rivals import loop

RIVAL = Rival("loop-fused", "loop", "the same loop with torch.optim.Adam(fused=True)", partial(loop.start, fused=True))
