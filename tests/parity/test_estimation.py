"""estimate(): what it counts is what torch's allocator counts, and nothing of the stack's changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.errors import ArgumentError
from memberwise.metering import Meter
from tests.parity.test_memory import CASES, ELSEWHERE, bytes_of, loss_of

pytestmark = pytest.mark.skipif(ELSEWHERE, reason="the profiler counts another device's memory in another way")


def _stack(name: str, members: int) -> tuple[memberwise.Stack, torch.Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    lone, x = make(), torch.randn(shape)
    return memberwise.stack([copy.deepcopy(lone) for _ in range(members)]), x


def _counted(name: str, members: int) -> int:
    """Bytes of a step's peak and of the state, by torch's own count."""
    stack, x = _stack(name, members)
    mapped = memberwise.vmap(loss_of, in_dims=(0, None), randomness="different")

    def step() -> None:
        mapped(stack, x).sum().backward()

    step()
    stack.zero_grad()
    return bytes_of(step)[0] + sum(t.nbytes for t in (*stack.parameters(), *stack.buffers()))


@pytest.mark.parametrize("name", CASES)
def test_a_members_share_is_what_torch_counts(name: str) -> None:
    stack, x = _stack(name, 3)
    found = memberwise.estimate(stack, x, loss_fn=loss_of, optimizer_copies=0, memory=10**9)
    per_member = (_counted(name, 12) - _counted(name, 4)) / 8
    assert found.per_member == pytest.approx(per_member, rel=0.3)  # kernels take some for themselves
    assert found.members == (10**9 - found.base) // found.per_member


def test_nothing_changes() -> None:
    stack, x = _stack("convolutions and batch norm", 3)
    stack.train()
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    state = torch.get_rng_state()
    memberwise.estimate(stack, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in stack.state_dict().items())
    assert all(parameter.grad is None for parameter in stack.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("members", [1, 2, 7])
def test_any_stack_of_the_kind_says_the_same(members: int) -> None:
    stack, x = _stack("a perceptron with dropout", members)
    again, _ = _stack("a perceptron with dropout", 3)
    assert memberwise.estimate(stack, x, memory=10**8) == memberwise.estimate(again, x, memory=10**8)


def test_inputs_of_each_member_count_for_it() -> None:
    stack, x = _stack("a perceptron with dropout", 3)
    own = memberwise.estimate(stack, memberwise.each(torch.stack([x] * 3)), memory=10**8)
    assert own.per_member == memberwise.estimate(stack, x, memory=10**8).per_member + x.nbytes


def test_what_the_optimizer_keeps_counts() -> None:
    stack, x = _stack("a perceptron with dropout", 3)
    none, two = (memberwise.estimate(stack, x, optimizer_copies=copies, memory=10**8) for copies in (0, 2))
    assert two.per_member - none.per_member == 2 * sum(p.nbytes for p in stack.parameters()) // 3


def test_without_gradients_less_is_taken() -> None:
    stack, x = _stack("a perceptron with dropout", 2)
    training = memberwise.estimate(stack, x, optimizer_copies=0)
    with torch.no_grad():
        assert memberwise.estimate(stack, x, optimizer_copies=0).per_member < training.per_member
    assert training.available > 10**6


def test_too_little_memory() -> None:
    stack, x = _stack("a perceptron with dropout", 2)
    found = memberwise.estimate(stack, x, memory=10)
    assert found.members == 0
    assert str(found).startswith("0 members fit into 10 B: ")


@pytest.mark.parametrize("wrong", [{"memory": -1}, {"optimizer_copies": -2}])
def test_a_wrong_argument(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"expected 0 or more.*MW603"):
        memberwise.estimate(memberwise.stack([nn.Linear(2, 2)]), torch.ones(1, 2), **wrong)


def test_the_meter_sees_memory_come_and_go() -> None:
    with Meter() as meter:
        a = torch.ones(100, 100)
        b = a + 1
        del a
        c = b.view(-1)[:10]
        c.mul_(2)
        assert (meter.now, meter.most) == (40_000, 80_000)
        del b
        assert meter.now == 40_000, "a view holds it"
        del c
        assert meter.now == 0
