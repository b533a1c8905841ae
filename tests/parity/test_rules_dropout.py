"""The composite rule of dropout: each member's mask is its lone run's, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise._torch import bernoulli
from memberwise.engine import trace
from memberwise.generators import make_generators
from tests.parity.loops import check, numbers

ALONE = {F.dropout: "draws need streams, which `check_rule` does not have"}
"""What is tested by hand, and why."""


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4), (1,), (0, 3)])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_seeded(shape: tuple[int, ...], p: float, training: bool) -> None:
    """Values, gradients, and where the streams stand: twice in a row, so that the order counts."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.dropout(x, p, training) * x, p, training)

    check(
        twice, numbers(3, *shape), seeds=[4, 5, 6], gradients=training and p == 0.3 and 0 not in shape and shape != (1,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    check(lambda x: F.dropout(x, 0.4), numbers(3, 20, dtype=dtype), seeds=[4, 5, 6])


@pytest.mark.parametrize("how", ["at once", "one after the other"])
def test_large_masks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from all streams at once where the library for it has been built before, and torch draws likewise."""
    monkeypatch.setattr(bernoulli, "_is_built", lambda: how == "at once")
    drawn, draw = [], bernoulli.draw
    monkeypatch.setattr(bernoulli, "draw", lambda tensors, p, own: drawn.append(p) or draw(tensors, p, own))
    can = how == "at once" and bernoulli._draws_alike()
    del drawn[:]

    def dropped(x: torch.Tensor) -> torch.Tensor:
        kept = torch.empty_like(x).bernoulli_(0.3) + torch.empty_like(x).bernoulli_()
        return F.dropout(F.dropout(x, 0.4) + x, 0.2) * kept + torch.empty_like(x.t()).bernoulli_(0.7).t()

    check(dropped, numbers(3, 30, 41), seeds=[4, 5, 6])
    assert set(drawn) == ({0.6, 0.8, 0.3, 0.5} if can else set())


def test_a_mask_that_is_drawn_anew_before_backward_is_an_error() -> None:
    def spoiled(x: torch.Tensor) -> torch.Tensor:
        mask = torch.empty_like(x).bernoulli_(0.3)
        out = (x * mask).sum()
        mask.bernoulli_(0.3)
        return out

    x = torch.ones(3, 1000, requires_grad=True)
    out = memberwise.vmap(spoiled, randomness="different", generators=make_generators(range(3)))(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.inference_mode():
        memberwise.vmap(spoiled, randomness="different", generators=make_generators(range(3)))(torch.ones(3, 1000))


def test_one_stream_for_several_members_is_drawn_from_in_turn() -> None:
    stream, x = torch.Generator(), torch.ones(3, 1000)
    stacked = memberwise.vmap(F.dropout, randomness="different", generators=[stream.manual_seed(1)] * 3)(x)
    alone = torch.empty(3, 1000).bernoulli_(0.5, generator=stream.manual_seed(1))
    assert torch.equal(stacked, alone * 2)


@pytest.mark.parametrize("order", ["transposed", "strided", "channels_last", "after a convolution"])
def test_a_lone_run_draws_in_the_order_of_its_memory(order: str) -> None:
    def dropped(x: torch.Tensor) -> torch.Tensor:
        if order == "transposed":
            x = (x * 1).transpose(0, 1)
        elif order == "strided":
            x = (x * 1)[:, ::2]
        elif order == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = torch.conv2d(x, torch.ones(4, 3, 2, 2, dtype=x.dtype))
        return F.dropout(x, 0.4)

    check(dropped, numbers(3, 2, 3, 4, 4), seeds=[4, 5, 6])


def test_a_shared_input_is_dropped_by_each_member_apart() -> None:
    check(lambda x, y: F.dropout(x, 0.4) * y, numbers(6), numbers(3, 6), in_dims=(None, 0), seeds=[4, 5, 6])


def test_double_backward_keeps_the_mask() -> None:
    def penalised(x: torch.Tensor) -> torch.Tensor:
        out = F.dropout(x, 0.4).square().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        return grad.square().sum()

    check(penalised, numbers(3, 8), seeds=[4, 5, 6])


def test_without_streams() -> None:
    """Members draw apart from the global stream, which goes on; about the share that was asked for is dropped."""
    x = torch.ones(2, 4000)
    before = torch.get_rng_state()
    with trace.recording() as record:
        out = memberwise.vmap(lambda x: F.dropout(x, 0.25), randomness="different")(x)
    assert any(entry.op == "composite::dropout" for entry in record.entries.values())
    assert not torch.equal(before, torch.get_rng_state())
    assert not torch.equal(out[0], out[1])
    assert 0.2 < out.eq(0).double().mean() < 0.3 and torch.isin(out, torch.tensor([0, 1 / 0.75])).all()


def test_the_same_for_all() -> None:
    out = memberwise.vmap(lambda x: F.dropout(x, 0.5), randomness="same")(torch.ones(3, 100))
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2]) and 0 < out[0].eq(0).sum() < 100


def test_refused_under_error() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        memberwise.vmap(lambda x: F.dropout(x, 0.5))(torch.ones(3, 4))


def test_a_retreat_rewinds_the_streams() -> None:
    """The members part ways after the draw: they draw the same again."""

    def parted(x: torch.Tensor) -> Any:
        out = F.dropout(x, 0.5)
        return out * 2 if out.sum() > 0 else out

    with pytest.warns(memberwise.errors.StackWarning):
        check(
            parted,
            numbers(4, 6).detach().abs().mul_(torch.tensor([[1], [-1], [1], [-1]])).requires_grad_(),
            seeds=[1, 2, 3, 4],
        )
