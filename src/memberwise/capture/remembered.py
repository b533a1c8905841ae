"""Plans, remembered on disk: what was measured once for a step on this machine is not measured again.

One small file a step, named by what the plan depends on: the recorded operations and their shapes, versions, the
processor, the number of threads. They lie beside what the compiler keeps, in `$TORCHINDUCTOR_CACHE_DIR`; a file that
cannot be read or written is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memberwise._torch.folder import get, kept_at, put


class Plan(NamedTuple):
    """How many members a chunk has (0: all), how many chunks run at a time, and why."""

    size: int
    lanes: int
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
        return get(self._path, lambda known: Plan(int(known["size"]), int(known["lanes"]), str(known["text"])))

    def put(self, plan: Plan) -> None:
        """Keep it; another process sees the whole file, or none."""
        put(self._path, plan._asdict())
