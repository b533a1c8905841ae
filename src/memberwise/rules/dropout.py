"""Dropout as one node; each member draws its own mask, as much as its lone run draws, in the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memberwise.engine.draws import fill_masks
from memberwise.engine.signals import Decline
from memberwise.rules.composite import composite, without_kept
from memberwise.rules.folding import is_among_channels


def _signature(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # F.dropout's names
    if not training or inplace or not 0 < p < 1 or input.numel() == 0 or not input.is_floating_point():
        return Decline("nothing is drawn, it is in place, or complex")
    return input, p


def _kept(info: Any, x: torch.Tensor, shape: torch.Size, p: float) -> torch.Tensor:
    """`(M, *s)`, or `(*s)` equal for all: 1 where a value is kept. Drawn as torch draws it alone on the CPU."""
    if info.randomness == "same":
        return x.new_empty(shape).bernoulli_(1 - p)
    noise = x.new_empty((info.batch_size, *shape))
    if info.generators is None:
        return noise.bernoulli_(1 - p)
    return fill_masks(noise, 1 - p, generators=info.generators)


@composite(F.dropout, signature=_signature)
class Dropout:
    """Values are dropped with probability `p`, the others scaled; by single operations four of them, 60 us more."""

    saves = ()

    @staticmethod
    def forward(info: Any, in_dims: Any, x: torch.Tensor, p: float) -> Any:
        stacked = in_dims[0] == 0
        if info.randomness == "error" or x.device.type != "cpu" or (not stacked and info.randomness == "same"):
            return Decline("a draw that is refused, off the CPU, or equal in all members")
        if not x.is_contiguous() and not (stacked and is_among_channels(x)):
            return Decline("memory in another order, in which a lone run draws")
        info.keep_streams()
        noise = _kept(info, x, x.shape[1:] if stacked else x.shape, p).div_(1 - p)
        info.drawn()
        return x * noise, (noise,)

    below = staticmethod(without_kept(forward))

    @staticmethod
    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        return grad * kept[0], None

    @staticmethod
    def again(needs: Any, inputs: Any, kept: Any, grad: torch.Tensor) -> Any:
        """Linear in the gradient, with the mask that was drawn."""
        return grad * kept[0], None
