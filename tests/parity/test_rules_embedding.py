"""Rules of embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from memberwise.rules.registry import composites_disabled
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten
_bag, _bag_back = _aten._embedding_bag.default, _aten._embedding_bag_backward.default
_bag_weights_back = _aten._embedding_bag_per_sample_weights_backward.default
_table, _rows, _offsets = of(6, 3), whole(6, 7), torch.tensor([0, 3, 3, 5])
_bags = {mode: _bag(_table, _rows, _offsets, False, mode, False, None, False, 2)[1:] for mode in (0, 1, 2)}
_EACH = [(0, 1), (0,), (1,)]  # offsets cannot be turned as other integers can

CASES = [
    case(_aten.embedding.default, of(6, 3), whole(6, 2, 5), batch_dims=(None, 0)),
    case(_aten.embedding.default, of(6, 3), whole(6, 2, 5), 2, name="padding", batch_dims=(None, 0, None)),
    case(_aten.embedding.default, of(6, 3), whole(3, 2, 5), -1, True, name="by frequency"),
    case(_aten.embedding.default, of(6, 3), torch.tensor(4), name="one index"),
    case(_aten.embedding_dense_backward.default, of(2, 5, 3), whole(6, 2, 5), 6, 2, False),
    case(_aten.embedding_dense_backward.default, of(2, 5, 3), whole(3, 2, 5), 6, -1, True, name="by frequency"),
    case(
        _aten.embedding_dense_backward.default,
        *(of(2, 5, 3), whole(6, 2, 5), 6, -1, False),
        name="batch",
        grad=False,
        batch_dims=(0, 0, None, None, None),
    ),
    case(
        _aten.embedding_renorm_.default,
        *(of(6, 3), whole(4, 2, 5), 1.0, 2.0),
        state=(0,),
        stacked=[(0, 1), (0,)],
        declines=True,
    ),
    *[case(F.embedding_bag, whole(6, 2, 5), of(6, 3), None, name=mode, mode=mode) for mode in ("sum", "mean", "max")],
    case(
        F.embedding_bag, whole(6, 7), of(6, 3), torch.tensor([0, 3, 3, 5]), name="offsets", stacked=[(0, 1), (0,), (1,)]
    ),
]

CASES += [
    case(_bag, _table, _rows, _offsets, False, mode, False, None, False, padding, name=name, stacked=_EACH, grad=False)
    for mode, padding, name in ((0, -1, "sum"), (1, 2, "mean, padding"), (2, 2, "largest, padding"), (2, -1, "largest"))
]
CASES += [
    case(_aten._embedding_bag_forward_only.default, _table, _rows, _offsets, name="sum", stacked=_EACH, grad=False),
    *[
        case(
            _bag_back,
            *(of(4, 3), _rows, _offsets, *_bags[mode], 6, False, mode, False, None, 2),
            name=str(mode),
            stacked=[(0,)],
            grad=False,
            thorough=False,
        )
        for mode in (0, 1, 2)
    ],
    case(
        _bag_weights_back,
        *(of(4, 3), _table, _rows, _offsets, _bags[0][0], 0, 2),
        stacked=[(0, 1), (0,), (1,)],
        grad=False,
        thorough=False,
    ),
]

_INDICES = torch.tensor([[0, 2, 2, 5, 1, 3, 2], [1, 1, 2, 0, 4, 4, 3], [5, 4, 2, 2, 2, 0, 1]])
_OFFSETS = torch.tensor([[0, 2, 2, 5], [0, 0, 3, 7], [0, 1, 4, 6]])


def _bagged(mode: str, **options: Any) -> Any:
    return lambda table, indices, offsets: F.embedding_bag(indices, table, offsets, mode=mode, **options)


@pytest.mark.parametrize("own", [(0, 0, 0), (0, None, None), (None, 0, 0), (0, 0, None), (0, None, 0)], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{"padding_idx": 2}, {}], ids=str)
@pytest.mark.parametrize("composite", [True, False])
def test_bags_of_each_member(own: Any, mode: str, options: dict[str, Any], composite: bool) -> None:
    """Tables, indices and offsets shared or a member's own, with padding or without: always by the rules."""
    given = numbers(3, 6, 3), _INDICES, _OFFSETS
    args = [value if dim == 0 else value.detach()[0] for value, dim in zip(given, own, strict=True)]
    args[0].requires_grad_()
    with trace.recording() as record, nullcontext() if composite else composites_disabled():
        check(
            lambda table, *where: F.embedding_bag(where[0], table, where[1], mode=mode, **options), *args, in_dims=own
        )
    assert not [entry.op for entry in record.entries.values() if entry.path in ("loop", "retreat")]


def test_weights_of_each_index() -> None:
    def bag(table: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, padding_idx=2)

    check(bag, numbers(3, 6, 3), _INDICES, _OFFSETS, numbers(3, 7, seed=1))
    check(bag, numbers(3, 6, 3), _INDICES[0], _OFFSETS[0], numbers(7, seed=1), in_dims=(0, None, None, None))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}], ids=str)
@pytest.mark.parametrize("offsets", [[1, 2], [0, 9]], ids=str)
def test_offsets_that_are_refused_alone_touch_no_other_member(options: dict[str, Any], offsets: list[int]) -> None:
    """Member 1's lie where its indices begin late, or beyond them: among all members' that would be another's bag."""
    own = torch.tensor([[0, 2], offsets, [0, 3]])
    with pytest.raises(RuntimeError):
        F.embedding_bag(_INDICES[1], _table, own[1], **options)
    with pytest.raises(RuntimeError):
        memberwise.vmap(lambda table, *args: F.embedding_bag(args[0], table, args[1], **options))(
            of(3, 6, 3), _INDICES, own
        )


@pytest.mark.filterwarnings("ignore::memberwise.StackWarning")  # each member's bags by its own call
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_last_offset_that_leaves_indices_out(mode: str) -> None:
    """Alone the rest is in the last bag or in none, by one of torch's kernels or another."""
    offsets = torch.tensor([[0, 2, 5], [0, 1, 7], [0, 3, 6]])
    check(_bagged(mode, include_last_offset=True), numbers(3, 6, 3), _INDICES, offsets)


@pytest.mark.parametrize("layer", [F.embedding, F.embedding_bag])
def test_a_sparse_gradient_is_dense(layer: Any) -> None:
    """With the values of the sparse one: no member tensor can show another."""
    mode = {} if layer is F.embedding else {"mode": "sum"}
    table = numbers(3, 6, 3)
    indices = _INDICES.view(3, 7, 1)
    out = memberwise.vmap(lambda own, where: layer(where, own, sparse=True, **mode))(table, indices)
    (grad,) = torch.autograd.grad(out.square().sum(), table)
    for i in range(3):
        own = table.detach()[i].requires_grad_()
        (expected,) = torch.autograd.grad(layer(indices[i], own, sparse=True, **mode).square().sum(), own)
        assert expected.is_sparse
        torch.testing.assert_close(grad[i], expected.to_dense())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("index", [-1, 6, -7, 100])
def test_an_index_out_of_range_reads_no_other_members_row(index: int) -> None:
    """Member 1's index -1 lies inside the stacked table; alone it is an error, and so it is here."""
    indices = torch.tensor([[0, 1], [2, index]])
    with pytest.raises(IndexError):
        torch.embedding(of(6, 3), indices[1])
    with pytest.raises(IndexError):
        memberwise.vmap(torch.embedding)(of(2, 6, 3), indices)
