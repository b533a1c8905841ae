"""Rules of views and rearrangements."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import memberwise
from memberwise.engine import trace
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of

_aten = torch.ops.aten

CASES = [
    case(_aten.view.default, of(2, 6), [3, -1], thorough=False),
    case(_aten.view.default, of(2, 6), [12], thorough=False, batch_dims=(0, None)),
    case(_aten._unsafe_view.default, of(2, 6), [3, 4], thorough=False),
    case(_aten.expand.default, of(2, 1), [4, 2, 3]),
    case(_aten.expand.default, of(), [2, 3], name="a number"),
    case(_aten.t.default, of(2, 3)),
    case(_aten.t.default, of(3), name="a vector"),
    case(_aten.transpose.int, of(2, 3, 4), 0, -1),
    case(_aten.transpose.int, of(), 0, -1, name="a number"),
    case(_aten.permute.default, of(2, 3, 4), [2, 0, -2]),
    case(_aten.select.int, of(2, 3, 4), -2, -1),
    case(_aten.slice.Tensor, of(2, 5), 1, 1, 9, 2, batch_dims=(0, None, None, None, None)),
    case(_aten.unsqueeze.default, of(2, 3), -1),
    case(_aten.unsqueeze.default, of(), 0, name="a number"),
    case(_aten.squeeze.dim, of(2, 1, 3), -2),
    case(_aten.squeeze.dim, of(2, 3), 0, name="not of one"),
    case(_aten.squeeze.dim, of(), 0, name="a number"),
    case(_aten.squeeze.dims, of(1, 2, 1, 3), [0, -2, 1]),
    case(_aten.squeeze.dims, of(), [0], name="a number"),
    case(_aten.squeeze.default, of(1, 2, 1)),
    case(_aten.squeeze.default, of(), name="a number"),
    case(_aten.permute_copy.default, of(2, 3, 4), [2, 0, -2], thorough=False),
    case(_aten.squeeze_copy.default, of(1, 2, 1), thorough=False),
    case(_aten.squeeze_copy.dim, of(2, 1, 3), -2, thorough=False),
    case(_aten.squeeze_copy.dims, of(1, 2, 1, 3), [0, -2], thorough=False),
    case(_aten.t_copy.default, of(2, 3), thorough=False),
    case(_aten.transpose_copy.int, of(2, 3, 4), 0, -1, thorough=False),
    case(_aten.unsqueeze_copy.default, of(2, 3), -1, thorough=False),
    case(_aten.detach.default, of(2, 3)),
    case(_aten.alias.default, of(2, 3)),
    case(_aten.split.Tensor, of(2, 5), 2, 1),
    case(_aten.split_with_sizes.default, of(2, 5), [1, 4], -1),
    case(_aten.unbind.int, of(2, 3), 1),
    case(_aten.cat.default, [of(2, 3), of(2, 1)], -1),
    case(_aten.cat.default, [of(2, 3), of(0)], 1, name="with torch's old empty tensor"),
    case(_aten._chunk_cat.default, [of(2, 3, 2), of(2, 5, 2)], 1, 2, grad=False),
    case(_aten.stack.default, [of(2, 3), of(2, 3, seed=1)], -1),
    case(_aten.as_strided.default, of(2, 6), [2, 3], [6, 2], thorough=False),
    case(_aten.as_strided_copy.default, of(2, 6), [2, 3], [6, 2], thorough=False),
    case(_aten.as_strided_scatter.default, of(2, 6), of(2, 3), [2, 3], [6, 2], thorough=False),
    case(_aten.flip.default, of(2, 3), [0, -1]),
    case(_aten.flip.default, of(), [0], name="a number"),
    case(_aten.roll.default, of(2, 3), [1, -1], [0, -1]),
    case(_aten.roll.default, of(2, 3), [2], name="as one row"),
    case(_aten.roll.default, of(), [2], name="a number"),
    case(_aten.tril.default, of(3, 4), -1),
    case(_aten.triu.default, of(2, 3, 4), 1),
    case(_aten.new_zeros.default, of(2, 3), [4, 5]),
    case(_aten.new_ones.default, of(2, 3), [4, 5], dtype=torch.int32, dtypes=()),
    case(_aten.new_full.default, of(2, 3), [4], 2.5),
]

ALONE = {
    _aten.new_empty.default: "its values are whatever the memory held",
    _aten.new_empty_strided.default: "its values are whatever the memory held",
}
"""Rules that are tested by hand, and why."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


def half_rotated(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., 2:], x[..., :2]], -1)


def test_heads_that_were_transposed_are_joined_by_the_rule() -> None:
    """They are four dimensions, and lie in another order, as images with their channels innermost do."""
    with trace.recording() as record:
        check(lambda x: half_rotated(x.transpose(1, 2)), numbers(3, 2, 5, 3, 4))
    assert ("aten::cat", "rule") in {(entry.op, entry.path) for entry in record.entries.values()}


@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (2, 1, 2, 3), (2, 3, 2, 1)], ids=str)
def test_what_is_joined_lies_as_alone(shape: tuple[int, ...]) -> None:
    for order in itertools.permutations(range(4)):
        seen = []

        def joined(x: torch.Tensor, order: tuple[int, ...] = order, seen: list[Any] = seen) -> torch.Tensor:
            out = torch.cat([x.permute(order)] * 2, 1)
            seen.append(out.stride())
            return out

        x = of(3, *shape)
        assert torch.equal(memberwise.vmap(joined)(x), torch.stack([joined(row) for row in x]))
        assert len(set(seen)) == 1, (order, seen)


def test_empty_memory_has_the_strides_that_were_asked_for() -> None:
    seen = []

    def make(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty_strided((2, 3), (1, 2), dtype=torch.float32)
        seen.append(out.stride())
        return out.fill_(0) + x.new_empty((2, 3)).zero_()

    assert torch.equal(memberwise.vmap(make)(of(3, 4)), torch.zeros(3, 2, 3, dtype=torch.float64))
    assert seen == [(1, 2)]
