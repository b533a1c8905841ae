"""oneDNN's LSTM kernel for one member: as torch has it, and as operations that can be recorded.

The kernel keeps what backward needs only with gradients on, and nobody but the kernel knows how much that is. A
recorded step is replayed with gradients off, and compiled from shapes.
"""

from __future__ import annotations

from typing import Any

import torch

from memberwise._torch.tracing import tracing

kernel = torch.ops.aten.mkldnn_rnn_layer.default
kernel_backward = torch.ops.aten.mkldnn_rnn_layer_backward.default
_LSTM = 2  # the number of its kind among recurrent layers

_WEIGHTS = "Tensor weight, Tensor recurrent, Tensor bias, Tensor recurrent_bias, Tensor hx, Tensor cx"
_LIBRARY = torch.library.Library("memberwise", "DEF")
_LIBRARY.define(f"lstm_layer(Tensor x, {_WEIGHTS}, bool reverse, bool biases) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"lstm_layer_backward(Tensor x, {_WEIGHTS}, Tensor out, Tensor hy, Tensor cy, Tensor grad, Tensor grad_hy, "
    "Tensor grad_cy, Tensor workspace, bool reverse, bool biases) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_recorded, _recorded_backward = torch.ops.memberwise.lstm_layer, torch.ops.memberwise.lstm_layer_backward

_sizes: dict[Any, torch.Size] = {}
"""How much the kernel kept, by the shapes of rows and state."""


def lstm_layer(*args: Any) -> Any:
    """Output rows, last states and workspace, given rows `(T, B, I)`, four weights, two states `(B, H)`, whether the
    steps are taken backwards, and whether there are biases."""
    return (_recorded if tracing() else _layer)(*args)


def lstm_layer_backward(*args: Any) -> Any:
    """Gradients of rows, weights and states, given these, the results, the results' gradients and the workspace."""
    return (_recorded_backward if tracing() else _layer_backward)(*args)


def _layer(*args: Any) -> Any:
    *own, reverse, biases = args
    with torch.enable_grad():  # else it keeps no workspace
        return kernel(*own, reverse, [], _LSTM, own[5].shape[-1], 1, biases, False, False, True)


def _layer_backward(*args: Any) -> Any:
    *tensors, workspace, reverse, biases = args
    end = reverse, _LSTM, tensors[5].shape[-1], 1, biases, True, False, [], False, workspace
    return kernel_backward(*tensors, *end)


def _noting_size(*args: Any) -> Any:
    found = tuple(one.detach() for one in _layer(*args))
    _sizes[args[0].shape, args[5].shape] = found[3].shape
    return found


def _shapes(*args: Any) -> Any:
    x, hx, cx = args[0], args[5], args[6]
    size = _sizes.get((x.shape, hx.shape))
    if size is None:
        raise NotImplementedError("how much the kernel keeps is known only once it has run")
    rows = x.new_empty(*x.shape[:2], hx.shape[-1])
    return rows, torch.empty_like(hx), torch.empty_like(cx), x.new_empty(size, dtype=torch.uint8)


def _shapes_backward(*args: Any) -> Any:
    return tuple(map(torch.empty_like, args[:7]))


for _name, _run, _fake in (
    ("lstm_layer", _noting_size, _shapes),
    ("lstm_layer_backward", _layer_backward, _shapes_backward),
):
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"memberwise::{_name}", _fake, lib=_LIBRARY)
