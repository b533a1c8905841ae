"""Lesson: a composite rule keeps autocast's dtypes, double backward, `jacrev` and each member's stream, or declines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import alone, check, numbers

pytestmark = pytest.mark.usefixtures("composites")

Layer = Callable[..., Any]
TOKENS = torch.tensor([[0, 2, 1], [3, 3, 0]])
LABELS = torch.tensor([1, -100, 3])


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], 2, -1).transpose(0, 1)


def lstm(x: torch.Tensor, w: torch.Tensor, u: torch.Tensor, b: torch.Tensor) -> Any:
    zeros = torch.zeros(1, 3, 2, dtype=x.dtype)
    out, h, c = torch.lstm(x, (zeros, zeros), [w, u, b, b * 2], True, 1, 0.0, True, False, False)
    return out, h, c


LAYERS: dict[str, tuple[Layer, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((3, 4), (5, 4), (5,))),
    "linear without bias": (F.linear, ((2, 3, 4), (5, 4))),
    "linear of a vector": (F.linear, ((4,), (5, 4), (5,))),
    "relu": (F.relu, ((3, 4),)),
    "linear and relu": (lambda x, w, b: F.relu(F.linear(x, w, b)), ((3, 4), (5, 4), (5,))),
    "min of all": (torch.min, ((3, 4),)),
    "max of all": (lambda x: x.max(), ((2, 3, 4),)),
    "gelu": (F.gelu, ((3, 4),)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), ((3, 4),)),
    "silu": (F.silu, ((3, 4),)),
    "softmax": (lambda x: F.softmax(x, -1), ((3, 4),)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), ((3, 4),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), ((3, 4), (4,), (4,))),
    "layer_norm of two dims": (lambda x, w: F.layer_norm(x, (3, 4), w), ((2, 3, 4), (3, 4))),
    "layer_norm bare": (lambda x: F.layer_norm(x, (4,)), ((3, 4),)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((3, 4), (4,), (4,))),
    "batch_norm 2d": (lambda x, w: F.batch_norm(x, None, None, w, None, training=True), ((2, 4, 3, 3), (4,))),
    "batch_norm eval": (
        lambda x, w, m, v: F.batch_norm(x, m.detach(), v.detach().abs() + 1, w, m, training=False),
        ((3, 4), (4,), (4,), (4,)),
    ),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w), ((2, 4, 3), (4,))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), ((3, 4), (4,))),
    "embedding": (lambda w, v: F.embedding(TOKENS, w) * v, ((4, 5), (5,))),
    "embedding padded": (lambda w, v: F.embedding(TOKENS, w, padding_idx=3) * v, ((4, 5), (5,))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), ((2, 3, 4), (2, 5, 4), (2, 5, 4))),
    "attention causal": (
        lambda q, k: F.scaled_dot_product_attention(heads(q), heads(k), heads(q), is_causal=True, scale=0.3),
        ((3, 4), (3, 4)),
    ),
    "attention masked": (
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m),
        ((2, 3, 4), (2, 5, 4), (3, 5)),
    ),
    "attention bool mask": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(3, 5).tril().bool()),
        ((2, 3, 4), (2, 5, 4)),
    ),
    "attention grouped": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        ((1, 4, 3, 4), (1, 2, 5, 4)),
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS), ((3, 4),)),
    "cross_entropy none": (lambda x: F.cross_entropy(x, LABELS, reduction="none"), ((3, 4),)),
    "cross_entropy smooth weighted": (
        lambda x, w: F.cross_entropy(x, LABELS, weight=w.detach().exp(), label_smoothing=0.2, reduction="sum"),
        ((3, 4), (4,)),
    ),
    "cross_entropy of images": (lambda x: F.cross_entropy(x, LABELS.clamp(min=0)[None]), ((1, 4, 3),)),
    "cross_entropy of probabilities": (lambda x, t: F.cross_entropy(x, t.softmax(-1)), ((3, 4), (3, 4))),
    "nll_loss": (lambda x: F.nll_loss(x.log_softmax(-1), LABELS), ((3, 4),)),
    "mse_loss": (F.mse_loss, ((3, 4), (3, 4))),
    "bce": (lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()), ((3, 4), (3, 4))),
    "lstm": (lstm, ((2, 3, 4), (8, 4), (8, 2), (8,))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 3, 4, 4), (4, 3, 3, 3), (4,))),
    "conv2d grouped": (lambda x, w: F.conv2d(x, w, stride=2, groups=2), ((2, 4, 5, 5), (4, 2, 2, 2))),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), ((2, 3, 4, 4),)),
    "matmul": (torch.matmul, ((2, 3, 4), (4, 5))),
    "addmm": (torch.addmm, ((3, 5), (3, 4), (4, 5))),
    "multiply and add": (lambda x, y, z: x * y + z, ((3, 4), (4,), (3, 1))),
}  # fmt: skip
FUSED = tuple(name for name in LAYERS if name.startswith(("lstm", "attention")))
"""Alone, torch has no second and no forward derivative of an LSTM and of the fused attention, which it takes for other
shapes in each version."""


def given(name: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [numbers(3, *shape, seed=k, dtype=dtype) for k, shape in enumerate(LAYERS[name][1])]


def first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else sum(entry.sum() for entry in out)


@pytest.mark.parametrize("name", LAYERS)
def test_alone_and_with_each_argument_shared(name: str) -> None:
    args = given(name)
    check(LAYERS[name][0], *args)
    for shared in range(len(args)):
        if len(args) == 1:
            continue
        own = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
        check(LAYERS[name][0], *own, in_dims=[None if k == shared else 0 for k in range(len(args))])


@pytest.mark.parametrize("name", LAYERS)
def test_only_one_argument_requires_grad(name: str) -> None:
    """Which gradients are asked for is decided a call: none too many, none too few."""
    args = given(name)
    for k, wanted in enumerate(args):
        own = [t.detach().requires_grad_(t is wanted) for t in args]
        check(
            LAYERS[name][0], *own, gradients=name not in ("batch_norm eval", "cross_entropy smooth weighted") or k == 0
        )


@pytest.mark.parametrize("name", LAYERS)
def test_members_not_contiguous(name: str) -> None:
    args = [t.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for t in given(name)]
    check(LAYERS[name][0], *args)
    check(LAYERS[name][0], *[t.detach().movedim(0, -1) for t in given(name)], in_dims=-1, gradients=False)


def check_if_alone(name: str, func: Callable[..., Any], *args: torch.Tensor, **options: Any) -> None:
    """Compare with the loop, unless torch has no such derivative of a fused layer."""
    if name in FUSED and not allowed_alone(func, [*args]):
        return
    check(func, *args, **options)


def allowed_alone(func: Callable[..., Any], args: list[torch.Tensor]) -> bool:
    """Whether a lone run, backward included, may do what `func` does."""
    try:
        alone(func, args)
    except RuntimeError:
        return False
    return True


KEEPS_ARGUMENTS = ("lstm",)
"""Composite rules that keep more than the operation alone: an error where alone is none, never a wrong gradient."""


def expect_refusal(request: pytest.FixtureRequest, name: str) -> None:
    if name in KEEPS_ARGUMENTS and "composites-" in request.node.name:
        request.applymarker(pytest.mark.xfail(strict=True, reason="keeps what its second derivative needs"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_result_may_be_written_if_it_may_be_alone(name: str) -> None:
    """What a rule keeps for its backward is no more than what the operation keeps alone."""

    def func(*own: torch.Tensor) -> Any:
        out = LAYERS[name][0](*own)
        for entry in [out] if isinstance(out, torch.Tensor) else out:
            entry.mul_(2.0)
        return out

    if allowed_alone(func, given(name)):
        check(func, *given(name))


@pytest.mark.parametrize("name", LAYERS)
def test_a_result_may_be_written_through_a_view_with_gradients_off(name: str) -> None:
    """A node that makes its result as a view must not show that."""

    def func(*own: torch.Tensor) -> Any:
        out = LAYERS[name][0](*own)
        with torch.no_grad():
            for entry in [out] if isinstance(out, torch.Tensor) else out:
                entry.unsqueeze(0).mul_(2.0)
        return out

    if allowed_alone(func, given(name)):
        check(func, *given(name))


@pytest.mark.parametrize("name", LAYERS)
def test_an_argument_may_be_written_later_if_it_may_be_alone(name: str, request: pytest.FixtureRequest) -> None:
    """With the gradient of one argument asked for, and another written after its use."""
    expect_refusal(request, name)
    count = len(LAYERS[name][1])
    for wanted in range(count):
        for changed in range(count):

            def func(*own: torch.Tensor, wanted: int = wanted, changed: int = changed) -> Any:
                copies = [t * 1 if k == wanted else t.detach().clone() for k, t in enumerate(own)]
                out = LAYERS[name][0](*copies)
                copies[changed].zero_()
                return out

            if allowed_alone(func, given(name)):
                check(func, *given(name), gradients=False)


@pytest.mark.parametrize("name", LAYERS)
def test_without_grad(name: str) -> None:
    def func(*own: torch.Tensor) -> Any:
        with torch.no_grad():
            return LAYERS[name][0](*own)

    check(func, *given(name), gradients=False)


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward_inside(name: str) -> None:
    """A gradient penalty: the gradient's gradient reaches every argument."""

    def func(*own: torch.Tensor) -> Any:
        out = first(LAYERS[name][0](*own)).sin()
        grads = torch.autograd.grad(out.sum(), own, create_graph=True, allow_unused=True)
        return sum(grad.pow(2).sum() for grad in grads if grad is not None) + out.sum()

    check_if_alone(name, func, *given(name))


def test_double_backward_where_arguments_depend_on_each_other() -> None:
    """Gradients that are made for a second derivative flow on from each argument once, not twice."""

    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        out = F.linear(x, x.sum(0) * w, w[:, 0] + x.mean()).sin() + F.layer_norm(x, (4,), x[0] * 2, x[1] + w[0]).sum()
        grads = torch.autograd.grad(out.sum(), (x, w), create_graph=True)
        return sum(grad.pow(2).sum() for grad in grads)

    check(func, numbers(3, 3, 4), numbers(3, 5, 4, seed=1))


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward_outside(name: str) -> None:
    layer = lambda *own: first(LAYERS[name][0](*own))  # noqa: E731 # of several results the sum
    args, lone_args = given(name), given(name)
    try:
        lone = first_order([layer(*own) for own in zip(*lone_args, strict=True)], lone_args)
        theirs_all = second_order(lone, lone_args)
    except RuntimeError:
        assert name in FUSED
        return
    ours = first_order(memberwise.vmap(layer)(*args), args)
    for mine, theirs in zip(second_order(ours, args), theirs_all, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_equal(mine, theirs)


def first_order(outs: Any, args: list[torch.Tensor]) -> list[torch.Tensor]:
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    total = sum(out.sin().sum() for out in outs)
    grads = torch.autograd.grad(total, args, create_graph=True, allow_unused=True)
    return [grad for grad in grads if grad is not None and grad.requires_grad]


def second_order(grads: list[torch.Tensor], args: list[torch.Tensor]) -> Any:
    return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), args, allow_unused=True)


TRANSFORMS: dict[str, Callable[[Layer, int], Callable[..., Any]]] = {
    "jacrev": lambda f, n: torch.func.jacrev(f, argnums=tuple(range(n))),
    "jacfwd": lambda f, n: torch.func.jacfwd(f),
    "grad": lambda f, n: torch.func.grad(lambda *own: f(*own).sum(), argnums=tuple(range(n))),
    "jvp": lambda f, n: lambda *own: torch.func.jvp(f, own, own),
    "vjp": lambda f, n: lambda *own: torch.func.vjp(f, *own)[1](f(*own)),
    "autograd jacobian": lambda f, n: lambda *own: torch.autograd.functional.jacobian(f, own, create_graph=True),
}


@pytest.mark.parametrize(("transform", "name"), [(transform, name) for name in LAYERS for transform in TRANSFORMS])
def test_below_a_transform(transform: str, name: str) -> None:
    func = TRANSFORMS[transform](lambda *own: first(LAYERS[name][0](*own)), len(LAYERS[name][1]))
    check_if_alone(name, func, *[t.detach() for t in given(name)], gradients=False)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_dtypes(name: str) -> None:
    """The dtype of every output and of every gradient is the lone one; values within the table."""
    layer = LAYERS[name][0]
    seen: list[Any] = []

    def func(*own: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = layer(*own)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        seen.append([out.dtype for out in outs])
        return [out.bfloat16() for out in outs]

    args = given(name, torch.float32)
    try:
        func(*(t[0] for t in args))
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):  # which an LSTM has with AVX-512 alone
            raise
        pytest.skip(f"torch has no such kernel for this processor: {error}")
    seen.clear()
    out = memberwise.vmap(func)(*args)
    torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    for i in range(3):
        own = [t[i].detach().requires_grad_() for t in args]
        lone = func(*own)
        torch.autograd.backward(lone, [torch.ones_like(o) for o in lone])
        for mine, theirs in zip(out, lone, strict=True):
            assert_equal(mine[i], theirs)
        for k, t in enumerate(own):
            if t.grad is not None and name != "batch_norm":
                assert args[k].grad.dtype == t.grad.dtype
                assert_equal(args[k].grad[i].bfloat16(), t.grad.bfloat16(), f"gradient {k}")
    assert all(entry == seen[1] for entry in seen)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_draws_in_attention_and_lstm(p: float) -> None:
    check(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=p),
        numbers(3, 2, 3, 4),
        numbers(3, 2, 5, 4, seed=1),
        seeds=[4, 5, 6],
        gradients=p < 1,
    )
    check(
        lambda x: F.dropout(F.linear(x, x), p) + F.dropout(x @ x, p), numbers(3, 4, 4), seeds=[4, 5, 6], gradients=p < 1
    )


def test_lstm_dropout_between_layers() -> None:
    torch.manual_seed(0)
    module = torch.nn.LSTM(3, 2, num_layers=3, dropout=0.5, bidirectional=True).double().train()
    check(lambda x: module(x)[0] + torch.rand(1), numbers(3, 4, 2, 3), seeds=[4, 5, 6])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("first", [lambda x: x, lambda x: x + 1], ids=["of an input", "of a result"])
@pytest.mark.parametrize("op", [torch.relu, F.relu, F.max_pool1d], ids=["relu", "F.relu", "max_pool1d"])
def test_a_gradient_without_curvature_has_a_graph_if_it_has_one_alone(op: Any, first: Any, recorded: bool) -> None:
    """Alone the gradient of relu requires a gradient, which is zero: `grad.sum().backward()` is no error."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    options = (2,) if op is F.max_pool1d else ()
    with trace.recording() if recorded else nullcontext():
        out = memberwise.vmap(lambda x: op(first(x), *options))(x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    lone = x[0].detach().requires_grad_()
    (alone,) = torch.autograd.grad(op(first(lone), *options).sum(), lone, create_graph=True)
    assert grad.requires_grad == alone.requires_grad
    if grad.requires_grad:
        (again,) = torch.autograd.grad(grad.sum(), x)
        assert torch.equal(again, torch.zeros_like(x))
