"""Rules of reductions, and of other operations along dimensions."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of, whole

_aten = torch.ops.aten

CASES = [
    *[
        case(scan.default, value, dim, name=f"ndim {value.ndim}")
        for scan in (_aten.cumsum, _aten.cumprod, _aten.logcumsumexp)
        for value, dim in ((of(2, 3, 4), -2), (of(), 0))
    ],
    case(_aten.cummax.default, of(2, 3), 1),
    case(_aten.cummin.default, of(2, 3), 1),
    case(_aten.sort.default, of(2, 3, 4), 1, True),
    case(_aten.sort.default, of(5)),
    case(_aten.sort.stable, of(2, 5), stable=True, dim=0),
    case(_aten.topk.default, of(2, 5), 2, 1),
    case(_aten.topk.default, of(2, 5), 2, 0, False),
    case(_aten.max.dim, of(2, 3), 1),
    case(_aten.max.dim, of(), 0),
    case(_aten.min.dim, of(2, 3), 0, True),
    case(_aten.median.dim, of(2, 3), 1),
    case(_aten.kthvalue.default, of(2, 5), 2, 1),
    case(_aten.mode.default, whole(3, 2, 6).double(), 1),
    case(_aten.argmax.default, of(2, 3), 1),
    case(_aten.argmin.default, of(2, 3), 0, True),
    case(_aten.argmax.default, of(2, 3), name="of all"),
    case(_aten.argmax.default, of(2, 3), None, True, name="of all, kept"),
    case(_aten.any.dim, of(2, 3) > 1, 1),
    case(_aten.all.dim, of(2, 3) > -1, 1, True),
    case(_aten.any.dims, of(2, 3) > 1, [0, 1]),
    case(_aten.all.dims, of(2, 3) > -2, None),
    case(_aten.prod.dim_int, of(2, 3), 1),
    case(_aten.hash_tensor.default, whole(7, 2, 3), [1]),
    case(_aten.hash_tensor.default, of(2, 3), name="of all"),
    case(_aten.searchsorted.Scalar, of(5).sort().values, 0.25),
    case(_aten.searchsorted.Scalar, of(5).abs().sort().values, 0.5, right=True, out_int32=True, name="from the right"),
    case(_aten.searchsorted.Scalar, torch.tensor([1, 2, 3]), 2.5, sorter=torch.tensor([2, 0, 1]), name="of integers"),
    case(_aten.renorm.default, of(2, 3, 4), 2, 1, 1.5),
    case(_aten.renorm.default, of(3, 4), 1, -1, 1.0, name="sums"),
    case(_aten.segment_reduce.default, of(6, 2), "max", lengths=torch.tensor([2, 1, 3])),
    case(
        _aten.segment_reduce.default,
        *(of(2, 5), "sum"),
        offsets=torch.tensor([[0, 2, 5], [0, 4, 5]]),
        axis=1,
        initial=1.0,
        name="offsets",
    ),
    case(
        _aten._segment_reduce_backward.default,
        *(of(3, 2), of(3, 2, seed=1), of(6, 2), "sum"),
        lengths=torch.tensor([2, 1, 3]),
        grad=False,
    ),
    case(_aten.logsumexp.default, of(2, 3, 2), [0, 2]),
    case(_aten.var.correction, of(2, 3, 2), [0, 2], correction=1),
    case(_aten.std.correction, of(2, 3, 2), None, keepdim=True),
    case(_aten.var_mean.correction, of(2, 3, 2), [-1], correction=0),
    case(_aten.std_mean.correction, of(4)),
    case(_aten.linalg_vector_norm.default, of(2, 3), 2, [1], True),
    case(_aten.linalg_vector_norm.default, of(2, 3)),
    case(_aten.norm.ScalarOpt_dim, of(2, 3), 2, [1]),
    case(_aten.nansum.default, of(2, 3), [1]),
    case(_aten.max.default, of(2, 3)),
    case(_aten.min.default, of()),
    case(_aten.any.default, of(2, 3) > 1),
    case(_aten.all.default, of(2) > -9),
    *[case(_aten.sum.default, value, name=f"ndim {value.ndim}") for value in (of(2, 3), of())],
    *[case(_aten.mean.default, value, name=f"ndim {value.ndim}") for value in (of(2, 3), of())],
    case(_aten.sum.dim_IntList, of(2, 3, 4), [0, -1], True),
    case(_aten.sum.dim_IntList, of(2, 3, 4), None),
    case(_aten.sum.dim_IntList, of(), [0]),
    case(_aten.mean.dim, of(2, 3, 4), [1]),
    case(_aten.mean.dim, of(2, 3, 4), [], True),
    case(_aten.amax.default, of(2, 3), [1]),
    case(_aten.amin.default, of(2, 3), [0], True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
