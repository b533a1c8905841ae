"""Hooks, gradient penalties, detach and requires_grad inside, closure tensors: what autograd does for one model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


def hook_changes(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = x @ w
    y.register_hook(lambda grad: grad.clamp(-0.5, 0.5) * 2)
    return y.sin()


def hook_on_input(x: torch.Tensor, w: torch.Tensor) -> Any:
    x.register_hook(lambda grad: grad * 3)
    return (x @ w) * x


def two_hooks(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = x * 2
    y.register_hook(lambda grad: grad + 1)
    handle = y.register_hook(lambda grad: grad * 100)
    y.register_hook(lambda grad: grad * 2)
    handle.remove()
    return y @ w


def node_hooks(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = (x * 2).sin()
    y.grad_fn.register_hook(lambda inputs, outputs: tuple(g * 2 for g in inputs))
    y.grad_fn.register_prehook(lambda outputs: tuple(g + 1 for g in outputs))
    return y @ w


def retain_grad(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = x.detach().clone().requires_grad_()
    y = own @ w.detach()
    y.retain_grad()
    (y**2).sum().backward()
    return y.grad * x, own.grad


def multi_grad_hook(x: torch.Tensor, w: torch.Tensor) -> Any:
    seen: list[Any] = []
    a, b = x * 2, x * 3
    torch.autograd.graph.register_multi_grad_hook((a, b), seen.extend)
    (grad,) = torch.autograd.grad((a * b).sum(), x)
    return torch.stack(seen), grad * w


def post_accumulate(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = x.detach().clone().requires_grad_()
    seen: list[Any] = []
    own.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad * 2))
    (own @ w.detach()).sin().sum().backward()
    return seen[0] * x


def gradient_penalty(x: torch.Tensor, w: torch.Tensor) -> Any:
    mixed = (x * 0.5).detach().requires_grad_()
    score = F.linear(mixed, w).tanh().sum()
    (grad,) = torch.autograd.grad(score, mixed, create_graph=True)
    return (grad.norm() - 1) ** 2 + F.linear(x, w).sum()


def double_penalty(x: torch.Tensor, w: torch.Tensor) -> Any:
    (first,) = torch.autograd.grad((x @ w).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    return second.pow(2).sum() + first.sum()


def maml(x: torch.Tensor, w: torch.Tensor) -> Any:
    """Two inner steps whose outcome is differentiated."""
    own = w
    for _ in range(2):
        loss = ((x @ own).tanh() - 1).pow(2).mean()
        (grad,) = torch.autograd.grad(loss, own, create_graph=True)
        own = own - 0.1 * grad
    return (x @ own).sum()


def detached(x: torch.Tensor, w: torch.Tensor) -> Any:
    return x.detach() @ w + x, (x @ w).detach()


def stop_part(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.no_grad():
        scale = (x @ w).norm()
    return x / scale, scale


def enable_in_no_grad(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.no_grad():
        y = x @ w
        with torch.enable_grad():
            z = x * w.sum()
        assert not y.requires_grad and z.requires_grad and z.grad_fn is not None
    return y, z


def toggled(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = x.detach()
    assert not own.requires_grad
    own.requires_grad_()
    assert own.requires_grad and own.is_leaf
    (grad,) = torch.autograd.grad((own @ w.detach()).sin().sum(), own)
    own.requires_grad_(False)
    frozen = w.detach().requires_grad_(False)
    return grad * x, own @ frozen


def flags(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = x @ w
    return (
        (x.requires_grad, y.requires_grad, y.is_leaf, y.grad_fn is not None, x.detach().is_leaf),
        (torch.is_grad_enabled(), y.detach().requires_grad, (x > 0).requires_grad),
        y,
    )


def backward_inside(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = w.detach().clone().requires_grad_()
    for _ in range(3):
        (x.detach() @ own).sin().sum().backward()
    before = own.grad.clone()
    own.grad.zero_()
    (x.detach() @ own).sum().backward()
    return before * w, own.grad


def sgd_inside(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = w.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([own], lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (x.detach() @ own).pow(2).sum().backward()
        optimizer.step()
    return own.detach() * w


def adam_inside(x: torch.Tensor, w: torch.Tensor) -> Any:
    own = nn.Parameter(w.detach().clone())
    optimizer = torch.optim.Adam([own], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (x.detach() @ own).pow(2).sum().backward()
        optimizer.step()
    return own.detach() * w


def unused_input(x: torch.Tensor, w: torch.Tensor) -> Any:
    return x * 2


def in_place_on_graph(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = x @ w
    y.mul_(2).add_(x)
    y[0].mul_(x[0, 0])
    y[:, 1] = x[:, 0] * w[0, 0]
    return y


def several_outputs(x: torch.Tensor, w: torch.Tensor) -> Any:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return s, (u * s) @ v @ w


def anomaly(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.autograd.detect_anomaly(check_nan=False):
        return (x @ w).exp()


def views_of_input(x: torch.Tensor, w: torch.Tensor) -> Any:
    return x[0], x.t(), x.unbind(0), w.diagonal(), x.view(-1)[1:]


def same_input_twice(x: torch.Tensor, w: torch.Tensor) -> Any:
    return x, x, x @ w


PROGRAMS: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
    hook_changes,
    hook_on_input,
    two_hooks,
    node_hooks,
    retain_grad,
    multi_grad_hook,
    post_accumulate,
    gradient_penalty,
    double_penalty,
    maml,
    detached,
    stop_part,
    enable_in_no_grad,
    toggled,
    flags,
    backward_inside,
    sgd_inside,
    adam_inside,
    unused_input,
    in_place_on_graph,
    several_outputs,
    anomaly,
    views_of_input,
    same_input_twice,
]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("func", PROGRAMS, ids=lambda f: f.__name__)
def test_program(func: Callable[..., Any], shared: int | None) -> None:
    args = [numbers(3, 4, 4), numbers(3, 4, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    in_dims = [None if k == shared else 0 for k in range(2)]
    if func is hook_on_input and shared == 0:
        pytest.skip("alone, M members register M hooks on one tensor; which of them is right is a matter of taste")
    check(func, *args, in_dims=in_dims)


class Hooked(nn.Module):
    """Forward hooks and pre-hooks, full backward hooks and pre-hooks, on a part and on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.first.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        self.first.register_forward_hook(lambda m, args, out: out + args[0].sum())
        self.first.register_full_backward_hook(lambda m, gi, go: tuple(g * 2 for g in gi))
        self.second.register_full_backward_pre_hook(lambda m, go: tuple(g.clamp(-1, 1) for g in go))
        self.second.register_forward_hook(lambda m, args, kwargs, out: out.tanh(), with_kwargs=True)
        self.register_full_backward_hook(lambda m, gi, go: tuple(g + 0.5 for g in gi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_module_hooks() -> None:
    torch.manual_seed(0)
    models = [Hooked().double() for _ in range(3)]
    params, _ = memberwise.stack_module_state(models)
    x = numbers(3, 2, 4)
    out = vmap(lambda p, own: memberwise.functional_call(models[0], (p, {}), (own,)))(params, x)
    out.pow(2).sum().backward()
    for i, model in enumerate(models):
        own = x.detach()[i].requires_grad_()
        lone = model(own)
        lone.pow(2).sum().backward()
        assert_equal(out[i].detach(), lone.detach())
        assert_equal(x.grad[i], own.grad)
        for name, p in model.named_parameters():
            assert_equal(params[name].grad[i], p.grad, name)


def test_hooks_see_one_members_gradient() -> None:
    seen: list[Any] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.register_hook(lambda grad: seen.append((tuple(grad.shape), grad.dtype)))
        return y.sin()

    check(func, numbers(3, 4, 5))
    assert seen == [((4, 5), torch.float64)] * 4


def test_hooks_of_stacked_parameters_outside_see_the_stack() -> None:
    x = numbers(3, 4)
    seen: list[torch.Tensor] = []
    x.register_hook(lambda grad: seen.append(grad))
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad))
    vmap(lambda own: own.sin())(x).sum().backward()
    assert [type(grad) for grad in seen] == [torch.Tensor] * 2
    assert_equal(seen[0], x.detach().cos())


CLOSURES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "product": lambda x, c: x * c,
    "linear": lambda x, c: F.linear(x, c.outer(c)),
    "first alone": lambda x, c: (c * 2).sin() * x,
    "alone, returned": lambda x, c: (x * 1, c * 2, c),
    "in a fresh tensor": lambda x, c: torch.zeros(4, dtype=x.dtype).add_(c).mul_(x),
    "stacked with members": lambda x, c: torch.cat([x, c]) * x.sum(),
    "indexed": lambda x, c: c[x.detach().argsort()] * x,
    "under no_grad": lambda x, c: x * torch.no_grad()(lambda: c * 2)(),
    "gradient inside": lambda x, c: torch.autograd.grad((x * c).sin().sum(), c, create_graph=True)[0] * x,
    "layer_norm": lambda x, c: F.layer_norm(x, (4,), c, c * 2),
    "through a Python list": lambda x, c: sum([x * c, c]),
    "in an inner vmap": lambda x, c: vmap(lambda v: v * c)(x.expand(2, 4)),
    "func.grad": lambda x, c: torch.func.grad(lambda v: (v * c).sin().sum())(x) * c,
}


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "made outside"])
@pytest.mark.parametrize("name", CLOSURES)
def test_a_closure_tensor_gets_the_sum_over_members(name: str, leaf: bool) -> None:
    """Used inside through a closure, and outside as well, called twice: every use counts."""

    def run(mapped: Callable[..., Any]) -> Any:
        x, root = numbers(3, 4), numbers(4, seed=7)
        c = root if leaf else root.tanh()
        total = root.new_zeros(())
        for _ in range(2):
            outs = mapped(lambda own: CLOSURES[name](own, c), x)
            outs = outs if isinstance(outs, tuple) else (outs,)
            total = total + sum((out * numbers(*out.shape, seed=k, grad=False)).sum() for k, out in enumerate(outs))
        (total + (c * 5).sum()).backward()
        return x.grad, root.grad

    def loop(func: Callable[..., Any], x: torch.Tensor) -> Any:
        outs = [func(row) for row in x]
        return tuple(map(torch.stack, zip(*outs, strict=True))) if isinstance(outs[0], tuple) else torch.stack(outs)

    ours, theirs = run(lambda f, x: vmap(f)(x)), run(loop)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_equal(mine, expected)
    assert theirs[1].ne(0).any()


def test_a_closure_module_is_shared() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh()).double()
    x = numbers(3, 5, 4)
    vmap(lambda own: trunk(own) * own)(x).sin().sum().backward()
    ours = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    torch.stack([trunk(row) * row for row in x.detach()]).sin().sum().backward()
    for mine, p in zip(ours, trunk.parameters(), strict=True):
        assert_equal(mine, p.grad)


def test_backward_inside_into_a_closure_leaf() -> None:
    """`.backward()` inside a call, into a shared leaf: its `.grad` is the sum, and a plain tensor."""

    def run(mapped: Callable[..., Any]) -> torch.Tensor:
        x, c = numbers(3, 4, grad=False), numbers(4, seed=7)

        def func(own: torch.Tensor) -> torch.Tensor:
            (own * c).sin().sum().backward()
            return own * 1

        mapped(func, x)
        return c.grad

    ours, loop = run(lambda f, x: vmap(f)(x)), run(lambda f, x: [f(row) for row in x])
    assert type(ours) is torch.Tensor
    assert_equal(ours, loop)


def test_retain_graph_and_many_backwards() -> None:
    x, w = numbers(3, 4), numbers(3, 4, 4, seed=1)
    out = vmap(lambda own, own_w: F.linear(own.sin(), own_w))(x, w)
    first = torch.autograd.grad(out.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), (x, w))


def test_one_members_loss_moves_no_other_member() -> None:
    x, w = numbers(3, 4), numbers(3, 4, 4, seed=1)
    out = vmap(lambda own, own_w: F.linear(own.sin(), own_w).softmax(0))(x, w)
    out[1, 0].backward()
    for grad in (x.grad, w.grad):
        assert grad[0].eq(0).all() and grad[2].eq(0).all() and grad[1].ne(0).any()


class Token:
    """What can be referred to weakly."""


@pytest.mark.parametrize("func", [F.relu, torch.exp, lambda x: F.linear(x, x), lambda x: F.dropout(x, 0.5)])
def test_without_a_backward_nothing_stays(func: Callable[..., torch.Tensor]) -> None:
    """A node that is reached from what it keeps would live forever, with all its memory."""
    out = vmap(func, randomness="different")(numbers(3, 4, 4))
    token = Token()
    out.grad_fn.metadata["token"] = token
    lives = weakref.ref(token)
    del token, out
    assert lives() is None
