"""torch.func.grad, jvp, vjp, hessian and their kin inside a call, with closures, nesting and gradients through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.nn import functional as F

import memberwise
from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

Func = Callable[[torch.Tensor, torch.Tensor], Any]


def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(F.layer_norm(x.tanh(), (4,)), w).sin().sum()


def wide(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.softmax(F.linear(x, w), -1) * x


INSIDE: dict[str, Func] = {
    "grad": lambda x, w: grad(net)(x, w),
    "grad of both": lambda x, w: grad(net, argnums=(0, 1))(x, w),
    "grad with aux": lambda x, w: grad(lambda v: (net(v, w), v * 2), has_aux=True)(x),
    "grad_and_value": lambda x, w: grad_and_value(net)(x, w),
    "grad through a closure": lambda x, w: grad(lambda v: net(v, w) * x.sum())(x),
    "grad of a dict": lambda x, w: grad(lambda p: net(p["x"], p["w"]))({"x": x, "w": w}),
    "grad of grad": lambda x, w: grad(lambda v: grad(net)(v, w).pow(2).sum())(x),
    "vjp": lambda x, w: vjp(wide, x, w)[1](x * 2),
    "vjp value": lambda x, w: vjp(lambda v: wide(v, w), x)[0],
    "vjp twice": lambda x, w: [f(x) for f in [vjp(lambda v: wide(v, w), x)[1]] * 2],
    "jvp": lambda x, w: jvp(lambda v: wide(v, w), (x,), (x.flip(0),)),
    "jvp of both": lambda x, w: jvp(wide, (x, w), (x * 2, w * 3)),
    "jvp of grad": lambda x, w: jvp(grad(lambda v: net(v, w)), (x,), (x * 2,)),
    "grad of jvp": lambda x, w: grad(lambda v: jvp(lambda u: wide(u, w), (v,), (v * 2,))[1].sum())(x),
    "jacrev": lambda x, w: jacrev(lambda v: wide(v, w))(x),
    "jacrev of both": lambda x, w: jacrev(wide, argnums=(0, 1))(x, w),
    "jacrev chunked": lambda x, w: jacrev(lambda v: wide(v, w), chunk_size=2)(x),
    "jacfwd": lambda x, w: jacfwd(lambda v: wide(v, w))(x),
    "hessian": lambda x, w: hessian(lambda v: net(v, w))(x),
    "hessian of the weight": lambda x, w: hessian(lambda v: net(x, v))(w),
    "jacfwd of jacfwd": lambda x, w: jacfwd(jacfwd(lambda v: net(v, w)))(x),
    "laplacian": lambda x, w: hessian(lambda v: net(v, w))(x).diagonal().sum(),
    "linearize": lambda x, w: linearize(lambda v: wide(v, w), x)[1](x * 2),
    "hvp": lambda x, w: vjp(grad(lambda v: net(v, w)), x)[1](x)[0],
    "autograd jacobian": lambda x, w: torch.autograd.functional.jacobian(lambda v: wide(v, w), x, create_graph=True),
    "autograd hessian": lambda x, w: torch.autograd.functional.hessian(lambda v: net(v, w), x, create_graph=True),
    "autograd vhp": lambda x, w: torch.autograd.functional.vhp(lambda v: net(v, w), x, x * 2, create_graph=True)[1],
    "autograd jvp": lambda x, w: torch.autograd.functional.jvp(lambda v: wide(v, w), x, x * 2, create_graph=True)[1],
    "dual numbers": lambda x, w: dual(x, w),
    "batched grads": lambda x, w: torch.autograd.grad(
        wide(x, w), x, torch.eye(4, dtype=x.dtype), is_grads_batched=True, create_graph=True
    )[0],
    "no_grad inside": lambda x, w: grad(lambda v: (net(v, w) * torch.no_grad()(lambda: v.norm())()).sum())(x),
    "fresh inside": lambda x, w: grad(lambda v: (v + torch.ones(4, dtype=v.dtype) * v.sum()).sin().sum())(x) * w,
    "fresh written inside": lambda x, w: grad(lambda v: (v * torch.zeros(4, dtype=v.dtype).add_(2.0)).sum())(x) @ w,
    "in place inside": lambda x, w: grad(lambda v: (v * 1).mul_(2).sin_().sum())(x),
    "detach inside": lambda x, w: grad(lambda v: (v.detach() * v).sum())(x) @ w,
    "shared closure tensor": lambda x, w: grad(lambda v: (v * CLOSURE).sin().sum())(x) @ w,
}
CLOSURE = numbers(4, seed=11, grad=False)


def dual(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        out = (torch.autograd.forward_ad.make_dual(x, x * 2) @ w).sin() * x
        return tuple(torch.autograd.forward_ad.unpack_dual(out))


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", INSIDE)
def test_inside(name: str, shared: int | None) -> None:
    """Values, and the gradients through them."""
    args = [numbers(3, 4), numbers(3, 4, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    if name == "linearize":
        args = [t.detach() for t in args]  # torch refuses to linearize what requires grad
    check(INSIDE[name], *args, in_dims=[None if k == shared else 0 for k in range(2)], gradients=name != "linearize")


@pytest.mark.parametrize("name", INSIDE)
def test_inside_for_one_member_and_without_gradients(name: str) -> None:
    args = numbers(1, 4, grad="autograd" in name or "batched" in name), numbers(1, 4, 4, seed=1, grad=False)
    check(INSIDE[name], *args, gradients=False)


@pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "hessian", "vjp"])
def test_with_draws(name: str) -> None:
    """A draw below a transform is the member's own."""

    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        noise = torch.rand(4, dtype=x.dtype)
        inner = INSIDE[name](x * noise, w)
        return inner, F.dropout(x, 0.5)

    check(func, numbers(3, 4), numbers(3, 4, 4, seed=1), seeds=[1, 2, 3])


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: jvp(f, (x,), (x,))[1]], ids=["grad", "jvp"])
def test_dropout_below_a_transform(transform: Callable[..., Any]) -> None:
    check(lambda x: transform(lambda v: F.dropout(v.sin(), 0.5).sum())(x), numbers(3, 8), seeds=[1, 2, 3])


def test_a_functional_optimizer_inside() -> None:
    """MAML as torch's docs write it: functional_call, func.grad and dicts, inside a call over models and tasks."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(3)]
    x, y = numbers(6, 4, grad=False), numbers(6, 2, seed=2, grad=False)

    def adapted(call: Callable[..., Any], template: nn.Module, p: dict[str, torch.Tensor]) -> torch.Tensor:
        def loss(q: dict[str, torch.Tensor]) -> torch.Tensor:
            return F.mse_loss(call(template, q, (x,)), y)

        for _ in range(2):
            grads = grad(loss)(p)
            p = {name: value - 0.1 * grads[name] for name, value in p.items()}
        return loss(p)

    params, _ = memberwise.stack_module_state(models)
    out = vmap(lambda p: adapted(memberwise.functional_call, models[0], p))(params)
    out.sum().backward()
    for i, model in enumerate(models):
        lone = adapted(functional_call, model, dict(model.named_parameters()))
        lone.backward()
        assert_equal(out[i].detach(), lone.detach())
        for name, p in model.named_parameters():
            assert_equal(params[name].grad[i], p.grad, name)


def test_neural_tangent_kernel() -> None:
    """jacrev over a functional model, contracted; the standard page of torch.func."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double() for _ in range(3)]
    x = numbers(2, 4, grad=False)

    def kernel(call: Callable[..., Any], template: nn.Module, p: dict[str, torch.Tensor]) -> torch.Tensor:
        one = lambda q, row: call(template, q, (row[None],)).squeeze(0)  # noqa: E731 # as the page has it
        jacobians = torch.vmap(jacrev(one), (None, 0))(p, x)
        flat = [j.flatten(2) for j in jacobians.values()]
        return sum(torch.einsum("naf,mbf->nmab", j, j) for j in flat)

    params, _ = memberwise.stack_module_state(models)
    out = vmap(lambda p: kernel(memberwise.functional_call, models[0], p))(params)
    for i, model in enumerate(models):
        detached = {name: p.detach() for name, p in model.named_parameters()}
        assert_equal(out[i].detach(), kernel(functional_call, model, detached))
