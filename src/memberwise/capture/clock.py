"""How long a call takes, told by a part of it: to choose how a thousand members run, not all of them need to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Sequence

import torch

from memberwise.capture.chunks import Chunks, Run, several

PIECE = 0.05
"""Seconds that a part of a call must take to stand for it."""


class Clock:
    """Times calls for several steps.

    All members at once, each step takes alike, and one is run. Of chunks that take longer, some are, through all steps:
    each time the next, so that their state comes out of memory as it does in a call.

    Args:
        run: what is called.
        steps: the inputs of each step.
        fleeting: results that matter of the last step only.
        finish: waits for the device.
    """

    def __init__(
        self,
        run: Run,
        steps: Sequence[Sequence[torch.Tensor]],
        fleeting: Container[int],
        finish: Callable[[], object],
    ) -> None:
        self._run = run
        self._steps = steps
        self._fleeting = fleeting
        self._finish = finish
        self._size: int | None = None
        self._begin = 0

    def seconds(self) -> float:
        """Of a call, by what ran just now."""
        if not isinstance(self._run, Chunks):
            return len(self._steps) * self._taken(lambda: several(self._run, self._steps[:1], self._fleeting))
        if self._size is None:
            self._size = self._sized(self._run)
        if not self._size:
            return self._taken(lambda: several(self._run, self._steps, self._fleeting))
        return self._of_some(self._run, self._size)

    def _sized(self, run: Chunks) -> int:
        """How many chunks take long enough; 0 if that is more than half of them."""
        passage = run.passage(self._steps, self._fleeting)
        size = run.lanes * math.ceil(PIECE / self._taken(lambda: passage.run(0, run.lanes)))
        return size if 2 * size <= passage.full else 0

    def _of_some(self, run: Chunks, size: int) -> float:
        """Of a call, by the next so many chunks; members left over, which all cores share, take as long for each."""
        passage = run.passage(self._steps, self._fleeting)
        begin = self._begin + size
        self._begin = begin = begin if begin + size <= passage.full else 0
        rounds = math.ceil(passage.full / run.lanes) + passage.left / run.lanes
        return rounds * run.lanes / size * self._taken(lambda: passage.run(begin, begin + size))

    def _taken(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        self._finish()
        return time.perf_counter() - start
