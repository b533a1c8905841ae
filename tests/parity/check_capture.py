"""The captured step, compiled: 50 steps of each kind of model. Minutes of compiling, so it is asked for by name:

pytest tests/parity/check_capture.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memberwise._torch.inductor import begin_graph
from memberwise.capture import compile, outline
from memberwise.testing.tolerance import assert_equal
from tests.parity.test_capture import INPUTS, check, training
from tests.parity.test_capture_regions import MODELS, recorded, step_of
from tests.parity.twins import assert_same


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", INPUTS)
def test_fifty_compiled_steps(kind: str, optimizer: str) -> None:
    check(kind, lambda: training(kind, optimizer), backend="inductor")


@pytest.mark.parametrize("kind", INPUTS)
def test_fifty_compiled_steps_without_seeds(kind: str) -> None:
    check(kind, lambda: training(kind, "adamw", seeded=False), backend="inductor")


@pytest.mark.parametrize("chunk", [2, 3])
def test_compiled_steps_in_chunks(chunk: int) -> None:
    """Members left over are a smaller chunk, compiled for itself."""
    captured = compile(training("mlp", "adamw", members=5).step, chunk=chunk)
    twin = training("mlp", "adamw", members=5)
    for _ in range(6):
        x = INPUTS["mlp"][1]()
        assert_same(captured(x), twin.step(x), "returned", exact=False)
    assert captured.captured.plans == [f"{chunk} at a time, as told"]


@pytest.fixture
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", MODELS)
def test_three_steps_by_compiled_regions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the recording, operation by operation: in float32 a gradient that is rounding alone makes Adam differ."""
    monkeypatch.setattr(outline, "CALL", 0.0)  # cut small steps, too
    program = recorded(*step_of(name))
    with torch.no_grad():
        end, count = outline.by_regions(program.graph, lambda: program.copies(program.values), begin_graph)
        run = end()
        assert count > 1
        whole, cut = program.copies(program.values), program.copies(program.values)
        for _ in range(3):
            expected, found = program.graph.forward(*whole), run(*cut)
            for ours, theirs in zip((*found, *cut), (*expected, *whole), strict=True):
                assert_equal(ours, theirs)
