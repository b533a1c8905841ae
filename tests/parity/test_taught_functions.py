"""Lesson: Python code that autograd calls (Functions, saved-tensor hooks) sees member tensors, and what it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import Function

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


class OldStyle(Function):
    """`forward(ctx, ...)`; backward makes tensors and writes members' values into them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        out = torch.zeros(x.shape, dtype=x.dtype)
        out[1:] = x[1:] * scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        out = torch.zeros(x.shape, dtype=x.dtype)
        tail = out[1:]
        tail.copy_(grad[1:] * ctx.scale)
        return out, None


class NewStyle(Function):
    """`setup_context`; saves an intermediate result, and marks an output as not differentiable."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> Any:
        root = (x * x + 1).sqrt()
        return root * y, root.argmax(), root

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y = inputs
        _, index, root = output
        ctx.mark_non_differentiable(index, root)
        ctx.save_for_backward(x, y, root)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any, _: Any, __: Any) -> Any:
        x, y, root = ctx.saved_tensors
        if grad is None:
            return None, None
        grad_y = torch.empty_like(y)
        grad_y[:] = grad * root
        return grad * y * x / root, grad_y


class Generated(Function):
    """A Function whose vmap rule torch generates."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sin() * y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grad * x.cos() * y, grad * x.sin()


class OwnRule(Function):
    """A Function with a vmap staticmethod of its own, which must not be needed."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        return OwnRule.apply(x), in_dims[0]


class StraightThrough(Function):
    """Rounds; its gradient passes unchanged and clipped by a fresh tensor's bounds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.shape = x.shape
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.minimum(grad, torch.ones(ctx.shape, dtype=grad.dtype) * 0.5)


class InPlace(Function):
    """Writes its input and says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3.0


class Reversal(Function):
    """Gradient reversal, the usual one: a view out, the negative back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.neg() * 0.5


class KeepsOnContext(Function):
    """Keeps tensors as attributes of `ctx` rather than by save_for_backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mask = x > 0
        ctx.needs = ctx.needs_input_grad
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        assert ctx.needs == (True,)
        return grad * ctx.mask


class Inner(Function):
    """Runs autograd itself in its forward, as reversible and checkpointing layers do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            out = (own**3).sum()
        (ctx.found,) = torch.autograd.grad(out, own)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return ctx.found * grad


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "old style": lambda x, y: OldStyle.apply(x, 2.5) * y,
    "old style twice": lambda x, y: OldStyle.apply(OldStyle.apply(x * y, 2.0), 3.0),
    "new style": lambda x, y: NewStyle.apply(x, y),
    "generated rule": lambda x, y: Generated.apply(x, y),
    "own rule": lambda x, y: OwnRule.apply(x) * y,
    "straight through": lambda x, y: StraightThrough.apply(x * 3) * y,
    "in place": lambda x, y: InPlace.apply(x * 1) * y,
    "reversal": lambda x, y: Reversal.apply(x) * y,
    "on context": lambda x, y: KeepsOnContext.apply(x) * y,
    "inner autograd": lambda x, y: Inner.apply(x) * y,
    "in no_grad": lambda x, y: torch.no_grad()(lambda: OldStyle.apply(x, 2.0))() * y,
    "gradient of it": lambda x, y: torch.autograd.grad(Generated.apply(x, y).sum(), (x, y), create_graph=True)[0] * y,
    "gradient of old style": lambda x, y: torch.autograd.grad(OldStyle.apply(x * y, 2.0).sum(), x)[0] * y,
    "func.grad of it": lambda x, y: torch.func.grad(lambda v: Generated.apply(v, y).sum())(x) * y,
}


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, shared: int | None) -> None:
    args = [numbers(3, 4), numbers(3, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    check(FUNCTIONS[name], *args, in_dims=[None if k == shared else 0 for k in range(2)])


def test_a_function_draws_in_forward_and_in_backward() -> None:
    class Noisy(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.noise = torch.randn(x.shape, dtype=x.dtype)
            return x * ctx.noise + torch.rand_like(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.noise + torch.rand(grad.shape, dtype=grad.dtype)

    check(lambda x: Noisy.apply(x), numbers(3, 4), seeds=[5, 6, 7])


def test_the_stack_is_not_seen_by_a_function() -> None:
    """Shapes, dims and needs_input_grad are one member's."""
    seen: list[Any] = []

    class Probe(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.shape, x.requires_grad, torch.is_grad_enabled(), ctx.needs_input_grad))
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append((grad.shape, torch.is_grad_enabled()))
            return grad * 2

    check(lambda x: Probe.apply(x), numbers(3, 4, 5))
    assert seen[:2] == seen[-2:] and len(seen) == 3 * 2 + 2


def test_apply_is_torchs_own_again() -> None:
    before = Function.apply
    memberwise.vmap(lambda x: OldStyle.apply(x, 2.0))(numbers(3, 4))
    assert Function.apply == before


def hooked(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = torch.nn.functional.linear(x, w)
            y = torch.nn.functional.layer_norm(y.tanh(), (3,))
            return torch.nn.functional.cross_entropy(y.exp(), torch.tensor([0, 2]))

    return func


def test_saved_tensor_hooks_see_what_they_see_alone() -> None:
    """The shapes, dtypes and number of saved tensors are one member's; what a hook changes reaches the gradient."""
    seen: list[Any] = []

    def pack(tensor: torch.Tensor) -> Any:
        seen.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    check(hooked(pack, lambda kept: kept), numbers(3, 2, 4), numbers(3, 3, 4, seed=1))
    alone = len(seen) * 3 // 4
    assert len(seen) % 4 == 0 and seen[alone:] == seen[: alone // 3]


PACKINGS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "rounding": (lambda t: (t * 4).round() if t.is_floating_point() else t, lambda kept: kept / 4),
    "float32": (lambda t: (t.dtype, t.to(torch.float32)), lambda kept: kept[1].to(kept[0])),
    "scaling": (lambda t: t * 2 if t.is_floating_point() else t, lambda kept: kept),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_saved_tensor_hooks_change_the_gradient_as_alone(name: str) -> None:
    pack, unpack = PACKINGS[name]

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return (x @ w).sin() * x.sum()

    check(func, numbers(3, 4), numbers(3, 4, 4, seed=1))


def test_save_on_cpu_and_disabled_hooks() -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            y = (x @ w).sin()
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return y * x.exp()

    check(func, numbers(3, 4), numbers(3, 4, 4, seed=1))


def test_hooks_of_the_caller_see_member_tensors_too() -> None:
    """Hooks entered around the call: what they change is changed in every member."""
    x, w = numbers(3, 2, 4), numbers(3, 3, 4, seed=1)

    def func(own_x: torch.Tensor, own_w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(own_x, own_w).sin()

    def grads(run: Callable[[], torch.Tensor]) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            out = run()
        return torch.autograd.grad(out.sum(), (x, w))

    ours = grads(lambda: memberwise.vmap(func)(x, w))
    loop = grads(lambda: torch.stack([func(x[i], w[i]) for i in range(3)]))
    for mine, theirs in zip(ours, loop, strict=True):
        assert_equal(mine, theirs)
