"""Convolutions of 3 x 3 taps in float32 on the CPU, one or two apart, and their gradients, in 16 or 25 products of 36.

torch's, by oneDNN, multiply at three quarters of what a Zen 5 can do: fewer products are what is left. ResNet-18's
take 0.5 to 0.75 of torch's time, those two apart 0.5 to 0.97. Where a result is not finite torch's kernel answers:
ours would spread it over a tile.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from memberwise.kernels.library import library, operation


class _Sizes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("images", "groups", "in", "out", "height", "width", "stride", "top", "left")
    )


@functools.cache
def _kernel(name: str, tensors: int) -> Any:
    found = getattr(library("convolution"), name)
    found.argtypes, found.restype = [ctypes.c_void_p] * tensors + [_Sizes], ctypes.c_bool
    return found


def _is_right(name: str, *tensors: torch.Tensor, settings: tuple[int, ...]) -> bool:
    """Whether the kernel answered; the last two are x and w."""
    x, w = tensors[-2:]
    *steps, groups = settings
    images, channels, height, width = x.shape
    sizes = _Sizes(images, groups, channels // groups, w.shape[0] // groups, height, width, *steps)
    return _kernel(name, len(tensors))(*(one.data_ptr() for one in tensors), sizes)


def _run(x: torch.Tensor, w: torch.Tensor, *settings: int) -> torch.Tensor:
    x, w = x.contiguous(), w.contiguous()
    out = _empty(x, w, *settings)
    if _is_right("memberwise_convolution", out, x, w, settings=settings):
        return out
    return torch.ops.aten.convolution(x, w, None, *_theirs(*settings))


def _run_backward(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *settings: int) -> tuple[torch.Tensor, ...]:
    grad, x, w = grad.contiguous(), x.contiguous(), w.contiguous()
    found = _empty_backward(grad, x, w)
    if _is_right("memberwise_convolution_backward", *found, grad, x, w, settings=settings):
        return found
    return torch.ops.aten.convolution_backward(grad, x, w, None, *_theirs(*settings), [True, True, False])[:2]


def _theirs(stride: int, top: int, left: int, groups: int) -> tuple[Any, ...]:
    """The same as torch's arguments from stride on."""
    return [stride, stride], [top, left], [1, 1], False, [0, 0], groups


def _empty(x: torch.Tensor, w: torch.Tensor, stride: int, top: int, left: int, groups: int) -> torch.Tensor:
    sides = ((x.shape[k] + 2 * padding - 3) // stride + 1 for k, padding in ((2, top), (3, left)))
    return x.new_empty(x.shape[0], w.shape[0], *sides)


def _empty_backward(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *_: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


convolution3x3 = operation(
    "convolution3x3(Tensor x, Tensor w, int stride, int top, int left, int groups) -> Tensor",
    "convolution",
    _run,
    _empty,
    torch.Tag.needs_contiguous_strides,
)
"""`conv2d(x, w, stride=stride, padding=(top, left), groups=groups)` of `(N, C, H, W)` and `(O, C / groups, 3, 3)`:
float32, on the CPU, with a stride of 1 or 2 and no more than 2 of padding."""

convolution3x3_backward = operation(
    "convolution3x3_backward(Tensor grad, Tensor x, Tensor w, int stride, int top, int left, int groups)"
    " -> (Tensor, Tensor)",
    "convolution",
    _run_backward,
    _empty_backward,
    torch.Tag.needs_contiguous_strides,
)
"""The gradients of x and w, given that of the results and the arguments."""
