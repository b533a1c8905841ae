"""A recording rewritten to fewer views, and in another memory order: the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

import memberwise
from memberwise import optim
from memberwise.capture import compile, layout
from memberwise.capture.layout import channels_last_is_faster
from memberwise.capture.views import with_fewer_views
from tests.parity.twins import assert_same

_aten = torch.ops.aten

KINDS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(216, 2)
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 2)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Flatten(2), nn.Linear(36, 2)
    ),
}  # fmt: skip


def _images(kind: str) -> tuple[memberwise.Stack[nn.Module], Any]:
    stack = memberwise.build(KINDS[kind], seeds=range(4), dtype=torch.float64)
    opt = optim.SGD(stack.parameters(), lr=0.1, momentum=0.9)

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        losses = stack(x).flatten(1).square().mean(1)
        losses.sum().backward()
        opt.step()
        return losses

    return stack, step


def recorded(function: Any, *shapes: tuple[int, ...]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
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
    module, inputs = recorded(function, *shapes)
    rewritten = with_fewer_views(module, inputs)
    own, others = [x.clone() for x in inputs], [x.clone() for x in inputs]
    expected, found = module(*own), rewritten(*others)
    for ours, theirs in zip((*found, *others), (*expected, *own), strict=True):
        assert torch.equal(ours, theirs) and ours.shape == theirs.shape
    views = {"view", "reshape", "unsqueeze", "transpose", "_unsafe_view"}
    count = sum(str(node.target).split(".")[1] in views for node in rewritten.graph.nodes if node.op == "call_function")
    assert count <= left, rewritten.code


COPIED: dict[str, tuple[Any, int]] = {
    # what is done to two tensors of shape (4, 6), and how many copies are left
    "between": (lambda x, y: (x * y).unsqueeze(0).clone().squeeze(0).exp(), 0),
    "returned": (lambda x, y: x.clone(), 1),
    "of what is written then": (lambda x, y: (old := x.clone(), x.add_(1.0), old.exp())[-1], 1),
    "of what is written then, by a part": (lambda x, y: (old := x.clone(), x[0].add_(1.0), old.exp())[-1], 1),
    "written then": (lambda x, y: (own := x.clone(), own[0].add_(1.0), x.exp() + own)[-1], 1),
}


@pytest.mark.parametrize("name", COPIED)
def test_copies_stay_where_they_tell_two_tensors_apart(name: str) -> None:
    function, left = COPIED[name]
    module, inputs = recorded(function, (4, 6), (4, 6))
    rewritten = with_fewer_views(module, inputs, copies=True)
    own, others = [x.clone() for x in inputs], [x.clone() for x in inputs]
    expected, found = module(*own), rewritten(*others)
    for ours, theirs in zip((*found, *others), (*expected, *own), strict=True):
        assert torch.equal(ours, theirs)
    assert sum(node.target is _aten.clone.default for node in rewritten.graph.nodes) == left, rewritten.code
    assert found[0].data_ptr() not in {x.data_ptr() for x in others}


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


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("kind", ["cnn", "pooled", "depthwise"])
def test_a_step_with_the_channels_last_is_the_same(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, operation by operation, by the recording as it was, and by that in another memory order."""
    found = []
    for last in (False, True):
        monkeypatch.setattr(layout, "channels_last_is_faster", lambda graph, inputs, last=last: last)
        monkeypatch.setattr(layout, "get", lambda path, made_of: None)
        stack, step = _images(kind)
        captured = compile(step, chunk=chunk, backend="fx")
        generator = torch.Generator().manual_seed(0)
        losses = [captured(torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)) for _ in range(5)]
        run: Any = captured.captured.programs[0].run  # type: ignore[attr-defined] # of a function
        while not hasattr(run, "__self__"):  # the program of chunks, or of a graph
            run = run.run
        graph = str(run.__self__.graph)
        assert ("torch.channels_last" in graph) == last
        grads = {name: param.grad for name, param in stack.named_parameters()}
        found.append(({"losses": losses, "grads": grads}, stack.state_dict()))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_same(ours, theirs, kind, exact=False)
    for grad, other in zip(found[0][0]["grads"].values(), found[1][0]["grads"].values(), strict=True):
        assert grad.stride() == other.stride()
