"""How members run: all at once, or in chunks of a few, one chunk after the other or one on each core.

Whichever is fastest on the user's own step, measured at its first use, on copies of its state, and remembered on disk
(`memberwise.capture.remembered`).
"""

from __future__ import annotations

import contextlib
import math
import operator
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from memberwise.capture import progress
from memberwise.capture.chunker import Chunker, Prepared, Unfit
from memberwise.capture.chunks import Run, several
from memberwise.capture.graphed import graphed
from memberwise.capture.outline import LONG
from memberwise.capture.remembered import Plan, Remembered

WORTH = 150e-6
"""Seconds that a chunk takes, at least, to be tried: no compiled program is called for less (a step with AdamW of an
MLP, M = 1: 90 to 110 us), and to compile another takes seconds."""

GROWTH = 8
"""How many times as many members each candidate has."""

BUDGET = 20.0
"""Seconds after which no further candidate is compiled."""

HOPE = 1.5
"""How much longer than all at once a candidate may take operation by operation, to be compiled all the same: many small
operations gain more by it than few large ones. (MLPs, M = 10 to 1000, beyond it: none was faster compiled.)"""

TRIAL = 0.2
"""Seconds for which each candidate is timed."""

GAIN = 0.95
"""Of a long recording: the part of the time of all at once that a candidate must take, both run operation by operation,
to be compiled instead. What chunks gain in caches or by other kernels shows there, too."""


class Candidate(NamedTuple):
    """Members of a chunk (0: all), and how many chunks run at a time."""

    size: int = 0
    lanes: int = 1

    def __str__(self) -> str:
        text = "all at once" if not self.size else "one at a time" if self.size == 1 else f"{self.size} at a time"
        return text if self.lanes == 1 else f"{text} on each of {self.lanes} cores"


def sizes(members: int, seconds: float, lanes: int = 1) -> list[int]:
    """Members of a chunk, of each candidate, for a step that takes `seconds` for all.

    >>> sizes(100, 0.1), sizes(1000, 0.01), sizes(16, 0.0001)
    ([1, 8], [15, 120], [])
    >>> sizes(100, 0.1, lanes=2), sizes(5, 0.1, lanes=2), sizes(16, 0.0001, lanes=2)
    ([1, 8, 50], [1, 2], [])
    """
    size, found, most = max(1, math.ceil(WORTH * members / seconds)), [], members // max(2, lanes)
    while size <= most:
        found.append(size)
        size *= GROWTH
    if lanes > 1 and found and 2 * found[-1] <= most:
        found.append(most)
    return found


@dataclass(eq=False)
class Planner(Chunker):
    """Chooses how one recording runs, and compiles it so.

    Args:
        steps: how many steps a call has: each candidate is timed on so many.
    """

    steps: int = 1

    def plan(self, remembered: Remembered) -> tuple[Run, str]:
        """All members at once, or so many at a time; and why."""
        if self.whole.members < 2:
            return self.at_once(), "all at once: fewer than two members are known of"
        if not self.whole.can_copy(self.values):
            return self.at_once(), "all at once: the state is too large to try chunks on copies"
        known = remembered.get()
        if known is not None:
            return self._as_known(known)
        long = len(self.whole.graph.graph.nodes) > LONG
        run, choice, why = self._promised() if long else self._measured()
        plan = Plan(*choice, f"{choice}: {why}")
        remembered.put(plan)
        return run, plan.text

    def at_once(self) -> Run:
        """The recording for all members, compiled."""
        trial = self._copies if self.whole.can_copy(self.values) else None
        return self.compiled(self.whole.graph, self.values[: self.whole.count], trial)

    def _as_known(self, plan: Plan) -> tuple[Run, str]:
        if not plan.size:
            return self.at_once(), f"{plan.text}, as measured before"
        try:
            return self.chunks(plan.size, plan.lanes), f"{plan.text}, as measured before"
        except Unfit as reason:  # a step of the same operations may be of another kind
            return self.at_once(), f"all at once: {Candidate(plan.size, plan.lanes)}, {reason}"

    def _promised(self) -> tuple[Run, Candidate, str]:
        """Of a long recording: what is fastest operation by operation is compiled, and nothing else."""
        (seconds,) = self._seconds(self.whole.graph.forward)
        found, told = self._tried(seconds)
        for taken, candidate, prepared in found:
            if taken < GAIN:
                with contextlib.suppress(Unfit):
                    return self.of(prepared, candidate.lanes), candidate, f"{told}, operation by operation"
        return self.at_once(), Candidate(), f"{told}, operation by operation"

    def _measured(self) -> tuple[Run, Candidate, str]:
        """What is fastest, compiled; the candidates in the order of what they promise."""
        best, choice, end = self.at_once(), Candidate(), time.monotonic() + BUDGET
        (seconds,) = self._seconds(best)
        found, why = self._tried(seconds)
        told = []
        for part, candidate, prepared in found:
            if part > HOPE:
                break
            progress.told(f"compiling a step for members {candidate}")
            try:
                chunks = self.of(prepared, candidate.lanes)
            except Unfit as reason:
                told.append(str(reason))
                continue
            now, own = self._seconds(best, chunks)
            told.append(f"{candidate} {own * 1e3:.2f} ms, {choice} {now * 1e3:.2f}")
            if own < now:
                best, choice = chunks, candidate
            if time.monotonic() > end:
                break
        return best, choice, "; ".join(told) or why

    def _tried(self, seconds: float) -> tuple[list[tuple[float, Candidate, Prepared]], str]:
        """The candidates for a step of so many seconds, the best operation by operation first: the part of the time of
        all at once that each takes so; and that in words."""
        members, seconds = self.whole.members, seconds / self.steps
        candidates = self._candidates(members, seconds)
        if not candidates:
            return [], f"{seconds / members * 1e6:.0f} us a member"
        found, prepared = [], {}
        try:
            for size in dict.fromkeys(candidate.size for candidate in candidates):
                prepared[size] = self.prepared(size)
        except Unfit as reason:
            if not prepared:
                return [], f"{candidates[0]}, {reason}"
        for candidate in candidates:
            if candidate.size in prepared:
                chunks = prepared[candidate.size].uncompiled(candidate.lanes)
                whole, own = self._seconds(self.whole.graph.forward, chunks)
                found.append((own / whole, candidate, prepared[candidate.size]))
        found.sort(key=operator.itemgetter(0))
        return found, "; ".join(f"{candidate} {100 * part:.0f}% of its time" for part, candidate, _ in found)

    def _candidates(self, members: int, seconds: float) -> list[Candidate]:
        cores = 1 if self._on_gpu else torch.get_num_threads()
        found = [Candidate(size) for size in sizes(members, seconds)]
        if cores > 1:
            found += [Candidate(size, cores) for size in sizes(members, seconds * cores, cores)]
        return found

    @property
    def _on_gpu(self) -> bool:
        return any(value.device.type == "cuda" for value in self.values)

    def _seconds(self, *runs: Run) -> list[float]:
        """The least time of each run, on copies, taken in turns: a busy machine slows all of them."""
        inputs = [self._copies() for _ in runs]
        runs = tuple(graphed(run, own) for run, own in zip(runs, inputs, strict=True))
        finish = torch.cuda.synchronize if self._on_gpu else _nothing
        best, end = [float("inf")] * len(runs), time.perf_counter() + TRIAL * len(runs)
        with torch.no_grad():
            for run, own in zip(runs, inputs, strict=True):
                for _ in range(2 if self._on_gpu else 1):  # the second makes a CUDA graph
                    several(run, [own])
            while time.perf_counter() < end or best[-1] == float("inf"):
                for k, (run, own) in enumerate(zip(runs, inputs, strict=True)):
                    start = time.perf_counter()
                    several(run, [own] * self.steps)
                    finish()
                    best[k] = min(best[k], time.perf_counter() - start)
        return best


def _nothing() -> None:
    """A CPU has finished when a call returns."""
