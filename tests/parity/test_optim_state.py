"""What torch promises of an optimizer beside its step: saving, loading, copying, closures, hooks, groups."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

from memberwise import optim
from memberwise.errors import ArgumentError, EngineError
from memberwise.testing.tolerance import assert_equal
from tests.parity.lone_steps import ADAM, MEMBERS, SGD, SHAPES, backward_together, leaves, run_alone, starts

KINDS = {
    "SGD": (optim.SGD, torch.optim.SGD, SGD),
    "Adam": (optim.Adam, torch.optim.Adam, {**ADAM, "amsgrad": True}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, ADAM),
}


def take_steps(params: dict[str, torch.Tensor], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        backward_together(params, step)
        optimizer.step()


def check(params: dict[str, torch.Tensor], name: str, steps: int) -> None:
    alone = run_alone(KINDS[name][1], KINDS[name][2], steps)
    for key in SHAPES:
        assert_equal(params[key].detach(), alone[key], key)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


# -- saving and loading


@pytest.mark.parametrize("fresh", [False, True], ids=["mid-way values", "another optimizer's values"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_on_from_its_state_dict(name: str, fresh: bool) -> None:
    kind, _, hyper = KINDS[name]
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper)
    take_steps(params, optimizer, 0, 5)
    saved = through_file(optimizer.state_dict(), weights_only=True)
    params = leaves({key: value.detach() for key, value in params.items()})
    optimizer = kind(list(params.values()), **({"lr": 1.0, "momentum": 0.5} if name == "SGD" and fresh else hyper))
    optimizer.load_state_dict(saved)
    take_steps(params, optimizer, 5, 10)
    check(params, name, 10)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_on_from_a_copy(name: str, through: Any) -> None:
    kind, _, hyper = KINDS[name]
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper)
    take_steps(params, optimizer, 0, 5)
    params, copied = through((params, optimizer))
    assert [id(p) for p in copied.param_groups[0]["params"]] == [id(p) for p in params.values()]
    take_steps(params, copied, 5, 10)
    check(params, name, 10)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_has_values_of_its_own(through: Any) -> None:
    optimizer = optim.AdamW([torch.zeros(3, 2, requires_grad=True)], lr=[0.1, 0.2, 0.3])
    copied = through(optimizer)
    copied.param_groups[0]["lr"][0] = 9.0
    copied.param_groups[0]["betas"] = (0.5, [0.1, 0.2, 0.3])
    assert optimizer.param_groups[0]["lr"].tolist() == [0.1, 0.2, 0.3]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert copied.members == 3 and type(copied) is optim.AdamW


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_knows_what_is_shared(through: Any) -> None:
    shared = torch.nn.Parameter(torch.zeros(5))
    shared._memberwise_shared = True
    own = torch.nn.Parameter(torch.zeros(3, 2))
    copied = through(optim.SGD([shared, own], lr=0.1))
    assert copied.param_groups[0]["params"][0]._memberwise_shared
    assert copied.members == 3
    copied.load_state_dict(copied.state_dict())
    assert copied.param_groups[0].shared == (True, False)


def test_a_group_and_its_values_can_be_copied_alone() -> None:
    optimizer = optim.AdamW([torch.zeros(3, 2, requires_grad=True)], lr=[0.1, 0.2, 0.3])
    for through in (copy.deepcopy, through_pickle, copy.copy):
        group = through(optimizer.param_groups[0])
        assert group["lr"].tolist() == [0.1, 0.2, 0.3] and group["betas"] == (0.9, 0.999)


def test_a_state_dict_holds_plain_tensors_and_numbers() -> None:
    optimizer = optim.AdamW([torch.zeros(3, 2, requires_grad=True)], lr=[0.1, 0.2, 0.3], betas=([0.5, 0.6, 0.7], 0.9))
    group = optimizer.state_dict()["param_groups"][0]
    assert type(group) is dict and group["params"] == [0]
    assert type(group["lr"]) is torch.Tensor and type(group["betas"][0]) is torch.Tensor
    assert set(group) == set(torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0])


@pytest.mark.parametrize("name", KINDS)
def test_the_state_of_torchs_own_optimizer_can_be_loaded(name: str) -> None:
    """A stack trained so far by one optimizer of torch's, with one set of values for all."""
    kind, lone, _ = KINDS[name]
    hyper = {"lr": 0.05, "weight_decay": 0.1, **({"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {})}
    params, twins = leaves(starts()), leaves(starts())
    theirs, expected = lone(list(params.values()), **hyper), lone(list(twins.values()), **hyper)
    take_steps(params, theirs, 0, 4)
    take_steps(twins, expected, 0, 8)
    ours = kind(list(params.values()), lr=1.0)
    ours.load_state_dict(theirs.state_dict())
    take_steps(params, ours, 4, 8)
    for key in SHAPES:
        assert_equal(params[key].detach(), twins[key].detach(), key)


def test_state_with_other_strides_than_its_parameter() -> None:
    """Saved by a run whose parameter was transposed; the fused kernels would pair up wrong elements."""
    start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = start.transpose(1, 2).contiguous().transpose(1, 2)
    ends = []
    for first, second in ((start, start), (turned, start)):
        weight = first.clone().requires_grad_()
        optimizer = optim.AdamW([weight], lr=0.1)
        weight.grad = start.sin()
        optimizer.step()
        saved = optimizer.state_dict()
        weight = second.clone().requires_grad_()
        optimizer = optim.AdamW([weight], lr=0.1)
        optimizer.load_state_dict(saved)
        weight.grad = start.cos()
        optimizer.step()
        ends.append(weight.detach())
    assert_equal(ends[1], ends[0])


def test_adamw_stays_adamw_when_adams_state_is_loaded() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    optimizer = optim.AdamW([weight], lr=0.1, weight_decay=1.0)
    optimizer.load_state_dict(optim.Adam([weight], lr=0.1, weight_decay=1.0).state_dict())
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.detach().unique().item() == pytest.approx(0.9)


def test_state_of_another_number_of_members_is_refused_whole() -> None:
    def make(members: int, lr: Any = 0.1) -> Any:
        weights = [torch.zeros(members, *s, requires_grad=True) for s in [(2,), (3, 2)]]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = optim.AdamW(list(zip("ab", weights, strict=True)), lr=lr)
        optimizer.step()
        return optimizer

    optimizer = make(3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ArgumentError, match=r"parameter 'a': step: expected shape \(3,\), found \(4,\); .*\[MW408\]"):
        optimizer.load_state_dict(make(4).state_dict())
    with pytest.raises(ArgumentError, match=r"lr: expected 1 or 3 values, found 4.*\[MW401\]"):
        optimizer.load_state_dict(make(4, [1.0] * 4).state_dict())
    after = optimizer.state_dict()
    assert str(after) == str(before)


# -- steps, closures, hooks, gradients


def test_a_closure_is_called_with_gradients_on_and_its_value_returned() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    optimizer = optim.SGD([weight], lr=[1.0, 2.0, 3.0])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = (weight - 1).square().sum(1)
        losses.sum().backward()
        return losses

    with torch.no_grad():
        losses = optimizer.step(closure)
    assert losses.tolist() == [2.0, 2.0, 2.0]
    assert weight.detach()[:, 0].tolist() == [2.0, 4.0, 6.0]


def test_hooks_fire_around_a_step() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    optimizer = optim.AdamW([weight])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optim.AdamW([weight]).zero_grad(set_to_none=to_none)
    assert weight.grad is None if to_none else not weight.grad.any()


def test_a_step_without_any_gradient_changes_nothing() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer = optim.AdamW([weight], lr=[0.1, 0.2, 0.3], weight_decay=0.5)
    optimizer.step()
    assert weight.detach().unique().tolist() == [1.0]
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_not_held_after_a_step(name: str, dtype: torch.dtype) -> None:
    """Views of parameters are kept from step to step; of what is new at each step they must not be."""
    weight = torch.zeros(5, 4, dtype=dtype, requires_grad=True)
    optimizer = KINDS[name][0]([weight], **KINDS[name][2])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = len(optimizer._views)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        held = weakref.ref(weight.grad.untyped_storage())
        optimizer.step()
        weight.grad = None
        assert held() is None and len(optimizer._views) == kept


def test_state_that_was_cleared_starts_over() -> None:
    params = leaves(starts())
    optimizer = optim.Adam(list(params.values()), lr=ADAM["lr"])
    take_steps(params, optimizer, 0, 3)
    optimizer.state.clear()
    twins = leaves({key: value.detach() for key, value in params.items()})
    take_steps(params, optimizer, 3, 6)
    take_steps(twins, optim.Adam(list(twins.values()), lr=ADAM["lr"]), 3, 6)
    for key in SHAPES:
        assert torch.equal(params[key], twins[key])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    other = torch.ones(2, 3, requires_grad=True)
    table = torch.nn.Parameter(torch.ones(2, 5))
    for optimizer in (optim.SGD([("other", other), ("table", table)]), optim.AdamW([other, table], lr=[0.1, 0.2])):
        other.grad = torch.ones_like(other)
        table.grad = torch.ones(2, 5).to_sparse()
        with pytest.raises(EngineError, match=r"found torch.sparse_coo of parameter ('table'|1).*\[MW405\]"):
            optimizer.step()
        assert torch.equal(other.detach(), torch.ones(2, 3))


# -- groups


def test_names_and_groups_can_be_added() -> None:
    first, second = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = optim.SGD([("first", first)], lr=[1.0, 2.0, 3.0])
    optimizer.add_param_group({"params": [("second", second)], "lr": [4.0, 5.0, 6.0]})
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    assert first.detach()[:, 0].tolist() == [-1.0, -2.0, -3.0]
    assert second.tolist() == [-4.0, -5.0, -6.0]
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["second"]


def test_a_group_that_does_not_fit_is_not_added() -> None:
    optimizer = optim.SGD([torch.zeros(3, 2, requires_grad=True)])
    for group, code in (
        ({"params": [torch.zeros(4, 2, requires_grad=True)]}, "MW404"),
        ({"params": [torch.zeros(3, requires_grad=True)], "lr": [1.0, 2.0]}, "MW401"),
        ({"params": [torch.zeros(3, requires_grad=True)], "lr": [1.0, 2.0, -1.0]}, "MW402"),
    ):
        with pytest.raises(ArgumentError) as caught:
            optimizer.add_param_group(group)
        assert caught.value.code == code
        assert len(optimizer.param_groups) == 1


def test_members_are_counted() -> None:
    shared = torch.nn.Parameter(torch.zeros(7))
    shared._memberwise_shared = True
    optimizer = optim.SGD([{"params": [shared]}, {"params": [torch.zeros(3, 2, requires_grad=True)]}])
    assert optimizer.members == len(optimizer) == 3
    alone = optim.SGD([shared], lr=0.5)
    assert alone.members is None and alone
    shared.grad = torch.ones(7)
    alone.step()
    assert shared.detach().unique().tolist() == [-0.5]
    alone.add_param_group({"params": [torch.zeros(4, requires_grad=True)], "lr": [0.1, 0.2, 0.3, 0.4]})
    assert alone.members == 4


def test_repr_shows_the_values() -> None:
    text = repr(optim.AdamW([torch.zeros(3, 2, requires_grad=True)], lr=[0.5, 0.25, 0.125]))
    assert "AdamW" in text and "lr: MemberValues([0.5000, 0.2500, 0.1250]" in text


def test_param_groups_split_by_what_a_parameter_is_to_a_member() -> None:
    shared_bias, shared_weight = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5, 2))
    shared_bias._memberwise_shared = shared_weight._memberwise_shared = True
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(3, 4, 2))
    model.bias = torch.nn.Parameter(torch.zeros(3, 4))
    model.scale = torch.nn.Parameter(torch.zeros(3))
    model.frozen = torch.nn.Parameter(torch.zeros(3, 4, 2), requires_grad=False)
    model.shared_bias, model.shared_weight = shared_bias, shared_weight
    decay, rest = optim.param_groups(model, weight_decay=0.3, lr=0.5)
    assert [name for name, _ in decay["params"]] == ["weight", "shared_weight"]
    assert [name for name, _ in rest["params"]] == ["bias", "scale", "shared_bias"]
    assert (decay["weight_decay"], rest["weight_decay"], decay["lr"], rest["lr"]) == (0.3, 0.0, 0.5, 0.5)
    for kind in (optim.AdamW, torch.optim.AdamW):
        assert [len(group["params"]) for group in kind([decay, rest]).param_groups] == [2, 3]


def test_param_groups_of_one_sort_alone_make_an_optimizer() -> None:
    biases = [torch.zeros(3, 4, requires_grad=True)]
    for parameters in (biases, [("b", biases[0])], iter(biases)):
        groups = optim.param_groups(parameters, weight_decay=[0.1, 0.2, 0.3])
        optimizer = optim.AdamW(groups)
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
        assert optimizer.param_groups[0]["weight_decay"].tolist() == [0.1, 0.2, 0.3]
        biases[0].grad = torch.ones(3, 4)
        optimizer.step()


def test_members_is_what_the_constant_says() -> None:
    assert len(starts()["w1"]) == MEMBERS
