"""A stack is an ordinary module: state dicts, files, copies, casts, what it prints."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.models import CASES
from tests.parity.stacks import Net, assert_same_state, backward, inputs, nets, run_alone, twins


def test_a_state_dict_has_the_members_keys_with_m_first() -> None:
    models = nets(3)
    state = memberwise.stack(models).state_dict()
    assert list(state) == list(models[0].state_dict())
    for name, tensor in state.items():
        assert_equal(tensor, torch.stack([model.state_dict()[name] for model in models]), name)
    assert state._metadata == models[0].state_dict()._metadata


def test_load_state_dict_and_what_does_not_fit() -> None:
    models = nets(6)
    stack = memberwise.stack(models[:3])
    weight = stack.first.weight
    assert stack.load_state_dict(memberwise.stack(models[3:]).state_dict()).missing_keys == []
    assert stack.first.weight is weight
    assert stack.first.weight._version > 0
    assert_same_state(stack, models[3:], gradients=False)
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
        stack.load_state_dict(memberwise.stack(models[:2]).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        stack.load_state_dict({})


def test_safetensors_and_torch_files(tmp_path: Path) -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, other = memberwise.stack(models).eval(), memberwise.stack(nets(4)[1:]).eval()
    expected = stack(x)
    safetensors.torch.save_file(stack.state_dict(), tmp_path / "stack.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "stack.safetensors"))
    assert_equal(other(x).detach(), expected.detach(), "output after safetensors")
    torch.save(stack.state_dict(), tmp_path / "stack.pt")
    third = memberwise.stack(nets(4)[1:]).eval()
    third.load_state_dict(torch.load(tmp_path / "stack.pt", weights_only=True))
    assert_equal(third(x).detach(), expected.detach(), "output after torch.save")
    best = stack.unstack()[2].state_dict()
    Net().double().load_state_dict(best, strict=True)


class Particular(nn.Module):
    """Saves and loads in ways of its own: a version, extra state, hooks, other names."""

    _version = 7

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.extra, self.seen = "fresh", []
        self.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({prefix + "note": 1}))
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.pop(prefix + "note", None))

    def get_extra_state(self) -> str:
        return self.extra

    def set_extra_state(self, state: str) -> None:
        self.extra = state

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "kernel"] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, state: dict, prefix: str, meta: dict, *rest: object) -> None:
        self.seen.append(meta.get("version"))
        state[prefix + "weight"] = state.pop(prefix + "kernel")
        super()._load_from_state_dict(state, prefix, meta, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("nested", [False, True])
def test_a_member_class_that_saves_in_its_own_way(nested: bool) -> None:
    stack, other = (memberwise.stack([Particular() for _ in range(3)]) for _ in range(2))
    stack.extra = "told"
    first, second = (nn.ModuleDict({"inner": one}) if nested else one for one in (stack, other))
    state = first.state_dict()
    prefix = "inner." if nested else ""
    assert list(state) == [f"{prefix}_extra_state", f"{prefix}kernel", f"{prefix}note"]
    assert second.load_state_dict(state).unexpected_keys == []
    assert torch.equal(other.weight, stack.weight)
    assert other.extra == "told"
    assert other.seen == [7]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("seeded", [True, False])
def test_copies_are_whole_and_apart(how: str, seeded: bool) -> None:
    stack = memberwise.build(Net, seeds=range(3), dtype=torch.float64) if seeded else memberwise.stack(nets(3))
    x = inputs(6, 3).detach()
    backward(stack(x))
    stack.eval(members=[1])
    if how == "deepcopy":
        other = copy.deepcopy(stack)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(stack))
    else:
        file = io.BytesIO()
        torch.save(stack, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other._parameters is other._template._parameters
    assert other._modules is other._template._modules
    assert list(other.state_dict()) == list(stack.state_dict())
    expected = stack(x)
    assert_equal(other(x).detach(), expected.detach(), "output of the copy")
    assert torch.equal(other.norm.num_batches_tracked, stack.norm.num_batches_tracked)
    before = stack.first.weight.detach().clone()
    backward(other(x))
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert torch.equal(stack.first.weight, before)
    assert not torch.equal(other.first.weight, before)
    assert other[1].first.weight.shape == (4, 3)
    assert [member.training for member in other.unstack()] == [True, False, True]


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_model_copies_and_selects_after_a_call(name: str) -> None:
    case = CASES[name]
    stack = memberwise.stack(case.members(3, torch.float64, p=0.0))
    x = case.inputs(4, dtype=torch.float64).detach()
    stack(x)
    stack.eval()
    expected = stack(x).detach()
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack.select(range(3))):
        assert_equal(other(x).detach(), expected, "output of the copy")
    for member, view, own in zip(stack.unstack(), stack, expected, strict=True):
        assert_equal(member(x).detach(), own, "output of an unstacked member")
        assert_equal(view(x).detach(), own, "output of a live member")


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "to"])
def test_casts(cast: str) -> None:
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models), twins(models)
    for module in (stack, *alone):
        module.to(torch.float32) if cast == "to" else getattr(module, cast)()
    x = x.to(stack.first.weight.dtype)
    expected = run_alone(alone, lambda model, i: model(x))
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), expected, "output")
    assert_same_state(stack, alone)
    assert stack.calls.dtype is torch.int64
    assert stack._template.first.weight is stack.first.weight


def test_casting_an_lstm_that_has_run() -> None:
    """A recurrent module holds its weights a second time, and its `_apply` renews them."""
    models = [nn.LSTM(3, 4) for _ in range(2)]
    stack, x = memberwise.stack(models), inputs(5, 2, 3, dtype=torch.float32).detach()
    stack(x)
    stack.double()
    expected = torch.stack([model.double()(x.double())[0].detach() for model in models])
    assert_equal(stack(x.double())[0].detach(), expected, "output")
    assert all(a is b for a, b in zip(stack._template._flat_weights, stack.parameters(), strict=True))


def test_what_a_stack_prints() -> None:
    text = repr(memberwise.stack(nets(3)))
    assert text.startswith("Stack of 3 members: Net(")
    assert "(first): Linear(in_features=3, out_features=4, bias=True)" in text
    nested = repr(nn.Sequential(memberwise.stack(nets(2))))
    assert "(0): Stack of 2 members: Net(\n    (first)" in nested


def test_parameters_and_modules_are_found_by_their_names() -> None:
    stack, model = memberwise.stack(nets(3)), nets(1)[0]
    assert [name for name, _ in stack.named_modules()] == [name for name, _ in model.named_modules()]
    assert stack.get_parameter("first.weight") is stack.first.weight
    assert stack.get_buffer("norm.running_mean") is stack.norm.running_mean
    assert stack.get_submodule("norm") is stack.norm
    counted = []
    stack.apply(lambda module: counted.append(type(module)))
    assert counted[-1] is memberwise.Stack
    assert stack.requires_grad_(False).first.weight.requires_grad is False
    assert set(stack.__dict__["_parameters"]) == {"scale"}


def test_attributes_set_on_the_stack_are_the_members() -> None:
    stack = memberwise.stack(nets(3))
    stack.mark = "set"
    assert stack._template.mark == "set"
    assert "mark" not in vars(stack)
    stack.own = 3
    assert not hasattr(stack._template, "own")
    stack.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    assert stack._template.scale is stack.scale
    x = inputs(5, 3).detach()
    assert_equal(stack.eval()(x).detach(), torch.stack([2 * m.eval()(x).detach() for m in nets(3)]), "output")


def test_a_part_that_is_replaced_is_noticed() -> None:
    """The places of parameters are remembered: not longer than they are right."""
    models, x = nets(3), inputs(5, 3).detach()
    stack, alone = memberwise.stack(models).eval(), [model.eval() for model in twins(models)]
    run_alone(alone, lambda model, i: model(x).detach())
    stack(x)
    layers = [nn.Linear(4, 6).double() for _ in range(3)]
    stack.last = memberwise.stack(layers)._template
    for model, layer in zip(alone, layers, strict=True):
        model.last = copy.deepcopy(layer)
    backward(stack(x))
    run_alone(alone, lambda model, i: model(x))
    assert_same_state(stack, alone)
    stack.last.weight = nn.Parameter(torch.ones(3, 6, 4, dtype=torch.float64))
    stack.first.register_parameter("more", nn.Parameter(torch.zeros(3, 2)))
    del stack.last.bias
    stack.last.register_buffer("bias", torch.ones(3, 6, dtype=torch.float64))
    for model in alone:
        model.last.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
        model.first.register_parameter("more", nn.Parameter(torch.zeros(2)))
        del model.last.bias
        model.last.register_buffer("bias", torch.ones(6, dtype=torch.float64))
    assert_equal(stack(x).detach(), torch.stack([model(x).detach() for model in alone]), "output")


def test_the_meta_device_and_back() -> None:
    models, x = [model.eval() for model in nets(3)], inputs(5, 3).detach()
    stack = memberwise.stack(models)
    state = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    stack.to("meta")
    stack.to_empty(device="cpu")
    stack.load_state_dict(state)
    assert_equal(stack(x).detach(), torch.stack([model(x).detach() for model in models]), "output")
