"""The clock: rounds in which every rival runs one block of steps, so that a busy moment meets all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

FEWEST = 3
"""Rounds of a rival, however long its steps: a ratio of one pair of neighbours has no interval."""

Step = Callable[[int], object]
"""Runs training step number i, or the i-th call of several steps."""


def nothing() -> None:
    """A CPU has done its work when the call returns."""


def finisher(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else nothing


@dataclass(frozen=True)
class Pace:
    """How long to measure: `rounds` blocks of at least `block_s` seconds, but no more once a rival took `budget_s`.

    Before each block of several calls the rival runs as many without the clock: after the others had their turn its
    state is no longer in the cache, nor the processor at its pace, for some twenty milliseconds, and nobody trains so.
    """

    rounds: int = 30
    block_s: float = 0.03
    budget_s: float = 10.0


@dataclass
class Runner:
    """One rival at the start: how many calls a block has and steps a call, and what it has measured."""

    step: Step
    finish: Callable[[], None] = nothing
    together: int = 1
    calls: int = 1
    done: int = 0
    samples: list[float] = field(default_factory=list)

    def block(self) -> float:
        """Seconds a step, over one block."""
        if self.calls > 1:
            self._run()
        return self._run() / self.calls / self.together

    @property
    def spent(self) -> float:
        """Seconds of its samples' blocks. Those before, which tell how many calls a block has, may still compile."""
        return sum(self.samples) * self.calls * self.together

    def _run(self) -> float:
        begin = time.perf_counter()
        for number in range(self.done, self.done + self.calls):
            self.step(number)
        self.finish()
        self.done += self.calls
        return time.perf_counter() - begin


def interleaved(
    steps: dict[str, Step],
    pace: Pace,
    seed: int = 0,
    finish: Callable[[], None] = nothing,
    together: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds a step in each round, by rival. Sample i of one and sample i of another were neighbours.

    The order within a round is drawn anew for each. A rival whose budget is spent runs in no further round:
    it has fewer samples than `pace.rounds`, and at least `FEWEST`. `together` says whose calls are several steps.
    """
    order = random.Random(seed)
    runners = {name: Runner(step, finish, (together or {}).get(name, 1)) for name, step in steps.items()}
    for runner in runners.values():
        runner.calls = _calls_of_a_block(runner, pace)
    for number in range(pace.rounds):
        names = [name for name, runner in runners.items() if number < FEWEST or runner.spent < pace.budget_s]
        for name in order.sample(names, len(names)):
            runners[name].samples.append(runners[name].block())
    return {name: runner.samples for name, runner in runners.items()}


def _calls_of_a_block(runner: Runner, pace: Pace) -> int:
    """As many as fill `block_s`, by a first block of three (or one, if one is long)."""
    first = runner.block()
    if first * runner.together < pace.block_s:
        runner.calls = 3
        first = min(first, runner.block())
    return max(1, round(pace.block_s / first / runner.together))
