"""A step that runs as one graph of launches, which knows addresses only, is the step.

On a CPU `AddressTape` does what a CUDA graph does; `MEMBERWISE_PLAN=graph` runs all tests of captured steps on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from memberwise.capture import step
from memberwise.capture.graphed import Graphed
from tests import plans
from tests.parity.test_capture import INPUTS, KINDS, check, training


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graphed]]:
    """The programs that run as graphs in a test."""
    made: list[Graphed] = []

    def graphed(run: Any, inputs: Any) -> Any:
        made.append(plans.graphs(run, inputs))
        return made[-1]

    monkeypatch.setattr(step, "graphed", graphed)
    yield made


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_the_same(kind: str, graphs: list[Graphed]) -> None:
    check(kind, lambda: training(kind, "adamw"), steps=12)
    assert [graph.why_not for graph in graphs] == [""]
    assert 1 <= graphs[0].made <= 3


def _program(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """State += x; the new state's square, and its sum."""
    state, x = inputs
    state += x
    return [state.square(), state.sum()]


def _expected(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    own = state.clone()
    return own, _program(own, x)


def _same(graph: Graphed, state: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """What it returns and writes now, compared."""
    after, expected = _expected(state, x)
    count = state._version
    found = graph(state, x)
    assert torch.equal(state, after)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert state._version > count, "autograd has to know of the write"
    return list(found)


def test_inputs_that_stay_and_results_that_go_are_not_copied() -> None:
    graph, state, x = Graphed(_program, plans.AddressTape), torch.arange(3.0), torch.ones(3)
    _same(graph, state, x)
    (first, _) = _same(graph, state, x)
    address = first.data_ptr()
    del first, _
    for _ in range(3):
        assert _same(graph, state, x)[0].data_ptr() == address
    assert graph.made == 1


def test_what_lies_elsewhere_is_copied_from_then_on() -> None:
    graph, state = Graphed(_program, plans.AddressTape), torch.arange(3.0)
    batches = [torch.randn(3) for _ in range(6)]
    for x in batches:
        _same(graph, state, x)
    assert graph.made == 2
    for _ in range(3):  # state that moves is copied back as well
        state = state.clone()
        _same(graph, state, batches[0])
    assert graph.made == 3


@pytest.mark.parametrize("hold", [lambda out: out, lambda out: out.view(-1)[:1], lambda out: out.numpy()])
def test_results_that_are_held_keep_their_values(hold: Callable[[torch.Tensor], Any]) -> None:
    graph, state, x = Graphed(_program, plans.AddressTape), torch.arange(3.0), torch.ones(3)
    held, values = [], []
    for _ in range(5):
        square, total = _same(graph, state, x)
        values.append(square.clone())
        held.append(hold(square))
        del square, total
    for own, value in zip(held, values, strict=True):
        assert torch.equal(torch.as_tensor(own), hold(value) if isinstance(own, torch.Tensor) else value)
    assert graph.made == 2


@pytest.mark.parametrize("make", [lambda: torch.arange(3.0).expand(2, 3), lambda: torch.arange(8.0).view(2, 4)[:, ::2]])
def test_inputs_in_any_memory_order(make: Callable[[], torch.Tensor]) -> None:
    seen = []

    def program(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append(x.stride())
        return [x * 2]

    graph = Graphed(program, plans.AddressTape)
    held = [make() for _ in range(4)]  # so that each lies elsewhere
    for x in held:
        assert torch.equal(graph(x)[0], x * 2)
    assert set(seen) == {make().stride()}
    assert graph.made == 2


def test_a_program_that_cannot_be_a_graph_runs_as_it_is() -> None:
    def refusing(run: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graph, state, x = Graphed(_program, refusing), torch.arange(3.0), torch.ones(3)
    for _ in range(3):
        _same(graph, state, x)
    assert (graph.made, graph.why_not) == (0, "operation not permitted when stream is capturing")


def test_a_result_in_the_memory_of_an_input_is_that_input() -> None:
    def program(state: torch.Tensor) -> list[torch.Tensor]:
        state += 1
        return [state.view(-1)]

    graph, state = Graphed(program, plans.AddressTape), torch.zeros(2)
    for k in range(1, 4):
        (out,) = graph(state)
        assert out.data_ptr() == state.data_ptr() and out.tolist() == [k, k]
    assert graph.why_not == "a result lies in the memory of an input"


def test_gradients_are_the_results_last_left_unless_somebody_holds_them(graphs: list[Graphed]) -> None:
    """A gradient is as large as its parameter: none is copied that only `.grad` holds."""
    world = training("mlp", "sgd")
    captured = step.CapturedStep(world.step, backend="fx")
    addresses, kept, values = [], [], []
    batches = [INPUTS["mlp"][1]() for _ in range(9)]  # all held, so that each lies elsewhere
    for k, x in enumerate(batches):
        captured((x,), {})
        grad = next(iter(world.stack.parameters())).grad
        addresses.append(grad.data_ptr())
        if k > 6:
            kept.append(grad)
            values.append(grad.clone())
        del grad
    assert len(set(addresses[5:8])) == 1
    assert addresses[8] != addresses[7]
    assert all(map(torch.equal, kept, values))
    assert graphs[0].made == 3
