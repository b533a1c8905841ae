"""Products and what is added to them, taken apart: the same step, within rounding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.capture import compile
from memberwise.capture.program import Program
from memberwise.capture.unfused import PRODUCTS, unfused
from memberwise.construction import build
from tests.parity.test_capture import INPUTS, training
from tests.parity.test_capture_regions import assert_computes_the_same, recorded


def _names(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in unfused(program.graph).graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("kind", ["mlp", "transformer", "lstm"])
def test_the_same_step(kind: str) -> None:
    program = recorded(training(kind, "sgd").step, INPUTS[kind][1]())
    before = Counter(str(node.target) for node in program.graph.graph.nodes if node.op == "call_function")
    after = _names(program)
    sums = sum(before[str(op)] for op in PRODUCTS)
    assert sums and not any(after[str(op)] for op in PRODUCTS)
    assert after["aten.add.Tensor"] - before["aten.add.Tensor"] == sums
    assert_computes_the_same(program, unfused(program.graph))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_half_precision_they_stay(dtype: torch.dtype) -> None:
    """A product that is rounded, and then added to, is not what the library's call gives."""
    models = build(lambda: nn.Linear(4, 4), seeds=range(3), dtype=dtype)
    optimizer = optim.SGD(models.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        losses = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))(models, x)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    names = _names(recorded(step, torch.randn(5, 4, dtype=dtype)))
    assert bool(names["aten.baddbmm.default"]) == (dtype is torch.bfloat16)


def test_a_product_with_factors_of_its_own_stays() -> None:
    """`beta` and `alpha` are other operations."""
    weight = torch.randn(4, 4)
    captured = compile(lambda x: torch.addmm(x, x, weight, beta=0.5, alpha=2.0), backend="fx")
    x = torch.randn(4, 4)
    for _ in range(2):
        captured(x)
    assert _names(captured.captured.programs[0]) == {"aten.addmm.default": 1}
