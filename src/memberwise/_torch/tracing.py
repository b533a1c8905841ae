"""Whether operators are being watched: seen by a dispatch mode, or written down to be run again.

Missing public way: none asks "am I inside `make_fx`?" without importing `torch.fx.experimental`, which loads
sympy; and none counts or lists the dispatch modes.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def watched() -> bool:
    """Whether any `TorchDispatchMode` is active (of which tracing is one)."""
    return torch._C._len_torch_dispatch_stack() > 0


def tracing() -> bool:
    """Whether the operators that run now are recorded: by `make_fx`, or by a mode with a true `records`."""
    if not watched():
        return False
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return any(getattr(mode, "records", False) for mode in _get_current_dispatch_mode_stack())
