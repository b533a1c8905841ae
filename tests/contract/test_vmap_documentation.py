"""The page of torch.vmap: each example and each stated condition, beside torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memberwise import functional_call, vmap
from memberwise.testing.tolerance import assert_equal
from memberwise.trees import tree_leaves

N, D, FEATURES = 2, 5, 3
x, y = torch.arange(10.0).view(N, D), torch.linspace(-1, 1, 10).view(N, D)

EXAMPLES: dict[str, Callable[[Any], Any]] = {
    "batched dot": lambda m: m(torch.dot)(x, y),
    "nested": lambda m: m(m(torch.dot))(x.view(N, 1, D), y.view(N, 1, D)),
    "in_dims of another dimension": lambda m: m(torch.dot, in_dims=1)(x, y),
    "one input without a map dimension": lambda m: m(torch.dot, in_dims=(0, None))(x, y[0]),
    "a Python struct": lambda m: m(lambda given: torch.dot(given["x"], given["y"]), in_dims=({"x": 0, "y": None},))(
        {"x": x, "y": y[1]}
    ),
    "out_dims": lambda m: m(lambda x: x**2, out_dims=1)(x),
    "one element of out_dims an output": lambda m: m(lambda x: (x, x.sum()), out_dims=(1, 0))(x),
    "keywords are not mapped": lambda m: m(lambda x, scale=4.0: x * scale)(x, scale=x),
    "keywords are accepted": lambda m: m(lambda x, scale=4.0: x * scale)(x),
    "chunks": lambda m: m(torch.dot, chunk_size=1)(x, y),
    "an in-place operation": lambda m: (lambda own: (m(lambda row: row.add_(1))(own), own))(x.clone()),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str) -> None:
    ours, theirs = (tree_leaves(EXAMPLES[name](m)) for m in (vmap, torch.vmap))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_equal(mine, expected)


def test_a_model_of_one_example_and_shared_weights() -> None:
    weights, examples = torch.randn(FEATURES, requires_grad=True), torch.randn(4, FEATURES)
    results = [m(lambda vector: vector.dot(weights).relu())(examples) for m in (vmap, torch.vmap)]
    assert_equal(*results)
    assert_equal(*(torch.autograd.grad(result.sum(), weights)[0] for result in results))


def test_a_whole_jacobian_in_one_call_of_grad() -> None:
    point = torch.randn(D, requires_grad=True)
    value = point**2
    rows = [torch.autograd.grad(value, point, v, retain_graph=True)[0] for v in torch.eye(D).unbind()]
    (jacobian,) = vmap(lambda v: torch.autograd.grad(value, point, v))(torch.eye(D))
    assert_equal(jacobian, torch.stack(rows))


def test_detached_parameters_give_gradients_that_are_not_tracked() -> None:
    """As the page of functional_call says of `torch.func.grad`."""
    model, given, t = torch.nn.Linear(3, 3), torch.randn(4, 3), torch.randn(4, 3)
    loss = lambda params: torch.nn.functional.mse_loss(functional_call(model, params, given), t)  # noqa: E731 # one line
    tracked = torch.func.grad(loss)(dict(model.named_parameters()))
    detached = torch.func.grad(loss)({name: value.detach() for name, value in model.named_parameters()})
    torch.nn.functional.mse_loss(model(given), t).backward()
    for name, value in model.named_parameters():
        assert_equal(tracked[name], value.grad)
        assert_equal(detached[name], value.grad)
        assert tracked[name].grad_fn is not None
        assert detached[name].grad_fn is None
