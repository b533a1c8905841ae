"""What compares a stack with its members is shown a wrong stack, and must say so.

A sample of what `make check-mutations` does with every rule and every test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.rules.registry import composites_disabled
from memberwise.testing import check_rule
from tests.architecture.checks_can_fail.sabotage import Mutation, of_composites, of_rules, watching
from tests.parity import loops

_aten = torch.ops.aten


def program(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One layer and one activation of one member."""
    return F.linear(x, weight, bias).relu().mean(0)


def by_loop() -> None:
    """The comparison of the parity tests."""
    loops.check(program, loops.numbers(3, 4, 5), loops.numbers(3, 2, 5, seed=1), loops.numbers(3, 2, seed=2))


def by_verify() -> None:
    """The comparison that users have."""
    torch.manual_seed(0)
    stack = memberwise.stack([nn.Sequential(nn.Linear(5, 2), nn.ReLU()) for _ in range(3)])
    memberwise.verify(stack, torch.randn(4, 5))


def by_check_rule() -> None:
    """The comparison that comes with a rule."""
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((4, 5), (2, 5), (2,)))
    check_rule(F.linear, x, weight, bias)


CHECKS = {"loop": by_loop, "verify": by_verify, "check_rule": by_check_rule}


def mutation(target: Any, kind: str) -> Mutation:
    with watching() as uses:
        by_loop()
    return next(m for m in of_composites(uses) + of_rules() if m.target is target and m.kind == kind)


COMPOSITE_FAULTS = [
    "permute members",
    "ignore argument 1",
    "ignore argument 2",
    "cut gradient 0",
    "cut gradient 1",
    "cut gradient 2",
    "permute gradient 1",
]
PAIRS = [(check, kind) for check in CHECKS for kind in COMPOSITE_FAULTS]
PAIRS.remove(("verify", "cut gradient 0"))  # it takes no gradient of a stack's plain inputs


@pytest.mark.parametrize("check", CHECKS)
def test_sound_rules_pass(check: str) -> None:
    with watching() as uses:
        CHECKS[check]()
    assert F.linear in uses.targets
    assert uses.places[F.linear, "forward"] == {0, 1, 2}


@pytest.mark.parametrize(("check", "kind"), PAIRS)
def test_broken_linear_is_found(check: str, kind: str) -> None:
    """A dropped bias is "ignore argument 2", a detached gradient "cut gradient"."""
    broken = mutation(F.linear, kind)
    with broken.active(), pytest.raises(AssertionError):
        CHECKS[check]()
    assert broken.effects


@pytest.mark.parametrize("kind", ["permute members", "drop the result"])
@pytest.mark.parametrize(
    "op", [_aten.addmm.default, _aten.relu.default, _aten.mean.dim, _aten.threshold_backward.default]
)
def test_broken_rule_of_one_operation_is_found(op: Any, kind: str) -> None:
    broken = mutation(op, kind)
    with composites_disabled(), broken.active(), pytest.raises(AssertionError):
        by_loop()
    assert broken.effects


def test_a_mutation_is_taken_out_again() -> None:
    for kind in ("permute members", "cut gradient 1"):
        with mutation(F.linear, kind).active(), pytest.raises(AssertionError):
            by_loop()
        by_loop()


# -- faults that lie in no rule


def noisy(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Draws, and writes to its second input."""
    count.add_(x.detach().sum())
    return F.dropout(x * x, 0.5)


def sound(vmapped: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return vmapped


def shared_generator(vmapped: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    first = options["generators"][0]
    options["generators"][1:] = [first.clone_state() for _ in options["generators"][1:]]
    return vmapped


def rounded_gradient(vmapped: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def call(x: torch.Tensor, *rest: Any) -> Any:
        x.register_hook(lambda grad: grad.float().double())
        return vmapped(x, *rest)

    return call


def cut_gradient(vmapped: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda x, *rest: vmapped(x.detach(), *rest)


def lost_write(vmapped: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda x, count: vmapped(x, count.clone())


FAULTS = [shared_generator, rounded_gradient, cut_gradient, lost_write]


@pytest.mark.parametrize("fault", [sound, *FAULTS])
def test_broken_call_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared generator, a rounded gradient, a detached gradient, a write that reaches nobody."""
    real = memberwise.vmap

    def broken(func: Any, in_dims: Any, **options: Any) -> Any:
        return fault(real(func, in_dims, **options), options)

    monkeypatch.setattr(memberwise, "vmap", broken)
    with nullcontext() if fault is sound else pytest.raises(AssertionError):
        loops.check(noisy, loops.numbers(3, 6), loops.numbers(3, grad=False), seeds=[0, 1, 2])
