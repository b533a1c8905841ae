"""Rules within rules: a call inside a call, where a rule's stacked tensors are members of the outer call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from tests.parity.loops import check, numbers
from tests.parity.rule_case import whole

pytestmark = pytest.mark.usefixtures("composites")


def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = F.conv2d(x, weight, padding=1)
    out = F.batch_norm(out, None, None, weight[:, 0, 0, 0], weight[:, 0, 1, 1], training=True)
    return F.max_pool2d(F.relu(out), 2).flatten(1)


def recurrent(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    start = torch.zeros(1, 2, 3, dtype=x.dtype)
    out, hidden, _ = torch.lstm(x, (start, start), weights, True, 1, 0.0, True, False, False)
    return torch.cat([out, hidden])


PROGRAMS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(4, 5), (3, 5), (3,)]),
    "narrow linear": (F.linear, [(9, 5), (3, 5), (3,)]),
    "convolution": (convolved, [(2, 3, 4, 4), (8, 3, 3, 3)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, [4], w, b), [(2, 3, 4), (4,), (4,)]),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), [(2, 2, 4, 3)] * 2),
    "lstm": (recurrent, [(4, 2, 5), (12, 5), (12, 3), (12,), (12,)]),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.arange(9) % 4, label_smoothing=0.1), [(9, 4)]),
    "mse": (F.mse_loss, [(3, 4), (3, 4)]),
    "embedding": (lambda table: F.embedding(torch.tensor([[1, 3], [0, 1]]), table), [(4, 3)]),
    "bag": (lambda table: F.embedding_bag(torch.tensor([[1, 3], [0, 1]]), table), [(4, 3)]),
    "softmax": (lambda x: F.softmax(x, -1), [(9, 4)]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_call_inside_a_call(name: str) -> None:
    """Inside, members differ in the first argument alone, so that stacked meets shared on both levels."""
    program, shapes = PROGRAMS[name]
    first, *rest = (numbers(2, *shape, seed=k) for k, shape in enumerate(shapes))
    first = numbers(2, 3, *shapes[0], seed=7)

    def inner(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return memberwise.vmap(program, (0, *(None for _ in rest)))(first, *rest)

    def looped(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.stack([program(own, *rest) for own in first])

    check(inner, first, *rest)
    ours = memberwise.vmap(inner)(first, *rest)
    alone = torch.stack([looped(first[i], *(one[i] for one in rest)) for i in range(2)])
    torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-10)


def test_classes_of_both_levels() -> None:
    labels = whole(4, 2, 3, 9)

    def inner(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return memberwise.vmap(F.cross_entropy)(x, labels)

    check(inner, numbers(2, 3, 9, 4), labels)
