"""Composite rules of recurrent layers, and what goes by single operations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.engine import trace
from memberwise.rules import recurrent
from memberwise.rules.directions import is_faster_apart
from memberwise.rules.registry import composites_disabled
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_KINDS = {
    "lstm": (torch.lstm, 4, 2),
    "gru": (torch.gru, 3, 1),
    "tanh": (torch.rnn_tanh, 1, 1),
    "relu": (torch.rnn_relu, 1, 1),
}


def _layer(kind: str, layers: int = 1, directions: int = 1, bias: bool = True, batch_first: bool = False) -> RuleCase:
    """A recurrent call: 5 features in, 3 hidden, batch 2, 4 steps, states given."""
    function, gates, states = _KINDS[kind]
    weights = []
    for k in range(layers * directions):
        width = 5 if k < directions else 3 * directions
        own = [
            of(gates * 3, width, seed=k),
            of(gates * 3, 3, seed=k + 9),
            of(gates * 3, seed=k),
            of(gates * 3, seed=k + 9),
        ]
        weights += own if bias else own[:2]
    given = [of(layers * directions, 2, 3, seed=k) for k in range(states)]
    x = of(2, 4, 5) if batch_first else of(4, 2, 5)
    hx = tuple(given) if states > 1 else given[0]
    flags = bias, layers, 0.0, True, directions == 2, batch_first
    name = f"{layers} layers, {directions} directions{', no bias' * (not bias)}{', batch first' * batch_first}"
    return case(function, x, hx, [0.3 * weight for weight in weights], *flags, name=name, dtypes=(torch.float32,))


CASES = [
    *[_layer(kind) for kind in _KINDS],
    *[_layer(kind, batch_first=True) for kind in _KINDS],
    *[_layer(kind, layers=2, directions=2) for kind in _KINDS],
    *[_layer(kind, directions=2, bias=False) for kind in _KINDS],
    _layer("lstm", layers=2, directions=2, bias=False, batch_first=True),
]

ALONE = {
    torch.ops.aten.mkldnn_rnn_layer.default: "one of its results is scratch memory",
    torch.ops.aten.mkldnn_rnn_layer_backward.default: "one of its arguments is scratch memory",
}
"""Rules that are tested by hand, and why."""


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_one_kernel_call_a_member(directions: int, grad: bool) -> None:
    """With composite rules off: torch's LSTM kernel has no batching rule, and no warning is due."""
    size, width = 3, 3 * directions
    shapes = [(12, 5), (12, 3), (12,), (12,)] * directions
    weights = [numbers(size, *shape, seed=k, dtype=torch.float32, grad=grad) for k, shape in enumerate(shapes)]
    x, start = numbers(size, 4, 2, 5, dtype=torch.float32, grad=grad), torch.zeros(directions, 2, 3)

    def layer(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out, hidden, cell = torch.lstm(x, (start, start), weights, True, 1, 0.0, True, directions == 2, False)
        assert out.shape == (4, 2, width)
        return torch.cat([out.flatten(), hidden.flatten(), cell.flatten()])

    with composites_disabled(), trace.recording() as record, warnings.catch_warnings():
        warnings.simplefilter("error")
        check(layer, x, *weights, gradients=grad)
    assert {entry.path for entry in record.entries.values() if "mkldnn" in entry.op} == {"rule"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_members_apart(layers: int, directions: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's kernel has float32 alone, and no second derivative."""
    monkeypatch.setattr(recurrent, "is_faster_apart", lambda x, *_: x.dtype == torch.float32)
    _layer("lstm", layers, directions, bias, batch_first=layers == 2).check()


def test_the_sizes_that_run_apart() -> None:
    def apart(size: int, batch: int, hidden: int, dtype: torch.dtype = torch.float32) -> bool:
        return is_faster_apart(torch.empty(size, 1, dtype=dtype), batch, hidden)

    assert apart(2, 32, 32) and apart(4, 32, 32) and apart(8, 64, 64)
    assert not apart(16, 32, 32) and not apart(16, 8, 32) and not apart(3, 4, 5)
    assert not apart(2, 64, 64, torch.float64)


def test_a_tensor_transposed_in_place() -> None:
    """What torch's own batch-first layers do by single operations."""
    check(lambda x: (x * 2).transpose_(0, 1), numbers(3, 2, 4))


@pytest.mark.parametrize("chunk_size", [None, 1], ids=["at once", "in turns"])
def test_weights_are_not_moved_together(chunk_size: int | None) -> None:
    """On a GPU a layer whose weights were exchanged moves them into memory of their own; a stack's stay its own."""

    class Watched(nn.LSTM):
        calls = 0

        def flatten_parameters(self) -> None:
            type(self).calls += 1

    stack = memberwise.stack([Watched(2, 3).double() for _ in range(2)])
    before = Watched.calls
    x = torch.randn(4, 1, 2, dtype=torch.float64)
    memberwise.vmap(lambda model, x: model(x)[0], (0, None), chunk_size=chunk_size)(stack, x).sum().backward()
    stack.float().double()
    assert Watched.calls == before, "the layer moved weights that are a part of the stack's"
    params, buffers = memberwise.stack_module_state([Watched(2, 3).double() for _ in range(2)])
    template, before = Watched(2, 3).double(), Watched.calls

    def one(params: Any, buffers: Any) -> torch.Tensor:
        return memberwise.functional_call(template, (params, buffers), (x,))[0]

    memberwise.vmap(one)(params, buffers)
    assert Watched.calls == before, "the template moved the members' weights"


@pytest.mark.filterwarnings("error::memberwise.StackWarning")  # members that part ways
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_sequence_as_an_argument(kind: Any) -> None:
    """C++ code reads how many sequences each step has, which inside the call is a member tensor without memory."""
    models = [kind(3, 4).double() for _ in range(2)]
    packed = nn.utils.rnn.pack_padded_sequence(numbers(4, 3, 3).detach(), torch.tensor([4, 2, 1]))
    out, last = memberwise.stack(models)(packed)
    for i, model in enumerate(models):
        own, own_last = model(packed)
        torch.testing.assert_close(out.data[i], own.data)
        pairs = zip(last, own_last, strict=True) if kind is nn.LSTM else [(last, own_last)]
        for state, own_state in pairs:
            torch.testing.assert_close(state[i], own_state)
