"""A tensor subclass whose operators give plain tensors.

Missing public way: the documentation names `torch._C._disabled_torch_function_impl` for this (nn.Parameter uses
it), and nothing without an underscore.
"""

from __future__ import annotations

import torch

plain_results = torch._C._disabled_torch_function_impl
