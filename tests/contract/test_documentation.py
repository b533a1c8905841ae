"""The page of torch.func.stack_module_state: both examples and every stated condition, beside torch itself.

The page's two slips are mended: `model[0]` for `models[0]`, and a Foo without `super().__init__()`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from memberwise import functional_call, stack_module_state, vmap
from memberwise.testing.tolerance import assert_equal

NUM_MODELS, BATCH_SIZE = 5, 64
IN_FEATURES, OUT_FEATURES = 3, 3


class Foo(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        hidden = 4
        self.l1 = nn.Linear(in_features, hidden)
        self.l2 = nn.Linear(hidden, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l2(self.l1(x))


@pytest.fixture
def linears() -> list[nn.Linear]:
    return [nn.Linear(IN_FEATURES, OUT_FEATURES) for _ in range(NUM_MODELS)]


def test_first_example_gives_torch_s_result(linears: list[nn.Linear]) -> None:
    data = torch.randn(BATCH_SIZE, 3)

    def wrapper(params, buffers, data):
        return functional_call(linears[0], (params, buffers), data)

    params, buffers = stack_module_state(linears)
    output = vmap(wrapper, (0, 0, None))(params, buffers, data)

    assert output.shape == (NUM_MODELS, BATCH_SIZE, OUT_FEATURES)
    theirs = torch.func.stack_module_state(linears)
    expected = torch.vmap(lambda p, b, x: torch.func.functional_call(linears[0], (p, b), x), (0, 0, None))(
        *theirs, data
    )
    assert_equal(output, expected)
    for index, model in enumerate(linears):
        assert_equal(output[index], model(data))


def test_second_example_follows_state_dict_names() -> None:
    models = [Foo(IN_FEATURES, OUT_FEATURES) for _ in range(NUM_MODELS)]
    params, buffers = stack_module_state(models)
    assert list(params.keys()) == ["l1.weight", "l1.bias", "l2.weight", "l2.bias"]
    assert list(params) == list(torch.func.stack_module_state(models)[0])
    assert buffers == {}


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, iter])
def test_a_sequence_a_module_list_or_an_iterator_of_models(linears: list[nn.Linear], kind) -> None:
    params, buffers = stack_module_state(kind(linears))
    assert type(params) is type(buffers) is dict
    for name, stacked in torch.func.stack_module_state(linears)[0].items():
        assert torch.equal(params[name], stacked)


def test_the_stacked_parameters_are_new_leaves(linears: list[nn.Linear]) -> None:
    params, _ = stack_module_state(linears)
    for stacked in params.values():
        assert stacked.is_leaf
        assert stacked.requires_grad
        assert stacked.grad_fn is None
        assert not stacked._is_view()


@pytest.mark.parametrize("kind", [list, iter])
def test_the_stacked_parameters_are_unrelated_to_the_originals(linears: list[nn.Linear], kind) -> None:
    before = copy.deepcopy(linears)
    params, _ = stack_module_state(kind(linears))
    (params["weight"].sum() + params["bias"].sum()).backward()
    with torch.no_grad():
        params["weight"].fill_(7)
    for model, same in zip(linears, before, strict=True):
        assert model.weight.grad is None
        assert torch.equal(model.weight, same.weight)
    with torch.no_grad():
        linears[0].bias.fill_(9)
    assert torch.equal(params["bias"][0], before[0].bias)


@pytest.mark.parametrize("kind", [list, iter])
def test_the_stacked_parameters_can_be_passed_directly_to_an_optimizer(linears: list[nn.Linear], kind) -> None:
    params, _ = stack_module_state(kind(linears))
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    data, target = torch.randn(8, 3), torch.randn(8, 3)
    lone = [torch.optim.Adam(model.parameters(), lr=0.1) for model in linears]
    for _ in range(3):
        optimizer.zero_grad()
        out = vmap(lambda p: functional_call(linears[0], p, data))(params)
        ((out - target) ** 2).mean((1, 2)).sum().backward()
        optimizer.step()
    for model, each in zip(linears, lone, strict=True):
        for _ in range(3):
            each.zero_grad()
            ((model(data) - target) ** 2).mean().backward()
            each.step()
    for index, model in enumerate(linears):
        assert_equal(params["weight"][index], model.weight)
        assert_equal(params["bias"][index], model.bias)


def test_all_models_must_be_in_the_same_mode(linears: list[nn.Linear]) -> None:
    linears[3].eval()
    for stack in (torch.func.stack_module_state, stack_module_state):
        with pytest.raises(RuntimeError, match="same training/eval mode"):
            stack(linears)


def test_buffers_are_stacked_too() -> None:
    models = [nn.BatchNorm1d(4) for _ in range(3)]
    for index, model in enumerate(models):
        model.running_mean.fill_(index)
    _, buffers = stack_module_state(models)
    _, theirs = torch.func.stack_module_state(models)
    assert list(buffers) == list(theirs) == ["running_mean", "running_var", "num_batches_tracked"]
    for name, stacked in theirs.items():
        assert torch.equal(buffers[name], stacked)
        assert buffers[name].dtype == stacked.dtype
        assert not buffers[name].requires_grad
