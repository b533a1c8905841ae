"""The function behind `torch.nn.utils.rnn.pack_padded_sequence`, which is in no public namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

pack_padded_sequence: Callable[..., Any] = torch._C._VariableFunctions._pack_padded_sequence
"""`(input, lengths, batch_first) -> (data, batch_sizes)`; torch functions that are overridden get this object."""
