"""Packed sequences: one set of lengths for all members, which C++ code reads on the host.

torch's formula for the backward makes a plain tensor and writes members' gradients into it; a gather has none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise._torch.dispatch import suspended
from memberwise._torch.packing import pack_padded_sequence
from memberwise.engine.signals import part_ways
from memberwise.engine.tensor import MemberTensor


def pack(sequences: Any, lengths: Any, batch_first: bool) -> Any:
    """`(data, batch_sizes)`: the steps that lengths leave, in time's order; batch sizes stay a plain tensor."""
    region = next(arg._region for arg in (sequences, lengths) if isinstance(arg, MemberTensor))
    with suspended(region):
        rows, columns = sequences.shape[:2]
        places = torch.arange(rows * columns).view(rows, columns)
        places, batch_sizes = pack_padded_sequence(places, _plain(lengths), batch_first)
    return sequences.flatten(0, 1).index_select(0, places.to(sequences.device)), batch_sizes


def _plain(lengths: Any) -> torch.Tensor:
    if not isinstance(lengths, MemberTensor):
        return lengths
    inner = lengths._inner
    if not lengths._batched:
        return inner
    if (inner != inner[:1]).any():
        part_ways(lengths._region, "sequence lengths differ between members")
    return inner[0]


def with_plain_sizes(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer whose C++ code reads how many sequences each step has, where a packed sequence was given."""

    def handler(data: Any, sizes: Any, *args: Any) -> Any:
        is_packed = len(args) > 1 and isinstance(args[1], list | tuple)
        return layer(data, _plain(sizes) if is_packed else sizes, *args)

    return handler


RECURRENT = {layer: with_plain_sizes(layer) for layer in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)}
