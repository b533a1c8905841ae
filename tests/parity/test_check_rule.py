"""check_rule itself: a right rule passes, and each way of being wrong is seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from memberwise import rules
from memberwise.engine import operation
from memberwise.engine.signals import Decline
from memberwise.rules.registry import RULES, register_rule
from memberwise.testing import check_rule
from memberwise.testing.rules import combinations
from tests.parity.rule_case import of


@torch.library.custom_op("memberwise_test::affine", mutates_args=())
def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x * weight + bias`, of `(n, d)`, `(d)` and `(d)`."""
    return x * weight + bias


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).sum(0), grad.sum(0)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


affine.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("memberwise_test::count_", mutates_args={"total"})
def count_(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`x + total`, after `total += 1`."""
    total += 1
    return x + total


def _lifted(value: torch.Tensor, dim: Any) -> torch.Tensor:
    return value.unsqueeze(1) if dim == 0 else value


def right(info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return x * _lifted(weight, dims[1]) + _lifted(bias, dims[2]), 0


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda *args: (change(right(*args)[0]), 0)


def without_bias(info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return right(info, dims, x, weight, torch.zeros_like(bias))


def wrong_where_shared(info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return right(info, dims, x, weight * 2 if dims[1] is None else weight, bias)


def of_contiguous_memory_alone(info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return right(info, dims, x.as_strided(x.shape, torch.empty(x.shape).stride()), weight, bias)


def not_of_one_sample(info: Any, dims: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return right(info, dims, x.squeeze(1) if dims[0] == 0 and x.shape[1] == 1 else x, weight, bias)


WRONG = {
    "members permuted": changed(lambda out: out.roll(1, 0)),
    "a bias forgotten": without_bias,
    "another type": changed(lambda out: out.float()),
    "another type in half precision": changed(lambda out: out.float() if out.dtype == torch.bfloat16 else out),
    "other strides": changed(lambda out: out.transpose(1, 2).contiguous().transpose(1, 2)),
    "rounded": changed(lambda out: out.float().to(out.dtype)),
    "wrong where the weight is shared": wrong_where_shared,
    "of contiguous memory alone": of_contiguous_memory_alone,
    "not of a batch of one": not_of_one_sample,
    "an error": lambda *args: 1 / 0,
    "always declined": lambda *args: Decline("no"),
}


@contextmanager
def ruled(op: Any, rule: Callable[..., Any]) -> Iterator[None]:
    """`op` runs by `rule` inside."""
    key = op._opoverload
    register_rule(op, rule)
    try:
        yield
    finally:
        del RULES[key]
        operation._KNOWN.pop(key, None)


def run() -> Any:
    return check_rule(affine, of(4, 3), of(3), of(3), batch_dims=(0, None, None))


def test_a_right_rule() -> None:
    with ruled(affine, right):
        checked = run()
    assert not checked.declined and "(0, 0, 0)" in checked.by_rule and "batch 0 (0, None, None)" in checked.by_rule


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_rule_is_seen(fault: str) -> None:
    with ruled(affine, WRONG[fault]), pytest.raises((AssertionError, RuntimeError)):
        checked = run()
        assert not checked.declined  # how a fault shows that the engine can live with: a retreat


def test_what_is_not_written_is_seen() -> None:
    def adds(info: Any, dims: Any, x: torch.Tensor, total: torch.Tensor) -> Any:
        total += 1
        return x + total.unsqueeze(1), 0

    def forgets(info: Any, dims: Any, x: torch.Tensor, total: torch.Tensor) -> Any:
        return x + total.unsqueeze(1) + 1, 0

    def checked() -> Any:
        return check_rule(count_, of(4, 3), of(3), state=(1,), stacked=[(0, 1)], grad=False)

    with ruled(count_, adds):
        assert not checked().declined
    with ruled(count_, forgets), pytest.raises(AssertionError, match="argument 1 after the call"):
        checked()


@pytest.mark.parametrize("cut", ["detached", "scaled", "of another member"])
def test_a_wrong_gradient_is_seen(cut: str) -> None:
    """A gradient that is cut or wrong, with right values: of a composite's backward."""
    from torch.nn import functional as F

    from memberwise.rules.registry import COMPOSITES

    call = COMPOSITES[F.linear]
    backward = call.backward
    faults: dict[str, Callable[[Any], Any]] = {
        "detached": lambda grad: None,
        "scaled": lambda grad: grad * 1.001,
        "of another member": lambda grad: grad.roll(1, 0),
    }

    def wrong(*args: Any) -> Any:
        grads = backward(*args)
        return grads[0], faults[cut](grads[1]), *grads[2:]

    call.backward = wrong
    try:
        with pytest.raises(AssertionError):
            check_rule(F.linear, of(4, 3), of(2, 3), of(2))
    finally:
        call.backward = backward


def test_a_wrong_second_derivative_is_seen() -> None:
    from torch.nn import functional as F

    from memberwise.rules.registry import COMPOSITES

    call = COMPOSITES[F.linear]
    again = call.again
    call.again = lambda needs, inputs, kept, grad: (grad.detach() @ inputs[1], *[None] * (len(inputs) - 1))
    try:
        with pytest.raises(AssertionError, match="order"):
            check_rule(F.linear, of(4, 3), of(2, 3), of(2))
    finally:
        call.again = again


def test_the_first_rule_of_the_readme() -> None:
    """Its code runs as it stands."""
    text = (Path(rules.__file__).parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_combinations() -> None:
    few, many = [of(1), 2, of(1)], [of(1)] * 5
    assert list(combinations(few)) == [(0, 2), (0,), (2,)]
    assert len(list(combinations(many))) == 11 and next(combinations(many)) == (0, 1, 2, 3, 4)
