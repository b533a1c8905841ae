"""What leads to what in autograd's graph.

Missing public way: `grad_fn.next_functions` is one, but to ask whether one node lies behind another would take a walk
over all that lies behind; torch's own count of nodes ends it at those that are older.
"""

from __future__ import annotations

from typing import Any


def made_after(node: Any, earlier: Any) -> bool:
    """Whether the gradient of what `node` has made flows through `earlier`."""
    if node is earlier or node is None or earlier is None:
        return False
    oldest, seen, waiting = earlier._sequence_nr(), {node}, [node]
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is earlier:
                return True
            if below is None or below in seen or hasattr(below, "variable") or below._sequence_nr() <= oldest:
                continue
            seen.add(below)
            waiting.append(below)
    return False
