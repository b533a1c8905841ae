"""Corners where one line was once wrong: complex numbers, members of no dimension, empty batches, reseeding inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memberwise import vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def complex_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    real, imaginary = numbers(*shape, seed=seed, grad=False), numbers(*shape, seed=seed + 50, grad=False)
    return torch.complex(real, imaginary).requires_grad_()


COMPLEX: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((2, 4), (3, 4), (3,))),
    "linear of a vector": (F.linear, ((4,), (3, 4))),
    "matmul": (torch.matmul, ((2, 4), (4, 3))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 3))),
    "addmm": (torch.addmm, ((3,), (2, 4), (4, 3))),
    "baddbmm": (torch.baddbmm, ((3,), (2, 3, 4), (2, 4, 3))),
    "dot": (torch.dot, ((4,), (4,))),
    "vdot": (torch.vdot, ((4,), (4,))),
    "einsum": (lambda x, y: torch.einsum("ij,jk->ik", x, y.conj()), ((2, 4), (4, 3))),
    "mul": (torch.mul, ((2, 4), (4,))),
    "div": (torch.div, ((2, 4), (4,))),
    "conv1d": (F.conv1d, ((2, 3, 6), (4, 3, 2), (4,))),
    "conv2d": (F.conv2d, ((2, 3, 4, 4), (4, 3, 2, 2))),
    "abs and angle": (lambda x: (x.abs(), x.angle()), ((2, 4),)),
    "mean": (lambda x: (x.mean(0), x.sum(), x.prod(1)), ((2, 4),)),
    "where": (lambda x, y: torch.where(x.real > 0, x, y), ((2, 4), (4,))),
    "cat and index": (lambda x, y: torch.cat([x, y])[[1, 0, 3]], ((2, 4), (2, 4))),
    "real and imag": (lambda x: x.real * x.imag + x.conj().imag, ((2, 4),)),
    "resolved": (lambda x: x.conj().resolve_conj() @ x.mT.conj_physical(), ((2, 4),)),
    "solve": (torch.linalg.solve, ((3, 3), (3, 2))),
    "svd": (lambda x: torch.linalg.svdvals(x), ((3, 4),)),
    "fft": (lambda x: torch.fft.fft2(x), ((2, 4),)),
    "tanh and exp": (lambda x: x.tanh() * x.exp(), ((2, 4),)),
    "mixed with real": (lambda x: F.linear(x.real, x.real) * x @ x.mT, ((2, 2),)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name: str) -> None:
    func, shapes = COMPLEX[name]
    args = [complex_numbers(3, *shape, seed=k) for k, shape in enumerate(shapes)]
    check(func, *args)
    for shared in range(len(args) if len(args) > 1 else 0):
        own = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
        check(func, *own, in_dims=[None if k == shared else 0 for k in range(len(args))])


NO_DIMENSION: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "addmm": lambda s, x: torch.addmm(s, x, x.T, beta=0.3, alpha=2.0),
    "addmv": lambda s, x: torch.addmv(s, x, x[0], beta=0.3),
    "addr": lambda s, x: torch.addr(s, x[0], x[0], alpha=0.5),
    "baddbmm": lambda s, x: torch.baddbmm(s, x[None], x.T[None]),
    "addbmm": lambda s, x: torch.addbmm(s, x[None], x.T[None], beta=2.0),
    "addcmul": lambda s, x: torch.addcmul(s, x, x, value=0.5),
    "addcdiv": lambda s, x: torch.addcdiv(s, x, x.exp(), value=0.5),
    "roll": lambda s, x: torch.roll(s, 2) * x,
    "flip": lambda s, x: torch.flip(s, ()) * x,
    "cumsum": lambda s, x: s.cumsum(0) * x,
    "sort": lambda s, x: s.sort().values * x,
    "topk": lambda s, x: s.topk(1).values * x,
    "max": lambda s, x: s.max(0).values * x,
    "softmax": lambda s, x: s.softmax(0) * s * x,
    "log_softmax": lambda s, x: (s.log_softmax(0) + s) * x,
    "sum": lambda s, x: s.sum(0) * s.mean(-1) * x,
    "norm": lambda s, x: s.norm() * torch.linalg.vector_norm(s) * x,
    "prod": lambda s, x: s.prod() * s.prod(0) * x,
    "std": lambda s, x: s.var(unbiased=False) + x * s,
    "gather": lambda s, x: s.gather(0, torch.tensor(0)) * x,
    "index_select": lambda s, x: s.index_select(0, torch.tensor([0])) * x,
    "take": lambda s, x: s.take(torch.tensor([0, 0])).sum() * x,
    "unsqueeze": lambda s, x: s[None, None] * x,
    "expand": lambda s, x: s.expand(3, 4) * x,
    "reshape": lambda s, x: s.reshape(1).repeat(4) * x,
    "flatten": lambda s, x: s.flatten() * x + s.ravel(),
    "squeeze": lambda s, x: s.squeeze() * x,
    "where": lambda s, x: torch.where(s > 0, s, x),
    "clamp": lambda s, x: x.clamp(min=s),
    "full": lambda s, x: torch.full_like(x, 2.0) * s + x.masked_fill(x > 0, s),
    "fill_": lambda s, x: (x * 1).fill_(s),
    "setitem": lambda s, x: set_first(x * 1, s),
    "stack": lambda s, x: torch.stack([s, s * 2]).sum() * x,
    "cat of one": lambda s, x: torch.hstack([s, s]).sum() * x,
    "outer": lambda s, x: torch.outer(s.view(1), x[0]),
    "dot": lambda s, x: torch.dot(s.view(1), s.view(1)) * x,
    "matmul": lambda s, x: (s * x) @ x.T,
    "layer_norm": lambda s, x: F.layer_norm(x * s, (4,), x[0] * s),
    "dtype promotion": lambda s, x: x.float() * s + s.float() * x,
    "pow": lambda s, x: x.abs() ** s + 2.0**s,
    "atleast": lambda s, x: torch.atleast_2d(s) * x,
    "movedim": lambda s, x: s.movedim((), ()) * x.transpose(0, 1).T,
    "view_as_real": lambda s, x: torch.view_as_real(torch.complex(s, s)).sum() * x,
    "bucketize": lambda s, x: torch.bucketize(s, x[0].detach().sort().values) * x * s,
    "cdist": lambda s, x: torch.cdist(x * s, x),
    "loss": lambda s, x: F.mse_loss(s, x[0, 0]) + F.cross_entropy(x[0] * s, torch.tensor(1)),
    "unbind": lambda s, x: sum(part * s for part in x.unbind()),
    "item agreeing": lambda s, x: x * s * (s * 0).item(),
}  # fmt: skip


def set_first(y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    y[0, 1] = s
    y[..., -1] = s
    return y


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("name", NO_DIMENSION)
def test_members_of_no_dimension(name: str, size: int, shared: int | None) -> None:
    """A stack of them is a vector, which an operation may take for one member's; M as wide as the data, or not."""
    args = [numbers(size), numbers(size, 3, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    gradients = name != "item agreeing"
    check(NO_DIMENSION[name], *args, in_dims=[None if k == shared else 0 for k in range(2)], gradients=gradients)


PROMOTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mul": lambda s, x: x * s,
    "add": lambda s, x: s + x,
    "sub": lambda s, x: s - x,
    "rsub": lambda s, x: torch.rsub(x, s),
    "div": lambda s, x: x / s,
    "floor_divide": lambda s, x: x // (s.abs() + 1),
    "remainder": lambda s, x: x % (s.abs() + 1),
    "pow": lambda s, x: x.abs() ** s.abs(),
    "where": lambda s, x: torch.where(x > 0, s, x),
    "maximum": lambda s, x: torch.maximum(x, s),
    "clamp": lambda s, x: x.clamp(min=s),
    "gt": lambda s, x: x > s,
    "stack": lambda s, x: torch.stack([s, s]).sum() * x,
    "in place": lambda s, x: (x * 1).add_(s.to(x.dtype)),
    "two of no dimension": lambda s, x: s * x.sum() + s,
    "both ways": lambda s, x: (s * s) * (x + s),
    "with a number": lambda s, x: (s * 2 + 1) * x * 2,
    "with a fresh scalar": lambda s, x: x * torch.tensor(2.0, dtype=torch.float64) * s,
    "a bool": lambda s, x: (x > 0) * s,
    "result_type": lambda s, x: x * (1 if torch.result_type(x, s) == x.dtype else 2),
}
FIRST = [torch.float64, torch.float32, torch.int64, torch.bool]
SECOND = [torch.float16, torch.int32]


@pytest.mark.parametrize("shared", [None, 1], ids=["all own", "second shared"])
@pytest.mark.parametrize("second", SECOND, ids=str)
@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("name", PROMOTIONS)
def test_type_promotion(name: str, first: torch.dtype, second: torch.dtype, shared: int | None) -> None:
    """A member of no dimension has no say in the dtype of a result, though its stack is a vector."""
    func = PROMOTIONS[name]
    args = [(numbers(3, grad=False) * 3).to(first), (numbers(3, 2, 4, seed=1, grad=False) * 3).to(second)]
    args = [t[0] if k == shared else t for k, t in enumerate(args)]
    try:
        func(*[t if k == shared else t[0] for k, t in enumerate(args)])
    except RuntimeError:
        with pytest.raises(RuntimeError):
            vmap(func, tuple(None if k == shared else 0 for k in range(2)))(*args)
        return
    check(func, *args, in_dims=[None if k == shared else 0 for k in range(2)], gradients=False)


EMPTY: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear to nothing": lambda x, w: F.linear(x, w[:0]),
    "linear from nothing": lambda x, w: F.linear(x[:, :0], w[:, :0], w[:, 0]),
    "matmul": lambda x, w: x @ w.T,
    "cdist": lambda x, w: torch.cdist(x, w),
    "cat": lambda x, w: torch.cat([x, w]),
    "layer_norm": lambda x, w: F.layer_norm(x, (4,), w[0]),
    "softmax": lambda x, w: x.softmax(0) * w[0],
    "sum": lambda x, w: x.sum(0) * w,
    "prod": lambda x, w: x.prod(0) * w,
    "embedding": lambda x, w: F.embedding(torch.zeros(0, dtype=torch.long), w),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None]),
    "cross_entropy": lambda x, w: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="sum") * w,
    "index": lambda x, w: w[torch.zeros(0, dtype=torch.long)] * x[:0],
    "relu": lambda x, w: F.relu(x) * w[0],
    "conv": lambda x, w: F.conv1d(x[:, None], w[:, None, :2]),
    "pool": lambda x, w: F.max_pool1d(w[None], 2) * x.sum(),
    "sort": lambda x, w: x.sort(0).values * w[0],
    "cumsum": lambda x, w: x.cumsum(0) * w[0],
    "write": lambda x, w: written(w * 1, x),
    "batch_norm in eval": lambda x, w: F.batch_norm(x, w[0].detach(), w[0].detach().exp(), w[1]),
    "split": lambda x, w: [part * w[0] for part in x.split([0, len(x)])],
}


def written(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y[: len(x)] = x
    y[0:0].add_(1.0)
    return y


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_batches(name: str, rows: int, shared: int | None) -> None:
    args = [numbers(3, rows, 4), numbers(3, 5, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    check(EMPTY[name], *args, in_dims=[None if k == shared else 0 for k in range(2)], gradients=False)
    last = [t if k == shared else t.detach().movedim(0, -1).requires_grad_() for k, t in enumerate(args)]
    check(EMPTY[name], *last, in_dims=[None if k == shared else -1 for k in range(2)], gradients=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("driver", ["gelsy", "gels"])
def test_least_squares(driver: str, dtype: torch.dtype) -> None:
    """Residuals of complex systems: torch's own batching squares where it should take the modulus."""

    def func(a: torch.Tensor, b: torch.Tensor) -> Any:
        found = torch.linalg.lstsq(a, b, driver=driver)
        return found.solution, found.residuals

    make = numbers if dtype is torch.float64 else complex_numbers
    check(func, make(3, 5, 3), make(3, 5, 2, seed=1))


def fixed_noise(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        noise = torch.rand(4, dtype=x.dtype)
    return x * noise + torch.rand(4, dtype=x.dtype)


def reseeded(x: torch.Tensor) -> torch.Tensor:
    first = torch.rand(4, dtype=x.dtype)
    torch.manual_seed(42)
    return x * torch.rand(4, dtype=x.dtype) + first


def replayed(x: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    first = torch.rand(4, dtype=x.dtype)
    torch.set_rng_state(state)
    return x * first + torch.rand(4, dtype=x.dtype)


@pytest.mark.parametrize("func", [fixed_noise, reseeded, replayed])
def test_streams_that_the_function_moves_itself(func: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`torch.manual_seed` and its kin inside act on the member's stream, which is its global one."""
    check(func, numbers(3, 4), seeds=[1, 2, 3])


def test_one_members_infinity_or_nan_stays_its_own() -> None:
    x = numbers(3, 4, grad=False)
    x[1, 2] = float("nan")
    x[2, 0] = float("inf")
    w = numbers(3, 4, 4, seed=1)
    own = x.requires_grad_()
    out = vmap(lambda a, b: F.linear(F.layer_norm(a, (4,)), b).softmax(0))(own, w)
    out.sum().backward()
    assert out[0].isfinite().all() and own.grad[0].isfinite().all() and w.grad[0].isfinite().all()
    assert out[1].isnan().any() and out[2].isnan().any()
    lone = F.linear(F.layer_norm(x[0].detach(), (4,)), w[0].detach()).softmax(0)
    assert_equal(out[0].detach(), lone)
