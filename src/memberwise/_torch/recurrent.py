"""The second list of weights that `nn.RNN`, `nn.LSTM` and `nn.GRU` keep.

Missing in public torch: a recurrent module holds its weights in `_flat_weights` too, renews that list when its
parameters were swapped, and keeps the swapped-in tensors there (with all that hangs on them) after the swap is
over, until it is called again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

LISTS = ("_flat_weights", "_flat_weight_refs")
"""The attributes that lead to the weights a second time."""


def kept_lists(module: nn.RNNBase) -> dict[str, Any]:
    """The lists as they are now, to be given to `put_back`."""
    return {name: list(module.__dict__[name]) for name in LISTS if name in module.__dict__}


def put_back(module: nn.RNNBase, lists: dict[str, Any]) -> None:
    """Make the module's lists those that `kept_lists` found."""
    module.__dict__.update(lists)
