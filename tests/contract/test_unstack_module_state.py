"""unstack_module_state: M dicts that load strictly and give back every bit, whatever the dicts went through."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrizations

from memberwise.errors import ArgumentError
from memberwise.state import stack_module_state, unstack_module_state


class Tied(nn.Module):
    """Ties, a submodule under two names, a buffer under two names and buffers that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.trunk = nn.BatchNorm1d(3)
        self.again = self.trunk
        self.register_buffer("position", torch.randn(4), persistent=False)
        self.register_buffer("table", torch.randn(2))
        self.register_buffer("same_table", self.table)
        self.register_buffer("hidden", torch.randn(2), persistent=False)
        self.register_buffer("seen", self.hidden)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "tied": Tied,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 2))),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "attention": lambda: nn.TransformerDecoderLayer(4, 2, 8),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex128),
    "bfloat16": lambda: nn.Linear(3, 2, dtype=torch.bfloat16),
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().clone().view(-1).view(torch.uint8).tolist())


def assert_loads_to_the_bit(states: list[dict[str, torch.Tensor]], models: list[nn.Module], make) -> None:
    assert len(states) == len(models)
    for state, model in zip(states, models, strict=True):
        expected = model.state_dict()
        assert {*state} == {*expected}
        assert all(type(name) is str for name in state)
        fresh = make()
        fresh.load_state_dict(state, strict=True)
        for name, tensor in fresh.state_dict().items():
            assert bits(tensor) == bits(expected[name]), name
            assert state[name].dtype == expected[name].dtype


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 3])
def test_round_trip(name: str, kind, count: int) -> None:
    make = MAKERS[name]
    models = [make() for _ in range(count)]
    assert_loads_to_the_bit(unstack_module_state(*stack_module_state(kind(models))), models, make)


def test_nans_infinities_and_signed_zeros_come_back() -> None:
    models = [nn.Linear(5, 1) for _ in range(2)]
    with torch.no_grad():
        models[1].weight.copy_(torch.tensor([[float("nan"), float("inf"), -0.0, 0.0, 1e-45]]))
        models[1].weight.view(torch.int32)[0, 0] += 1  # a NaN of another payload
    assert_loads_to_the_bit(unstack_module_state(*stack_module_state(models)), models, lambda: nn.Linear(5, 1))


@pytest.mark.parametrize("kind", [list, iter])
def test_tied_names_come_back_as_one_tensor(kind) -> None:
    states = unstack_module_state(*stack_module_state(kind([Tied() for _ in range(3)])))
    for state in states:
        assert state["decoder.weight"] is state["encoder.weight"]
        assert state["again.running_mean"] is state["trunk.running_mean"]
        assert state["same_table"] is state["table"]


def test_what_a_state_dict_leaves_out_is_left_out() -> None:
    models = [Tied() for _ in range(2)]
    params, buffers = stack_module_state(models)
    assert "position" in buffers
    assert "hidden" in buffers
    state = unstack_module_state(params, buffers)[1]
    assert "position" not in state
    assert "hidden" not in state, "only its other name is persistent"
    assert torch.equal(state["seen"], models[1].hidden)


def save_and_load(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "a comprehension": lambda d: {name: tensor * 1 for name, tensor in d.items()},
    "unpacking": lambda d: {**d},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "torch.save": save_and_load,
    "tree_map": lambda d: torch.utils._pytree.tree_map(lambda t: t.detach().clone(), d),
    "vmap": lambda d: torch.vmap(lambda inner: {name: tensor + 0 for name, tensor in inner.items()})(d),
    "functionalize": lambda d: torch.func.functionalize(lambda inner: dict(inner))(d),
    "compile": torch.compile(lambda d: {name: tensor + 0 for name, tensor in d.items()}, backend="eager"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ties_and_persistence_survive_what_dicts_go_through(way: str) -> None:
    models = [Tied() for _ in range(3)]
    params, buffers = map(WAYS[way], stack_module_state(models))
    assert_loads_to_the_bit(unstack_module_state(params, buffers), models, Tied)


PLAIN_WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "safetensors": lambda d: load(save({name: tensor.detach() for name, tensor in d.items()})),
    "json": lambda d: dict(zip(json.loads(json.dumps(list(d))), d.values(), strict=True)),
}


@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_like_tells_again_what_plain_strings_have_lost(way: str) -> None:
    models = [Tied() for _ in range(3)]
    params, buffers = map(PLAIN_WAYS[way], stack_module_state(models))
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*Unexpected key"):
        Tied().load_state_dict(unstack_module_state(params, buffers)[0], strict=True)
    assert_loads_to_the_bit(unstack_module_state(params, buffers, like=Tied()), models, Tied)


@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_plain_strings_lose_nothing_where_there_was_nothing_to_know(way: str) -> None:
    def make() -> nn.Module:
        return nn.BatchNorm1d(3)

    models = [make() for _ in range(3)]
    params, buffers = map(PLAIN_WAYS[way], stack_module_state(models))
    assert_loads_to_the_bit(unstack_module_state(params, buffers), models, make)


def test_torch_s_own_stack_comes_apart_with_like() -> None:
    models = [Tied() for _ in range(2)]
    states = unstack_module_state(*torch.func.stack_module_state(models), like=models[0])
    assert_loads_to_the_bit(states, models, Tied)


def test_trained_values_are_what_comes_back() -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    params, buffers = stack_module_state(models)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    params["weight"].sum().backward()
    optimizer.step()
    states = unstack_module_state(params, buffers)
    for state, model in zip(states, models, strict=True):
        assert torch.equal(state["weight"], model.weight.detach() - 0.1)
        assert not state["weight"].requires_grad


def test_each_dict_owns_its_memory() -> None:
    """A view would make torch.save write the whole stack for each member."""
    params, buffers = stack_module_state([nn.Linear(3, 2) for _ in range(4)])
    states = unstack_module_state(params, buffers)
    assert states[0]["weight"].untyped_storage().nbytes() == 6 * 4
    states[0]["weight"].zero_()
    assert params["weight"][0].any()


def test_memory_format_and_meta_are_kept() -> None:
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    states = unstack_module_state(*stack_module_state(models))
    assert states[1]["weight"].stride() == models[1].weight.stride()
    with torch.device("meta"):
        states = unstack_module_state(*stack_module_state([nn.Linear(3, 2) for _ in range(2)]))
    assert states[1]["weight"].is_meta


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "there is no tensor to tell the number of members"),
    "no axis": ({"w": torch.ones(())}, {}, "'w' has no dimension, expected a member axis"),
    "other M": ({"w": torch.ones(2)}, {"b": torch.ones(3)}, "'b' holds 3 members, 'w' holds 2"),
    "twice": ({"w": torch.ones(2)}, {"w": torch.ones(2)}, "'w' is a parameter and a buffer"),
    "no tensor": ({"w": [1.0, 2.0]}, {}, "'w' is a list, expected a tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_dicts_that_are_no_stack_are_refused(case: str) -> None:
    params, buffers, line = WRONG[case]
    with pytest.raises(ArgumentError) as error:
        unstack_module_state(params, buffers)
    assert line in str(error.value)
    assert error.value.code == "MW109"


def test_all_that_is_wrong_is_listed() -> None:
    params = {f"p{size}": torch.ones(size) for size in range(1, 14)}
    with pytest.raises(ArgumentError) as error:
        unstack_module_state(params, {"scalar": torch.ones(())})
    assert "'scalar' has no dimension" in str(error.value)
    assert "and 3 more" in str(error.value)
