"""Plans: how a step may run; remembered on disk: what was measured once on this machine is not measured again.

One small file a step, named by what the plan depends on: the recorded operations and their shapes, versions, the
processor, the number of threads. They lie beside what the compiler keeps, in `$TORCHINDUCTOR_CACHE_DIR`; a file that
cannot be read or written is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memberwise._torch.folder import get, kept_at, put


class Candidate(NamedTuple):
    """Members of a chunk (0: all), how many chunks run at a time, and what does not run as usual: "lstm by calls"."""

    size: int = 0
    lanes: int = 1
    way: str = ""

    def __str__(self) -> str:
        text = "all at once" if not self.size else "one at a time" if self.size == 1 else f"{self.size} at a time"
        text = text if self.lanes == 1 else f"{text} on each of {self.lanes} cores"
        return f"{text}, {self.way}" if self.way else text


class Plan(NamedTuple):
    """How a step runs, and why."""

    choice: Candidate
    text: str


class Remembered:
    """The plan of one step.

    Args:
        structure: equal for steps that compute the same from inputs of the same kind.
    """

    def __init__(self, structure: Any) -> None:
        self._path = kept_at((structure, torch.get_num_threads())).with_suffix(".json")

    def get(self) -> Plan | None:
        """What was put here, by this process or another."""
        return get(self._path, _plan)

    def put(self, plan: Plan) -> None:
        """Keep it; another process sees the whole file, or none."""
        put(self._path, {**plan.choice._asdict(), "text": plan.text})


def _plan(known: Any) -> Plan:
    return Plan(Candidate(int(known["size"]), int(known["lanes"]), str(known["way"])), str(known["text"]))
