"""What a call writes to tensors from outside, and what it returns of them: autograd outside knows of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import memberwise
from memberwise.testing.tolerance import assert_equal

M = 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda state, w: state.mul_(w.sum()),
    "copied": lambda state, w: state.copy_(w.expand_as(state)),
    "a part": lambda state, w: state[1:].mul_(w[:1]),
    "by index": lambda state, w: state.__setitem__(0, w.sum()),
    "twice": lambda state, w: (state[0].copy_(w.sum()), state.mul_(2.0)),
    "by a layer": lambda state, w: nn.functional.relu(state, inplace=True) * w.sum(),
    "no gradient": lambda state, w: state.zero_(),
}


@pytest.mark.parametrize("grows", [True, False], ids=["from a graph", "plain"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_has_its_gradient_outside(name: str, dim: int, grows: bool) -> None:
    def after(run: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
        w, source = numbers(M, 4).requires_grad_(), numbers(*((M, 4, 4) if dim == 0 else (4, M, 4)), seed=1)
        source.requires_grad_(grows)
        state = run(source * 1.0, w)
        ((state * numbers(*state.shape, seed=2)).sum() + w.sum()).backward()
        return [state.detach(), w.grad, source.grad]

    def loop(state: Tensor, w: Tensor) -> Tensor:
        rows = [row * 1.0 for row in state.unbind(dim)]
        for row, own in zip(rows, w, strict=True):
            WRITES[name](row, own)
        return torch.stack(rows, dim)

    def stacked(state: Tensor, w: Tensor) -> Tensor:
        memberwise.vmap(lambda s, w: [WRITES[name](s, w), None][1], in_dims=(dim, 0), out_dims=None)(state, w)
        return state

    for ours, theirs in zip(after(stacked), after(loop), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or assert_equal(ours, theirs) is None


def test_a_write_inside_two_calls() -> None:
    w = numbers(2, M, 4).requires_grad_()
    state = torch.zeros(2, M, 4, dtype=torch.float64)
    inner = memberwise.vmap(lambda s, w: s.copy_(2 * w))
    memberwise.vmap(inner)(state, w)
    state.sum().backward()
    assert_equal(w.grad, torch.full_like(w, 2.0))


def test_a_leaf_is_not_written_as_alone() -> None:
    w = numbers(M, 4).requires_grad_()
    before = w.detach().clone()
    words = "leaf Variable that requires grad is being used in an in-place operation.*MW212"
    with pytest.raises(RuntimeError, match=words):
        memberwise.vmap(lambda t: t.mul_(2.0))(w)
    assert torch.equal(w, before)


def test_what_autograd_is_not_to_see_is_no_write_to_its_graph() -> None:
    w = numbers(M, 4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memberwise.vmap(lambda t: t.detach().mul_(2.0).sum())(w)
    assert_equal(w.detach(), 2 * numbers(M, 4))
    assert w.is_leaf


def test_a_tensor_that_all_share_is_written_once_and_its_gradient_counts_once() -> None:
    scale, source = numbers(M).requires_grad_(), numbers(4, seed=1).requires_grad_()
    state = source * 1.0
    out = memberwise.vmap(lambda s, w: s.mul_(3.0) * w, in_dims=(None, 0))(state, scale)
    assert_equal(state.detach(), 3 * source.detach())
    (out.sum() + state.sum()).backward()
    assert_equal(source.grad, torch.full_like(source, 3.0) * (1 + scale.detach().sum()))


class Keeps(nn.Module):
    """Keeps what it has computed in a buffer, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("state", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.state.copy_(self.weight * x + self.state.detach())
        return self.state * 2.0


def test_a_buffer_that_a_forward_writes_keeps_its_graph() -> None:
    stack, x = memberwise.build(Keeps, seeds=range(M)), numbers(4)
    models = stack.unstack()
    stack(x), stack(x)
    assert stack.state.requires_grad
    stack.state.sum().backward()
    for i, model in enumerate(models):
        model(x), model(x)
        model.state.sum().backward()
        assert_equal(stack.weight.grad[i], model.weight.grad)
        assert_equal(stack.state[i].detach(), model.state.detach())


# -- what leaves


def test_what_is_returned_as_it_came_is_the_same_object() -> None:
    x, w = numbers(M, 4), numbers(M, 4).requires_grad_()
    assert memberwise.vmap(lambda t: t)(x) is x
    assert memberwise.vmap(lambda t: t)(w) is w
    assert memberwise.vmap(lambda t: t.mul_(2.0))(x) is x
    assert memberwise.vmap(memberwise.vmap(lambda t: t.mul_(2.0)))(x) is x
    assert memberwise.vmap(lambda t: t, out_dims=1)(x)._base is x
    outer = memberwise.vmap(lambda t: memberwise.vmap(lambda u: t)(torch.ones(2)))(x)
    assert torch.equal(outer, x.unsqueeze(1).expand(M, 2, 4))


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda t: t.t(),
    "a part": lambda t: t[1:, ::2],
    "flat": lambda t: t.reshape(-1),
    "expanded": lambda t: t[:, None].expand(-1, 5, -1),
    "pairs": lambda t: torch.view_as_complex(t.view(-1, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_an_input_is_one_outside(name: str) -> None:
    x = numbers(M + 1, 4, 6)[1:]
    out = memberwise.vmap(VIEWS[name])(x)
    expected = torch.stack([VIEWS[name](row) for row in x])
    assert torch.equal(out, expected)
    assert out._base is x._base
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    x.mul_(scale)
    assert out.requires_grad


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_what_all_share_is_one_outside(name: str) -> None:
    x = numbers(M + 1, 4, 6)
    out = memberwise.vmap(lambda t, _: VIEWS[name](t), in_dims=(None, 0))(x[1], torch.ones(2))
    assert torch.equal(out, torch.stack([VIEWS[name](x[1])] * 2))
    assert out._base is x


def test_bits_read_as_another_type() -> None:
    x = torch.view_as_complex(torch.randn(M, 4, 2))
    for kind in (torch.int32, torch.int64, torch.float64, torch.uint8):
        assert torch.equal(memberwise.vmap(lambda t, kind=kind: t.view(kind))(x), x.view(kind))


def test_complex_inputs_as_pairs_of_numbers() -> None:
    x = torch.view_as_complex(numbers(M, 4, 2))
    out = memberwise.vmap(lambda t: (torch.view_as_real(t), t.real, t[1:].imag))(x)
    for ours, theirs in zip(out, (torch.view_as_real(x), x.real, x[:, 1:].imag), strict=True):
        assert torch.equal(ours, theirs)
        assert ours._base is x._base


class Reversed(Function):
    """A view whose gradient is not a view's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def hooked(x: Tensor) -> Tensor:
    part = x[1:]
    part.register_hook(lambda grad: 5.0 * grad)
    return part.t()


def hooked_itself(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: 5.0 * grad)
    return x


@pytest.mark.parametrize("function", [*VIEWS.values(), Reversed.apply, hooked, hooked_itself])
def test_a_view_with_a_graph_has_the_members_gradient(function: Callable[[Tensor], Tensor]) -> None:
    """It is a copy, as the results of a loop put together are: a write to it is none to the input."""
    gradients = []
    for run in (memberwise.vmap(function), lambda x: torch.stack([function(row) for row in x])):
        w = numbers(M, 4, 6).requires_grad_()
        x = w * 1.0
        out = run(x)
        if out is not x:
            out.mul_(3.0)
        (out.abs().sum() + x.sum()).backward()
        gradients.append(w.grad)
    assert_equal(*gradients)


# -- places in a storage


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.as_strided((2,), (1,), t.storage_offset() + 1),
        lambda t: t[1:].as_strided((2,), (1,), t.storage_offset()),
        lambda t: t[1:].as_strided((2,), (1,)),
        lambda t: torch.as_strided_copy(t[1:], (2,), (1,), t.storage_offset()),
        lambda t: t[1:].as_strided_scatter(torch.tensor([-1.0]), (1,), (1,)),
        lambda t: t[1:].as_strided_scatter(torch.tensor([-1.0]), (1,), (1,), t[1:].storage_offset() + 1),
        lambda t: (t * 1)[1:].as_strided((2,), (1,), 2),
    ],
)
def test_a_place_in_the_storage_of_an_input_that_does_not_begin_there(function: Any, begin: int) -> None:
    x = torch.arange(20.0)[begin : begin + 16].view(4, 4)
    assert torch.equal(memberwise.vmap(function)(x), torch.stack([function(row) for row in x]))
    shared = memberwise.vmap(lambda t, one: function(t) * one, in_dims=(None, 0))(x[0], torch.ones(2))
    assert torch.equal(shared[1], function(x[0]))
