"""What random programs (`make check-fuzz`) have found, each at its smallest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def differs(x: torch.Tensor) -> bool:
    return bool(x.detach().sum() > 0)


def test_a_gradient_of_one_input_runs_nothing_of_another() -> None:
    """One node took all inputs in: what leads to `b` alone ran too, and failed where a lone run does not look."""

    def func(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kept = b * 1
        out = a.sin() + kept * kept
        kept.mul_(2)
        return out

    a, b = numbers(3, 2), numbers(3, 2, seed=1)
    (found,) = torch.autograd.grad(memberwise.vmap(func)(a, b).sum(), a)
    assert_equal(found, a.detach().cos())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_result_of_a_recurrent_layer_may_be_written(kind: type[nn.Module], batch_first: bool) -> None:
    """The layer for all members keeps its rows for backward, which the lone layer does not."""
    layer = kind(2, 2, batch_first=batch_first).double()  # type: ignore[call-arg] # of all three

    def func(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(layer, {"weight_ih_l0": weight}, x)[0]
        out += x
        return out

    check(func, numbers(2, 3, 4, 2), numbers(2, *layer.weight_ih_l0.shape, seed=1))


def test_an_input_written_in_inference_mode_is_put_back() -> None:
    """Its values were kept in that mode, and could not be copied back outside of it."""

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            x.index_add_(0, torch.tensor([0]), x.detach()[-1:].clone())
        return w * w

    check(func, numbers(4, 3, seed=5), numbers(4, 3, seed=6))


def test_an_input_is_detached_by_a_member_that_runs_alone() -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.detach_() * w * (2 if differs(x) else 3)

    check(func, numbers(4, 3, seed=5), numbers(4, 3, seed=6))
