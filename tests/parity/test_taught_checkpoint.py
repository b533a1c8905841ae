"""Lesson: checkpoint of both kinds recomputes with each member's own parameters, and replays its stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def inner(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(torch.tanh(F.linear(x, w)), (4,)).sin() * x.exp()


@KINDS
def test_recomputed_gradients(reentrant: bool) -> None:
    check(lambda x, w: checkpoint(inner, x, w, use_reentrant=reentrant), numbers(3, 4), numbers(3, 4, 4, seed=1))


@KINDS
@pytest.mark.parametrize("shared", [0, 1], ids=["first shared", "second shared"])
def test_shared_inputs(reentrant: bool, shared: int) -> None:
    args = [numbers(3, 4), numbers(3, 4, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    in_dims = [None if k == shared else 0 for k in range(2)]
    check(lambda x, w: checkpoint(inner, x, w, use_reentrant=reentrant), *args, in_dims=in_dims)


@KINDS
def test_it_does_recompute(reentrant: bool) -> None:
    """Forward runs twice for one call of ours, so memory is saved and the test above says something."""
    calls: list[tuple[int, ...]] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return x.sin()

    x = numbers(3, 4)
    out = memberwise.vmap(lambda own: checkpoint(counted, own, use_reentrant=reentrant))(x)
    assert calls == [(4,)]
    out.sum().backward()
    assert calls == [(4,), (4,)]
    assert_equal(x.grad, x.detach().cos())


@KINDS
def test_recomputed_dropout_replays_each_stream(reentrant: bool) -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(lambda v: F.dropout(v.sin(), 0.5) * torch.rand(4, dtype=v.dtype), x, use_reentrant=reentrant)
        z = F.dropout(y, 0.3)
        return checkpoint(lambda v: F.dropout(v.exp(), 0.5), z, use_reentrant=reentrant)

    check(func, numbers(3, 4), seeds=[11, 12, 13])


@KINDS
def test_recomputed_dropout_of_the_global_stream(reentrant: bool) -> None:
    """Unseeded: the mask of the forward is the mask of the gradient."""
    x = torch.ones(3, 200, dtype=torch.float64, requires_grad=True)
    func = partial(checkpoint, lambda v: F.dropout(v, 0.5), use_reentrant=reentrant)
    out = memberwise.vmap(func, randomness="different")(x)
    out.sum().backward()
    assert_equal(x.grad, out.detach())
    assert not torch.equal(out[0], out[1])
    same = memberwise.vmap(func, randomness="same")(x)
    x.grad = None
    same.sum().backward()
    assert_equal(x.grad, same.detach())
    assert torch.equal(same[0], same[1])


@KINDS
def test_without_preserving_the_stream(reentrant: bool) -> None:
    check(
        lambda x: checkpoint(torch.sin, x, use_reentrant=reentrant, preserve_rng_state=False) * x,
        numbers(3, 4),
        seeds=[1, 2, 3],
    )


class Net(nn.Module):
    """Blocks with dropout and BatchNorm, each checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(4)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def members(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    models = []
    with torch.random.fork_rng(devices=[]):
        for i in range(count):
            torch.manual_seed(i)
            models.append(make().double())
    return models


def compare_with_lone_runs(models: Sequence[nn.Module], x: torch.Tensor) -> None:
    params, buffers = memberwise.stack_module_state(list(models))
    generators = [torch.Generator().manual_seed(20 + i) for i in range(len(models))]

    def func(p: Any, b: Any, own: torch.Tensor) -> torch.Tensor:
        return memberwise.functional_call(models[0], (p, b), (own,))

    out = memberwise.vmap(func, (0, 0, None), generators=generators)(params, buffers, x)
    out.pow(2).sum().backward()
    with torch.random.fork_rng(devices=[]):
        for i, model in enumerate(models):
            torch.manual_seed(20 + i)
            lone = model(x)
            lone.pow(2).sum().backward()
            assert_equal(out[i].detach(), lone.detach())
            for name, p in model.named_parameters():
                assert p.grad is not None and p.grad.ne(0).any()
                assert_equal(params[name].grad[i], p.grad, f"member {i}: {name}")
            for name, buffer in model.named_buffers():
                assert_equal(buffers[name][i], buffer, f"member {i}: {name}")
            assert torch.equal(generators[i].get_state(), torch.get_rng_state())


@KINDS
def test_functional_call_recomputes_with_the_members_parameters(reentrant: bool) -> None:
    """torch's own functional_call recomputes with the template's, in silence, where checkpoint is not reentrant."""
    x = numbers(5, 4, seed=3, grad=reentrant)  # a reentrant checkpoint needs an input that requires grad
    compare_with_lone_runs(members(lambda: Net(reentrant), 3), x)


@KINDS
def test_checkpoint_sequential(reentrant: bool) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=reentrant)

    compare_with_lone_runs(members(Chain, 3), numbers(5, 4, seed=3, grad=True))


def test_tied_parameters_below_checkpoint() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda v: self.second(self.first(v).tanh()), x, use_reentrant=False)

    compare_with_lone_runs(members(Tied, 3), numbers(5, 4, seed=3, grad=False))


def test_context_fn_of_the_user_is_entered() -> None:
    from contextlib import contextmanager

    entered: list[str] = []

    @contextmanager
    def noted(name: str) -> Any:
        entered.append(name)
        yield

    def func(x: torch.Tensor) -> torch.Tensor:
        contexts = lambda: (noted("forward"), noted("recompute"))  # noqa: E731 # as torch's own examples write it
        return checkpoint(inner, x, x.outer(x), use_reentrant=False, context_fn=contexts)

    check(func, numbers(3, 4))
    assert entered == ["forward", "recompute"] * 4


def test_selective_checkpoint() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(inner, x, w, use_reentrant=False, context_fn=contexts)

    check(func, numbers(3, 2, 4), numbers(3, 4, 4, seed=1))


def test_nested_checkpoints() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        deeper = partial(checkpoint, lambda v: F.dropout(v, 0.4).sin(), use_reentrant=False)
        return checkpoint(lambda v: deeper(v) * deeper(v.exp()), x, use_reentrant=False)

    check(func, numbers(3, 4), seeds=[1, 2, 3])


@KINDS
def test_backward_inside_the_call(reentrant: bool) -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        own = x.detach().clone().requires_grad_()
        checkpoint(lambda v: F.dropout(v.sin(), 0.4), own, use_reentrant=reentrant).sum().backward()
        assert own.grad is not None
        return own.grad * x

    check(func, numbers(3, 4), seeds=[1, 2, 3])


def test_create_graph_through_checkpoint() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(lambda v: (v**3).sin(), x, use_reentrant=False)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return grad.pow(2)

    check(func, numbers(3, 4))


@KINDS
def test_autocast_below_checkpoint(reentrant: bool) -> None:
    dtypes: list[torch.dtype] = []

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        dtypes.append(y.dtype)
        return y.float().sin()

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(layer, x, w, use_reentrant=reentrant)

    x, w = numbers(3, 2, 4, dtype=torch.float32), numbers(3, 4, 4, seed=1, dtype=torch.float32)
    out = memberwise.vmap(func)(x, w)
    out.sum().backward()
    assert dtypes == [torch.bfloat16] * 2
    for i in range(3):
        own_x, own_w = (t[i].detach().requires_grad_() for t in (x, w))
        lone = func(own_x, own_w)
        lone.sum().backward()
        assert_equal(out[i].bfloat16(), lone.bfloat16())
        assert_equal(w.grad[i].bfloat16(), own_w.grad.bfloat16())
