"""How much memory operations take, counted while they run; how much there is; and both in words."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import torch

from memberwise._torch.dispatch import DispatchMode
from memberwise._torch.identity import is_plain, memory_key
from memberwise._torch.pytree import tree_flatten


class Meter(DispatchMode):
    """Counts the memory that operations make, below members, while it lives.

    Attributes:
        most: bytes that lived at one time, of those made under it. What a kernel makes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = _tensors((args, kwargs))
        if not all(map(is_plain, leaves)):
            return NotImplemented
        given = {memory_key(leaf) for leaf in leaves}
        out = func(*args, **(kwargs or {}))
        for made in _tensors(out):
            if is_plain(made) and made.layout is torch.strided and memory_key(made) not in given:
                self._note(made)
        return out

    def _note(self, made: torch.Tensor) -> None:
        storage, key = made.untyped_storage(), memory_key(made)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def shares(few: int, more: int, taken: tuple[int, int]) -> tuple[int, int]:
    """Bytes for each member, and for all together, of what so many members took.

    >>> shares(1, 2, (50, 90))
    (40, 10)
    """
    per_member = max((taken[1] - taken[0]) // (more - few), 1)
    return per_member, max(taken[0] - few * per_member, 0)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if table.exists():  # what the system could free at once counts as free
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_words(count: float) -> str:
    """Bytes.

    >>> in_words(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
