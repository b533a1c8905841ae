"""Lazy models in a stack: one call on example inputs gives each what it gives it alone; nothing else of it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing._internal.common_modules import module_db

import memberwise
from memberwise.errors import StateError
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import assert_same_state, backward, inputs, run_alone

NORMS = {1: (4, 3, 5), 2: (4, 3, 5, 5), 3: (4, 3, 2, 5, 5)}


def cases() -> list[Any]:
    """One of each lazy module that torch has: how it is made, and what it is called with."""
    return [*_of_module_db(), *_others()]


def _of_module_db() -> Iterator[Any]:
    for info in module_db:
        if issubclass(info.module_cls, LazyModuleMixin):
            one = info.module_inputs_func(info, "cpu", torch.float64, False, True)[0]
            make = one.constructor_input
            made = partial(info.module_cls, *make.args, **make.kwargs)
            yield pytest.param(made, one.forward_input.args[0], id=info.module_cls.__name__)


def _others() -> Iterator[Any]:
    yield pytest.param(lambda: nn.LazyLinear(2), inputs(4, 3).detach(), id="LazyLinear")
    for dims, shape in NORMS.items():
        for name in (f"LazyBatchNorm{dims}d", f"LazyInstanceNorm{dims}d"):
            make = partial(getattr(nn, name), affine=True, track_running_stats=True)
            yield pytest.param(make, inputs(*shape).detach(), id=name)


class Late(nn.Module):
    """Draws, norms and a count of calls around two lazy layers; writes to its input, and may be given more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.first = nn.LazyLinear(4)
        self.second = nn.LazyLinear(2)
        self.after = nn.LazyBatchNorm1d()
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        x.mul_(2)
        self.calls = self.calls + 1
        hidden = self.drop(self.first(self.norm(x))).relu()
        self.last = hidden.detach()
        return self.after(self.second(hidden)) + bias


def first_call(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The call by which a lone model gets its sizes; its running statistics start anew, as if it had not been."""
    model(*args, **kwargs)
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    if isinstance(model, Late):
        model.calls, model.last = torch.zeros((), dtype=torch.float64), None


def late() -> Late:
    return Late().double()


def example() -> torch.Tensor:
    return inputs(5, 3, seed=7).detach()


def test_every_lazy_module_of_torch_has_a_case() -> None:
    lazy = {name for name, cls in vars(nn).items() if isinstance(cls, type) and issubclass(cls, LazyModuleMixin)}
    assert {case.id for case in cases()} == lazy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), cases())
def test_a_lazy_module_equals_its_members(make: Callable[[], nn.Module], x: torch.Tensor, training: bool) -> None:
    models, lone = ([make().double().train(training) for _ in range(3)] for _ in range(2))  # no copy: torch has none
    torch.manual_seed(0)
    stack = memberwise.stack(models, example_inputs=(x,))
    torch.manual_seed(0)
    for model in lone:
        first_call(model, x)
    out = stack(x)
    backward(out)
    assert_equal(out.detach(), run_alone(lone, lambda model, _: model(x)))
    assert_same_state(stack, lone)
    assert type(stack[0]) is type(lone[0])


def test_members_draw_what_their_first_calls_draw() -> None:
    models, lone = ([late() for _ in range(3)] for _ in range(2))
    x = example()
    torch.manual_seed(1)
    stack = memberwise.stack(models, example_inputs=(x,))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for model in lone:
        first_call(model, x.clone())
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(x, example())
    assert_same_state(stack, lone, gradients=False)


def test_a_seeded_member_is_the_lone_model_after_its_first_call() -> None:
    stack = memberwise.build(late, seeds=[5, 6, 7], example_inputs=(example(),))
    lone, outs = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in (5, 6, 7):
            torch.manual_seed(seed)
            lone.append(late())
            first_call(lone[-1], example())
            outs += [run_alone(lone[-1:], lambda model, _: model(example()))[0]]
    out = stack(memberwise.each(torch.stack([example()] * 3)))
    assert_equal(out.detach(), torch.stack(outs))
    assert_same_state(stack, lone, gradients=False)


def test_nothing_but_the_values_stays_of_the_call() -> None:
    models = [late() for _ in range(2)]
    memberwise.stack(models, example_inputs=(example(),))
    for model in models:
        assert model.calls == 0
        assert model.last is None
        assert not model.norm.running_mean.any()
        assert not model.after.running_mean.any()
        assert model.after.num_batches_tracked == 0
        assert type(model.after) is nn.BatchNorm1d
        assert not model.first._forward_pre_hooks
        assert model.second.in_features == 4


def test_a_model_that_is_not_lazy_is_not_called() -> None:
    before = torch.get_rng_state()
    memberwise.stack([nn.Dropout(0.5), nn.Dropout(0.5)], example_inputs=(example(),))
    assert torch.equal(before, torch.get_rng_state())


def test_examples_may_be_one_tensor_keywords_or_one_a_member() -> None:
    xs, bias = torch.stack([example(), 3 * example()]), inputs(2).detach()
    models, lone = ([late() for _ in range(2)] for _ in range(2))
    torch.manual_seed(2)
    stack = memberwise.stack(models, example_inputs=memberwise.each(xs), example_kwargs={"bias": bias})
    torch.manual_seed(2)
    for model, x in zip(lone, xs.clone(), strict=True):
        first_call(model, x, bias=bias)
    assert_same_state(stack, lone, gradients=False)
    assert memberwise.stack([nn.LazyLinear(2)], example_inputs=example().float()).weight.shape == (1, 2, 3)


def test_a_lazy_trunk_that_all_share_stays_one_object() -> None:
    trunk = nn.LazyLinear(3)
    models = [nn.Sequential(trunk, nn.LazyLinear(2)) for _ in range(2)]
    stack = memberwise.stack(models, shared="0.*", example_inputs=(torch.ones(5, 4),))
    assert stack[0][0].weight.shape == (3, 4)
    assert dict(stack.named_parameters())["0.weight"] is trunk.weight


def test_a_model_that_fails_on_the_examples_is_named_and_left_as_it_was() -> None:
    models = [late() for _ in range(2)]
    with pytest.raises(StateError, match=r"(?s)member 0: Late fails on the example inputs.*tuple.*MW104"):
        memberwise.stack(models, example_inputs=(torch.ones(5, 8, dtype=torch.float64),))
    assert models[0].calls == 0
    with pytest.raises(StateError, match=r"(?s)no values yet.*example_inputs.*MW104"):
        memberwise.stack(models)


def test_members_that_get_other_shapes_from_their_examples_are_listed() -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.layer = nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x[:, : self.width])

    with pytest.raises(StateError, match=r"(?s)member 1.*'layer.weight' has shape \(2, 2\).*MW103"):
        memberwise.stack([Wide(3), Wide(2)], example_inputs=(torch.ones(5, 3),))
