"""The one table of tolerances: what "equal" means when a stack is compared with its members."""

from __future__ import annotations

import torch

#: dtype -> (rtol, atol) between the stack and a Python loop over the same members.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.complex128: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (4e-3, 4e-3),
}


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(rtol, atol) for `dtype`; integers and bools must be equal.

    >>> tolerance(torch.int64)
    (0.0, 0.0)
    """
    return TOLERANCES.get(dtype, (0.0, 0.0))


def assert_equal(stacked: torch.Tensor, alone: torch.Tensor, what: str = "tensor") -> None:
    """Raise AssertionError unless both have one shape and dtype, and values within the table's tolerance.

    >>> assert_equal(torch.ones(3), torch.ones(3) + 1e-7)
    """
    rtol, atol = tolerance(alone.dtype)
    torch.testing.assert_close(stacked, alone, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")
