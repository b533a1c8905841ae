"""Rules of normalisation."""

from __future__ import annotations

import pytest
import torch

from tests.parity.rule_case import RuleCase, case, of, positive

_aten = torch.ops.aten

_layer, _layer_back = _aten.native_layer_norm.default, _aten.native_layer_norm_backward.default
_batch, _batch_back = _aten.native_batch_norm.default, _aten.native_batch_norm_backward.default
_rows, _images = of(2, 3, 4), of(4, 3, 2, 2)
_mean, _rstd = _layer(_rows, [4], None, None, 1e-5)[1:]
_saved = _batch(_images, None, None, None, None, True, 0.1, 1e-5)[1:]
_BACK = {"grad": False, "thorough": False}  # torch reads means from other memory wrongly
_STATS = {"state": (3, 4), "stacked": [(0, 1, 2, 3, 4), (0, 3, 4), (1, 3, 4), (0, 1, 3, 4)]}

CASES = [
    case(_layer, _rows, [4], of(4), of(4), 1e-5, batch_dims=(0, None, None, None, None)),
    case(_layer, _rows, [3, 4], of(3, 4), None, 1e-5, name="two dimensions", batch_dims=(0, None, None, None, None)),
    case(_layer, of(4), [4], None, of(4), 1e-5, name="one row"),
    case(_layer, _rows, [4], None, None, 1e-5, name="no weight"),
    case(_layer_back, of(2, 3, 4, seed=9), _rows, [4], _mean, _rstd, of(4), of(4), [True, True, True], **_BACK),
    case(_layer_back, of(2, 3, 4, seed=9), _rows, [4], _mean, _rstd, of(4), None, [True, True, False], **_BACK),
    case(_layer_back, of(2, 3, 4, seed=9), _rows, [4], _mean, _rstd, None, None, [True, False, False], **_BACK),
    case(_batch, _images, of(3), of(3), of(3), positive(3), True, 0.1, 1e-5, **_STATS),
    case(_batch, of(4, 3), of(3), of(3), of(3), positive(3), True, 0.1, 1e-5, name="rows", **_STATS),
    case(_batch, of(4, 3, 5), of(3), of(3), of(3), positive(3), False, 0.1, 1e-5, name="eval", **_STATS),
    case(
        _batch,
        *(of(4, 3, 5), None, None, None, None, True, 0.1, 1e-5),
        name="no statistics",
        batch_dims=(0, None, None, None, None, None, None, None),
    ),
    case(_aten._native_batch_norm_legit.default, _images, of(3), of(3), of(3), positive(3), True, 0.1, 1e-5, **_STATS),
    case(_aten._native_batch_norm_legit.no_stats, _images, of(3), of(3), True, 0.1, 1e-5),
    case(
        _batch_back,
        *(of(4, 3, 2, 2, seed=9), _images, of(3), None, None, *_saved, True, 1e-5, [True, True, True]),
        stacked=[(0, 1, 2, 5, 6), (0, 1, 5, 6), (0, 2), (1, 5, 6)],
        state=(5, 6),
    ),
    case(
        _batch_back,
        *(of(4, 3, seed=9), of(4, 3), of(3), of(3), positive(3), None, None, False, 1e-5, [True, True, True]),
        name="eval",
        stacked=[(0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 2), (1, 3, 4)],
        state=(3, 4),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()
