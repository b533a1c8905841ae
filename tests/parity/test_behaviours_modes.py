"""inference_mode, no_grad, autocast, default dtypes and devices, deterministic modes: set inside, or by the caller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


def model(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = F.linear(x, w)
    y.reshape(-1)[0] += 1
    out = torch.zeros(4, dtype=x.dtype)
    out[:2] = y[:2]
    return F.layer_norm(y, (4,)) * out, y.argmax()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "inference_mode off": lambda: torch.inference_mode(False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "no multithreading": lambda: torch.autograd.set_multithreading_enabled(False),
    "deterministic": lambda: torch.utils.deterministic.fill_uninitialized_memory and nullcontext(),
    "math attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


def stacked(outs: list[Any]) -> list[torch.Tensor]:
    return [torch.stack([out[k] for out in outs]) for k in range(len(outs[0]))]


@pytest.mark.parametrize("name", MODES)
def test_mode_of_the_caller(name: str) -> None:
    x, w = numbers(3, 4), numbers(3, 4, 4, seed=1)
    with MODES[name]():
        found = list(vmap(model)(x, w))
        expected = stacked([model(x[i], w[i]) for i in range(3)])
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is torch.Tensor
        assert mine.requires_grad == theirs.requires_grad
        assert mine.is_inference() == theirs.is_inference()
        assert_equal(mine, theirs)
    if expected[0].requires_grad:
        for mine, theirs in zip(*(torch.autograd.grad(t[0].sum(), (x, w)) for t in (found, expected)), strict=True):
            assert_equal(mine, theirs)


@pytest.mark.parametrize("name", MODES)
def test_mode_inside(name: str) -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        with MODES[name]():
            out, index = model(x, w)
            state = out.requires_grad, out.is_inference(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return out.clone(), index.clone(), state, x * 2

    check(func, numbers(3, 4), numbers(3, 4, 4, seed=1))


def test_inputs_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x, w = numbers(3, 4, grad=False), numbers(3, 4, 4, seed=1, grad=False)
        found = vmap(model)(x, w)[0]
    assert_equal(found, torch.stack([model(x[i].clone(), w[i].clone())[0] for i in range(3)]))
    with pytest.raises(RuntimeError):
        vmap(lambda own: own.mul_(2))(x)  # as alone: an inference tensor may not be written outside its mode
    assert_equal(vmap(lambda own: own * 2)(x), x * 2)


def test_buffers_written_in_inference_mode() -> None:
    torch.manual_seed(0)
    models = [torch.nn.BatchNorm1d(4).double() for _ in range(3)]
    params, buffers = memberwise.stack_module_state(models)
    x = numbers(3, 5, 4, grad=False)
    with torch.inference_mode():
        out = vmap(lambda p, b, own: memberwise.functional_call(models[0], (p, b), (own,)))(params, buffers, x)
        for i, lone in enumerate(models):
            assert_equal(out[i], lone(x[i]))
            assert_equal(buffers["running_mean"][i], lone.running_mean)


def test_no_grad_in_a_decorator_and_in_a_generator() -> None:
    @torch.no_grad()
    def frozen(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def parts(x: torch.Tensor) -> Any:
        for k in range(3):
            with torch.set_grad_enabled(k != 1):
                y = x * k
            yield y

    check(lambda x: [frozen(x) * x, *parts(x)], numbers(3, 4))


AUTOCAST: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w,
    "conv": lambda x, w: F.conv1d(x[None, None], w[:1, None, :3]),
    "softmax": lambda x, w: (x @ w).softmax(-1),
    "layer_norm": lambda x, w: F.layer_norm(x @ w, (4,)),
    "cross_entropy": lambda x, w: F.cross_entropy(x @ w, torch.tensor(2)),
    "attention": lambda x, w: F.scaled_dot_product_attention(w[None], w[None], (w @ w)[None]),
    "promotion": lambda x, w: torch.cat([x @ w, x]),
    "pointwise": lambda x, w: (x @ w) * x,
    "norm": lambda x, w: (x @ w).norm(),
    "nested off": lambda x, w: without_autocast(x @ w, w),
    "fresh": lambda x, w: torch.ones(4) @ w,
    "closure": lambda x, w: F.linear(x, torch.eye(4)) + x @ w,
    "in place": lambda x, w: (x @ w).add_(1.0).relu_(),
    "einsum": lambda x, w: torch.einsum("i,ij->j", x, w),
    "double backward": lambda x, w: torch.autograd.grad((x @ w).float().sin().sum(), x, create_graph=True)[0],
}


def without_autocast(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return y.float() @ w


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name: str, dtype: torch.dtype, where: str) -> None:
    """The dtype that each operation computes in, and the gradients' dtypes, are the lone ones."""
    seen: list[Any] = []

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = AUTOCAST[name](x, w)
        seen.append((out.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return out

    def inside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return plain(x, w)

    x, w = numbers(3, 4, dtype=torch.float32), numbers(3, 4, 4, seed=1, dtype=torch.float32)
    if where == "inside":
        out = vmap(inside)(x, w)
    else:
        with torch.autocast("cpu", dtype=dtype):
            out = vmap(plain)(x, w)
    out.float().sum().backward()
    for i in range(3):
        own_x, own_w = (t[i].detach().requires_grad_() for t in (x, w))
        lone = inside(own_x, own_w)
        lone.float().sum().backward()
        assert out.dtype == lone.dtype
        assert_equal(out[i].to(dtype), lone.to(dtype))
        for stack, own in ((x, own_x), (w, own_w)):
            assert (stack.grad is None) == (own.grad is None)
            if own.grad is not None:
                assert stack.grad.dtype == own.grad.dtype
                assert_equal(stack.grad[i].to(dtype), own.grad.to(dtype))
    assert all(entry == seen[0] for entry in seen)


def test_autocast_cache_does_not_leak() -> None:
    """The weight that autocast caches inside a call is not used after it, nor by the next call."""
    w = numbers(4, 4, dtype=torch.float32)
    x = numbers(3, 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = vmap(lambda own: F.linear(own, w))(x)
        plain = F.linear(x, w)
        second = vmap(lambda own: F.linear(own, w))(x)
    assert type(plain) is torch.Tensor
    assert_equal(first, plain)
    assert_equal(second, plain)
    (first.float().sum() + second.float().sum()).backward()
    grad = w.grad.clone()
    w.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (F.linear(x, w).float().sum() * 2).backward()
    assert_equal(grad.bfloat16(), w.grad.bfloat16())


def test_default_dtype_and_device() -> None:
    def func(x: torch.Tensor) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            a = torch.zeros(2) + 1
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            b = torch.ones(2)
        return a * x[:2], b * x[:2], a.dtype == torch.float64, b.dtype == torch.float32

    check(func, numbers(3, 4))


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """A user's own dispatch mode: names of what passes, and a change to one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.sin.default:
            self.shapes.append(tuple(out.shape))
            return out * 2
        return out


class Doubling(torch.overrides.TorchFunctionMode):
    """A user's own function mode that changes one function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func in (torch.sin, torch.Tensor.sin) else out


@pytest.mark.parametrize("mode", [Counter, Doubling])
def test_a_users_mode_inside(mode: type) -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with mode():
            return F.linear(x, w).sin() + torch.zeros(4, dtype=x.dtype).add_(x)

    check(func, numbers(3, 4), numbers(3, 4, 4, seed=1))


def test_a_users_dispatch_mode_inside_sees_one_member() -> None:
    counter = Counter()

    def func(x: torch.Tensor) -> torch.Tensor:
        with counter:
            return x.sin()

    check(func, numbers(3, 4, 5))
    assert counter.shapes == [(4, 5)] * 4


def test_a_users_mode_around_the_call() -> None:
    with Doubling():
        found = vmap(lambda x: x.sin())(numbers(3, 4, grad=False))
    assert_equal(found, numbers(3, 4, grad=False).sin() * 2)


def test_threads() -> None:
    """Calls in several threads at once do not meet."""
    from concurrent.futures import ThreadPoolExecutor

    def run(k: int) -> bool:
        x = numbers(3, 4, seed=k)
        w = numbers(3, 4, 4, seed=k + 1)
        out = vmap(lambda a, b: model(a, b)[0])(x, w)
        out.sum().backward()
        y, v = (t.detach().clone().requires_grad_() for t in (x, w))
        torch.stack([model(y[i], v[i])[0] for i in range(3)]).sum().backward()
        return all(torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-10) for a, b in ((x, y), (w, v)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))
