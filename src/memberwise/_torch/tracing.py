"""Whether operators are being watched: traced into a graph, or seen by a dispatch mode.

Missing public way: none asks "am I inside `make_fx`?" without importing `torch.fx.experimental`, which loads
sympy; and none counts the dispatch modes.
"""

from __future__ import annotations

import torch

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def watched() -> bool:
    """Whether any `TorchDispatchMode` is active (of which tracing is one)."""
    return torch._C._len_torch_dispatch_stack() > 0


def tracing() -> bool:
    """Whether the operators that run now are recorded: by `make_fx`, or by a mode that says so (`records = True`)."""
    if not watched():
        return False
    stack = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return torch._C._get_dispatch_mode(_PROXY) is not None or any(getattr(mode, "records", False) for mode in stack)
