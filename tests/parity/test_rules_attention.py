"""Rules of attention."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_q, _k, _v = of(2, 3, 6, 5), of(2, 3, 6, 5, seed=1), of(2, 3, 6, 5, seed=2)
_out, _sums = _flash(_q, _k, _v)
_attend = F.scaled_dot_product_attention
_MASKED = {"stacked": [(0, 1, 2), (0,), (1, 2)]}

CASES = [
    case(_flash, of(2, 3, 4, 5), _k, _v, 0.0, False, batch_dims=(0, 0, 0, None, None)),
    case(_flash, _q, _k, _v, 0.0, True, name="causal", scale=0.3),
    case(_flash, _q, _k, _v, name="mask", attn_mask=of(6, 6), **_MASKED),
    case(_flash, _q, _k, _v, name="mask a head", attn_mask=of(2, 1, 6, 6), **_MASKED),
    case(_backward, of(2, 3, 6, 5, seed=3), _q, _k, _v, _out, _sums, 0.0, False, grad=False),
    case(
        _backward,
        *(of(2, 3, 6, 5, seed=3), _q, _k, _v, _out, _sums, 0.0, False),
        name="mask",
        grad=False,
        attn_mask=of(6, 6),
        stacked=[(0, 1, 2, 3, 4, 5), (0, 4)],
    ),
    case(_attend, of(2, 3, 4, 5), _k, _v, declines=True, batch_dims=(0, 0, 0)),
    case(_attend, _q, _k, _v, None, 0.0, True, name="causal", scale=0.3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("shape", [(6, 6), (2, 1, 6, 6), (1, 3, 6, 6)])
def test_a_mask_of_each_member(shape: tuple[int, ...]) -> None:
    """A mask is passed by keyword, where a rule is not told whether it is stacked."""
    from tests.parity.loops import check, numbers

    def attend(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _flash(q, q, q, attn_mask=mask)[0]

    check(attend, numbers(3, 2, 3, 6, 5), numbers(3, *shape, grad=False))


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("kind", ["mask", "boolean mask", "grouped", "three dimensions", "dropout", "math"])
def test_what_the_composite_declines(kind: str) -> None:
    """It goes down the ladder, and is the loop's."""
    from tests.parity.loops import check, numbers

    shape = (3, 6, 5) if kind == "three dimensions" else (2, 4, 6, 5)
    q, k, v = numbers(3, *shape), numbers(3, *shape, seed=1), numbers(3, *shape, seed=2)
    if kind == "grouped":
        k, v = (value.detach()[:, :, :2].requires_grad_() for value in (k, v))
    options = {
        "mask": {"attn_mask": numbers(6, 6, grad=False)},
        "boolean mask": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()},
        "grouped": {"enable_gqa": True},
        "dropout": {"dropout_p": 0.4},
    }.get(kind, {})
    with sdpa_kernel(SDPBackend.MATH) if kind == "math" else nullcontext():
        check(lambda *args: _attend(*args, **options), q, k, v, seeds=[1, 2, 3])


@pytest.mark.usefixtures("composites")
def test_the_result_lies_as_alone() -> None:
    """So that heads are joined by a view, as a lone run may."""
    from tests.parity.loops import check, numbers

    def attended(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(2, 6, 4, 5).transpose(1, 2) for part in x.split(20, -1))
        return _attend(q, k, v, is_causal=True).transpose(1, 2).view(2, 6, 20)

    check(attended, numbers(3, 2, 6, 60))


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("lies", ["in the batch", "outside of it"])
def test_a_second_derivative_is_an_error_as_alone(lies: str) -> None:
    """torch's kernel has none. The first derivative, kept with its graph, is the loop's."""
    from tests.parity.loops import check, numbers

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if lies == "outside of it":
            q, k, v = (value.permute(1, 2, 0, 3) for value in (q, k, v))
        return _attend(q, k, v)

    own = [numbers(3, 4, 2, 3, 5, seed=seed) for seed in range(3)]
    check(attend, *own)
    first = memberwise.vmap(attend)(*own)
    found = torch.autograd.grad(first.square().sum(), own, create_graph=True)
    lone = [torch.autograd.grad(attend(*[x[i] for x in own]).square().sum(), own) for i in range(3)]
    for grad, *members in zip(found, *lone, strict=True):
        assert_equal(grad, sum(members))
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
            torch.autograd.grad(grad.sum(), own, retain_graph=True)
