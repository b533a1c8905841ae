"""Stacking and unstacking random module trees: equal to torch where torch answers, and lossless to the bit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from memberwise.errors import ArgumentError, StateError
from memberwise.functional import functional_call
from memberwise.state import stack_module_state, unstack_module_state

from .recipes import Case, Node, Tensor, bits, cases, make

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
kinds = st.sampled_from([list, tuple, iter, nn.ModuleList])


def stacked(models: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # members of one recipe differ in nothing
        return stack_module_state(models)


@quick
@given(cases(), kinds)
def test_equal_to_torch(case: Case, kind: Callable[[list[nn.Module]], Any]) -> None:
    theirs = torch.func.stack_module_state(case.models)
    ours = stacked(kind(case.models))
    for mine, expected in zip(ours, theirs, strict=True):
        assert list(mine) == list(expected)
        for name, tensor in expected.items():
            assert bits(mine[name]) == bits(tensor)
            assert mine[name].requires_grad == tensor.requires_grad
            assert mine[name].is_leaf


@quick
@given(cases(), kinds, st.booleans())
def test_round_trip_to_the_bit(case: Case, kind: Callable[[list[nn.Module]], Any], by_template: bool) -> None:
    params, buffers = stacked(kind(case.models))
    if not params and not buffers:
        with pytest.raises(ArgumentError, match="no tensor"):
            unstack_module_state(params, buffers)
        return
    if by_template:
        params = {str(name): tensor for name, tensor in params.items()}
        buffers = {str(name): tensor for name, tensor in buffers.items()}
    states = unstack_module_state(params, buffers, like=case.fresh if by_template else None)
    assert len(states) == len(case.models)
    for state, model in zip(states, case.models, strict=True):
        expected = {name: bits(tensor) for name, tensor in model.state_dict().items()}
        assert {name: bits(tensor) for name, tensor in state.items()} == expected
        case.fresh.load_state_dict(state, strict=True)
        assert {name: bits(tensor) for name, tensor in case.fresh.state_dict().items()} == expected


@quick
@given(cases())
def test_ties_and_strides_come_back(case: Case) -> None:
    params, buffers = stacked(iter(case.models))
    assume(params or buffers)
    for state, model in zip(unstack_module_state(params, buffers), case.models, strict=True):
        held = model.state_dict(keep_vars=True)
        for first in held:
            for second in held:
                assert (held[first] is held[second]) == (state[first] is state[second])
        for name, tensor in held.items():
            assert meaningful_strides(state[name]) == meaningful_strides(torch.empty_like(tensor))


def meaningful_strides(tensor: torch.Tensor) -> list[int]:
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1] if tensor.numel() else []


@quick
@given(cases())
def test_stacked_again_after_unstacking(case: Case) -> None:
    first = stacked(case.models)
    assume(first[0] or first[1])
    for model, state in zip(case.models, unstack_module_state(*first), strict=True):
        model.load_state_dict(state)
    for mine, expected in zip(stacked(iter(case.models)), first, strict=True):
        assert list(mine) == list(expected)
        assert all(bits(mine[name]) == bits(tensor) for name, tensor in expected.items())


def replaced(tensor: Tensor, change: str) -> Tensor:
    if change == "shape":
        return dataclasses.replace(tensor, shape=(*tensor.shape, 2))
    if change == "dtype":
        other = torch.float64 if tensor.dtype is torch.float32 else torch.float32
        return dataclasses.replace(tensor, dtype=other)
    if change == "persistent":
        return dataclasses.replace(tensor, persistent=not tensor.persistent)
    return dataclasses.replace(tensor, absent=True)


@quick
@given(cases(), st.sampled_from(["shape", "dtype", "persistent", "absent", "mode", "child"]), st.data())
def test_one_odd_member_is_named(case: Case, change: str, data: st.DataObject) -> None:
    node = case.node
    if change in ("mode", "child"):
        odd = dataclasses.replace(node, training=not node.training)
        if change == "child":
            odd = dataclasses.replace(node, children=(*node.children, Node((PLAIN,), ())))
    else:
        index = data.draw(st.integers(0, 2))
        assume(index < len(node.tensors) and not node.tensors[index].absent)
        assume(change != "persistent" or not node.tensors[index].parameter)
        tensors = list(node.tensors)
        tensors[index] = replaced(tensors[index], change)
        odd = dataclasses.replace(node, tensors=tuple(tensors))
    at = data.draw(st.integers(1, len(case.models)))
    models = [*case.models[:at], make(odd, torch.Generator()), *case.models[at:]]
    kind = data.draw(kinds)
    with pytest.raises(StateError) as error:
        stacked(kind(models))
    assert f"member {at}: " in str(error.value)
    assert error.value.code == "MW103"
    others = {f"member {index}: " for index in range(len(models)) if index != at}
    assert not any(other in str(error.value) for other in others)


PLAIN = Tensor((2,), torch.float32, True, True, True, False, False)


class Summed(nn.Module):
    """Uses every tensor of a tree once a name, and reassigns what is a buffer."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__()
        self.tree = tree

    def forward(self) -> list[tuple[int, ...]]:
        seen = []
        for module in self.tree.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                seen.append(bits(getattr(module, name))[2])
                if name in module._buffers:
                    setattr(module, name, tensor.clone())
        return seen


@quick
@given(cases(most=2))
def test_a_functional_call_sees_each_member_and_leaves_the_template(case: Case) -> None:
    template = Summed(case.fresh)
    held = {
        (path, name): tensor
        for path, module in template.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    }
    for model in case.models:
        lone = Summed(model)
        params = {name: tensor.detach() for name, tensor in lone.named_parameters()}
        buffers = {name: tensor.detach() for name, tensor in lone.named_buffers()}
        before = dict(buffers)
        assert functional_call(template, (params, buffers), strict=True) == lone()
        assert all(buffers[name] is not tensor for name, tensor in before.items())
    for (path, name), tensor in held.items():
        module = template.get_submodule(path)
        assert {**module._parameters, **module._buffers}[name] is tensor
