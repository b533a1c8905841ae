"""Which operations of a recording run by kernels of our own: those that are faster so, measured one by one."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.building import quiet
from memberwise._torch.folder import get, kept_at, put
from memberwise._torch.graphmodule import graph_module
from memberwise.capture.record import shapes
from memberwise.kernels.attention import attention, attention_backward
from memberwise.kernels.convolution import convolution3x3, convolution3x3_backward
from memberwise.kernels.library import available
from memberwise.kernels.product import product, product_plus

GAIN = 0.95
"""What part of the time of torch's own an operation must take."""

TIMES, AT_LEAST = 5, 0.01
"""Runs of each, and seconds that all of them take at least: what takes microseconds runs often enough for a moment in
which the machine does something else to pass."""

MOST = 1 << 23
"""Numbers in a tensor of a trial, which leaves members out above that: the time of one hardly depends on them."""

LONGEST = 2048
"""Keys whose scores, of a block of rows, stay in the cache."""


Run = Callable[[], object]


def _multiplied(a: Any, b: Any) -> tuple[Any, ...] | None:
    """A product with a side of one is none to Inductor, which fuses it with what is around."""
    return (a, b) if min(*a.shape[-2:], *b.shape[-2:]) > 1 else None


def _multiplied_plus(bias: Any, a: Any, b: Any, **scales: Any) -> tuple[Any, ...] | None:
    """A bias of each column."""
    row = len(bias.shape) == 1 or (len(bias.shape) == 3 and bias.shape[1] == 1)
    dense = row and bias.shape[-1] == b.shape[-1] and bias.stride[-1] == 1
    return (bias, a, b) if dense and not scales and _multiplied(a, b) else None


def _attended(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Any, ...] | None:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fits = attn_mask is None and dropout_p == 0 and scale > 0 and k.shape[-2] <= LONGEST
    return (q, k, v, is_causal, scale) if fits and 0 not in (*q.shape, *k.shape, *v.shape) else None


def _attended_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, dropout_p: float, is_causal: bool, **named: Any
) -> tuple[Any, ...] | None:
    own = _attended(q, k, v, dropout_p, is_causal, **named)
    return own and (grad, q, k, v, sums, *own[3:])


NARROWEST = 16
"""Channels of a member's convolution, in and out: a vector of them lies side by side."""


def _convolved(x: Any, w: Any, bias: Any, stride: Any, padding: Any, *rest: Any) -> tuple[Any, ...] | None:
    *common, groups = rest
    fits = bias is None and common == [[1, 1], False, [0, 0]] and stride in ([1, 1], [2, 2]) and w.shape[2:] == (3, 3)
    wide = fits and min(w.shape[1], w.shape[0] // groups) >= NARROWEST
    return (x, w, stride[0], *padding, groups) if wide and max(padding) <= 2 and 0 not in x.shape else None


def _convolved_backward(grad: Any, x: Any, w: Any, sizes: Any, *rest: Any) -> tuple[Any, ...] | None:
    *common, wanted = rest
    own = _convolved(x, w, None, *common) if wanted == [True, True, False] else None
    return own and (grad, *own)


class Ours(NamedTuple):
    """An operation of ours.

    Attributes:
        kernel: the file that it lies in.
        run: the operation.
        given: its arguments, made of those of torch's; None if it does not serve these.
        dtypes: what it computes in.
        by_member: whether its tensors' first dimension are members, or else heads of them.
        of_one: whether it can be run on tensors of one number, which tells what a call from Python takes.
    """

    kernel: str
    run: Any
    given: Callable[..., tuple[Any, ...] | None]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    by_member: bool = True
    of_one: bool = False


_aten = torch.ops.aten
_PRODUCT = Ours("product", product, _multiplied, (torch.bfloat16, torch.float32, torch.float64), of_one=True)
_PLUS = Ours("product", product_plus, _multiplied_plus, (torch.bfloat16,), of_one=True)
OURS = {
    _aten.bmm.default: _PRODUCT,
    _aten.mm.default: _PRODUCT,
    _aten.baddbmm.default: _PLUS,
    _aten.addmm.default: _PLUS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: Ours("attention", attention, _attended),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: Ours(
        "attention", attention_backward, _attended_backward
    ),
    _aten.convolution.default: Ours("convolution", convolution3x3, _convolved, by_member=False),
    _aten.convolution_backward.default: Ours(
        "convolution", convolution3x3_backward, _convolved_backward, by_member=False
    ),
}
"""torch's operation -> ours."""


@dataclass(frozen=True)
class Operand:
    """A tensor of a recording, without its values; those of two nodes may be equal."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    node: fx.Node = field(compare=False, repr=False)

    def example(self, most: int) -> torch.Tensor:
        """One like it, of ones (a draw would advance the user's streams), of so many members at most."""
        shape = (min(self.shape[0], most), *self.shape[1:]) if len(self.shape) > 2 else self.shape
        return torch.empty_strided(shape, self.stride, dtype=self.dtype).fill_(1)

    def one(self) -> torch.Tensor:
        """One number, of as many dimensions."""
        return torch.ones((1,) * len(self.shape), dtype=self.dtype)


def with_ours(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A recording that computes the same, within rounding, by the faster of two kernels for each operation."""
    known = [node for node in module.graph.nodes if node.target in OURS]
    if not known or any(value.device.type != "cpu" for value in inputs):
        return module
    operands = operands_of(module.graph, inputs)
    ours = {node: given for node in known if (given := _served(node, operands)) and _is_faster(node, given, operands)}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
        if node in ours:
            args = tuple(new[one.node] if isinstance(one, Operand) else one for one in ours[node])
            new[node].target, new[node].args, new[node].kwargs = OURS[node.target].run, args, {}
    return graph_module(module, graph)


def operands_of(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> dict[fx.Node, Operand]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    strides = {node: node.meta["kind"][1] for node in graph.nodes if "kind" in node.meta}
    strides |= {node: value.stride() for node, value in zip(placeholders, inputs, strict=True)}
    dtypes = {node: node.meta.get("dtype", torch.float32) for node in graph.nodes}
    dtypes |= {node: value.dtype for node, value in zip(placeholders, inputs, strict=True)}
    return {
        node: Operand(tuple(shape), strides.get(node) or _dense(shape), dtypes[node], node)
        for node, shape in shapes(graph, inputs).items()
    }


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _served(node: fx.Node, operands: dict[fx.Node, Operand]) -> tuple[Any, ...] | None:
    """What ours takes, if it does what torch's does here: in such a dtype, with results that lie alike."""
    if any(one not in operands for one in node.all_input_nodes):
        return None  # part of an operation's several results
    own = OURS[node.target]
    results = [one for one in node.users if one.target is operator.getitem] or [node]
    if any(one.meta.get("dtype") not in own.dtypes for one in results):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
    given = own.given(*args, **kwargs)
    if given is None or not available(own.kernel):
        return None
    meta = [
        torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta") if _is_tensor(one) else one
        for one in given
    ]
    made = own.run(*meta)
    alike = all((made[one.args[1]] if one is not node else made).stride() == operands[one].stride for one in results)
    return given if alike else None


def _is_faster(node: fx.Node, given: tuple[Any, ...], operands: dict[fx.Node, Operand]) -> bool:
    args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
    own = OURS[node.target]

    def timed_on(example: Callable[[Operand], torch.Tensor]) -> list[float]:
        theirs, ours = ([example(one) if _is_tensor(one) else one for one in called] for called in (args, given))
        return timed(functools.partial(node.target, *theirs, **kwargs), functools.partial(own.run, *ours))

    def seconds() -> list[float]:
        most = MOST
        if own.by_member:
            most = max(1, min(MOST // max(1, math.prod(one.shape[1:])) for one in given if _is_tensor(one)))
        idle = timed_on(Operand.one) if own.of_one else [0.0, 0.0]
        return [taken - called for taken, called in zip(timed_on(lambda one: one.example(most)), idle, strict=True)]

    return is_faster((str(node.target), args, kwargs), seconds)


def is_faster(key: Any, seconds: Callable[[], Sequence[float]]) -> bool:
    """Whether ours is: `seconds` measures theirs and ours, once a machine for each `key`."""
    path = kept_at((key, torch.get_num_threads())).with_suffix(".json")
    faster = get(path, lambda known: bool(known["faster"]))
    if faster is None:
        theirs, ours = seconds()
        faster = ours < GAIN * theirs
        put(path, {"faster": faster, "seconds": [theirs, ours]})
    return faster


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Operand)


def timed(*runs: Run) -> list[float]:
    """The least seconds of each, taken in turns."""
    best, rounds = [float("inf")] * len(runs), 0
    quiet()
    end = time.perf_counter() + AT_LEAST
    with torch.no_grad():
        while rounds < TIMES or time.perf_counter() < end:
            rounds += 1
            for k, run in enumerate(runs):
                start = time.perf_counter()
                run()
                best[k] = min(best[k], time.perf_counter() - start)
    return best
