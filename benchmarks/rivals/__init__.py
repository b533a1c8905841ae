"""The rivals, one file each; `RIVALS` is the table of them all, in the order they are printed."""

from __future__ import annotations

from benchmarks.rival import Rival
from benchmarks.rivals import (
    folded_compiled,
    jax_vmap,
    loop,
    loop_compiled,
    loop_fused,
    loop_graph,
    memberwise_captured,
    memberwise_eager,
    memberwise_steps,
    one,
    tensordict_vmap,
    vmap,
    vmap_backward_compiled,
    vmap_compiled,
    vmap_grad,
    vmap_sum_compiled,
)

RIVALS: dict[str, Rival] = {
    module.RIVAL.name: module.RIVAL
    for module in (
        one,
        loop,
        loop_fused,
        loop_compiled,
        loop_graph,
        vmap,
        vmap_grad,
        vmap_compiled,
        vmap_sum_compiled,
        vmap_backward_compiled,
        tensordict_vmap,
        folded_compiled,
        jax_vmap,
        memberwise_eager,
        memberwise_captured,
        memberwise_steps,
    )
}

FIRST = tuple(
    module.RIVAL.name
    for module in (loop, loop_fused, vmap, vmap_compiled, vmap_sum_compiled, memberwise_eager, memberwise_captured)
)
"""Those of the first table."""
