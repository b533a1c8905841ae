"""How members run: all at once, or in chunks of a few, one chunk after the other or one on each core.

Whichever is fastest on the user's own step, measured at its first use, on copies of its state, and remembered on disk
(`memberwise.capture.remembered`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import time
from dataclasses import dataclass

import torch
from torch import fx

from memberwise._torch.building import quiet
from memberwise._torch.inductor import How
from memberwise.capture import progress
from memberwise.capture.chunker import Chunker, Prepared, Unfit
from memberwise.capture.chunks import Run
from memberwise.capture.clock import Clock
from memberwise.capture.graphed import graphed
from memberwise.capture.layout import laid_out
from memberwise.capture.outline import LONG
from memberwise.capture.remembered import Candidate, Plan, Remembered

WORTH = 150e-6
"""Seconds that a chunk takes, at least, to be tried: no compiled program is called for less (a step with AdamW of an
MLP, M = 1: 90 to 110 us), and to compile another takes seconds."""

GROWTH = 8
"""How many times as many members each candidate has; the best one's neighbours, of half and twice as many, follow."""

BUDGET = 30.0
"""Seconds of compiling candidates, after which no further one is."""

HOPE = 1.5
"""How much longer than all at once a candidate may take operation by operation, to be compiled all the same: many small
operations gain more by it than few large ones. (MLPs, M = 10 to 1000, beyond it: none was faster compiled.)"""

UNCOMPILED = "operation by operation"
"""The way of a recording that runs as it was recorded."""

CLEARLY = 0.98
"""The part of the best's time that a candidate must take to replace it: less is noise."""

TRIAL = 0.2
"""Seconds for which each candidate is timed."""

GAIN = 0.95
"""Of a long recording: the part of the time of all at once that a candidate must take, both run operation by operation,
to be compiled instead. What chunks gain in caches or by other kernels shows there, too."""

AGAIN = 1.2
"""What the time of chunks counts where members are left over, for their program takes as long to compile again."""


def sizes(members: int, seconds: float, lanes: int = 1) -> list[int]:
    """Members of a chunk, of each candidate, for a step that takes `seconds` for all.

    >>> sizes(100, 0.1), sizes(1000, 0.01), sizes(16, 0.0001)
    ([1, 10], [20, 200], [])
    >>> sizes(100, 0.1, lanes=2), sizes(5, 0.1, lanes=2), sizes(16, 0.0001, lanes=2)
    ([1, 10, 50], [1, 2], [])
    """
    size, found, most = max(1, math.ceil(WORTH * members / seconds)), [], members // max(2, lanes)
    while size <= most:
        found.append(even(members, size, lanes))
        size = found[-1] * GROWTH
    if lanes > 1 and found and 2 * found[-1] <= most:
        found.append(most)
    return found


def even(members: int, size: int, lanes: int = 1) -> int:
    """So many members, or up to twice as many, of which no chunk is left over that would need a program of its own;
    rather such that no core is idle in the last round.

    >>> even(1000, 15), even(1000, 120), even(1000, 120, lanes=2), even(17, 8)
    (20, 125, 125, 8)
    """
    most, least = members // size, max(2, lanes, members // (2 * size))
    counts = [count for count in range(most, least - 1, -1) if not members % count]
    full = [count for count in counts if not count % lanes]
    return members // (full or counts)[0] if counts else size


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
        if not self._can_copy:
            return self.at_once(), "all at once: the state is too large to try chunks on copies of it"
        known = remembered.get()
        if known is not None:
            return self._as_known(known)
        long = len(self.whole.graph.graph.nodes) > LONG
        run, choice, why = self._promised() if long else self._measured()
        plan = Plan(choice, f"{choice}: {why}")
        remembered.put(plan)
        return run, plan.text

    def at_once(self) -> Run:
        """The recording for all members, compiled."""
        graph, last = self._laid_out
        trial = self._copies if self._can_copy else None
        return self.begin(graph, self.values[: self.whole.count], trial, How(channels_last=last))()

    @functools.cached_property
    def _can_copy(self) -> bool:
        """Asked once: the copies themselves take of the room."""
        return self.whole.can_copy(self.values)

    @functools.cached_property
    def _laid_out(self) -> tuple[fx.GraphModule, bool]:
        if not self._can_copy:
            return self.whole.graph, False
        return laid_out(self.whole.graph, self._copies, self.whole.outputs)

    @property
    def _plain(self) -> Run:
        """The recording for all members, operation by operation."""
        return self._laid_out[0].forward

    def _as_known(self, plan: Plan) -> tuple[Run, str]:
        if plan.choice.way == UNCOMPILED:
            return self._plain, f"{plan.text}, as measured before"
        if not plan.choice.size:
            return self.at_once(), f"{plan.text}, as measured before"
        try:
            return self.chunks(*plan.choice), f"{plan.text}, as measured before"
        except Unfit as reason:  # a step of the same operations may be of another kind
            return self.at_once(), f"all at once: {plan.choice}, {reason}"

    def _promised(self) -> tuple[Run, Candidate, str]:
        """Of a long recording: what is fastest operation by operation is compiled, and nothing else."""
        found, told = self._tried(math.inf)  # so many operations take longer than `WORTH` for one member, too
        told = f"{told}, operation by operation"
        counted = [(part * (AGAIN if own.parts[1:] else 1), candidate, own) for part, candidate, own in found]
        for part, candidate, prepared in sorted(counted, key=operator.itemgetter(0)):
            if part < GAIN:
                with contextlib.suppress(Unfit):
                    return self.of(prepared, candidate.lanes), candidate, told
        return self.at_once(), Candidate(), told

    def _measured(self) -> tuple[Run, Candidate, str]:
        """What is fastest, compiled; the candidates in the order of what they promise, or of several steps by size."""
        best, choice = self.at_once(), Candidate()
        (seconds,) = self._seconds(best)
        found, why = self._tried(seconds)
        told: list[str] = []
        hopeful = [(candidate, prepared) for part, candidate, prepared in found if part <= HOPE]
        promising = iter(sorted(hopeful, key=_by_size) if self.steps > 1 else hopeful)
        tried = {(candidate.size, candidate.lanes) for _, candidate, _ in found}
        end = time.monotonic() + BUDGET
        while new := self._beside(choice, tried) or next(promising, None):
            best, choice = self._faster(best, choice, *new, told)
            if time.monotonic() > end:
                break
        return self._or_uncompiled(best, choice, told) or (best, choice, "; ".join(told) or why)

    def _faster(
        self, best: Run, choice: Candidate, candidate: Candidate, prepared: Prepared, told: list[str]
    ) -> tuple[Run, Candidate]:
        """The best so far, or a candidate, compiled."""
        progress.told(f"compiling a step for members {candidate}")
        try:
            chunks = self.of(prepared, candidate.lanes)
        except Unfit as reason:
            told.append(str(reason))
            return best, choice
        now, own = self._seconds(best, chunks)
        told.append(f"{candidate} {own * 1e3:.2f} ms, {choice} {now * 1e3:.2f}")
        return (chunks, candidate) if own < CLEARLY * now else (best, choice)

    def _beside(self, choice: Candidate, tried: set[tuple[int, int]]) -> tuple[Candidate, Prepared] | None:
        """One with half or twice as many members as the best that was not tried yet; it is then."""
        if not choice.size:
            return None
        members, lanes = self.whole.members, choice.lanes
        for near in (choice.size // 2, 2 * choice.size):
            if not 1 <= near <= members // max(2, lanes):
                continue
            size = even(members, near, lanes)
            candidate = choice._replace(size=size)
            if (size, lanes) not in tried:
                tried.add((size, lanes))
                with contextlib.suppress(Unfit):
                    return candidate, self.prepared(size, choice.way)
        return None

    def _or_uncompiled(self, best: Run, choice: Candidate, told: list[str]) -> tuple[Run, Candidate, str] | None:
        """The recording as it is, where that is faster: some kernels of torch's beat what a compiler makes of them."""
        plain = self._plain
        now, own = self._seconds(best, plain)
        if own >= GAIN * now:
            return None
        told = [*told, f"uncompiled {own * 1e3:.2f} ms, {choice} {now * 1e3:.2f}"]
        return plain, Candidate(way=UNCOMPILED), "; ".join(told)

    def _tried(self, seconds: float) -> tuple[list[tuple[float, Candidate, Prepared]], str]:
        """The candidates for a step of so many seconds, the best operation by operation first: the part of the time of
        all at once that each takes so; and that in words."""
        members, seconds = self.whole.members, seconds / self.steps
        candidates = self._candidates(members, seconds)
        if not candidates:
            return [], f"{seconds / members * 1e6:.0f} us a member"
        prepared, why = {}, ""
        for size, way in dict.fromkeys((candidate.size, candidate.way) for candidate in candidates):
            try:
                prepared[size, way] = self.prepared(size, way)
            except Unfit as reason:
                why = why or f"{Candidate(size, way=way)}, {reason}"
                if not way:
                    break
        candidates = [candidate for candidate in candidates if (candidate.size, candidate.way) in prepared]
        if not candidates:
            return [], why
        own = [prepared[candidate.size, candidate.way] for candidate in candidates]
        chunks = [part.uncompiled(candidate.lanes) for part, candidate in zip(own, candidates, strict=True)]
        whole, *each = self._seconds(self._plain, *chunks, rounds=1)
        found = [(taken / whole, *rest) for taken, *rest in zip(each, candidates, own, strict=True)]
        found.sort(key=operator.itemgetter(0))
        return found, "; ".join(f"{candidate} {100 * part:.0f}% of its time" for part, candidate, _ in found)

    def _candidates(self, members: int, seconds: float) -> list[Candidate]:
        cores = 1 if self._on_gpu else torch.get_num_threads()
        found = [Candidate(size) for size in sizes(members, seconds)]
        if cores > 1:
            found += [Candidate(size, cores) for size in sizes(members, seconds * cores, cores)]
        ways = [f"{operation} {way}" for operation, others in self.whole.choices.items() for way in others]
        return found + [candidate._replace(way=way) for way in ways for candidate in found]

    @property
    def _on_gpu(self) -> bool:
        return any(value.device.type == "cuda" for value in self.values)

    def _seconds(self, *runs: Run, rounds: int = 2) -> list[float]:
        """The least time of each run, on copies, taken in turns: a busy machine slows all of them."""
        quiet()
        inputs, fleeting = self._scratch(), self.whole.fleeting
        finish = torch.cuda.synchronize if self._on_gpu else _nothing
        clocks = [Clock(graphed(run, inputs), [inputs] * self.steps, fleeting, finish) for run in runs]
        best, end = [float("inf")] * len(runs), time.perf_counter() + TRIAL * len(runs)
        rounds = max(rounds, 3 if self._on_gpu else 0)  # the second makes a CUDA graph
        with torch.no_grad(), self.whole.memory:
            while time.perf_counter() < end or rounds > 0:
                best = [min(least, clock.seconds()) for least, clock in zip(best, clocks, strict=True)]
                rounds -= 1
        return best


def _by_size(hopeful: tuple[Candidate, Prepared]) -> tuple[int, int]:
    """Small chunks first, for their state can stay in the caches, and most of them on own cores."""
    candidate, _ = hopeful
    return candidate.size, -candidate.lanes


def _nothing() -> None:
    """A CPU has finished when a call returns."""
