"""A tensor subclass whose operators give plain tensors.

Missing public way: the documentation names `torch._C._disabled_torch_function_impl` for this (nn.Parameter uses
it), and nothing without an underscore.
"""

from __future__ import annotations

from typing import Any

import torch

plain_results: Any = torch._C._disabled_torch_function_impl
