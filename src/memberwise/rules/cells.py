"""The cells of recurrent layers: one step after another, and back through time.

A cell's tensors are `(M, B, G * H)`, its gates side by side as torch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_aten = torch.ops.aten
_of_sigmoid, _of_tanh = _aten.sigmoid_backward.default, _aten.tanh_backward.default
_of_relu = _aten.threshold_backward.default


class Cell:
    """What a kind of cell must say.

    Attributes:
        name, function: the composite's name, and the torch function it answers.
        states: how many states it carries: hidden, and for the LSTM cell.
        kept: how many tensors a step keeps for backward.
        fused: whether torch has a fused kernel for it on the CPU.
    """

    name: str
    function: Callable[..., Any]
    states = 1
    kept = 0
    fused = False

    def joint_bias(self, bias: Any, recurrent_bias: Any) -> Any:
        """What is added to the products of all inputs at once, `(M, G * H)`."""
        return None if bias is None else bias + recurrent_bias

    def scan(
        self,
        inputs: Sequence[torch.Tensor],
        weight: torch.Tensor,
        bias: Any,
        states: Sequence[torch.Tensor],
        order: range,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Hidden states by time, the last states, and what is kept (by time, `kept` a step).

        `inputs` are the products of the inputs, by time, `weight` the recurrent one, `(M, G * H, H)`, `bias` its bias.
        """
        raise NotImplementedError

    def back(
        self,
        saved: Sequence[torch.Tensor],
        weight: torch.Tensor,
        before: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        grads: Sequence[Any],
        last: Sequence[Any],
        order: range,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Gradients by time of the input products; of the state's products where the two differ (their last gates;
        else nothing); and of the initial states. `saved` are, where a step keeps nothing, the hidden states; `before`
        those that the steps started from; `grads`, `last` may hold None."""
        raise NotImplementedError


def _tanh(value: torch.Tensor) -> torch.Tensor:
    """`tanh`, as `2 * sigmoid(2 * x) - 1` where many values make four quick passes faster than a slow one: of 16 384
    float32 values tanh takes 49 us, these 22. The absolute error is that of tanh, 1e-7."""
    if value.device.type != "cpu" or value.numel() < 4096:
        return torch.tanh(value)
    return torch.sigmoid(value * 2).mul_(2).sub_(1)


def _plus(value: Any, more: Any) -> Any:
    return more if value is None else value if more is None else value + more


class Lstm(Cell):
    """Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000); gates i, f, g, o."""

    name, function = "Lstm", torch.lstm
    states, kept, fused = 2, 3, True

    def scan(self, inputs: Any, weight: Any, bias: Any, states: Any, order: range) -> Any:
        hidden, cell = states
        across = weight.transpose(1, 2)
        by_time: list[Any] = [None] * len(order)
        saved: list[Any] = [None] * (3 * len(order))
        for t in order:
            gates = torch.baddbmm(inputs[t], hidden, across)
            enter, forget, new, leave = gates.chunk(4, 2)
            new.mul_(2)  # tanh as a sigmoid, so that one pass serves all four gates
            gates.sigmoid_()
            new.mul_(2).sub_(1)
            cell = (forget * cell).addcmul_(enter, new)
            bent = _tanh(cell)
            by_time[t] = hidden = leave * bent
            saved[3 * t : 3 * t + 3] = gates, cell, bent
        return by_time, [hidden, cell], saved

    def back(self, saved: Any, weight: Any, before: Any, states: Any, grads: Any, last: Any, order: range) -> Any:
        of_hidden, of_cell = last
        found: list[Any] = [None] * len(order)
        for t in reversed(order):
            gates, _, bent = saved[3 * t : 3 * t + 3]
            start = t == order[0]
            earlier = states[1] if start else saved[3 * (t - order.step) + 1]
            enter, forget, new, leave = gates.chunk(4, 2)
            of_hidden = _plus(grads[t], of_hidden)
            if of_hidden is None:
                of_hidden = torch.zeros_like(bent)
            of_cell = _plus(_of_tanh(of_hidden * leave, bent), of_cell)
            parts = (
                _of_sigmoid(of_cell * new, enter),
                _of_sigmoid(of_cell * earlier, forget),
                _of_tanh(of_cell * enter, new),
                _of_sigmoid(of_hidden * bent, leave),
            )
            found[t] = torch.cat(parts, 2)
            of_cell = of_cell * forget
            of_hidden = torch.bmm(found[t], weight)
        return found, [], [of_hidden, of_cell]


class Gru(Cell):
    """Cho et al. (2014), as torch has it (the reset gate acts after the product); gates r, z, n."""

    name, function = "Gru", torch.gru
    kept = 4

    def joint_bias(self, bias: Any, recurrent_bias: Any) -> Any:
        return bias

    def scan(self, inputs: Any, weight: Any, bias: Any, states: Any, order: range) -> Any:
        (hidden,) = states
        across = weight.transpose(1, 2)
        features = weight.shape[2]
        held = None if bias is None else bias.unsqueeze(1)
        by_time: list[Any] = [None] * len(order)
        saved: list[Any] = [None] * (4 * len(order))
        for t in order:
            own = torch.bmm(hidden, across) if held is None else torch.baddbmm(held, hidden, across)
            reset, update = (inputs[t][..., : 2 * features] + own[..., : 2 * features]).sigmoid_().chunk(2, 2)
            own = own[..., 2 * features :].clone()  # or all three gates' products would be kept with it
            new = _tanh(torch.addcmul(inputs[t][..., 2 * features :], reset, own))
            by_time[t] = hidden = torch.lerp(new, hidden, update)
            saved[4 * t : 4 * t + 4] = reset, update, own, new
        return by_time, [hidden], saved

    def back(self, saved: Any, weight: Any, before: Any, states: Any, grads: Any, last: Any, order: range) -> Any:
        (of_hidden,) = last
        shared = 2 * weight.shape[2]
        found: list[Any] = [None] * len(order)
        of_state: list[Any] = [None] * len(order)
        for t in reversed(order):
            reset, update, own, new = saved[4 * t : 4 * t + 4]
            of_hidden = _plus(grads[t], of_hidden)
            if of_hidden is None:
                of_hidden = torch.zeros_like(new)
            kept = of_hidden * update
            of_new = _of_tanh(of_hidden - kept, new)
            gates = _of_sigmoid(of_new * own, reset), _of_sigmoid(of_hidden * (before[t] - new), update)
            found[t] = torch.cat((*gates, of_new), 2)
            of_state[t] = of_new.mul_(reset)
            of_hidden = kept.baddbmm_(found[t][..., :shared], weight[:, :shared])
            of_hidden.baddbmm_(of_state[t], weight[:, shared:])
        return found, of_state, [of_hidden]


class Rnn(Cell):
    """Elman (1990). A step keeps nothing: what it needs is the hidden state that it gave."""

    kept = 0

    def __init__(self, name: str, function: Any, bend: Callable[..., torch.Tensor], unbend: Any) -> None:
        self.name, self.function, self.bend, self.unbend = name, function, bend, unbend

    def scan(self, inputs: Any, weight: Any, bias: Any, states: Any, order: range) -> Any:
        (hidden,) = states
        across = weight.transpose(1, 2)
        by_time: list[Any] = [None] * len(order)
        for t in order:
            by_time[t] = hidden = self.bend(torch.baddbmm(inputs[t], hidden, across))
        return by_time, [hidden], []

    def back(self, saved: Any, weight: Any, before: Any, states: Any, grads: Any, last: Any, order: range) -> Any:
        (of_hidden,) = last
        found: list[Any] = [None] * len(order)
        for t in reversed(order):
            of_hidden = _plus(grads[t], of_hidden)
            if of_hidden is None:
                of_hidden = torch.zeros_like(saved[t])
            found[t] = self.unbend(of_hidden, saved[t])
            of_hidden = torch.bmm(found[t], weight)
        return found, [], [of_hidden]


def _of_positive(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return _of_relu(grad, out, 0)


CELLS: tuple[Cell, ...] = (
    Lstm(),
    Gru(),
    Rnn("RnnTanh", torch.rnn_tanh, _tanh, _of_tanh),
    Rnn("RnnRelu", torch.rnn_relu, torch.relu, _of_positive),
)
"""All kinds of cells."""
