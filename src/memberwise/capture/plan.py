"""How many members run at once: all, or a few at a time, whichever is faster on the user's own step.

Measured at a step's first use, on copies of its state, and remembered on disk (`memberwise.capture.remembered`).
"""

from __future__ import annotations

import math
import time

import torch

from memberwise.capture import progress
from memberwise.capture.chunks import Chunker, Run, Unfit, Unpromising, several
from memberwise.capture.outline import LONG
from memberwise.capture.remembered import Plan, Remembered

WORTH = 150e-6
"""Seconds that a chunk takes, at least, to be tried: no compiled program is called for less (a step with AdamW of an
MLP, M = 1: 90 to 110 us), and to compile another takes seconds."""

GROWTH = 8
"""How many times as many members each candidate has."""

BUDGET = 20.0
"""Seconds after which no further candidate is compiled."""

TRIAL = 0.2
"""Seconds for which each candidate is timed."""

GAIN = 0.95
"""Of a long recording: the part of the time of all at once that a candidate must take, both run operation by operation,
to be compiled. What chunks gain in caches or by other kernels shows there, too."""


def sizes(members: int, seconds: float) -> list[int]:
    """Members of a chunk, of each candidate, for a step that takes `seconds` for all.

    >>> sizes(100, 0.1), sizes(1000, 0.01), sizes(16, 0.0001)
    ([1, 8], [15, 120], [])
    """
    size, found = max(1, math.ceil(WORTH * members / seconds)), []
    while 2 * size <= members:
        found.append(size)
        size *= GROWTH
    return found


class Planner(Chunker):
    """Chooses how one recording runs.

    Attributes:
        steps: how many steps a call has: each candidate is timed on so many.
    """

    steps = 1

    def plan(self, remembered: Remembered) -> tuple[Run, str]:
        """All members at once, or so many at a time; and why."""
        whole, members = self._run(), self.whole.members
        if members < 2:
            return whole, "all at once: fewer than two members are known of"
        if not self.whole.can_copy(self.values):
            return whole, "all at once: the state is too large to try chunks on copies"
        known = remembered.get()
        if known is not None:
            return self._as_known(known)
        run, plan = self._measured(members)
        remembered.put(plan)
        return run, plan.text

    def _as_known(self, plan: Plan) -> tuple[Run, str]:
        if not plan.size:
            return self._run(), f"{plan.text}, as measured before"
        try:
            return self.chunks(plan.size), f"{plan.text}, as measured before"
        except Unfit as reason:  # a step of the same operations may be of another kind
            return self._run(), f"all at once: {_told(plan.size)}, {reason}"

    def _measured(self, members: int) -> tuple[Run, Plan]:
        best, size, end = self._run(), 0, time.monotonic() + BUDGET
        (seconds,) = self._seconds(best)
        candidates = sizes(members, seconds / self.steps)
        if not candidates:
            return best, Plan(0, f"all at once: {seconds / self.steps / members * 1e6:.0f} us a member")
        told = []
        promising = self._is_promising if len(self.whole.graph.graph.nodes) > LONG else None
        for candidate in candidates:
            progress.told(f"compiling a step for members {_told(candidate)}")
            try:
                chunks = self.chunks(candidate, promising)
            except Unpromising:
                told.append(f"{_told(candidate)} not compiled, as it promises less than it takes")
                continue
            except Unfit as reason:
                if not told:
                    return best, Plan(0, f"all at once: {_told(candidate)}, {reason}")
                break
            now, own = self._seconds(best, chunks)
            told.append(f"{_told(candidate)} {own * 1e3:.2f} ms, {_told(size)} {now * 1e3:.2f}")
            if own < now:
                best, size = chunks, candidate
            if time.monotonic() > end:
                break
        return best, Plan(size, f"{_told(size)}: {'; '.join(told)}")

    def _is_promising(self, chunks: Run) -> bool:
        whole, own = self._seconds(self.whole.graph.forward, chunks)
        return own < GAIN * whole

    def _seconds(self, *runs: Run) -> list[float]:
        """The least time of each run, on copies, taken in turns: a busy machine slows all of them."""
        inputs = [self._copies() for _ in runs]
        best, end = [float("inf")] * len(runs), time.perf_counter() + TRIAL * len(runs)
        with torch.no_grad():
            for run, own in zip(runs, inputs, strict=True):
                several(run, [own])
            while time.perf_counter() < end or best[-1] == float("inf"):
                for k, (run, own) in enumerate(zip(runs, inputs, strict=True)):
                    start = time.perf_counter()
                    several(run, [own] * self.steps)
                    best[k] = min(best[k], time.perf_counter() - start)
        return best


def _told(size: int) -> str:
    return "all at once" if not size else "one at a time" if size == 1 else f"{size} at a time"
