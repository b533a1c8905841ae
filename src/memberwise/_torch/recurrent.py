"""The second list of weights that `nn.RNN`, `nn.LSTM` and `nn.GRU` keep.

Missing in public torch: a recurrent module holds its weights in `_flat_weights` too, renews that list when its
parameters were swapped, and keeps the swapped-in tensors there (with all that hangs on them) after the swap is
over, until it is called again. On a GPU, renewing the list also moves the weights into one piece of memory of their
own (`flatten_parameters`), of which there is none for members: a stack holds theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LISTS = ("_flat_weights", "_flat_weight_refs")
"""The attributes that lead to the weights a second time."""


def kept_lists(module: nn.RNNBase) -> dict[str, Any]:
    """The lists as they are now, to be given to `put_back`."""
    return {name: list(module.__dict__[name]) for name in LISTS if name in module.__dict__}


def follow(module: nn.RNNBase) -> None:
    """Let the lists lead to what is in the places now, so that the module need not renew them."""
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    refs = [None if weight is None else weakref.ref(weight) for weight in weights]
    module.__dict__.update(zip(LISTS, (weights, refs), strict=True))


@contextmanager
def weights_stay(module: nn.Module) -> Iterator[None]:
    """Within the block, no recurrent module in `module` moves its weights together when it renews its lists."""
    recurrent = [each for each in module.modules() if isinstance(each, nn.RNNBase)]
    for each in recurrent:
        each.__dict__["flatten_parameters"] = lambda: None
    try:
        yield
    finally:
        for each in recurrent:
            each.__dict__.pop("flatten_parameters", None)


def put_back(module: nn.RNNBase, lists: dict[str, Any]) -> None:
    """Make the module's lists those that `kept_lists` found."""
    module.__dict__.update(lists)
