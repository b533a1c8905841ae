"""One direction of one recurrent layer, two ways: batched cells, or oneDNN's LSTM kernel once a member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memberwise.rules.cells import Cell
from memberwise.rules.lstm_kernel import kernel, kernel_backward, lstm_layer, lstm_layer_backward
from memberwise.rules.matmul import batched, batched_plus
from memberwise.rules.registry import register_rule


@dataclass
class Direction:
    """Weights `(M, G * H, I)`, `(M, G * H, H)`, biases `(M, G * H)` or None, initial states `(M, B, H)`."""

    weight: torch.Tensor
    recurrent: torch.Tensor
    bias: torch.Tensor | None
    recurrent_bias: torch.Tensor | None
    states: list[torch.Tensor]
    reverse: bool

    def order(self, steps: int) -> range:
        """The steps as they are taken."""
        return range(steps - 1, -1, -1) if self.reverse else range(steps)


class Strategy(Protocol):
    """How a direction runs for all members."""

    def kept(self, size: int, steps: int) -> int:
        """How many tensors `forward` keeps."""
        ...

    def forward(self, direction: Direction, rows: torch.Tensor) -> tuple[torch.Tensor, list[Any], list[Any]]:
        """Output rows `(M, T, B, H)`, last states, what is kept."""
        ...

    def backward(
        self,
        direction: Direction,
        rows: Any,
        out: Any,
        saved: Sequence[Any],
        grad: Any,
        last: Sequence[Any],
        deep: bool,
    ) -> tuple[list[Any], list[Any], Any]:
        """Gradients of the four weights, of the initial states, and (if `deep`) of the input rows."""
        ...


def can_be_apart(x: torch.Tensor) -> bool:
    """Whether oneDNN has a kernel for it."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def is_faster_apart(x: torch.Tensor, batch: int, hidden: int) -> bool:
    """Whether oneDNN's LSTM kernel, a member at a time, beats batched cells for an input `(M, ...)`.

    A batched step has some 30 kernels (forward and backward 60 us), and then costs 38 ns for each of a member's B * H
    values; the fused kernel 20 us a member and 20 ns a value. Forward and backward over 20 steps, float32, one thread,
    ms, batched and by member, at (M, B, H): (16, 8, 32) 4.3, 8.1; (4, 32, 32) 4.4, 3.3; (16, 32, 32) 13, 13; (8, 64,
    64) 37, 32; (8, 32, 128) 53, 45. Even is taken batched: recorded steps gain more from it.
    """
    return can_be_apart(x) and batch * hidden > 1400 - 3300 / x.shape[0]


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """`(M, T, B, *)` as `(M, T * B, *)`."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _joined(steps: list[torch.Tensor]) -> torch.Tensor:
    """Tensors by time, `(M, B, *)` each, as `(M, T * B, *)`; takes them, lest both be held."""
    whole = torch.stack(steps, 1)
    steps.clear()
    return _flat(whole)


class Batched:
    """The input products of all steps at once, then one batched product a step, and back through time by hand."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def kept(self, size: int, steps: int) -> int:
        return steps * self.cell.kept

    def forward(self, direction: Direction, rows: torch.Tensor) -> tuple[torch.Tensor, list[Any], list[Any]]:
        size, steps, batch, _ = rows.shape
        bias = self.cell.joint_bias(direction.bias, direction.recurrent_bias)
        factors = _flat(rows), direction.weight.transpose(1, 2)
        inputs = batched(*factors) if bias is None else batched_plus(bias.unsqueeze(1), *factors)
        inputs = inputs.reshape(size, steps, batch, -1)
        given = inputs.unbind(1), direction.recurrent, direction.recurrent_bias, direction.states
        hidden, states, saved = self.cell.scan(*given, direction.order(steps))
        return torch.stack(hidden, 1), states, saved

    def backward(
        self,
        direction: Direction,
        rows: Any,
        out: Any,
        saved: Sequence[Any],
        grad: Any,
        last: Sequence[Any],
        deep: bool,
    ) -> tuple[list[Any], list[Any], Any]:
        steps = rows.shape[1]
        before = self._before(direction, out)
        grads = [None] * steps if grad is None else grad.unbind(1)
        saved = saved or out.unbind(1)
        given = saved, direction.recurrent, before, direction.states, grads, last
        found, differing, states = self.cell.back(*given, direction.order(steps))
        products = _joined(found)
        back = batched(products, direction.weight).reshape(rows.shape) if deep else None
        of_weight, of_bias = batched(products.transpose(1, 2), _flat(rows)), products.sum(1)
        if differing:  # in place: to hold both would take more memory than M lone steps do
            products[..., -out.shape[-1] :] = _joined(differing)
        of_recurrent = batched(products.transpose(1, 2), _joined(before))
        return [of_weight, of_recurrent, of_bias, products.sum(1)], states, back

    def _before(self, direction: Direction, out: torch.Tensor) -> list[torch.Tensor]:
        """By time, `(M, B, H)`: the hidden state that each step starts from."""
        start, hidden = direction.states[0], list(out.unbind(1))
        return [*hidden[1:], start] if direction.reverse else [start, *hidden[:-1]]


class Apart:
    """One call of oneDNN's fused kernel a member: alone, torch's own LSTM is made of these."""

    @staticmethod
    def has_kept(saved: Sequence[Any]) -> bool:
        """Whether this is what `forward` keeps: the third is the kernel's workspace, which holds no numbers."""
        return len(saved) > 2 and not saved[2].is_floating_point()

    def kept(self, size: int, steps: int) -> int:
        return 3 * size

    def forward(self, direction: Direction, rows: torch.Tensor) -> tuple[torch.Tensor, list[Any], list[Any]]:
        columns, biases = _members(direction, rows)
        hidden, saved = direction.recurrent.shape[2], []
        out = rows.new_empty(*rows.shape[:3], hidden)
        for own, result in zip(zip(*columns, strict=True), out.unbind(0), strict=True):
            found, *more = lstm_layer(*own, direction.reverse, biases)
            result.copy_(found)
            saved += more
        return out, [torch.stack(saved[0::3]), torch.stack(saved[1::3])], saved

    def backward(
        self,
        direction: Direction,
        rows: Any,
        out: Any,
        saved: Sequence[Any],
        grad: Any,
        last: Sequence[Any],
        deep: bool,
    ) -> tuple[list[Any], list[Any], Any]:
        columns, biases = _members(direction, rows)
        size = rows.shape[0]
        given = (saved[0::3], saved[1::3], *(_spread(g, size) for g in (grad, *last)), saved[2::3])
        found = []
        for *own, result, hy, cy, g, g_hy, g_cy, workspace in zip(*columns, out.contiguous(), *given, strict=True):
            g_hy, g_cy = (torch.zeros_like(hy) if one is None else one for one in (g_hy, g_cy))
            g = torch.zeros_like(result) if g is None else g.contiguous()
            end = workspace, direction.reverse, biases
            found.append(lstm_layer_backward(*own, result, hy, cy, g, g_hy, g_cy, *end))
        back, *weights, of_hidden, of_cell = (torch.stack(column) for column in zip(*found, strict=True))
        return weights, [of_hidden, of_cell], back


def _members(direction: Direction, rows: torch.Tensor) -> tuple[list[Any], bool]:
    """The kernel's tensors, member by member; and whether there are biases."""
    biases = direction.bias, direction.recurrent_bias
    filled = [direction.weight.new_zeros(direction.weight.shape[:2]) if one is None else one for one in biases]
    tensors = rows, direction.weight, direction.recurrent, *filled, *direction.states
    return [tensor.contiguous().unbind(0) for tensor in tensors], direction.bias is not None


def _spread(value: torch.Tensor | None, size: int) -> Sequence[Any]:
    return [None] * size if value is None else value.unbind(0)


def _by_member(call: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        """torch has no batching rule for it, and one call a member is what is wanted."""
        given = [v.unbind(0) if dim == 0 else [v] * info.batch_size for v, dim in zip(args, in_dims, strict=True)]
        found = [call(*own) for own in zip(*given, strict=True)]
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)), 0

    return rule


for _op in (kernel, kernel_backward):
    register_rule(_op, _by_member(_op))
