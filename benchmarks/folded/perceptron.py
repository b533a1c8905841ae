"""Linear layers and ReLU."""

from __future__ import annotations

from torch import Tensor

from benchmarks.folded.layers import Mode, Tensors, linear


def perceptron(params: Tensors, buffers: Tensors, x: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    return layers(params, "", x), {}


def layers(params: Tensors, prefix: str, x: Tensor) -> Tensor:
    """Those of an `nn.Sequential` under this prefix, ReLU between them."""
    names = [name.removesuffix(".weight") for name in params if name.startswith(prefix) and name.endswith(".weight")]
    for name in names[:-1]:
        x = linear(params, name, x).relu()
    return linear(params, names[-1], x)
