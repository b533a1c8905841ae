"""Members out of a stack: live views, selections, slices, unstacked modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import memberwise
import memberwise.optim
from memberwise.errors import ArgumentError, MemberIndexError, StateError
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import cotangent
from tests.parity.stacks import Net, assert_same_state, backward, branches, inputs, nets, run_alone, twins


def test_a_member_is_of_its_own_class_and_looks_into_the_stack() -> None:
    models = nets(3)
    stack = memberwise.stack(models)
    member = stack[1]
    assert type(member) is Net
    assert list(member.state_dict()) == list(models[1].state_dict())
    for (name, p), (_, own) in zip(member.named_parameters(), models[1].named_parameters(), strict=True):
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
        assert p.requires_grad
        assert torch.equal(p, own)
        with torch.no_grad():
            stack.get_parameter(name)[1] += 1
        assert torch.equal(p, own + 1)
        with torch.no_grad():
            p.zero_()
        assert not stack.get_parameter(name)[1].any()
        assert torch.equal(stack.get_parameter(name)[2], models[2].get_parameter(name))


def test_negative_numbers_iteration_and_what_is_no_number() -> None:
    models = nets(3)
    stack = memberwise.stack(models)
    assert len(stack) == 3
    assert torch.equal(stack[-1].first.weight, models[2].first.weight)
    assert [torch.equal(m.first.weight, own.first.weight) for m, own in zip(stack, models, strict=True)] == [True] * 3
    assert torch.equal(stack[torch.tensor(1)].first.weight, models[1].first.weight)
    for index in (3, -4):
        with pytest.raises(IndexError, match=r"0 to 2.*MW305"):
            stack[index]
    assert issubclass(MemberIndexError, ArgumentError)
    with pytest.raises(TypeError):
        stack["first"]


def test_gradients_are_views_that_live() -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    member = stack[1]
    assert member.first.weight.grad is None
    backward(stack(x))
    run_alone(alone, lambda model, i: model(x))
    for name, p in member.named_parameters():
        assert_equal(p.grad, alone[1].get_parameter(name).grad, name)
        p.grad.mul_(2)
        assert_equal(stack.get_parameter(name).grad[1], 2 * alone[1].get_parameter(name).grad, name)
        assert_equal(stack.get_parameter(name).grad[2], alone[2].get_parameter(name).grad, name)
    stack.zero_grad()
    assert member.first.weight.grad is None


@pytest.mark.parametrize("first", ["member", "stack"])
def test_a_member_s_own_backward_adds_to_its_part_of_the_stack_s_gradient(first: str) -> None:
    models, x = [model.eval() for model in nets(3)], inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    if first == "stack":
        backward(stack(x))
        run_alone(alone, lambda model, i: model(x))
    member = stack[1]
    member(x).square().sum().backward()
    alone[1](x).square().sum().backward()
    for name, p in stack.named_parameters():
        own = [model.get_parameter(name).grad for model in alone]
        expected = torch.stack([torch.zeros_like(p[0]) if grad is None else grad for grad in own])
        assert_equal(p.grad, expected, name)
        assert_equal(member.get_parameter(name).grad, expected[1], name)


def test_a_member_trained_by_a_plain_optimizer_is_the_stack_s_member_trained() -> None:
    models, x = [model.eval() for model in nets(3)], inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    for model, optimizer in ((stack[1], torch.optim.AdamW), (alone[1], torch.optim.AdamW)):
        step = optimizer(model.parameters(), lr=0.1)
        for _ in range(3):
            step.zero_grad()
            model(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            step.step()
    assert_same_state(stack, alone, gradients=False)


def test_setting_and_clearing_a_member_s_gradient() -> None:
    stack = memberwise.stack(nets(3))
    weight = stack[1].first.weight
    weight.grad = torch.ones_like(weight)
    assert stack.first.weight.grad[:, 0, 0].tolist() == [0, 1, 0]
    weight.grad = torch.full_like(weight, 3)
    assert stack.first.weight.grad[:, 0, 0].tolist() == [0, 3, 0]
    stack[2].first.weight.grad = torch.ones_like(weight)
    stack[1].zero_grad()
    assert stack.first.weight.grad[:, 0, 0].tolist() == [0, 0, 1]
    del stack[2].first.weight.grad
    assert not stack.first.weight.grad.any()


def test_gradients_with_a_history_keep_it() -> None:
    stack, x = memberwise.stack([model.eval() for model in nets(3)]), inputs(5, 3).detach()
    member, alone = stack[1], copy.deepcopy(nets(3)[1].eval())
    for model in (member, alone):
        model(x).square().sum().backward(create_graph=True)
    member.first.weight.grad.square().sum().backward()
    alone.first.weight.grad.square().sum().backward()
    assert_equal(stack.last.weight.grad[1].detach(), alone.last.weight.grad.detach(), "second derivative")


def test_buffers_that_a_member_writes_or_assigns_go_into_the_stack() -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    member = stack[1]
    for _ in range(2):
        member(x)
        alone[1](x)
    assert_same_state(stack, alone, gradients=False)
    assert stack.calls.tolist() == [0, 2, 0]
    assert stack.norm.num_batches_tracked.tolist() == [0, 2, 0]


class Recurrent(nn.Module):
    """A state in a buffer, with its history."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.layer(x + self.state)
        return self.state


def test_a_buffer_with_a_history_keeps_it_in_a_member() -> None:
    models, x = [Recurrent().double() for _ in range(2)], inputs(3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    member = stack[1]
    for model in (member, alone[1]):
        model(x)
        model(x).sum().backward()
    assert_equal(stack.layer.weight.grad[1], alone[1].layer.weight.grad, "gradient through the buffer")
    assert_equal(stack.state[1], alone[1].state.detach(), "state")


def test_state_dicts_of_members_are_clones() -> None:
    stack = memberwise.stack(nets(3))
    member = stack[1]
    for state in (member.state_dict(), member.first.state_dict(prefix="first.")):
        kept = state["first.weight"].clone()
        with torch.no_grad():
            stack.first.weight.add_(1)
        assert torch.equal(state["first.weight"], kept)
        assert state["first.weight"].untyped_storage().nbytes() == kept.untyped_storage().nbytes()
        assert type(state["first.weight"]) is torch.Tensor
    assert member.state_dict(keep_vars=True)["first.weight"] is member.first.weight
    Net().double().load_state_dict(member.state_dict(), strict=True)


def test_loading_into_a_member_loads_into_the_stack() -> None:
    models = nets(4)
    stack = memberwise.stack(models[:3])
    stack[1].load_state_dict(models[3].state_dict())
    assert_same_state(stack, [models[0], models[3], models[2]], gradients=False)


@pytest.mark.parametrize("change", ["cast", "moved", "assigned", "the member cast"])
def test_a_stale_view_raises_whatever_is_done_with_it(change: str) -> None:
    stack, x = memberwise.stack(nets(3)), inputs(5, 3).detach()
    member = stack[1]
    if change == "cast":
        stack.float()
    elif change == "moved":
        stack.to("meta")
    elif change == "assigned":
        stack.load_state_dict({name: tensor.clone() for name, tensor in stack.state_dict().items()}, assign=True)
    else:
        member.float()
    uses = [
        lambda: member(x),
        lambda: member.first.weight + 1,
        lambda: torch.stack([member.first.weight]),
        lambda: member.first.weight.grad,
        lambda: setattr(member.first.weight, "grad", None),
        lambda: member.state_dict(),
        lambda: copy.deepcopy(member),
        lambda: torch.optim.SGD(member.parameters(), lr=1.0).zero_grad(),
    ]
    if change != "the member cast":
        uses.append(lambda: member.norm.running_mean.sum())
    for use in uses:
        with pytest.raises(StateError, match=r"(?s)member 1.*'[\w.]+'.*stack\[i\].*MW304"):
            use()
    assert stack[1].first.weight.shape == (4, 3)


def test_what_changes_no_memory_leaves_views_alive() -> None:
    models = nets(4)
    stack = memberwise.stack(models[:3])
    member = stack[1]
    stack.to(torch.float64).to("cpu")
    stack.load_state_dict(memberwise.stack(models[1:]).state_dict())
    stack.requires_grad_(True)
    torch.optim.SGD(stack.parameters(), lr=0.1).step()
    assert torch.equal(member.first.weight, models[2].first.weight)


def test_copies_and_pickles_of_a_member_are_modules_of_their_own() -> None:
    stack, x = memberwise.stack([model.eval() for model in nets(3)]), inputs(5, 3).detach()
    member = stack[1]
    expected = member(x).detach()
    saved = io.BytesIO()
    torch.save(member, saved)
    assert saved.tell() < 60_000
    saved.seek(0)
    copies = [copy.deepcopy(member), pickle.loads(pickle.dumps(member)), torch.load(saved, weights_only=False)]
    stack.float()
    for other in copies:
        assert type(other.first.weight) is nn.Parameter
        assert type(other.norm.running_mean) is torch.Tensor
        assert_equal(other(x).detach(), expected, "output of the copy")
        other(x).sum().backward()
        assert other.first.weight.grad.any()
    assert stack.first.weight.grad is None


def test_members_of_a_shared_trunk() -> None:
    models, x = branches(3), inputs(5, 3).detach()
    stack = memberwise.stack(models, shared="trunk.*")
    first, second = stack[0], stack[1]
    (first(x).sum() + second(x).sum()).backward()
    alone = branches(3)
    (alone[0](x).sum() + alone[1](x).sum()).backward()
    assert_equal(stack.trunk.weight.grad, alone[0].trunk.weight.grad, "gradient of the trunk")
    assert_equal(first.trunk.weight.grad, alone[0].trunk.weight.grad, "the same, seen by a member")
    second.trunk.weight.grad = None
    assert stack.trunk.weight.grad is None
    stack.float()
    with pytest.raises(StateError, match=r"shared 'trunk.weight'.*MW304"):
        first(x)


def test_a_view_shows_itself() -> None:
    stack = memberwise.stack(nets(2))
    weight = stack[1].first.weight
    assert "member 1" in repr(weight)
    stack.float()
    assert "stale" in repr(weight)


# -- selections


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([2, 0, 0], [2, 0, 0]),
        ([-1], [3]),
        ([True, False, True, False], [0, 2]),
        (torch.tensor([1, 3]), [1, 3]),
        (range(2), [0, 1]),
        (slice(1, None, 2), [1, 3]),
    ],
)
def test_select(indices: object, expected: list[int]) -> None:
    models, x = nets(4), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    backward(stack(x))
    run_alone(alone, lambda model, i: model(x))
    chosen = stack.select(indices)
    assert_same_state(chosen, [alone[i] for i in expected])
    assert all(p.is_leaf and type(p) is nn.Parameter for p in chosen.parameters())
    with torch.no_grad():
        chosen.first.weight.zero_()
    assert_same_state(stack, alone)
    backward(chosen(x))
    assert len(chosen) == len(expected)


def test_slices_are_selections() -> None:
    models = nets(5)
    stack = memberwise.stack(models)
    assert_same_state(stack[1:4], models[1:4], gradients=False)
    assert_same_state(stack[::-2], [models[4], models[2], models[0]], gradients=False)
    assert isinstance(stack[:1], memberwise.Stack)
    for nothing in ([], slice(3, 3)):
        with pytest.raises(ArgumentError, match="MW410"):
            stack.select(nothing)
    with pytest.raises(ArgumentError, match="MW410"):
        stack.select([5])


def test_streams_travel_and_part() -> None:
    stack, x = memberwise.build(Net, seeds=range(3), dtype=torch.float64), inputs(6, 3).detach()
    stack(x)
    chosen = stack.select([2, 0, 0])
    expected = stack(x)
    found = chosen(x)
    assert_equal(found.detach(), expected[[2, 0, 0]].detach(), "outputs with dropout")
    assert [
        g.get_state().equal(stack.generators[i].get_state()) for g, i in zip(chosen.generators, (2, 0, 0), strict=True)
    ]
    assert chosen.generators[1] is not chosen.generators[2]
    assert not any(g is h for g in chosen.generators for h in stack.generators)


def test_what_belongs_to_a_stack_travels_with_it() -> None:
    """Modes, hooks, what calls left in attributes, and attributes of the stack itself."""
    stack = memberwise.stack(nets(3))
    seen = []
    stack.register_forward_hook(lambda module, args, out: seen.append(len(module)))
    stack.note = "kept"
    stack.eval(members=[1])
    chosen = stack.select([1, 2])
    assert chosen.note == "kept"
    chosen(inputs(5, 3).detach())
    assert seen == [2]
    assert chosen.norm.num_batches_tracked.tolist() == [0, 1]
    assert stack.norm.num_batches_tracked.tolist() == [0, 0, 0]


def test_a_stack_and_its_optimizer_travel_together() -> None:
    models, x = [model.eval() for model in nets(3)], inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    ours = memberwise.optim.AdamW(stack.parameters(), lr=0.1)
    theirs = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in alone]

    def step(stack: memberwise.Stack, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(stack(x))
        optimizer.step()

    step(stack, ours)
    kept, optimizer = memberwise.members.select((stack, ours), [2, 0])
    step(kept, optimizer)
    for i, (model, own) in enumerate(zip(alone, theirs, strict=True)):
        for members in ([0, 1, 2], [2, 0]):
            if i in members:
                own.zero_grad()
                out = model(x)
                out.backward(cotangent(out.new_empty(len(members), *out.shape), 0)[members.index(i)])
                own.step()
    assert_same_state(kept, [alone[2], alone[0]], gradients=False)


# -- unstacked


def test_unstacked_members_are_independent_and_complete() -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    backward(stack(x))
    run_alone(alone, lambda model, i: model(x))
    back = stack.unstack()
    assert [type(model) for model in back] == [Net] * 3
    for model, own in zip(back, alone, strict=True):
        for name, p in model.named_parameters():
            assert type(p) is nn.Parameter
            assert_equal(p.detach(), own.get_parameter(name).detach(), name)
            assert_equal(p.grad, own.get_parameter(name).grad, name)
        for name, buffer in model.named_buffers():
            assert_equal(buffer, own.get_buffer(name), name)
        with torch.no_grad():
            model.first.weight.zero_()
        model(x).sum().backward()
    assert_same_state(stack, alone)
    assert stack.first.weight.untyped_storage().data_ptr() != back[0].first.weight.untyped_storage().data_ptr()


def test_stacked_again_it_is_the_same_stack() -> None:
    models = nets(3)
    stack = memberwise.stack(models)
    assert_same_state(memberwise.stack(stack.unstack()), models, gradients=False)
    assert_same_state(memberwise.stack([copy.deepcopy(member) for member in stack]), models, gradients=False)


class Speaks(Net):
    """Has a method, a property and a constant of the class."""

    width = 4

    @property
    def total(self) -> torch.Tensor:
        return self.first.weight.sum()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def test_what_is_a_method_a_property_or_unknown_says_so() -> None:
    stack, x = memberwise.stack([Speaks().double() for _ in range(2)]), inputs(5, 3)
    assert stack.mark == "as made"
    assert stack.width == 4
    with pytest.raises(AttributeError, match=r"no attribute 'unknown'\. \[MW306\]"):
        _ = stack.unknown
    with pytest.raises(AttributeError, match=r"vmap\(lambda model, \*args: model\.encode\(.*MW306"):
        stack.encode(x)
    with pytest.raises(AttributeError, match=r"vmap\(lambda model: model\.total\)\(stack\).*MW306"):
        _ = stack.total
    assert memberwise.vmap(lambda model, x: model.encode(x), (0, None))(stack, x).shape == (2, 5, 4)
    assert_equal(memberwise.vmap(lambda model: model.total)(stack), stack.first.weight.sum((1, 2)), "property")
    assert not hasattr(stack, "encode")
