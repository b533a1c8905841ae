"""Sparse gradients of embeddings: no member tensor can show one, so that the gradient is dense. Its values are the
same, and what updates by it does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def _dense(call: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`call` without its argument `sparse`, which is at `place`."""

    def handler(*args: Any, sparse: bool = False, **kwargs: Any) -> Any:
        return call(*args[:place], *(False for _ in args[place : place + 1]), *args[place + 1 :], **kwargs)

    return handler


EMBEDDINGS = {function: _dense(function, place) for function, place in ((F.embedding, 6), (torch.embedding, 4))}
