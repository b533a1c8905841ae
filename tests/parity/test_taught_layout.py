"""Lesson: layout is part of fidelity. Strides, and what aliases what, are those of the lone run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memberwise import vmap
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

Func = Callable[..., Any]

IMAGE, KERNEL = (2, 3, 6, 6), (4, 3, 3, 3)
PRODUCERS: dict[str, tuple[Func, tuple[tuple[int, ...], ...]]] = {
    "conv2d": (lambda x, w: F.conv2d(x, w), (IMAGE, KERNEL)),
    "conv2d grouped": (lambda x, w: F.conv2d(x, w, groups=3), (IMAGE, (3, 1, 3, 3))),
    "conv2d bias": (lambda x, w: F.conv2d(x, w, w[:, 0, 0, 0]), (IMAGE, KERNEL)),
    "conv_transpose": (lambda x, w: F.conv_transpose2d(x, w), (IMAGE, (3, 4, 2, 2))),
    "conv1d": (lambda x, w: F.conv1d(x, w), ((2, 3, 6), (4, 3, 3))),
    "linear": (lambda x, w: F.linear(x, w), ((2, 3, 5), (4, 5))),
    "linear bias": (lambda x, w: F.linear(x, w, w[:, 0]), ((3, 5), (4, 5))),
    "matmul": (lambda x, w: x @ w.t(), ((3, 5), (4, 5))),
    "bmm": (lambda x, w: torch.bmm(x, w), ((2, 3, 5), (2, 5, 4))),
    "einsum": (lambda x, w: torch.einsum("bij,kj->bki", x, w), ((2, 3, 5), (4, 5))),
    "batch_norm": (lambda x, w: F.batch_norm(x * w.mean(), None, None, training=True), (IMAGE, KERNEL)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (5,), w[0]), ((2, 3, 5), (4, 5))),
    "max_pool": (lambda x, w: F.max_pool2d(x * w.mean(), 2), (IMAGE, KERNEL)),
    "avg_pool": (lambda x, w: F.adaptive_avg_pool2d(x * w.mean(), 2), (IMAGE, KERNEL)),
    "softmax": (lambda x, w: (x * w.mean()).transpose(0, 1).softmax(0), ((3, 5), (4, 5))),
    "pointwise of transposed": (lambda x, w: x.t() * 2 + w[0, 0], ((3, 5), (4, 5))),
    "pointwise of mixed": (lambda x, w: x.t() * w, ((5, 4), (4, 5))),
    "sum": (lambda x, w: (x.transpose(1, 2) * w[0, 0]).sum(0), ((2, 3, 5), (4, 5))),
    "cat": (lambda x, w: torch.cat([x.t(), w.t()], 1), ((3, 5), (4, 5))),
    "stack": (lambda x, w: torch.stack([x, w], 1), ((4, 5), (4, 5))),
    "index": (lambda x, w: x.t()[torch.tensor([1, 0])] * w[0, 0], ((3, 5), (4, 5))),
    "embedding": (lambda x, w: F.embedding(torch.tensor([[1, 0], [2, 3]]), w) * x.mean(), ((3, 5), (4, 5))),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x, x * w[0, 0], x), ((2, 2, 3, 4), (4, 5))),
    "expand": (lambda x, w: x[:1].expand(3, 5) * w[0], ((3, 5), (4, 5))),
    "cumsum": (lambda x, w: (x.t() * w[0, 0]).cumsum(0), ((3, 5), (4, 5))),
    "sort": (lambda x, w: (x.t() * w[0, 0]).sort(0).values, ((3, 5), (4, 5))),
    "inverse": (lambda x, w: torch.linalg.inv(x) * w[0, 0], ((4, 4), (4, 5))),
}
KEEPS_ITS_RESULT = ("attention", "softmax", "inverse")
"""Their backward needs the result, so autograd refuses a write to it; a sum with 0 has the same layout."""


def pair(shapes: tuple[tuple[int, ...], ...], size: int = 3) -> tuple[torch.Tensor, ...]:
    return tuple(numbers(size, *shape, seed=k) for k, shape in enumerate(shapes))


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.is_contiguous(), tensor.storage_offset()


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_strides_shown_are_the_lone_ones(name: str, shared: int | None) -> None:
    func, shapes = PRODUCERS[name]
    args = [t[0] if k == shared else t for k, t in enumerate(pair(shapes))]
    seen: list[Any] = []

    def noted(*own: torch.Tensor) -> Any:
        out = func(*own)
        seen.append(geometry(out))
        return out

    check(noted, *args, in_dims=[None if k == shared else 0 for k in range(2)])
    lone, ours = seen[0], seen[-1]
    assert ours == lone


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_write_through_reshape_reaches_the_original_exactly_if_it_does_alone(name: str, shared: int | None) -> None:
    func, shapes = PRODUCERS[name]
    args = [t[0] if k == shared else t for k, t in enumerate(pair(shapes))]

    def written(*own: torch.Tensor) -> Any:
        out = func(*own) + 0 if name in KEEPS_ITS_RESULT else func(*own)
        flat = out.reshape(-1)
        flat.mul_(2.0)
        flat[1:3] += own[0].reshape(-1)[0]
        last = out.reshape(out.shape[0], -1)[-1]
        last.add_(1.0)
        return out, flat, last

    check(written, *args, in_dims=[None if k == shared else 0 for k in range(2)])


@pytest.mark.parametrize("name", ["conv2d", "linear", "conv_transpose", "bmm"])
def test_writes_through_many_views(name: str) -> None:
    func, shapes = PRODUCERS[name]

    def written(*own: torch.Tensor) -> Any:
        out = func(*own)
        before = out[0]
        flat = out.view(-1)
        half = out.flatten()[: out.numel() // 2]
        same = out.contiguous()
        same.reshape(-1)[::2] *= 3.0
        half.sub_(own[1].sum())
        flat[0] = 5.0
        out.unsqueeze(0).squeeze(0).transpose(0, 1)[1].zero_()
        return out, before, flat, half, same

    check(written, *pair(shapes))


MOVES: dict[str, Func] = {
    "view of transposed": lambda x: x.t().view(-1),
    "view of cut": lambda x: x[:, 1:].view(-1),
    "view of rows": lambda x: x[1:].view(-1),
    "view of expanded": lambda x: x[:1].expand(4, 4).view(-1),
    "reshape of transposed": lambda x: x.t().reshape(-1),
    "dtype": lambda x: x.t().view(torch.int64) + x.long(),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_view_is_refused_exactly_if_it_is_alone(name: str) -> None:
    func = MOVES[name]
    x = numbers(3, 4, 4)
    try:
        func(x[0])
    except RuntimeError as error:
        with pytest.raises(type(error)):
            vmap(func)(x)
    else:
        check(lambda own: func(own) * own.sum(), x)


def test_contiguous_is_the_same_tensor_exactly_if_it_is_alone() -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        out = F.conv2d(x, w)
        turned = out.transpose(0, 1)
        return out.contiguous() is out, turned.contiguous() is turned, out, turned.contiguous()

    check(func, *pair((IMAGE, KERNEL)))


def test_copies_do_not_alias() -> None:
    def func(x: torch.Tensor) -> Any:
        y = x * 2
        copy, turned, same, cast = y.clone(), y.t().reshape(-1), y.to(y.dtype), y.to(torch.float32)
        copy.zero_()
        turned.mul_(3.0)
        same.add_(1.0)
        cast.add_(7.0)
        return y, copy, turned, same, cast

    check(func, numbers(3, 4, 5))


@pytest.mark.parametrize("shared", [False, True])
def test_channels_last(shared: bool) -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        inside = x.contiguous(memory_format=torch.channels_last)
        out = F.relu(F.conv2d(inside, w))
        flat = out.reshape(-1)
        kept = out.is_contiguous(memory_format=torch.channels_last), out.stride(), inside.stride()
        return out * 1, flat, torch.empty_like(inside).stride(), kept, (inside * 2).stride()

    x, w = pair((IMAGE, KERNEL))
    check(func, x[0] if shared else x, w, in_dims=[None if shared else 0, 0])


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_inputs_of_any_layout(dim: int) -> None:
    """A member axis in the middle, members that overlap in memory's order, and strides with gaps."""

    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = F.linear(x, w)
        y.reshape(-1)[0] += 1
        return y, x.t().reshape(-1), x.flatten() * 2, x.reshape(-1, 1)

    w = numbers(3, 5, 4, seed=2)
    x = numbers(3, 6, 4).movedim(0, dim)
    check(func, x, w, in_dims=[dim, 0])
    check(func, numbers(3, 12, 8)[:, ::2, ::2].movedim(0, dim), w, in_dims=[dim, 0])
    check(func, numbers(3, 4, 6).transpose(1, 2).movedim(0, dim), w, in_dims=[dim, 0])


def test_in_place_chain_on_a_convolution() -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> Any:
        out = F.conv2d(x, w, padding=1)
        flat = out.view(2, -1)
        flat[0] *= 2
        F.threshold(out, 0.1, 0.2, inplace=True)
        out.add_(x[:, :1]).sub_(1.0)
        flat.div_(1 + flat.detach().abs().amax())
        return out, flat

    check(func, *pair((IMAGE, KERNEL)))
