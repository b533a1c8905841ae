"""What counts as a setting, and what never does: caches, ids, lambdas."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memberwise.differences import Differences
from memberwise.errors import StackWarning
from memberwise.form import form_of
from memberwise.settings import settings_of
from memberwise.state import stack_module_state


def scaled(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return x * by


def other(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return x + by


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    rate: float = 0.1
    kind: str = "relu"
    cache: int = 0


class Callable_:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Holder(nn.Module):
    def __init__(self, value: Any, name: str = "value") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        object.__setattr__(self, name, value)


def differing(first: Any, second: Any, name: str = "value") -> dict[str, tuple[Any, ...]]:
    seen = Differences()
    for value in (first, second):
        seen.take(form_of(Holder(value, name)))
    return seen.settings()


REPORTED: dict[str, tuple[Any, Any]] = {
    "float": (0.1, 0.2),
    "int": (1, 2),
    "bool": (True, False),
    "complex": (1j, 2j),
    "none": (None, 3),
    "str": ("zeros", "reflect"),
    "bytes": (b"a", b"b"),
    "enum": (Colour.RED, Colour.BLUE),
    "dtype": (torch.float32, torch.float64),
    "device": (torch.device("cpu"), torch.device("meta")),
    "stride": ((1, 1), (2, 2)),
    "nested tuple": (((1, 1), "same"), ((1, 2), "same")),
    "size": (torch.Size([3]), torch.Size([4])),
    "function": (scaled, other),
    "torch function": (torch.relu, torch.tanh),
    "F function": (F.relu, F.gelu),
    "class": (nn.ReLU, nn.GELU),
    "builtin": (max, min),
    "method": (Colour.RED.__eq__, Callable_().__call__),
    "partial": (functools.partial(scaled, by=1.0), functools.partial(scaled, by=2.0)),
    "partial of other": (functools.partial(scaled), functools.partial(other)),
    "callable object": (Callable_(), scaled),
    "one-element tensor": (torch.tensor(0.5), torch.tensor(0.7)),
    "kind of value": ("1", 1),
    "nan": (float("nan"), 1.0),
}


@pytest.mark.parametrize("case", REPORTED)
def test_reported(case: str) -> None:
    first, second = REPORTED[case]
    assert list(differing(first, second)) == ["value"]


ITEMS: dict[str, tuple[Any, Any, str]] = {
    "list": ([1, 2, 3], [1, 5, 3], "value[1]"),
    "dict": ({"rate": 0.1, "kind": "a"}, {"rate": 0.2, "kind": "a"}, "value.rate"),
    "dataclass": (Config(), Config(rate=0.2), "value.rate"),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2), "value.a"),
    "deep": ({"a": [Config()]}, {"a": [Config(kind="gelu")]}, "value.a[0].kind"),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_are_reported_one_by_one(case: str) -> None:
    first, second, path = ITEMS[case]
    assert list(differing(first, second)) == [path]


SILENT: dict[str, tuple[Any, Any]] = {
    "equal": (0.1, 0.1),
    "int and float": (1, 1.0),
    "nan": (float("nan"), float("nan")),
    "lambdas": (lambda x: x, lambda x: x + 1),
    "partial of lambdas": (functools.partial(lambda x: x), functools.partial(lambda x: x + 1)),
    "objects": (object(), object()),
    "local functions of one name": ((lambda: scaled)(), scaled),
    "partial of objects": (functools.partial(scaled, object()), functools.partial(scaled, object())),
    "tensors": (torch.zeros(3), torch.ones(3)),
    "results of a run": (torch.ones((), requires_grad=True) * 2, torch.ones((), requires_grad=True) * 3),
    "meta scalar": (torch.zeros((), device="meta"), torch.ones((), device="meta")),
    "generators": (torch.Generator(), torch.Generator().manual_seed(3)),
    "modules": (nn.Linear(1, 1), nn.Linear(1, 1)),
    "sets": ({1}, {2}),
    "grown list": ([1, 2], [1, 2, 3]),
    "grown dict": ({}, {"key": 3}),
    "dict by shape": ({(1, 2): 3}, {(1, 2): 4}),
    "long table": (list(range(100)), list(range(1, 101))),
}


@pytest.mark.parametrize("case", SILENT)
def test_silent(case: str) -> None:
    first, second = SILENT[case]
    assert differing(first, second) == {}


PASSED_OVER = "_private __dunder cache _cache mask_cache cached_mask kv_caches memo history id uid uuid name"


@pytest.mark.parametrize("name", PASSED_OVER.split())
def test_silent_by_name(name: str) -> None:
    assert differing(3, 4, name) == {}


@pytest.mark.parametrize("name", ["memory", "memory_size", "identity", "namespace", "logits_scale", "pad_id", "rename"])
def test_reported_though_the_name_is_near(name: str) -> None:
    assert list(differing(3, 4, name)) == [name]


def test_structures_without_end_are_cut() -> None:
    loop: dict[str, Any] = {"rate": 0.1}
    loop["self"] = loop
    found = settings_of(Holder(loop))
    assert found["value.rate"] == 0.1
    assert len(found) < 20


def test_a_value_that_one_member_lacks_is_no_difference() -> None:
    """Attributes come into being as a module runs."""
    models = [Holder(1), Holder(1)]
    models[1].last_length = 5
    seen = Differences()
    for model in models:
        seen.take(form_of(model))
    assert seen.settings() == {}


def test_running_a_model_makes_no_difference() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        )

    models = [make() for _ in range(2)]
    hidden = models[0][2](models[0][:2](torch.randn(5, 3)))[0]
    hidden.sum().backward()
    models[0][3](torch.randn(2, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack_module_state(models)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2), "0.p"),
    "eps": (lambda: nn.LayerNorm(3), lambda: nn.LayerNorm(3, eps=1e-3), "0.eps"),
    "momentum": (lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(3, momentum=None), "0.momentum"),
    "stride": (lambda: nn.Conv1d(3, 3, 2), lambda: nn.Conv1d(3, 3, 2, stride=2), "0.stride"),
    "padding mode": (lambda: nn.Conv1d(3, 3, 2), lambda: nn.Conv1d(3, 3, 2, padding_mode="circular"), "0.padding_mode"),
    "approximate": (nn.GELU, lambda: nn.GELU(approximate="tanh"), "0.approximate"),
    "slope": (nn.LeakyReLU, lambda: nn.LeakyReLU(0.3), "0.negative_slope"),
    "upsample": (lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=3), "0.scale_factor"),
    "heads": (lambda: nn.MultiheadAttention(4, 2), lambda: nn.MultiheadAttention(4, 4), "0.num_heads"),
    "recurrent dropout": (lambda: nn.GRU(3, 3, 2), lambda: nn.GRU(3, 3, 2, dropout=0.1), "0.dropout"),
    "activation": (nn.ReLU, nn.Tanh, "0"),
    "functional activation": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=F.gelu),
        "0.activation",
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_torch_s_own_layers(case: str) -> None:
    first, second, path = LAYERS[case]
    with pytest.warns(StackWarning) as caught:
        stack_module_state([nn.Sequential(make()) for make in (first, second)])
    assert f"\n  {path} is " in str(caught[0].message)


def test_a_submodule_that_one_member_lacks() -> None:
    models = [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU())]
    with pytest.warns(
        StackWarning, match=r"1 is missing in member 0, torch\.nn\.modules\.activation\.ReLU in member 1"
    ):
        stack_module_state(models)


def test_hooks_are_compared_by_qualified_name() -> None:
    def halve(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out / 2

    models = [nn.Linear(2, 2) for _ in range(3)]
    models[1].register_forward_hook(halve)
    models[2].register_forward_hook(lambda *_: None)
    with pytest.warns(StackWarning, match=r"\(forward hooks\) is none in members 0, 2, .*halve in member 1"):
        stack_module_state(models)


def test_values_are_grouped_and_long_ones_cut() -> None:
    models = [Holder("x" * 500), Holder("y"), Holder("x" * 500)]
    with pytest.warns(StackWarning) as caught:
        stack_module_state(models)
    text = str(caught[0].message)
    assert "xxx...xxx" in text
    assert "x in members 0, 2, y in member 1" in text
    assert len(text) < 400


def test_ten_settings_are_shown_and_the_rest_counted() -> None:
    models = [nn.Sequential(*(nn.Dropout(rate) for _ in range(13))) for rate in (0.1, 0.2)]
    with pytest.warns(StackWarning) as caught:
        stack_module_state(models)
    text = str(caught[0].message)
    assert text.count("in member 0") == 10
    assert "\n  and 3 more\n" in text
