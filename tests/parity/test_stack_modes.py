"""Training and evaluation mode, of all members and of some."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import memberwise
from memberwise import each
from memberwise.errors import ArgumentError, EngineError
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import Net, assert_same_state, backward, branches, inputs, nets, run_alone, twins


def test_modes_of_all_members() -> None:
    stack = memberwise.stack(nets(3))
    assert stack.training
    assert stack.eval() is stack
    assert not stack.training
    assert not any(module.training for module in stack.modules())
    assert not stack._template.training
    assert stack.train().norm.training
    stack.training = False
    assert not stack._template.training


@pytest.mark.parametrize("trained", [[0], [1], [0, 2], [3, 1], [0, 1, 2, 3], []])
@pytest.mark.parametrize("own", [True, False])
def test_members_in_different_modes_run_as_they_would_alone(trained: list[int], own: bool) -> None:
    models = nets(4)
    stack = memberwise.stack(models).eval()
    if trained:
        assert stack.train(members=trained) is stack
    alone = [model.train(i in trained) for i, model in enumerate(twins(models))]
    xs = inputs(4, 5, 3) if own else inputs(5, 3)
    theirs = xs.detach().clone().requires_grad_()
    for _ in range(2):
        expected = run_alone(alone, lambda model, i: model(theirs[i] if own else theirs))
        out = stack(each(xs) if own else xs)
        backward(out)
        assert_equal(out.detach(), expected, "output")
    assert_equal(xs.grad, theirs.grad, "gradient of the inputs")
    assert_same_state(stack, alone)
    assert stack.norm.num_batches_tracked.tolist() == [2 * (i in trained) for i in range(4)]


def test_a_loss_of_members_in_different_modes() -> None:
    models, xs = nets(3), inputs(5, 3, 3)
    stack, alone = memberwise.stack(models), twins(models)
    stack.eval(members=[0])
    alone[0].eval()

    def loss_fn(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(x)
        return out.square().mean(), out

    losses, outs = memberwise.vmap(loss_fn, (0, 1), (0, 2))(stack, xs)
    losses.sum().backward()
    own = []
    for i, model in enumerate(alone):
        loss, out = loss_fn(model, xs.detach()[:, i])
        loss.backward()
        own.append(loss.detach())
        assert_equal(outs[..., i].detach(), out.detach(), "output")
    assert_equal(losses.detach(), torch.stack(own), "losses")
    assert_same_state(stack, alone)


def test_chunks_of_members_in_different_modes() -> None:
    models, x = nets(5), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    stack.eval(members=[1, 3])
    alone[1].eval(), alone[3].eval()
    expected = run_alone(alone, lambda model, i: model(x))
    out = memberwise.vmap(lambda model, x: model(x), (0, None), chunk_size=2)(stack, x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)


def test_streams_of_members_in_different_modes() -> None:
    stack, x = memberwise.build(Net, seeds=range(4), dtype=torch.float64), inputs(6, 3).detach()
    stack.eval(members=[1])
    out = stack(x)
    with torch.random.fork_rng(devices=[]):
        for i in range(4):
            torch.manual_seed(i)
            model = Net().double().train(i != 1)
            assert_equal(out[i].detach(), model(x).detach(), f"member {i}")
            assert torch.equal(torch.get_rng_state(), stack.generators[i].get_state())


def test_a_shared_trunk_of_members_in_different_modes() -> None:
    models, x = branches(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models, shared="trunk.*"), branches(3)
    for mine, theirs in zip(alone, models, strict=True):
        mine.load_state_dict(theirs.state_dict())
    stack.eval(members=[1])
    run_alone(alone, lambda model, i: model(x))
    backward(stack(x))
    assert_same_state(stack, alone)


class Freezes(nn.Module):
    """Keeps its statistics still, whatever mode it is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


def test_the_class_s_own_train_is_asked() -> None:
    stack = memberwise.stack([Freezes().double().train() for _ in range(3)])
    stack.eval().train()
    assert stack.drop.training
    assert not stack.norm.training
    stack.eval(members=[1])
    out = stack(inputs(8, 3).detach())
    assert stack.norm.num_batches_tracked.tolist() == [0, 0, 0]
    assert bool((out[0] == 0).any())
    assert not bool((out[1] == 0).any())


def test_a_part_s_mode_holds_for_members_without_one_of_their_own() -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    stack.eval(members=[2])
    stack.norm.eval()
    alone[0].norm.eval(), alone[1].norm.eval(), alone[2].eval()
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert not stack.norm.training
    assert stack.training


def test_modes_of_all_members_one_by_one_are_the_mode_of_all() -> None:
    stack = memberwise.stack(nets(3))
    stack.eval(members=[0, 1]).eval(members=[2])
    assert not stack.training
    assert stack.__memberwise_slots__().apart == {}
    stack.train(members=[1])
    stack.eval(members=[1])
    assert stack.__memberwise_slots__().apart == {}
    stack.train(members=[True, False, False]).eval()
    assert stack.__memberwise_slots__().apart == {}
    with pytest.raises(ArgumentError, match="MW410"):
        stack.train(members=[3])


def test_modes_go_where_members_go() -> None:
    stack = memberwise.stack(nets(3))
    stack.eval(members=[1])
    assert [member.training for member in stack] == [True, False, True]
    assert [member.norm.training for member in stack.unstack()] == [True, False, True]
    assert [member.training for member in stack.select([1, 1, 0])] == [False, False, True]
    assert [member.training for member in copy.deepcopy(stack)] == [True, False, True]


class Answers(nn.Module):
    """Answers another structure in each mode, or another shape."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), how

    def forward(self, x: torch.Tensor) -> object:
        out = self.layer(x)
        if self.how == "flag":
            return out, self.training
        if self.how == "shape":
            return out if self.training else out[:1]
        return {"out": out} if self.training else {"out": out, "more": out}


def test_other_values_come_one_a_member() -> None:
    stack = memberwise.stack([Answers("flag") for _ in range(3)])
    stack.eval(members=[1])
    assert stack(inputs(5, 3, dtype=torch.float32))[1] == [True, False, True]


@pytest.mark.parametrize("how", ["shape", "structure"])
def test_answers_that_do_not_fit_together_are_refused(how: str) -> None:
    stack = memberwise.stack([Answers(how) for _ in range(3)])
    stack.eval(members=[1])
    with pytest.raises(EngineError, match=r"modes.*MW203"):
        stack(inputs(5, 3, dtype=torch.float32))


class Remembers(nn.Module):
    """Leaves tensors in attributes, and counts in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout(0.0)
        self.hidden, self.count = None, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.hidden = self.layer(x) if self.hidden is None else self.layer(x) + self.hidden
        return self.hidden if self.training else -self.hidden


@pytest.mark.parametrize("apart", [[1], [0]])
def test_attributes_of_members_in_different_modes(apart: list[int]) -> None:
    models, x = [Remembers().double() for _ in range(3)], inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    stack.eval(members=apart)
    alone[apart[0]].eval()
    for _ in range(2):
        out = stack(x)
    expected = run_alone(alone, lambda model, i: [model(x) for _ in range(2)][-1])
    backward(out)
    assert_equal(out.detach(), expected, "output of the second call")
    assert_equal(stack.hidden.detach(), torch.stack([model.hidden.detach() for model in alone]), "attribute")
    assert stack.count == 2
    assert_same_state(stack, alone)
    chosen = stack.select([2, 0])
    assert_equal(chosen.hidden, stack.hidden.detach()[[2, 0]], "attribute of the selection")


def test_an_error_leaves_the_stack_whole() -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack = memberwise.stack(models)
    stack.eval(members=[1])

    def fails(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not model.training:
            raise ZeroDivisionError
        return model(x)

    with pytest.raises(ZeroDivisionError):
        memberwise.vmap(fails, (0, None))(stack, x)
    assert stack.first.weight.shape == (3, 4, 3)
    assert stack.training
    assert stack.norm.training
    assert stack(x).shape == (3, 5, 2)
