"""A group of models of different architectures against a loop over them: calls, training, what travels along."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise import optim
from memberwise.errors import ArgumentError, KindError, StateError
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import inputs, twins

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def models() -> list[nn.Module]:
    """Six models of four kinds, out of order; two of one kind differ in a rate, and one is in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [
            nn.Linear(3, 2),
            deep(0.2),
            nn.Linear(3, 2),
            deep(0.5).eval(),
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        ]
    return [model.double() for model in made]


def deep(rate: float) -> nn.Module:
    layers = nn.Linear(3, 4, bias=False), nn.Dropout(rate), nn.BatchNorm1d(4), nn.Linear(4, 2)
    return nn.Sequential(*layers)  # a bias before a batch norm has a gradient of rounding errors alone


def streams(count: int = 6) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(20 + i) for i in range(count)]


def in_a_loop(
    members: Sequence[nn.Module], call: Callable[[nn.Module, int], Any], own: Sequence[torch.Generator]
) -> list[Any]:
    """Each model alone, on its own stream."""
    outs = []
    for i, model in enumerate(members):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(own[i].get_state())
            outs.append(call(model, i))
            own[i].set_state(torch.get_rng_state())
    return outs


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return inputs(count, 5, 3).detach(), torch.randint(0, 2, (count, 5), generator=generator)


def assert_same_members(group: memberwise.Group, alone: Sequence[nn.Module], gradients: bool = True) -> None:
    """Parameters, gradients and buffers of each member are the lone model's."""
    for mine, theirs in zip(group.unstack(), alone, strict=True):
        assert type(mine) is type(theirs)
        assert [name for name, _ in mine.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        for name, p in mine.named_parameters():
            other = theirs.get_parameter(name)
            assert_equal(p.detach(), other.detach(), name)
            if gradients:
                assert p.grad is not None
                assert other.grad is not None
                assert_equal(p.grad, other.grad, f"gradient of {name}")
        for name, buffer in mine.named_buffers():
            assert_equal(buffer, theirs.get_buffer(name), name)


def test_as_few_stacks_as_run_as_one() -> None:
    group = memberwise.group(models())
    assert group.places == [[0, 2], [1, 3], [4], [5]]
    assert [len(stack) for stack in group.stacks] == [2, 2, 1, 1]
    assert len(group) == 6
    assert memberwise.group([nn.LeakyReLU(0.1 * i) for i in range(5)]).places == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("marked", [False, True])
def test_a_call_gives_the_members_results_in_their_order(marked: bool) -> None:
    group, alone, own = memberwise.group(models()), models(), streams()
    group.generators = streams()
    xs = batch()[0].requires_grad_()
    for _ in range(2):
        out = group(memberwise.each(xs)) if marked else group(xs[0])
        expected = in_a_loop(alone, lambda model, i: model(xs[i] if marked else xs[0]), own)
        assert_equal(out.detach(), torch.stack(expected).detach())
        grad = torch.autograd.grad(out.square().sum(), xs, retain_graph=True)[0]
        assert_equal(grad, torch.autograd.grad(sum(one.square().sum() for one in expected), xs, retain_graph=True)[0])
        out.square().sum().backward()
        for one in expected:
            one.square().sum().backward()
    assert_same_members(group, alone)
    for mine, theirs in zip(group.generators or (), own, strict=True):
        assert torch.equal(mine.get_state(), theirs.get_state())


def test_results_of_other_shapes_come_as_a_list() -> None:
    made = [nn.Linear(3, 2), nn.Linear(3, 1), nn.Linear(3, 2)]
    out = memberwise.group(made)(torch.ones(5, 3))
    assert isinstance(out, list)
    for one, model in zip(out, made, strict=True):
        assert_equal(one, model(torch.ones(5, 3)))
    named = memberwise.vmap(lambda model, x: {"a": model(x), "b": 1}, (0, None))(memberwise.group(made), torch.ones(3))
    assert [(one["a"].shape, one["b"]) for one in named] == [((2,), 1), ((1,), 1), ((2,), 1)]


def test_results_of_other_types_come_as_a_list() -> None:
    made = [nn.Linear(3, 2), nn.Sequential(Cast(), nn.Linear(3, 2).double())]
    out = memberwise.group(made)(torch.ones(3))
    assert [one.dtype for one in out] == [torch.float32, torch.float64]


class Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_training_is_the_loop_s(name: str, captured: bool) -> None:
    """A rate a member under a schedule, clipping, and a resume in the middle."""
    group, alone, own = memberwise.group(models()), models(), streams()
    group.generators = streams()
    optimizer = getattr(optim, name)(group.parameters(), lr=RATES)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    lone = [getattr(torch.optim, name)(model.parameters(), lr=rate) for model, rate in zip(alone, RATES, strict=True)]
    lone_schedules = [torch.optim.lr_scheduler.StepLR(one, 2, 0.5) for one in lone]
    xs, ys = batch()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        losses = memberwise.vmap(loss)(group, xs, ys)
        losses.sum().backward()
        norms = memberwise.clip_grad_norm_(group, 0.3)
        optimizer.step()
        return losses.detach(), norms

    def lone_step(model: nn.Module, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        lone[i].zero_grad()
        one = loss(model, xs[i], ys[i])
        one.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        lone[i].step()
        lone_schedules[i].step()
        return one.detach(), norm

    run = memberwise.compile(step, backend="fx") if captured else step
    for k in range(4):
        losses, norms = run()
        schedule.step()
        expected = in_a_loop(alone, lone_step, own)
        assert_equal(losses, torch.stack([one for one, _ in expected]))
        assert_equal(norms, torch.stack([norm for _, norm in expected]).to(norms.dtype))
        if k == 1 and not captured:
            saved, standing = copy.deepcopy((group.state_dict(), optimizer.state_dict())), group.generators
            group = memberwise.group(models())
            group.load_state_dict(saved[0])
            group.generators = standing
            optimizer = getattr(optim, name)(group.parameters(), lr=RATES)
            optimizer.load_state_dict(saved[1])
            schedule.optimizer = optimizer
    assert_same_members(group, alone)


def test_members_travel_with_their_optimizer() -> None:
    group, (xs, ys) = memberwise.group([model.eval() for model in models()]), batch()
    optimizer = optim.AdamW(group.parameters(), lr=RATES)

    def train(group: memberwise.Group, optimizer: Any, members: list[int]) -> None:
        optimizer.zero_grad()
        memberwise.vmap(loss)(group, xs[members], ys[members]).sum().backward()
        optimizer.step()

    train(group, optimizer, [*range(6)])
    order = [4, 2, 3, 4]
    chosen, own = memberwise.select((group, optimizer), order)
    copied, other = copy.deepcopy((group, optimizer))
    assert (len(chosen), len(own), len(other)) == (4, 4, 6)
    assert chosen.places == [[1], [2], [0, 3]]
    train(group, optimizer, [*range(6)])
    train(chosen, own, order)
    train(copied, other, [*range(6)])
    expected = group.unstack()
    assert_same_members(chosen, [expected[i] for i in order])
    assert_same_members(copied, expected)


def test_clipping_takes_a_bound_a_member_and_names_who_is_not_finite() -> None:
    group, alone, (xs, ys) = memberwise.group(models()), models(), batch()
    for made in (group, *alone):
        made.eval()
    bounds = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    memberwise.vmap(loss)(group, xs, ys).sum().backward()
    for i, model in enumerate(alone):
        loss(model, xs[i], ys[i]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), bounds[i])
    memberwise.clip_grad_norm_(group, bounds)
    assert_same_members(group, alone)
    next(iter(group.stacks[1].parameters())).grad[1] = torch.inf  # type: ignore[index] # it has one
    with pytest.raises(RuntimeError, match=r"member 3: inf.*MW407"):
        memberwise.clip_grad_norm_(group, bounds, error_if_nonfinite=True)
    assert_equal(group[0].weight.grad, alone[0].weight.grad)


def test_views_slices_modes_and_pickles() -> None:
    group, x = memberwise.group(models()), inputs(5, 3).detach()
    group.eval(members=[0, 1, 4, 5])
    alone = [model.eval() if i != 2 else model for i, model in enumerate(models())]
    assert [model.training for model in group.unstack()] == [model.training for model in alone]
    expected = torch.stack([model(x) for model in alone])
    for made in (group, pickle.loads(pickle.dumps(group)), copy.deepcopy(group)):
        assert_equal(made(x).detach(), expected.detach())
    assert_equal(group[1:4](x).detach(), expected[1:4].detach())
    assert_equal(torch.stack([member(x) for member in group]).detach(), expected.detach())
    group[-1][0].weight.data.zero_()
    assert not group.stacks[3].get_parameter("0.weight").any()
    assert group.train() is group
    assert all(model.training for model in group.unstack())
    assert_equal(group.eval().float()(x.float())[0].detach(), alone[0].float()(x.float()).detach(), "moved")


def test_what_members_write_to_their_inputs_is_there_afterwards() -> None:
    xs = inputs(6, 5, 3).detach()
    expected = xs * 2
    memberwise.vmap(lambda model, x: model(x.mul_(2)))(memberwise.group(models()).eval(), xs)
    assert_equal(xs, expected)


def test_verify_and_explain_take_a_group() -> None:
    group, (xs, ys) = memberwise.group(models()), batch()
    report = memberwise.verify(group, memberwise.each(xs), memberwise.each(ys), loss_fn=loss, members=3)
    assert report.members == [0, 2, 5]
    assert report.wrong == []
    assert {row.member for row in report.rows} <= {0, 2, 5}
    assert {row.name.split(".")[1] for row in report.rows} == {"0", "3"}
    before = {name: tensor.clone() for name, tensor in group.state_dict().items()}
    assert memberwise.explain(group, xs[0]).rows
    for name, tensor in group.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_lazy_models_are_grouped_by_what_they_become() -> None:
    made = [nn.Sequential(nn.LazyLinear(width), nn.Linear(width, 2)) for width in (4, 5, 4)]
    group = memberwise.group(made, example_inputs=(torch.ones(6, 3),))
    assert group.places == [[0, 2], [1]]
    assert_equal(group(torch.ones(6, 3)), torch.stack([model(torch.ones(6, 3)) for model in made]))


def test_two_groups_in_one_call() -> None:
    online, target, (xs, _) = memberwise.group(models()).eval(), memberwise.group(models()).eval(), batch()
    both = memberwise.vmap(lambda a, b, x: a(x) - b(x))
    assert not both(online, target, xs).any()
    with pytest.raises(ArgumentError, match="MW201"):
        both(online, target.select([1, 0, 2, 3, 4, 5]), xs)


def test_what_a_group_refuses() -> None:
    with pytest.raises(StateError, match="MW101"):
        memberwise.group([])
    with pytest.raises(KindError, match="MW108"):
        memberwise.group(nn.Linear(2, 2))  # type: ignore[arg-type] # that is the point
    with pytest.raises(KindError, match=r"member 1 is a str.*MW108"):
        memberwise.group([nn.Linear(2, 2), "b"])  # type: ignore[list-item] # that is the point
    trunk = nn.Linear(3, 3)
    with pytest.raises(StateError, match=r"(?s)'0\.weight' of member 1 is one object.*deepcopy.*MW105"):
        memberwise.group([nn.Sequential(trunk, nn.Linear(3, 2)), nn.Sequential(trunk, nn.Linear(3, 1))])
    group = memberwise.group(models())
    with pytest.raises(ArgumentError, match=r"expected 6 members in dimension 0.*MW201"):
        group(memberwise.each(torch.ones(4, 5, 3)))
    with pytest.raises(ArgumentError, match="MW303"):
        group.generators = streams(2)
    with pytest.raises(IndexError, match="MW305"):
        group[6]
    with pytest.raises(ArgumentError, match="MW401"):
        optim.SGD(group.parameters(), lr=[0.1, 0.2, 0.3])
    with pytest.raises(StateError, match=r"(?s)member 1.*group\(models\).*MW103"):
        memberwise.stack([nn.Linear(3, 2), nn.Linear(3, 1)])


def test_shared_arguments_of_the_models_stay_as_they_are() -> None:
    made = models()
    before = twins(made)
    group = memberwise.group(made)
    group(torch.ones(5, 3).double()).sum().backward()
    for model, other in zip(made, before, strict=True):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.grad is None
