"""Stacks from live models and from seeds: what goes in, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import memberwise
from memberwise.errors import ArgumentError, KindError, StackWarning, StateError
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import (
    Branches,
    Net,
    assert_same_gradient,
    assert_same_state,
    backward,
    branches,
    inputs,
    nets,
    run_alone,
    twins,
)


def test_models_stay_as_they_are_and_share_nothing() -> None:
    models = nets(3)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    stack = memberwise.stack(models)
    backward(stack(inputs(5, 3)))
    torch.optim.SGD(stack.parameters(), lr=1.0).step()
    for model, state in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        assert all(p.grad is None for p in model.parameters())
        assert model.mark == "as made"


def test_parameters_are_new_leaves_under_the_members_names() -> None:
    models = nets(3)
    models[0].last.bias.requires_grad_(False)
    for model in models[1:]:
        model.last.bias.requires_grad_(False)
    stack = memberwise.stack(models)
    assert list(stack.state_dict()) == list(models[0].state_dict())
    for name, p in stack.named_parameters():
        assert type(p) is nn.Parameter
        assert p.is_leaf
        assert p.shape == (3, *models[0].get_parameter(name).shape)
        assert p.requires_grad == models[0].get_parameter(name).requires_grad
    assert {name for name, _ in stack.named_buffers()} == {name for name, _ in models[0].named_buffers()}
    assert "mean" not in stack.state_dict()


@pytest.mark.parametrize("form", [list, tuple, nn.ModuleList, iter])
def test_any_sequence_or_iterator(form: type) -> None:
    models = nets(3)
    stack = memberwise.stack(form(models))
    assert_same_state(stack, models, gradients=False)


def test_from_an_iterator_no_two_models_are_held() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def made() -> Iterator[nn.Module]:
        for _ in range(4):
            gc.collect()
            assert sum(ref() is not None for ref in alive) == 0
            model = nn.Linear(3, 3)
            alive.append(weakref.ref(model))
            yield model
            del model

    assert len(memberwise.stack(made())) == 4


def test_what_is_no_sequence_of_modules_is_refused() -> None:
    with pytest.raises(StateError, match="MW101"):
        memberwise.stack([])
    for given in (3, nn.ModuleDict({"a": nn.Linear(2, 2)}), [nn.Linear(2, 2), "b"]):
        with pytest.raises(KindError, match="MW108"):
            memberwise.stack(given)


def test_models_that_differ_are_refused_with_every_difference() -> None:
    with pytest.raises(StateError, match="MW102"):
        memberwise.stack([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)])
    with pytest.raises(StateError, match=r"(?s)member 1.*weight.*member 2.*bias.*MW103"):
        memberwise.stack([nn.Linear(2, 2), nn.Linear(3, 2), nn.Linear(2, 2, bias=False)])
    with pytest.raises(StateError, match="MW104"):
        memberwise.stack([nn.LazyLinear(2), nn.LazyLinear(2)])


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    models = nets(2)
    for model in models:
        model.lock = (entry for entry in ())
    with pytest.raises(StateError, match=r"Net cannot be copied.*MW301"):
        memberwise.stack(models)


# -- what members differ in outside their tensors


def test_differing_settings_are_shown_and_come_back() -> None:
    models = [Net(p) for p in (0.1, 0.2, 0.5)]
    models[1].mark = "other"
    stack = memberwise.stack(models)
    assert repr(stack.drop.p) == "MemberValue(0.1, 0.2, 0.5)"
    back = stack.unstack()
    assert [model.drop.p for model in back] == [0.1, 0.2, 0.5]
    assert [model.mark for model in back] == ["as made", "other", "as made"]
    assert stack.select([2, 1])[1].drop.p == 0.2


def test_a_setting_of_the_stack_goes_to_all() -> None:
    stack = memberwise.stack([Net(p) for p in (0.1, 0.2, 0.5)])
    stack.drop.p = 0.3
    assert [model.drop.p for model in stack.unstack()] == [0.3, 0.3, 0.3]
    stack.mark = "set"
    assert [model.mark for model in stack.unstack()] == ["set"] * 3


class Bag(nn.Module):
    """Carries more than numbers: objects, itself, a function, another class of submodule."""

    def __init__(self, act: nn.Module, note: object) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(3, 3), act
        self.notes = {"note": note, "list": [note]}
        self.me = [self]
        self.method = self.double_it
        self.weights = (self.layer.weight,)

    def double_it(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.act(self.layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method(x)


def test_objects_methods_and_other_classes_of_submodule_come_back() -> None:
    models = [Bag(act, note).double() for act, note in ((nn.ReLU(), 1), (nn.Tanh(), "two"), (nn.ReLU(), (3,)))]
    del models[2].notes
    with pytest.warns(StackWarning, match="MW106"):
        stack = memberwise.stack(models)
    x = inputs(5, 3)
    for model, back in zip(models, stack.unstack(), strict=True):
        assert type(back.act) is type(model.act)
        assert getattr(back, "notes", None) == getattr(model, "notes", None)
        assert back.me == [back]
        assert back.method.__self__ is back
        assert back.weights[0] is back.layer.weight
        assert back.layer.weight is not model.layer.weight
        assert_equal(back(x), model(x), "output of an unstacked member")


class Heavy:
    """Something that is one object in all members, and must not be copied for each."""

    copies = 0

    def __deepcopy__(self, memo: dict) -> Heavy:
        type(self).copies += 1
        return Heavy()


def test_one_object_in_all_members_is_not_copied_for_each() -> None:
    heavy, models = Heavy(), nets(20)
    for model in models:
        model.tokenizer = heavy
    Heavy.copies = 0
    memberwise.stack(models)
    assert Heavy.copies <= 4


class Masked(nn.Module):
    """Holds a tensor in a plain attribute, which no `.to()` and no state dict knows."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.mask = nn.Linear(3, 3), mask
        self.fixed = torch.ones(3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.mask * self.fixed


def test_tensors_in_plain_attributes_are_each_member_s_own() -> None:
    models = [Masked(torch.rand(3, dtype=torch.float64)).double() for _ in range(3)]
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3)
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.fixed.shape == (3, 3)
    for model, back, view in zip(models, stack.unstack(), stack, strict=True):
        assert torch.equal(back.mask, model.mask)
        assert torch.equal(view.mask, model.mask)
    assert torch.equal(stack.select([2])[0].mask, models[2].mask)


CONSTANT = torch.full((3,), 2.0, dtype=torch.float64)


class Holder(nn.Module):
    """Tensors in plain attributes: equal, in structures, written in place, one object in all, a parameter's alias."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.total = torch.zeros(3, dtype=torch.float64)
        self.parts = {"gain": torch.full((3,), number, dtype=torch.float64), "texts": ["same"]}
        self.constant = CONSTANT
        self.alias = [self.layer.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x) * self.parts["gain"] + self.alias[0].sum() * self.constant
        self.total.add_(out.detach().mean(0))
        return out + self.total


def test_tensors_in_structures_and_equal_ones_are_each_member_s_own() -> None:
    models = [Holder(i + 1.0).double() for i in range(3)]
    stack, alone, x = memberwise.stack(models), [copy.deepcopy(model) for model in models], inputs(5, 3)
    for _ in range(2):
        expected = run_alone(alone, lambda model, i: model(x.detach()))
        out = stack(x.detach())
        backward(out)
        assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.constant is not models[0].constant
    assert stack.constant.shape == (3,)
    assert stack.alias[0] is stack.layer.weight
    for model, other in zip(stack.unstack(), alone, strict=True):
        assert_equal(model.total, other.total, "attribute written in place")
        assert_equal(model.parts["gain"], other.parts["gain"], "attribute in a structure")
        assert model.alias[0] is model.layer.weight
    assert not models[0].total.any()


class Transposed(nn.Module):
    """Keeps a view of its weight in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.turned = self.layer.weight.detach().t()


def test_views_of_parameters_in_attributes_are_warned_of() -> None:
    with pytest.warns(StackWarning, match=r"(?s)'turned' lies in the memory of 'layer\.weight'.*MW107") as caught:
        memberwise.stack([Transposed() for _ in range(2)])
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(StackWarning, match="MW107") as caught:
        memberwise.build(Transposed, seeds=range(2))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("how", ["chunks", "modes", "members"])
@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
def test_attributes_where_members_take_turns(how: str) -> None:
    models = [Holder(i + 1.0).double() for i in range(4)]
    for i, model in enumerate(models):
        nn.init.constant_(model.layer.bias, 0.5 * (-1) ** i)
    stack, alone, x = memberwise.stack(models), [copy.deepcopy(model) for model in models], inputs(5, 3).detach()
    if how == "modes":
        stack.eval(members=[0, 2])

    def one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        return out * (2 if model.layer.bias[0] > 0 else 3) if how == "members" else out

    for _ in range(2):
        expected = run_alone(alone, lambda model, i: one(model, x))
        out = memberwise.vmap(one, (0, None), chunk_size=3 if how == "chunks" else None)(stack, x)
        backward(out)
        assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.alias[0] is stack.layer.weight
    assert_equal(stack.total, torch.stack([model.total for model in alone]), "attribute written in place")


def test_of_one_model_too_attributes_have_the_member_axis() -> None:
    stack = memberwise.stack([Holder(2.0).double()])
    assert stack.total.shape == (1, 3)
    assert stack.parts["gain"].shape == (1, 3)
    assert stack(inputs(5, 3)).shape == (1, 5, 3)


def test_old_weight_norm_whose_attribute_is_no_leaf() -> None:
    models = [nn.utils.weight_norm(nn.Linear(3, 2)).double() for _ in range(3)]
    stack, x = memberwise.stack(models), inputs(5, 3)
    expected = torch.stack([model(x).detach() for model in models])
    out = stack(x)
    backward(out)
    run_alone(models, lambda model, i: model(x))
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, models)


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_members(norm: object) -> None:
    models = [norm(nn.Linear(3, 3)).double() for _ in range(3)]
    stack, alone, x = memberwise.stack(models), twins(models), inputs(5, 3)
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.token(x))


def test_ties_stay_ties() -> None:
    models = [Tied().double() for _ in range(3)]
    stack, alone, x = memberwise.stack(models), twins(models), torch.tensor([[0, 1], [4, 4]])
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.head.weight is stack.token.weight
    for model in (*stack.unstack(), stack[1], stack.select([1]), memberwise.stack(stack.unstack())):
        assert model.head.weight is model.token.weight
    assert len(list(stack.parameters())) == 1


# -- shared state


def test_a_shared_trunk_gets_the_sum_of_the_members_gradients() -> None:
    models = branches(3)
    stack = memberwise.stack(models, shared=("trunk.*",))
    alone, x = branches(3), inputs(5, 3)
    for mine, theirs in zip(alone, models, strict=True):
        mine.load_state_dict(theirs.state_dict())
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert stack.trunk.weight is models[0].trunk.weight
    assert stack.trunk.weight.shape == (4, 3)
    assert stack.trunk.weight._memberwise_shared
    assert not hasattr(stack.head.weight, "_memberwise_shared")
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    back = stack.unstack()
    assert back[0].trunk.weight is back[2].trunk.weight
    assert back[0].trunk.weight is not stack.trunk.weight
    assert_same_gradient("trunk.weight", back[1].trunk.weight.grad, [alone[0].trunk.weight.grad])
    assert_same_state(memberwise.stack(back, shared="trunk.*"), alone, gradients=False)


def test_shared_state_keeps_its_mark_and_shape_through_everything() -> None:
    stack = memberwise.stack(branches(3), shared=["trunk.weight", "trunk.bias"])
    loaded = memberwise.stack(branches(3), shared="trunk.*")
    loaded.load_state_dict(stack.state_dict(), assign=True)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack.select([2, 0]), loaded, stack.float()):
        assert other.trunk.weight._memberwise_shared
        assert other.trunk.weight.shape == (4, 3)
        assert other(inputs(5, 3, dtype=other.trunk.weight.dtype)).shape == (len(other), 5, 2)
    assert "shared: trunk.bias, trunk.weight" in repr(stack)


def test_undeclared_and_wrongly_declared_sharing_is_refused() -> None:
    with pytest.raises(StateError, match=r"(?s)trunk\.weight.*shared=.*MW105"):
        memberwise.stack(branches(3))
    with pytest.raises(StateError, match=r"(?s)head\.weight.*not one object.*MW105"):
        memberwise.stack(branches(3), shared=("trunk.*", "head.*"))
    with pytest.raises(StateError, match=r"(?s)trunc.*MW105"):
        memberwise.stack(branches(3), shared=("trunk.*", "trunc.*"))


def test_one_model_alone_is_no_sharing() -> None:
    assert memberwise.stack(branches(1))(inputs(5, 3)).shape == (1, 5, 2)


# -- from seeds


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_members_start_as_the_lone_script_does(dtype: torch.dtype | None) -> None:
    before = torch.get_rng_state()
    stack = memberwise.build(Net, seeds=[3, 0, 7], dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in (3, 0, 7):
            torch.manual_seed(seed)
            models.append(Net().to(dtype or torch.float32))
    assert_same_state(stack, models, gradients=False)
    assert stack.calls.dtype is torch.int64


def test_building_holds_no_more_than_the_stack_and_two_members() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def factory() -> nn.Module:
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        model = nn.Linear(3, 3)
        alive.append(weakref.ref(model))
        return model

    memberwise.build(factory, seeds=range(6))
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


def test_members_draw_as_the_lone_script_does() -> None:
    """Dropout masks of three steps, forward and backward, and where the streams stand then."""
    stack, x = memberwise.build(Net, seeds=range(4), dtype=torch.float64), inputs(6, 3)
    before = torch.get_rng_state()
    outs = []
    for _ in range(3):
        outs.append(stack(x))
        backward(outs[-1])
    assert torch.equal(torch.get_rng_state(), before)
    models = []
    with torch.random.fork_rng(devices=[]):
        for i in range(4):
            torch.manual_seed(i)
            model = Net().double()
            models.append(model)
            for out in outs:
                run_alone([model], lambda model, _, out=out, i=i: _checked(model(x), out[i].detach()))
            assert torch.equal(torch.get_rng_state(), stack.generators[i].get_state())
    assert_same_state(stack, models, gradients=False)
    assert stack.first.weight.grad.any()


def _checked(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    assert_equal(out.detach(), expected, "output of a step")
    return out


def test_a_loss_draws_from_the_stack_s_streams_too() -> None:
    stack, x = memberwise.build(Net, seeds=range(3), dtype=torch.float64), inputs(6, 3)
    before = torch.get_rng_state()
    losses = memberwise.vmap(lambda model, x: model(x + torch.rand_like(x)).mean(), (0, None))(stack, x)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        for i in range(3):
            torch.manual_seed(i)
            model = Net().double()
            assert_equal(losses[i].detach(), model(x + torch.rand_like(x)).mean().detach(), "loss")


def test_unseeded_stacks_draw_apart_from_the_global_stream() -> None:
    models = nets(3, p=0.5)
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    stack, x = memberwise.stack(models), inputs(6, 3)
    assert stack.generators is None
    before = torch.get_rng_state()
    out = stack(x)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(out[0], out[1])


def test_streams_can_be_set_and_must_fit() -> None:
    stack, x = memberwise.stack(nets(3, p=0.5)), inputs(6, 3)
    stack.generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    before = torch.get_rng_state()
    stack(x)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ArgumentError, match="MW303"):
        stack.generators = [torch.Generator()]
    stack.generators = None
    stack(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_two_seeded_stacks_in_one_call_must_agree_on_the_streams() -> None:
    first, second = (memberwise.build(Net, seeds=seeds, dtype=torch.float64) for seeds in (range(3), range(3, 6)))

    def both(a: nn.Module, b: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return a(x) + b(x)

    call = memberwise.vmap(both, (0, 0, None))
    with pytest.raises(ArgumentError, match=r"(?s)different random streams.*MW201"):
        call(first, second, inputs(6, 3))
    second.generators = first.generators
    assert call(first, second, inputs(6, 3)).shape == (3, 6, 2)
    second.generators = None
    assert call(first, second, inputs(6, 3)).shape == (3, 6, 2)


def test_seeds_must_be_ints() -> None:
    for seeds in ([], [0.5], [True], ["1"]):
        with pytest.raises(ArgumentError, match="MW302"):
            memberwise.build(Net, seeds=seeds)
    assert len(memberwise.build(Net, seeds=torch.arange(3))) == 3


def test_a_factory_that_fails_leaves_the_global_stream() -> None:
    before = torch.get_rng_state()

    def broken() -> nn.Module:
        torch.rand(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        memberwise.build(broken, seeds=[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_building_onto_the_meta_device_takes_no_values() -> None:
    stack = memberwise.build(Net, seeds=range(3), device="meta")
    assert all(p.is_meta for p in stack.parameters())
    assert stack.first.weight.shape == (3, 4, 3)


def test_a_factory_that_gives_the_same_object_shares_without_saying_so() -> None:
    trunk = nn.Linear(3, 4)
    with pytest.raises(StateError, match=r"(?s)trunk\.weight.*MW105"):
        memberwise.build(lambda: Branches(trunk), seeds=range(2))
