"""Rules of matrix products, and of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.rules import matmul
from memberwise.rules.matmul import batched, batched_plus, is_narrow, left_over, product
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

CASES = [
    case(_aten.mm.default, of(2, 3), of(3, 4), batch_dims=(0, None)),
    case(_aten.mm.default, of(3, 2).t(), of(3, 4), batch_dims=(0, None), name="turned"),
    case(_aten.mm.default, of(3, 2).t(), of(4, 3).t(), batch_dims=(0, None), name="both turned"),
    case(_aten.mm.default, of(9, 3), of(3, 3), name="narrow"),
    case(_aten.mm.default, of(9, 1), of(1, 3), name="outer"),
    case(_aten.mm.default, of(2, 0), of(0, 4), name="of nothing", dtypes=()),
    case(_aten.bmm.default, of(2, 3, 4), of(2, 4, 5), batch_dims=(0, 0)),
    *[
        case(_aten.addmm.default, of(*bias), of(rows, 4), of(4, 3), name=f"{bias} and {rows} rows")
        for bias in ((3,), (1, 3), (9, 3), (9, 1), ())
        for rows in (9, 2)
        if bias[:1] != (9,) or rows == 9
    ],
    case(_aten.addmm.default, of(3), of(9, 4), of(4, 3), name="scaled", beta=0.5, alpha=2),
    case(_aten.addmm.default, of(3), of(2, 4), of(4, 3), name="no bias", beta=0, alpha=2),
    case(_aten._trilinear.default, of(5, 2), of(4, 2, 3), of(5, 3), [1, 3], [0], [1, 2], [2, 3]),
    case(_aten._trilinear.default, of(5, 2), of(5, 3), of(2, 3), [2], [1], [0], [1], 2, name="elsewhere"),
    case(F.linear, of(2, 3), of(4, 3), of(4), declines=True, batch_dims=(0, None, None)),
    case(F.linear, of(9, 5), of(3, 5), of(3), name="narrow", declines=True),
    case(F.linear, of(9, 3), of(30, 3), None, name="narrow input"),
    case(F.linear, of(9, 3), of(1, 3), of(1), name="one output", declines=True),
    case(F.linear, of(3), of(4, 3), of(4), name="one row", declines=True),
    case(F.linear, of(2, 5, 3), of(4, 3), of(4), name="two leading dimensions", declines=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def test_narrow_results_are_those_that_were_measured() -> None:
    like = torch.empty(0)
    assert is_narrow(256, 10, like) and is_narrow(256, 23, like) and is_narrow(64, 10, like)
    assert not is_narrow(256, 16, like) and not is_narrow(64, 33, like) and not is_narrow(32, 12, like)
    assert not is_narrow(256, 1, like), "one column is a vector"
    assert not is_narrow(256, 10, like.bfloat16()), "not MKL's"


def test_a_gradients_columns_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all members in one piece would be a copy, and in bfloat16 nine times as long in the product."""
    monkeypatch.setattr(torch, "mm", lambda *_: pytest.fail("one product of all rows"))
    turned, shared = of(2, 3, 4).transpose(1, 2), of(3, 5)
    torch.testing.assert_close(product(turned, 0, shared, None), turned @ shared)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "bmm", lambda *_: pytest.fail("a product of each member's rows"))
    for rows in (turned.contiguous(), of(2, 1, 3)):
        torch.testing.assert_close(product(rows, 0, shared, None), rows @ shared)
    torch.testing.assert_close(product(turned, 0, shared.t().contiguous().t(), None), turned @ shared)


@pytest.fixture
def two_cores(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is too small for two threads to share it."""
    monkeypatch.setattr(matmul, "SHARED", 0)


def test_members_are_left_over_where_cores_would_wait(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(5, 8, 4), torch.ones(5, 4, 6)
    assert left_over(a, b) == 1
    assert left_over(a[:1], b[:1]) == 1 and left_over(a[:4], b[:4]) == 0
    assert left_over(a.bfloat16(), b.bfloat16()) == 0, "not MKL's"
    assert left_over(a, b[:, :3]) == 0, "torch says what is wrong with them"
    assert torch.func.vmap(lambda _: torch.tensor(left_over(a, b)))(torch.ones(2)).tolist() == [0, 0]
    monkeypatch.setattr(matmul, "SHARED", 8 * 4 * 6 // 2)
    assert left_over(a, b) == 1
    monkeypatch.setattr(matmul, "SHARED", 8 * 4 * 6 // 2 + 1)
    assert left_over(a, b) == 0, "too small to share"


@pytest.mark.parametrize("members", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [None, (), (6,), (8, 6), (0, 1, 6), (0, 8, 1), (0, 8, 6)], ids=str)
def test_products_of_members_left_over(members: int, bias: tuple[int, ...] | None, two_cores: None) -> None:
    generator = torch.Generator().manual_seed(members)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b = made(members, 8, 4), made(members, 6, 4).transpose(1, 2)
    if bias is None:
        torch.testing.assert_close(batched(a, b), a @ b)
        return
    added = made(*(members if size == 0 else size for size in bias))
    torch.testing.assert_close(batched_plus(added, a, b), added + a @ b)
    scaled = batched_plus(added, a, b, beta=0.5, alpha=2)
    torch.testing.assert_close(scaled, 0.5 * added + 2 * (a @ b))
    nothing = batched_plus(added * torch.nan, a, b, beta=0)
    torch.testing.assert_close(nothing, a @ b)


def test_training_with_members_left_over(two_cores: None) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    stack = memberwise.build(model, seeds=range(3))
    memberwise.verify(stack, torch.randn(8, 6, dtype=torch.float64))
    memberwise.verify(stack, memberwise.each(torch.randn(3, 8, 6, dtype=torch.float64)))
    x = torch.randn(8, 6, dtype=torch.float64)
    stacked = _second_gradients(stack, x)
    for k, member in enumerate(stack.unstack()):
        torch.testing.assert_close(tuple(own[k] for own in stacked), _second_gradients(member, x))


def _second_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    params = [*model.parameters()]
    slopes = torch.autograd.grad(model(x).square().sum(), params, create_graph=True)
    return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), params)
