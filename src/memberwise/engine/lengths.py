"""Lengths of sequences as numbers: torch's C++ code writes them into a tensor of its own, which inside a call has no
memory; as tensors they go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from memberwise._torch.dispatch import suspended
from memberwise.engine.tensor import MemberTensor


def _as_tensors(call: Callable[..., Any]) -> Callable[..., Any]:
    def handler(
        log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any
    ) -> Any:
        lengths = input_lengths, target_lengths
        if all(isinstance(own, list | tuple) for own in lengths):
            region = next(arg._region for arg in (log_probs, targets) if isinstance(arg, MemberTensor))
            with suspended(region):
                lengths = tuple(torch.tensor(own, dtype=torch.long) for own in lengths)
        return call(log_probs, targets, *lengths, *args, **kwargs)

    return handler


TAKES_LENGTHS = {function: _as_tensors(function) for function in (F.ctc_loss, torch.ctc_loss)}
