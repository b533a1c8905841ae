"""An encoder's padding mask: alone, `nn.TransformerEncoder` in evaluation leaves the padding out by nested tensors, and
its results there are zeros. No member tensor can show a nested one, so that the encoder runs member by member."""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.dispatch import suspended
from memberwise._torch.nested import is_left_aligned
from memberwise.engine.signals import part_ways
from memberwise.engine.tensor import MemberTensor


def goes_nested(sequences: Any, mask: Any) -> bool:
    """False, where that is the answer for each member, or does not matter; else members part ways."""
    region = next(arg._region for arg in (sequences, mask) if isinstance(arg, MemberTensor))
    if torch.is_autocast_enabled():  # then the encoder stays with padding, whatever the answer
        return False
    with suspended(region):
        pairs = zip(_each(sequences, region.batch_size), _each(mask, region.batch_size), strict=True)
        found = any(is_left_aligned(own, own_mask) for own, own_mask in pairs)
    if found:
        part_ways(region, "torch's encoder leaves padding out by nested tensors, which no stack can show")
    return False


def _each(value: Any, size: int) -> Any:
    if not isinstance(value, MemberTensor):
        return [value] * size
    return value._inner.detach().unbind(0) if value._batched else [value._inner.detach()] * size
