"""LSTM, GRU and RNN layers as one node.

What is not served (packed sequences, projections, dropout between layers) runs by single operations. In here
sequences are time-major rows, `(M, T, B, *)`, and a state is `(M, B, H)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memberwise._torch.tracing import tracing
from memberwise.engine.choices import way
from memberwise.engine.signals import Decline
from memberwise.rules.axis import expanded
from memberwise.rules.cells import CELLS, Cell
from memberwise.rules.composite import composite
from memberwise.rules.directions import Apart, Batched, Direction, Strategy, can_be_apart, is_faster_apart


def _runs_apart(x: torch.Tensor, batch: int, hidden: int) -> bool:
    """Whether each member has a call of its own. Recorded, that is for a plan to say: by cells, a step repeats the one
    before, is compiled once, and its kernels are joined; one call keeps more, and is fast on a core of its own."""
    if tracing():
        return can_be_apart(x) and way("lstm", "by cells", "by calls") == "by calls"
    return is_faster_apart(x, batch, hidden)


class _Call:
    """One call's arguments, and the order of what it keeps.

    Arguments are `x, layers, directions, has_biases, batch_first, *states, *weights`, as torch has them: for each
    layer and direction a weight of the input, one of the state, and their biases. Kept are for each layer its output
    rows, then what each direction keeps.
    """

    def __init__(
        self, cell: Cell, args: Sequence[Any], dims: Sequence[Any], size: int, kept: Sequence[Any] | None = None
    ) -> None:
        full = [expanded(v, dim, size) if isinstance(v, torch.Tensor) else v for v, dim in zip(args, dims, strict=True)]
        x, self.layers, self.directions, self.biases, self.batch_first, *rest = full
        self.rows = x.transpose(1, 2).contiguous() if self.batch_first else x
        self.states, self.weights = rest[: cell.states], rest[cell.states :]
        self.per_direction = 4 if self.biases else 2
        _, steps, batch, _ = self.rows.shape
        if kept is None:
            apart = cell.fused and _runs_apart(x, batch, self.states[0].shape[-1])
        else:
            apart = Apart.has_kept(kept[1:])
        self.strategy: Strategy = Apart() if apart else Batched(cell)
        self.width = 1 + self.directions * self.strategy.kept(size, steps)

    def direction(self, k: int) -> Direction:
        """Layer and direction number `k`."""
        own = self.weights[k * self.per_direction : (k + 1) * self.per_direction]
        weight, recurrent, bias, recurrent_bias = (*own, None, None)[:4]
        states = [state[:, k].contiguous() for state in self.states]
        return Direction(weight, recurrent, bias, recurrent_bias, states, k % self.directions == 1)

    def forward(self) -> tuple[Any, list[torch.Tensor]]:
        """Output, last states; and what is kept."""
        rows, kept, last = self.rows, [], []
        for layer in range(self.layers):
            outs, more = [], []
            for k in range(layer * self.directions, (layer + 1) * self.directions):
                out, states, saved = self.strategy.forward(self.direction(k), rows)
                outs.append(out)
                last.append(states)
                more += saved
            rows = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
            kept += [rows, *more]
        final = [torch.stack(column, 1) for column in zip(*last, strict=True)]
        rows = rows.clone()  # the layer keeps its rows, and alone a result may be written (`out += x`)
        return (rows.transpose(1, 2) if self.batch_first else rows, *final), kept

    def backward(self, kept: Sequence[torch.Tensor], grads: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
        """One gradient an argument that needs it."""
        grad, *final = grads
        grad = grad.transpose(1, 2) if self.batch_first and grad is not None else grad
        of_weights: list[Any] = []
        of_states: list[Any] = []
        for layer in range(self.layers - 1, -1, -1):
            own = kept[layer * self.width : (layer + 1) * self.width]
            rows = kept[(layer - 1) * self.width] if layer else self.rows
            found = self._layer_backward(layer, rows, own, grad, final, layer > 0 or needs[0])
            of_weights = [one for weights, _, _ in found for one in weights[: self.per_direction]] + of_weights
            of_states = [states for _, states, _ in found] + of_states
            backs = [back for _, _, back in found]
            grad = backs[0] if len(backs) == 1 or backs[0] is None else backs[0] + backs[1]
        grad = grad.transpose(1, 2) if self.batch_first and grad is not None else grad
        states = [torch.stack(column, 1) for column in zip(*of_states, strict=True)]
        every = [grad, None, None, None, None, *states, *of_weights]
        return [one if needed else None for one, needed in zip(every, needs, strict=True)]

    def _layer_backward(self, layer: int, rows: Any, kept: Any, grad: Any, final: Any, deep: bool) -> list[Any]:
        """For each direction the gradients of its weights, states, and input rows."""
        out, *saved = kept
        each, features, found = len(saved) // self.directions, out.shape[-1] // self.directions, []
        for side in range(self.directions):
            k = layer * self.directions + side
            part = slice(side * features, (side + 1) * features)
            last = [None if one is None else one[:, k] for one in final]
            own_grad = None if grad is None else grad[..., part]
            given = self.direction(k), rows, out[..., part], saved[side * each : (side + 1) * each], own_grad, last
            found.append(self.strategy.backward(*given, deep))
        return found


def _signature(cell: Cell) -> Any:
    def arrange(input: Any, hx: Any, params: Any, has_biases: Any, *rest: Any) -> Any:
        if not isinstance(params, list | tuple):
            return Decline("a packed sequence")
        layers, dropout, training, bidirectional, batch_first = rest
        directions = 2 if bidirectional else 1
        states = list(hx) if isinstance(hx, list | tuple) else [hx]
        if len(params) != layers * directions * (4 if has_biases else 2):
            return Decline("projections")
        if dropout and training and layers > 1:
            return Decline("dropout between layers")
        if input.ndim != 3 or 0 in input.shape or len(states) != cell.states:
            return Decline("an empty sequence, or states that torch refuses")
        shape = layers * directions, input.shape[1 - batch_first], params[1].shape[-1]
        if any(state.shape != shape for state in states):
            return Decline("states that torch refuses")
        return input, layers, directions, has_biases, batch_first, *states, *params

    return arrange


def _make(cell: Cell) -> None:
    """Register the composite of one kind of cell."""

    def plain(x: Any, layers: int, directions: int, has_biases: bool, batch_first: bool, *rest: Any) -> Any:
        hx = tuple(rest[: cell.states]) if cell.states > 1 else rest[0]
        flags = has_biases, layers, 0.0, False, directions == 2, batch_first
        return cell.function(x, hx, list(rest[cell.states :]), *flags)

    def forward(info: Any, in_dims: Any, *args: Any) -> Any:
        if 0 not in in_dims:
            return Decline("equal in all members")
        return _Call(cell, args, in_dims, info.batch_size).forward()

    def backward(info: Any, in_dims: Any, needs: Any, inputs: Any, kept: Any, grads: Any) -> Any:
        return _Call(cell, inputs, in_dims, info.batch_size, kept).backward(kept, grads, needs)

    rule = {"forward": forward, "backward": backward, "plain": plain}
    members = {name: staticmethod(function) for name, function in rule.items()}
    composite(cell.function, signature=_signature(cell))(type(cell.name, (), {**members, "lies_as_alone": True}))


for _cell in CELLS:
    _make(_cell)
