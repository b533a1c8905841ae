"""Lesson: levels nest, ours in ours, torch's in ours and ours in torch's; dispatch picks the innermost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(F.relu(F.linear(x, w)), (4,)).softmax(-1) * x.sum()


def twice(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, dtype=x.dtype)
    head = out[:2]
    out.add_(x * 2)
    out[2:].mul_(x[0])
    return out * head.sum()


INSIDE: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "ours": lambda x, w: vmap(layer, (0, None))(x, w),
    "ours over the weight": lambda x, w: vmap(layer, (None, 0))(x[0], w.expand(2, 4, 4)),
    "ours, other dims": lambda x, w: vmap(lambda v: v * w.sum(0), in_dims=1, out_dims=-1)(x.T),
    "ours in ours": lambda x, w: vmap(lambda row: vmap(lambda v: v.sin() * row.sum() * w.sum())(row))(x),
    "ours, fresh tensors": lambda x, w: vmap(twice)(x) @ w,
    "ours, fresh of the outer": lambda x, w: vmap(lambda row, z: (z + row).sin(), (0, None))(x, torch.zeros(4)) @ w,
    "ours, all shared but one": lambda x, w: vmap(lambda s: x * s @ w)(torch.arange(3.0, dtype=x.dtype)),
    "ours, chunked": lambda x, w: vmap(layer, (0, None), chunk_size=2)(x, w),
    "ours, a read": lambda x, w: vmap(lambda v: v * 2 if bool(v.detach().sum() > 0) else v * 3)(x) @ w,
    "ours, none shared": lambda x, w: vmap(torch.dot)(x @ w, x),
    "torch's": lambda x, w: torch.vmap(layer, (0, None))(x, w),
    "torch's over the weight": lambda x, w: torch.vmap(layer, (None, 0))(x[0], w.expand(2, 4, 4)),
    "torch's in torch's": lambda x, w: torch.vmap(lambda r: torch.vmap(lambda v: v.sin() * r.sum() * w.sum())(r))(x),
    "torch's in ours": lambda x, w: vmap(lambda r: torch.vmap(lambda v: v.sin() * r.sum() * w.sum())(r))(x),
    "ours in torch's": lambda x, w: torch.vmap(lambda r: vmap(lambda v: v.sin() * r.sum() * w.sum())(r))(x),
    "ours in torch's, reduced": lambda x, w: torch.vmap(lambda r: vmap(torch.dot)(r.expand(2, 4), w[:2]))(x),
    "func.grad of ours": lambda x, w: torch.func.grad(lambda v: vmap(layer, (0, None))(v, w).sin().sum())(x),
    "ours of func.grad": lambda x, w: vmap(torch.func.grad(lambda v: layer(v, w).sin().sum()))(x),
    "torch's of func.grad": lambda x, w: torch.vmap(torch.func.grad(lambda v: layer(v, w).sin().sum()))(x),
    "autograd.grad of ours": lambda x, w: torch.autograd.grad(
        vmap(layer, (0, None))(x, w).sin().sum(), w, create_graph=True
    )[0],
    "jvp of ours": lambda x, w: torch.func.jvp(lambda v: vmap(layer, (0, None))(v, w), (x,), (x * 2,)),
    "jacrev of ours": lambda x, w: torch.func.jacrev(lambda v: vmap(torch.dot)(v, v @ w))(x),
}


@pytest.mark.parametrize("name", INSIDE)
def test_inside(name: str) -> None:
    check(INSIDE[name], numbers(3, 2, 4), numbers(3, 4, 4, seed=1))


@pytest.mark.parametrize("name", INSIDE)
def test_inside_with_one_input_shared(name: str) -> None:
    check(INSIDE[name], numbers(2, 4), numbers(3, 4, 4, seed=1), in_dims=[None, 0])
    check(INSIDE[name], numbers(3, 2, 4), numbers(4, 4, seed=1), in_dims=[0, None])


def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return vmap(layer)(x, w)


def loop(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.stack([layer(x[i], w[i]) for i in range(x.shape[0])])


OUTSIDE: dict[str, Callable[[Callable[..., torch.Tensor]], Callable[..., Any]]] = {
    "torch's vmap": lambda f: torch.vmap(f, (0, None)),
    "torch's vmap, other dims": lambda f: torch.vmap(f, (0, None), out_dims=1),
    "torch's vmap over the weight": lambda f: lambda x, w: torch.vmap(f, (None, 0))(x[0], torch.stack([w, 2 * w])),
    "grad": lambda f: lambda x, w: torch.func.grad(lambda v: f(v, w).sin().sum())(x[0]),
    "grad of the weight": lambda f: lambda x, w: torch.func.grad(lambda v: f(x[0], v).sin().sum())(w),
    "vmap of grad": lambda f: lambda x, w: torch.vmap(torch.func.grad(lambda v: f(v, w).sin().sum()))(x),
    "grad of vmap": lambda f: (
        lambda x, w: torch.func.grad(lambda v: torch.vmap(f, (None, 0))(x[0], v).sin().sum())(torch.stack([w, 2 * w]))
    ),
    "grad of grad": lambda f: (
        lambda x, w: torch.func.grad(lambda u: torch.func.grad(lambda v: f(v, w).sin().sum())(u).pow(2).sum())(x[0])
    ),
    "jvp": lambda f: lambda x, w: torch.func.jvp(lambda v: f(v, w), (x[0],), (x[1],)),
    "vjp": lambda f: lambda x, w: torch.func.vjp(lambda v: f(v, w), x[0])[1](x[1]),
    "jacrev": lambda f: lambda x, w: torch.func.jacrev(lambda v: f(v, w))(x[0]),
    "jacfwd": lambda f: lambda x, w: torch.func.jacfwd(lambda v: f(v, w))(x[0]),
    "hessian": lambda f: lambda x, w: torch.func.hessian(lambda v: f(v, w).sin().sum())(x[0]),
    "linearize": lambda f: lambda x, w: torch.func.linearize(lambda v: f(v, w), x[0])[1](x[1]),
    "ours": lambda f: vmap(f, (0, None)),
}


@pytest.mark.filterwarnings("ignore:.*make_fx.*")
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside(name: str) -> None:
    """A whole call of ours below a transform of the caller."""
    x, w = numbers(2, 3, 4, grad=False), numbers(3, 4, 4, seed=1, grad=False)
    found, expected = OUTSIDE[name](ours)(x, w), OUTSIDE[name](loop)(x, w)
    found, expected = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (found, expected))
    for mine, theirs in zip(found, expected, strict=True):
        assert "Member" not in type(mine).__name__
        assert_equal(mine, theirs)


@pytest.mark.parametrize("name", ["torch's vmap", "ours", "grad", "vmap of grad"])
def test_gradients_through_the_outside(name: str) -> None:
    def run(func: Callable[..., torch.Tensor]) -> list[Any]:
        x, w = numbers(2, 3, 4), numbers(3, 4, 4, seed=1)
        OUTSIDE[name](func)(x, w).sin().sum().backward()
        return [x.grad, w.grad]

    for mine, theirs in zip(run(ours), run(loop), strict=True):
        assert theirs is not None and theirs.ne(0).any()
        assert_equal(mine, theirs)


def test_per_sample_gradients() -> None:
    """The page of torch's docs that everybody copies: vmap(grad) over samples, inside a call over models."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double() for _ in "abc"
    ]
    params, _ = memberwise.stack_module_state(models)
    x, labels = numbers(5, 4, grad=False), torch.tensor([0, 1, 1, 0, 1])

    def loss(p: Any, sample: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        out = memberwise.functional_call(models[0], (p, {}), (sample[None],))
        return F.cross_entropy(out, label[None])

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0))
    found = memberwise.vmap(per_sample, (0, None, None))(params, x, labels)
    for i, model in enumerate(models):
        for k in range(5):
            model.zero_grad()
            F.cross_entropy(model(x[k : k + 1]), labels[k : k + 1]).backward()
            for name, p in model.named_parameters():
                assert_equal(found[name][i, k].detach(), p.grad, f"member {i}, sample {k}, {name}")


def test_streams_of_the_outer_level() -> None:
    """A draw inside an inner call under outer generators: each outer member's stream moves as its lone run's."""

    def func(x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(2, 4, dtype=x.dtype)
        inner = vmap(lambda row, n: row * n)(x, noise)
        return inner + torch.rand(4, dtype=x.dtype)

    check(func, numbers(3, 2, 4), seeds=[1, 2, 3])


def test_randomness_of_nested_levels() -> None:
    x = numbers(3, 2, 50, grad=False)

    def drawn(outer: str, inner: str) -> torch.Tensor:
        torch.manual_seed(0)
        noise = lambda row: torch.rand_like(row)  # noqa: E731 # one expression, twice mapped
        return vmap(lambda own: vmap(noise, randomness=inner)(own), randomness=outer)(x)

    both = drawn("different", "different")
    assert len({tuple(row.tolist()) for row in both.view(6, 50)}) == 6
    same_inside = drawn("different", "same")
    assert torch.equal(same_inside[:, 0], same_inside[:, 1]) and not torch.equal(same_inside[0], same_inside[1])
    same_outside = drawn("same", "different")
    assert torch.equal(same_outside[0], same_outside[1]) and not torch.equal(same_outside[:, 0], same_outside[:, 1])
    with pytest.raises(RuntimeError):
        drawn("error", "different")
    with pytest.raises(RuntimeError):
        drawn("different", "error")


def test_an_outer_tensor_written_by_an_inner_call_is_right_or_refused() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(4, dtype=x.dtype)

        def inner(row: torch.Tensor) -> torch.Tensor:
            total.add_(row)
            return row * 2

        return vmap(inner)(x).sum(0) + total

    check(func, numbers(3, 2, 4))
