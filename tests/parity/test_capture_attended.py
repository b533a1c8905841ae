"""Attention with dropout as one operation: the same step, and only where nobody looks into it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import memberwise
from memberwise.capture import attended as module
from memberwise.capture.attended import attended
from memberwise.capture.ours import with_ours
from memberwise.capture.unfused import unfused
from memberwise.construction import build
from memberwise.kernels.library import available
from memberwise.testing.tolerance import assert_equal
from tests.parity.test_capture_ours import attending, sgd_step_of
from tests.parity.test_capture_regions import Encoder, assert_computes_the_same, recorded

pytestmark = pytest.mark.skipif(not available("attention"), reason="no C++ compiler, or a processor without AVX2")
BOTH = ["memberwise.attention_dropout.default", "memberwise.attention_dropout_backward.default"]
SOFTMAX = "aten._safe_softmax.default"


@pytest.fixture(autouse=True)
def _wherever_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_faster", lambda *_: True)


def _attends(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[str]:
    """How what is recorded of it attends."""
    program = recorded(function, *inputs)
    own = attended(unfused(program.graph), program.values[: program.count])
    assert_computes_the_same(program, own, calls=1)
    names = [str(node.target) for node in own.graph.nodes]
    return [name for name in names if name in {*BOTH, SOFTMAX}]


def _heads(rows: int = 5, keys: int = 5) -> list[torch.Tensor]:
    return [torch.randn(3, 2, count, 4, requires_grad=True) for count in (rows, keys, keys)]


_attending = functools.partial(attending, dropout_p=0.25)


def test_forward_and_backward_are_ours() -> None:
    for settings in ({}, {"is_causal": True}, {"scale": 0.3}):
        assert _attends(_attending(**settings), *_heads()) == BOTH, settings
    assert _attends(_attending(), *_heads(4, 7)) == BOTH
    assert _attends(_attending(gradients=0), *_heads()) == BOTH[:1], "a prediction that draws"


def test_what_ours_does_not_compute_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = _attending(attn_mask=torch.ones(5, 5).tril().log())
    assert _attends(masked, *_heads()) == [SOFTMAX], "another mask"
    assert _attends(_attending(gradients=1), *_heads()) == [SOFTMAX], "gradients of some"
    wide = [one.detach().double().requires_grad_() for one in _heads()]
    assert _attends(_attending(), *wide) == [SOFTMAX]
    monkeypatch.setattr(module, "LONGEST", 4)
    assert _attends(_attending(), *_heads()) == [SOFTMAX]


def test_a_softmax_that_somebody_else_reads_stays() -> None:
    aten = torch.ops.aten

    def of(reads: bool) -> Callable[..., torch.Tensor]:
        def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            weights = aten._safe_softmax(torch.bmm(q, k), -1)
            mask = aten.div_.Scalar(torch.empty_like(weights).bernoulli_(0.75), 0.75)
            out = torch.bmm(weights * mask, v)
            return out + weights.sum() if reads else out

        return step

    given = torch.randn(2, 5, 4), torch.randn(2, 4, 5), torch.randn(2, 5, 4)
    assert _attends(of(reads=False), *given) == BOTH[:1]
    assert _attends(of(reads=True), *given) == [SOFTMAX]


def test_the_same_step_of_a_stack() -> None:
    """Layers of attention with dropout, and dropout elsewhere: parameters after a step."""
    program = recorded(*sgd_step_of("encoder"))
    given = program.values[: program.count]
    own = attended(unfused(program.graph), given)
    assert [name for node in own.graph.nodes if (name := str(node.target)) in {*BOTH, SOFTMAX}].count(BOTH[0]) == 4
    assert not any(str(node.target) == SOFTMAX for node in own.graph.nodes)
    assert_computes_the_same(program, own, calls=1)
    assert_computes_the_same(program, with_ours(own, given), calls=1)


def test_compiled_members_draw_what_they_draw_eagerly() -> None:
    """By the compiled program, forward and backward."""
    x = torch.randn(2, 5, 8)
    loss = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))

    def step_of_new() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        models = build(Encoder, seeds=range(3))

        def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            models.zero_grad()
            losses = loss(models, x)
            losses.sum().backward()
            return losses.detach(), torch.cat([one.grad.flatten(1) for one in models.parameters()], 1)

        return step

    eager, captured = step_of_new(), memberwise.compile(step_of_new())
    for _ in range(4):
        for one, other in zip(captured(x), eager(x), strict=True):
            assert_equal(one, other)
