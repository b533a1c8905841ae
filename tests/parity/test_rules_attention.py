"""Rules of attention."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

_flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_q, _k, _v = of(2, 3, 6, 5), of(2, 3, 6, 5, seed=1), of(2, 3, 6, 5, seed=2)
_out, _sums = _flash(_q, _k, _v)
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
