"""Lesson: tensors made inside are equal in all members until a member's value is written; then all aliases follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import memberwise
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


def alias_before(x: torch.Tensor) -> Any:
    base = torch.zeros(2, 4, dtype=x.dtype)
    row, column, flat = base[1], base[:, 2], base.view(-1)
    base[0] = x
    return base, row, column, flat


def through_alias(x: torch.Tensor) -> Any:
    base = torch.ones(2, 4, dtype=x.dtype)
    row = base[1]
    row.mul_(x)
    return base, row, base.t()


def through_deep_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(3, 4, 2, dtype=x.dtype)
    view = base.transpose(0, 2)[1].t()[1:].reshape(-1)[2:6]
    other = base[2]
    view += x
    return base, view, other


def by_detached_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(4, dtype=x.dtype)
    view = base.detach()
    view.copy_(x.detach())
    return base + x, view


def with_offset(x: torch.Tensor) -> Any:
    base = torch.arange(12, dtype=x.dtype)[3:].view(3, 3)
    middle = base[1:, 1:]
    middle.fill_diagonal_(7.0)
    middle[0].add_(x[:2])
    return base, middle


def strided_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(12, dtype=x.dtype)
    window = base.as_strided((3, 4), (2, 1), 1)
    base[:4] = x
    return window.clone(), base


def dtype_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(4, dtype=torch.complex128)
    pairs = torch.view_as_real(base)
    pairs[:, 0] = x
    return pairs.clone(), base.real, base.imag


def complex_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(4, 2, dtype=x.dtype)
    whole = torch.view_as_complex(base)
    base[:, 1] = x
    return torch.view_as_real(whole).clone(), whole.abs()


def bits_alias(x: torch.Tensor) -> Any:
    base = torch.zeros(4, dtype=torch.float32)
    bits = base.view(torch.int32)
    base.copy_(x.detach())
    return bits.clone(), base * x


def expanded_source(x: torch.Tensor) -> Any:
    base = torch.zeros(1, dtype=x.dtype)
    wide = base.expand(4)
    base += x.sum()
    return wide * x, base


def wider_dtype(x: torch.Tensor) -> Any:
    base = torch.zeros(4, dtype=torch.int64)
    base += (x.detach() > 0).long()
    return base, base * x


def loop_of_writes(x: torch.Tensor) -> Any:
    out = torch.empty(4, 4, dtype=x.dtype)
    for i in range(4):
        out[i] = x * i
        out[i, i] += 1.0
    return out


def list_of_fresh(x: torch.Tensor) -> Any:
    parts = [torch.zeros(4, dtype=x.dtype) for _ in range(3)]
    for k, part in enumerate(parts):
        part += x**k
    return torch.stack(parts), parts


def written_by_index(x: torch.Tensor) -> Any:
    out = torch.zeros(6, dtype=x.dtype)
    out[torch.tensor([0, 2, 2, 5])] = x
    out.index_add_(0, torch.tensor([1, 1, 3, 4]), x)
    out.scatter_add_(0, torch.tensor([5, 4, 0, 0]), 2 * x)
    out.index_put_((torch.tensor([3]),), x[:1], accumulate=True)
    return out


def written_by_mask(x: torch.Tensor) -> Any:
    out = torch.zeros(4, dtype=x.dtype)
    out[x > 0] = 1.0
    out.masked_fill_(x < -1, -5.0)
    torch.where(x > 0, out, x).clone()
    return out, out * x


def by_out_argument(x: torch.Tensor) -> Any:
    out = torch.zeros(4, dtype=x.dtype)
    alias = out[1:]
    with torch.no_grad():
        torch.add(x, 1.0, out=out)
    return out, alias * x[1:]


def like_others(x: torch.Tensor) -> Any:
    zeros, ones = torch.zeros_like(x), x.new_ones(2)
    full, copy = x.new_full((4,), 2.0), torch.empty_like(x).copy_(x)
    return zeros + x, ones * x[:2], full * x, copy


def plain_only(x: torch.Tensor) -> Any:
    """A fresh tensor no member's value reaches: equal in all members, and a plain result."""
    return torch.arange(5), torch.eye(2) @ torch.ones(2, 2), x * 1


def fresh_requires_grad(x: torch.Tensor) -> Any:
    w = torch.ones(4, dtype=x.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad((w * x).sum() ** 2, w, create_graph=True)
    return grad, w * x


def fresh_parameter(x: torch.Tensor) -> Any:
    w = torch.nn.Parameter(torch.ones(4, dtype=x.dtype))
    (w * x).pow(2).sum().backward()
    assert w.grad is not None and w.is_leaf
    return w.grad.clone(), x * 2


def swapped(x: torch.Tensor) -> Any:
    a, b = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    for step in range(3):
        a, b = b, a.add_(x * step)
    return a, b


def appended_state(x: torch.Tensor) -> Any:
    state = torch.zeros(2, 3, dtype=x.dtype)
    history = []
    for step in range(3):
        state[:, step] = state.sum() + x[step]
        history.append(state.clone())
    return torch.stack(history)


def resized_view(x: torch.Tensor) -> Any:
    base = torch.zeros(4, dtype=x.dtype)
    base.unsqueeze_(0)
    row = base[0]
    base.add_(x)
    base.squeeze_(0)
    return base, row


def scalar_promoted(x: torch.Tensor) -> Any:
    total = torch.tensor(0.0, dtype=x.dtype)
    for value in x:
        total += value**2
    return total


def foreach(x: torch.Tensor) -> Any:
    parts = [torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)]
    views = [part[:2] for part in parts]
    torch._foreach_add_(parts, [x, 2 * x])
    return parts, [view.detach() for view in views]  # alone, torch itself loses the gradient of such views


FRESH: list[Callable[[torch.Tensor], Any]] = [
    alias_before,
    through_alias,
    through_deep_alias,
    by_detached_alias,
    with_offset,
    strided_alias,
    dtype_alias,
    complex_alias,
    bits_alias,
    expanded_source,
    wider_dtype,
    loop_of_writes,
    list_of_fresh,
    written_by_index,
    written_by_mask,
    by_out_argument,
    like_others,
    plain_only,
    fresh_requires_grad,
    fresh_parameter,
    swapped,
    appended_state,
    resized_view,
    scalar_promoted,
    foreach,
]


@pytest.mark.parametrize("func", FRESH, ids=lambda f: f.__name__)
def test_fresh(func: Callable[[torch.Tensor], Any]) -> None:
    check(func, numbers(3, 4))


@pytest.mark.parametrize("func", FRESH, ids=lambda f: f.__name__)
def test_fresh_for_one_member(func: Callable[[torch.Tensor], Any]) -> None:
    check(func, numbers(1, 4))


def test_a_saved_fresh_tensor_that_is_written_fails_in_backward_as_alone() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        fresh = torch.ones(4, dtype=x.dtype)
        out = (x * fresh).sum()
        fresh.add_(x.detach())
        return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        func(numbers(4)).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        memberwise.vmap(func)(numbers(3, 4)).sum().backward()


DRAWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "rand": lambda x: torch.rand(4, dtype=x.dtype) * x,
    "randn": lambda x: torch.randn(2, 4, dtype=x.dtype) * x,
    "randn_like": lambda x: torch.randn_like(x) * x,
    "rand_like": lambda x: torch.rand_like(x) * x,
    "randint": lambda x: torch.randint(5, (4,)) * x,
    "randint low": lambda x: torch.randint(2, 50, (4,)) * x,
    "randint_like": lambda x: torch.randint_like(x, 9) * x,
    "randperm": lambda x: x[torch.randperm(4)],
    "bernoulli": lambda x: torch.bernoulli(torch.full((4,), 0.5, dtype=x.dtype)) * x,
    "bernoulli of a member": lambda x: torch.bernoulli(x.sigmoid().detach()) * x,
    "bernoulli_": lambda x: torch.empty(4, dtype=x.dtype).bernoulli_(0.5) * x,
    "normal": lambda x: torch.normal(0.0, 2.0, (4,), dtype=x.dtype) * x,
    "normal of members": lambda x: torch.normal(x, x.abs() + 0.1) + x,
    "normal_": lambda x: torch.empty(2, 4, dtype=x.dtype).normal_(1.0, 2.0) * x,
    "uniform_ through a view": lambda x: torch.zeros(3, 4, dtype=x.dtype).requires_grad_(False).uniform_()[1] * x,
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0) * x,
    "cauchy_": lambda x: torch.empty_like(x).cauchy_() * x,
    "log_normal_": lambda x: torch.empty_like(x).log_normal_() * x,
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3) * x,
    "random_": lambda x: torch.empty_like(x).random_(7) * x,
    "multinomial": lambda x: x[torch.multinomial(x.detach().softmax(0), 3)],
    "multinomial with replacement": lambda x: x[torch.multinomial(x.detach().softmax(0), 6, replacement=True)],
    "poisson": lambda x: torch.poisson(x.detach().exp()) * x,
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.4),
    "dropout twice": lambda x: torch.nn.functional.dropout(torch.nn.functional.dropout(x, 0.2), 0.2),
    "alpha_dropout": lambda x: torch.nn.functional.alpha_dropout(x, 0.4, training=True),
    "feature dropout": lambda x: torch.nn.functional.dropout1d(x.view(1, 4, 1).expand(1, 4, 3), 0.5),
    "rrelu": lambda x: torch.nn.functional.rrelu(x, training=True),
    "gumbel_softmax": lambda x: torch.nn.functional.gumbel_softmax(x, hard=True),
    "init": lambda x: torch.nn.init.xavier_normal_(torch.empty(4, 4, dtype=x.dtype)) @ x,
    "orthogonal": lambda x: torch.nn.init.orthogonal_(torch.empty(4, 4, dtype=x.dtype)) @ x,
    "a layer made inside": lambda x: torch.nn.Linear(4, 2, dtype=x.dtype)(x),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample((2,)),
    "gamma": lambda x: torch.distributions.Gamma(x.exp(), 1.0).rsample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(x.exp()).rsample(),
    "beta": lambda x: torch.distributions.Beta(x.exp(), x.exp() + 1).rsample(),
    "categorical": lambda x: x[torch.distributions.Categorical(logits=x.detach()).sample()],
    "binomial": lambda x: torch.distributions.Binomial(10, x.detach().sigmoid()).sample() * x,
    "many numbers": lambda x: torch.randn(40, dtype=x.dtype).sum() * x,
    "mixed": lambda x: torch.rand(1, dtype=x.dtype) * torch.randn(3, 1, dtype=x.dtype) * x * torch.rand(4),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_member_draws_from_its_own_stream(name: str) -> None:
    """Values, and how far the stream moves, are the lone run's."""
    check(DRAWS[name], numbers(3, 4), seeds=[3, 1, 4])
