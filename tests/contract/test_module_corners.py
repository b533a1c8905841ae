"""What the private corners of torch.nn that we stand on must keep doing; a red test here names what breaks."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from memberwise._torch import modules, recurrent


def test_persistence_is_told() -> None:
    """Breaks: unstack_module_state would give dicts that do not load strictly."""
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(1))
    model.register_buffer("left", torch.zeros(1), persistent=False)
    assert modules.is_persistent(model, "kept")
    assert not modules.is_persistent(model, "left")


def test_hooks_are_found() -> None:
    """Breaks: a hook that only some members have would go unnoticed."""
    model = nn.Linear(1, 1)
    model.register_forward_hook(print)
    model.register_forward_pre_hook(max)
    assert list(modules.forward_hooks(model)) == [max, print]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_modules_keep_two_lists_and_renew_them(kind) -> None:
    """Breaks: a recurrent module in a functional_call would run with other weights, or keep them."""
    model = kind(2, 3)
    assert {"_flat_weights", "_flat_weight_refs"} <= vars(model).keys()
    weight, lists = model.weight_ih_l0, recurrent.kept_lists(model)
    model._parameters["weight_ih_l0"] = torch.zeros_like(weight)
    model(torch.zeros(1, 1, 2))
    assert model._flat_weights[0] is not weight, "the module noticed the swap"
    model._parameters["weight_ih_l0"] = weight
    recurrent.put_back(model, lists)
    assert model._flat_weights[0] is weight


def test_checkpoint_makes_its_records_by_two_names() -> None:
    """Breaks: checkpoints in a call would be recomputed with the template's own parameters, silently."""
    source = inspect.getsource(checkpoint)
    assert source.count("_CheckpointFrame(") == 1
    assert source.count("CheckpointFunction.apply(") == 1
    first = next(iter(inspect.signature(checkpoint._CheckpointFrame).parameters))
    assert first == "recompute_fn"


def test_a_property_in_a_subclass_hides_a_parametrization() -> None:
    """Breaks: a value for a computed name. Not private, but bold: the module's class is swapped for a while."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"weight": torch.eye(2)})
    assert torch.equal(model.weight, torch.eye(2))
    model.__class__ = kind
    assert model.weight.requires_grad
