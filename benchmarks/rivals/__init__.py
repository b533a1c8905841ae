"""The rivals, one file each; `RIVALS` is the table of them all, in the order they are printed."""

from __future__ import annotations

from benchmarks.rival import Rival
from benchmarks.rivals import (
    loop,
    loop_fused,
    memberwise_captured,
    memberwise_eager,
    vmap,
    vmap_compiled,
    vmap_sum_compiled,
)

RIVALS: dict[str, Rival] = {
    module.RIVAL.name: module.RIVAL
    for module in (
        loop,
        loop_fused,
        vmap,
        vmap_compiled,
        vmap_sum_compiled,
        memberwise_eager,
        memberwise_captured,
    )
}
