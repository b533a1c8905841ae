"""What surrounds a stack's call: transforms, checkpoints, autocast, averaging, other stacks, other threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import Net, assert_same_state, backward, inputs, nets, run_alone, twins


def stacks() -> tuple[memberwise.Stack, list[Net]]:
    models = [model.eval() for model in nets(3)]
    return memberwise.stack(models), twins(models)


def test_functional_call_of_a_stack() -> None:
    stack, alone = stacks()
    x = inputs(5, 3).detach()
    doubled = {name: (2 * p).detach().requires_grad_() for name, p in stack.named_parameters()}
    out = torch.func.functional_call(stack, (doubled, dict(stack.named_buffers())), (x,))
    backward(out)
    before = stack(x)
    for model in alone:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    expected = run_alone(alone, lambda model, i: model(x))
    assert_equal(out.detach(), expected, "output")
    for name, p in doubled.items():
        assert_equal(p.grad, torch.stack([model.get_parameter(name).grad for model in alone]), name)
    assert_equal(stack(x).detach(), before.detach(), "the stack's own output")


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
def test_transforms_of_parameters(transform: str) -> None:
    stack, alone = stacks()
    x = inputs(5, 3).detach()
    params = {name: p.detach() for name, p in stack.named_parameters()}

    def total(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(stack, params, (x,)).square().sum()

    if transform == "grad":
        grads = torch.func.grad(total)(params)
    elif transform == "vjp":
        (grads,) = torch.func.vjp(total, params)[1](torch.ones((), dtype=torch.float64))
    else:
        grads = torch.func.jacrev(total)(params)
    for model in alone:
        model(x).square().sum().backward()
    for name, grad in grads.items():
        assert_equal(grad, torch.stack([model.get_parameter(name).grad for model in alone]), name)
        assert grad.any()


def test_torch_vmap_around_a_stack() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(3)]
    stack, alone, xs = memberwise.stack(models), twins(models), inputs(4, 5, 3).detach()
    out = torch.vmap(stack)(xs)
    out.square().sum().backward()
    for k, x in enumerate(xs):
        for i, model in enumerate(alone):
            own = model(x)
            own.square().sum().backward()
            assert_equal(out[k, i].detach(), own.detach(), "output")
    assert_same_state(stack, alone)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("draws", [True, False])
def test_a_checkpoint_around_a_stack(reentrant: bool, draws: bool) -> None:
    stack, x = memberwise.stack(nets(3, p=0.5 if draws else 0.0)), inputs(6, 3)
    other, own = copy.deepcopy(stack), x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    out = checkpoint(stack, x, use_reentrant=reentrant)
    backward(out)
    torch.manual_seed(0)
    expected = other(own)
    backward(expected)
    assert_equal(out.detach(), expected.detach(), "output")
    assert_equal(x.grad, own.grad, "gradient of the input")
    for (name, p), q in zip(stack.named_parameters(), other.parameters(), strict=True):
        assert_equal(p.grad, q.grad, name)
        assert p.grad.any() or name == "first.bias"  # before a norm it has none


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_seeded_stack_is_refused_where_it_draws(reentrant: bool) -> None:
    """torch restores the global stream alone; other masks than in forward would give a wrong gradient."""
    stack, x = memberwise.build(Net, seeds=range(3), dtype=torch.float64), inputs(6, 3)
    with pytest.raises(memberwise.errors.EngineError, match=r"checkpoint.*MW209"):
        backward(checkpoint(stack, x, use_reentrant=reentrant))
    assert stack.first.weight.shape == (3, 4, 3)
    backward(checkpoint(stack.eval(), x, use_reentrant=reentrant))
    assert stack.first.weight.grad.any()


class Reads(nn.Module):
    """Runs by members, with or without a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(x) * self.layer.weight.sum().item())


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_the_same_where_members_part_ways(nested: bool) -> None:
    stack = memberwise.build(lambda: nn.Sequential(Reads()) if nested else Reads(), seeds=range(3), dtype=torch.float64)
    x = inputs(6, 3)
    with pytest.raises(memberwise.errors.EngineError, match=r"checkpoint.*MW209"):
        backward(checkpoint(stack, x, use_reentrant=False))
    backward(checkpoint(stack.eval(), x, use_reentrant=False))
    assert x.grad.any()


class Inside(Net):
    """Puts the checkpoint where each member's stream is restored."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpoint_inside_a_seeded_stack_draws_the_same_again() -> None:
    inner, plain = (memberwise.build(kind, seeds=range(3), dtype=torch.float64) for kind in (Inside, Net))
    x = inputs(6, 3).detach()
    out, expected = inner(x), plain(x)
    backward(out)
    backward(expected)
    assert_equal(out.detach(), expected.detach(), "output")
    for (name, p), q in zip(inner.named_parameters(), plain.parameters(), strict=True):
        assert_equal(p.grad, q.grad, name)


def test_autocast_around_a_stack() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)) for _ in range(3)]
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3, dtype=torch.float32).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(x)
        expected = torch.stack([model(x) for model in alone])
    assert out.dtype is expected.dtype is torch.bfloat16
    assert_equal(out, expected, "output")
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    for name, p in stack.named_parameters():
        theirs = torch.stack([model.get_parameter(name).grad for model in alone])
        assert_equal(p.grad.bfloat16(), theirs.bfloat16(), name)
        assert p.grad.any()


def test_an_averaged_stack_averages_each_member() -> None:
    stack, alone = stacks()
    averaged, own = AveragedModel(stack), [AveragedModel(model) for model in alone]
    x = inputs(5, 3).detach()
    for _ in range(2):
        for module in (stack, *alone):
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(1)
        averaged.update_parameters(stack)
        for average, model in zip(own, alone, strict=True):
            average.update_parameters(model)
    assert_equal(averaged(x).detach(), torch.stack([average(x).detach() for average in own]), "output")


class Parent(nn.Module):
    """A model that has an ensemble of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ensemble, self.head = memberwise.stack(nets(2)), nn.Linear(2, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.ensemble(x))


@pytest.mark.parametrize("train", [True, False])
def test_a_stack_of_models_that_have_stacks(train: bool) -> None:
    models = [Parent().train(train) for _ in range(3)]
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3)
    expected = run_alone(alone, lambda model, i: model(x.detach()))
    out = stack(x)
    backward(out)
    assert out.shape == (3, 2, 5, 2)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.ensemble.first.weight.shape == (3, 2, 4, 3)
    stack.eval()
    own = torch.stack([model.eval()(x).detach() for model in alone])
    for other in (copy.deepcopy(stack), stack.select(range(3))):
        assert_equal(other(x).detach(), own, "output of a copy")
    assert_equal(stack.unstack()[1](x).detach(), own[1], "output of an unstacked member")
    assert_equal(stack[2](x).detach(), own[2], "output of a live member")


def test_a_stack_of_stacks() -> None:
    models = [memberwise.stack(nets(2)).eval() for _ in range(3)]
    stack, x = memberwise.stack(models), inputs(5, 3).detach()
    assert_equal(stack(x).detach(), torch.stack([model(x).detach() for model in models]), "output")
    assert repr(stack).startswith("Stack of 3 members: Stack of 2 members: Net(")


def test_threads_take_turns() -> None:
    stack, alone = stacks()
    x = inputs(5, 3).detach()
    expected = torch.stack([model(x).detach() for model in alone])
    outs: list[Any] = [None] * 8

    def work(k: int) -> None:
        for _ in range(5):
            outs[k] = stack(x) if k % 2 else memberwise.vmap(lambda model, x: model(x), (0, None))(stack, x)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(outs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        assert_equal(out.detach(), expected, "output in a thread")
