"""The vmapped loss compiled, forward and backward, with `.backward()` and the optimizer outside."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.rival import Rival
from benchmarks.rivals import vmap

RIVAL = Rival(
    "vmap-backward-compiled",
    "torch.vmap compiled",
    "torch.compile of torch.vmap over functional_call; backward() and the fused optimizer outside",
    partial(vmap.start, compiled=torch.compile),
)
