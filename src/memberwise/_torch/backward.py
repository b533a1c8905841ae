"""Whether autograd runs a backward pass in this thread.

Missing public way: none asks that; the number below is what torch's own hooks and checkpoints ask.
"""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether this code is called from a backward pass: from a hook, a Function's backward, a recomputation."""
    return torch._C._current_graph_task_id() != -1
