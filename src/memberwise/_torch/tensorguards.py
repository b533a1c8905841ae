"""One check in C++ that a list of tensors is what it was: types, dtypes, devices, layouts, requires_grad.

Asked from Python, one question a tensor and property, the same costs some 0.5 us a tensor instead of 0.08. Missing
is a public name for the check that `torch.compile` uses for its own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._C._dynamo.guards import TensorGuards


def tensor_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: True while each is like the one given here, and no two are one object.

    "Like" means: type, dtype, device, sizes, strides, requires_grad, and the thread's dispatch state (autocast on
    or off, inference mode on or off).
    """
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[arg-type] # a list a tensor; the stub errs
        dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[arg-type] # as above
    ).check
