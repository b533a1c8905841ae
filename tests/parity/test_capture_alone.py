"""A recording for one member, rewritten to fewer views, and compiled in another memory order: the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from memberwise.capture import chunker, layout
from memberwise.capture.alone import alone
from memberwise.capture.layout import channels_last_is_faster

_aten = torch.ops.aten


def _recorded(function: Any, *shapes: tuple[int, ...]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """What it does to such tensors, operation by operation, with the kinds that the recorder notes."""
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    module = make_fx(function)(*inputs)
    graph = fx.Graph()
    out = graph.graph_copy(module.graph, {})
    graph.output(tuple(out) if isinstance(out, list | tuple) else (out,))
    module = fx.GraphModule(module, graph)
    ShapeProp(module).propagate(*(x.clone() for x in inputs))
    for node in module.graph.nodes:
        known = node.meta.get("tensor_meta")
        if node.op == "call_function" and known is not None:
            node.meta["kind"] = known.shape, known.stride
    return module, inputs


def _folded(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).reshape(4, 6, 2, 2)


STEPS: dict[str, tuple[Any, list[tuple[int, ...]], int]] = {
    # what is done, to tensors of which shapes, and how many views are left
    "between folds": (lambda x: _folded(x.reshape(1, 4, 6, 2, 2).exp().sin()), [(4, 6, 2, 2)], 0),
    "two folded": (lambda x, y: _folded(x.unsqueeze(0) * y.unsqueeze(0)), [(4, 6, 2, 2)] * 2, 0),
    "one not folded": (lambda x, y: x.unsqueeze(0) * y, [(4, 6), (1, 4, 6)], 1),
    "other axes": (lambda x: x.unsqueeze(0).transpose(1, 2).exp(), [(4, 4)], 2),
    "a result in another form": (lambda x: x.unsqueeze(0).exp(), [(4, 6)], 1),
    "summed": (lambda x: x.unsqueeze(0).sum(1), [(4, 6)], 1),
    "written in place": (lambda x: x.unsqueeze(0).add_(1.0).exp() + x, [(4, 6)], 2),
    "broadcast": (lambda x, y: x.unsqueeze(0) + y.unsqueeze(0), [(4, 6), (1, 6)], 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_fewer_views_compute_the_same(name: str) -> None:
    function, shapes, left = STEPS[name]
    module, inputs = _recorded(function, *shapes)
    rewritten = alone(module, inputs)
    own, others = [x.clone() for x in inputs], [x.clone() for x in inputs]
    expected, found = module(*own), rewritten(*others)
    for ours, theirs in zip((*found, *others), (*expected, *own), strict=True):
        assert torch.equal(ours, theirs) and ours.shape == theirs.shape
    views = {"view", "reshape", "unsqueeze", "transpose", "_unsafe_view"}
    count = sum(str(node.target).split(".")[1] in views for node in rewritten.graph.nodes if node.op == "call_function")
    assert count <= left, rewritten.code


def _convolving(groups: int = 1) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    out = graph.call_function(_aten.convolution.default, args)
    out.meta["kind"] = (torch.Size((2, 4, 5, 5)), (100, 25, 5, 1))
    graph.output((graph.call_function(_aten.convolution.default, (out, *args[1:])),))
    return fx.GraphModule({}, graph), [torch.randn(2, 4, 5, 5), torch.randn(4, 4 // groups, 3, 3)]


@pytest.mark.parametrize(("last", "faster"), [(0.5, True), (0.69, True), (0.71, False), (2.0, False)])
def test_convolutions_are_timed_in_both_orders(last: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(function: Any, args: Any, order: torch.memory_format) -> float:
        asked.append((tuple(args[0]), order))
        return last if order is torch.channels_last else 1.0

    monkeypatch.setattr(layout, "_seconds", seconds)
    assert channels_last_is_faster(*_convolving()) == faster
    assert asked == [((2, 4, 5, 5), torch.contiguous_format), ((2, 4, 5, 5), torch.channels_last)], "once each kind"


def test_the_timing_draws_nothing() -> None:
    step = _convolving(groups=4)
    before = torch.get_rng_state()
    channels_last_is_faster(*step)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_convolutions_have_no_order() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    assert not channels_last_is_faster(fx.GraphModule({}, graph), [torch.ones(2)])


@pytest.mark.parametrize("faster", [True, False])
def test_chunks_of_one_are_compiled_in_the_faster_order(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from memberwise.capture import compile
    from tests.parity.test_capture import INPUTS, training

    seen = []
    monkeypatch.setattr(chunker, "channels_last_is_faster", lambda graph, inputs: faster)
    of = chunker.Chunker.of
    monkeypatch.setattr(
        chunker.Chunker, "of", lambda self, prepared, lanes: seen.append(prepared) or of(self, prepared, lanes)
    )
    for size in (1, 2):
        captured = compile(training("cnn", "sgd", members=4).step, backend="fx", chunk=size)
        for _ in range(4):
            captured(INPUTS["cnn"][1]())
    assert [(each.size, each.channels_last) for each in seen] == [(1, faster), (2, False)]
