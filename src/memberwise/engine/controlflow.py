"""`torch.cond`, `while_loop`, `scan`, `map`: torch compiles the functions they are given, which it can for one member
alone. So the members part ways, and what watches a member's run steps aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memberwise._torch.controlflow import around_compiling
from memberwise._torch.dispatch import modes, suspended, top_mode
from memberwise.engine.ambient import Region
from memberwise.engine.lone_streams import LoneMode
from memberwise.engine.signals import part_ways


@contextmanager
def _around() -> Iterator[None]:
    region = next((mode for mode in modes() if isinstance(mode, Region)), None)
    if region is not None:
        part_ways(region, "an operator of control flow (torch.cond, scan) compiles its functions, for one member alone")
    mode = top_mode()
    if isinstance(mode, LoneMode):
        with suspended(mode), mode.aside():
            yield
    else:
        yield


around_compiling(_around)
