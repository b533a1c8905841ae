"""The question that torch's encoder asks before it goes by nested tensors, which is in no public namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

is_left_aligned: Callable[..., Any] = torch._C._VariableFunctions._nested_tensor_from_mask_left_aligned
"""`(sequences, mask) -> bool`; torch functions that are overridden get this object."""
