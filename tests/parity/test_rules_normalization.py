"""Rules of normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, positive

_aten = torch.ops.aten

_layer, _layer_back = _aten.native_layer_norm.default, _aten.native_layer_norm_backward.default
_batch, _batch_back = _aten.native_batch_norm.default, _aten.native_batch_norm_backward.default
_weight, _weight_back = _aten._weight_norm_interface.default, _aten._weight_norm_interface_backward.default
_rows, _images = of(2, 3, 4), of(4, 3, 2, 2)
_mean, _rstd = _layer(_rows, [4], None, None, 1e-5)[1:]
_saved = _batch(_images, None, None, None, None, True, 0.1, 1e-5)[1:]
_group, _group_back = _aten.native_group_norm.default, _aten.native_group_norm_backward.default
_of_group = _group(of(3, 4, 2, 2), None, None, 3, 4, 4, 2, 1e-5)[1:]
_of_one = _group(of(3, 1, 2), None, None, 3, 1, 2, 1, 1e-5)[1:]
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
    case(_weight, of(3, 4, 2), of(3, 1, 1), name="rows", thorough=False),  # torch reads other memory wrongly
    case(_weight, of(3, 4, 2), of(1, 1, 2), 2, name="columns", thorough=False),
    case(_weight_back, of(3, 4), of(3, 4, seed=9), of(3, 1), positive(3, 1), 0, name="rows", **_BACK),
    case(_weight_back, of(3, 4), of(3, 4, seed=9), of(1, 4), positive(1, 4), 1, name="columns", **_BACK),
    case(_group, of(3, 4, 2, 2), of(4), of(4), 3, 4, 4, 2, 1e-5, thorough=False),  # torch refuses other memory
    case(_group, of(3, 4, 5), None, None, 3, 4, 5, 2, 1e-5, name="no weight", thorough=False),
    case(
        _group_back,
        *(of(3, 1, 2, seed=9), of(3, 1, 2), *_of_one, of(1), 3, 1, 2, 1, [True] * 3),
        name="one channel",
        **_BACK,
    ),
    case(_group_back, of(3, 4, 2, 2, seed=9), of(3, 4, 2, 2), *_of_group, of(4), 3, 4, 4, 2, [True] * 3, **_BACK),
    case(
        _group_back,
        *(of(3, 4, 2, 2, seed=9), of(3, 4, 2, 2), *_of_group, None, 3, 4, 4, 2, [True, False, False]),
        name="no weight",
        **_BACK,
    ),
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
    case(_aten._batch_norm_with_update.default, _images, of(3), of(3), of(3), positive(3), 0.1, 1e-5, **_STATS),
    case(
        _aten.batch_norm_backward.default,
        *(of(4, 3, 2, 2, seed=9), _images, of(3), None, None, *_saved, True, 1e-5, [True, True, True], of(0)),
        grad=False,
        stacked=[(0, 1, 2, 5, 6), (0, 1, 5, 6), (0, 2), (1, 5, 6)],
        state=(5, 6),
    ),
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


_OWN_STATS = {"state": (1, 2), "stacked": [(0, 1, 2, 3, 4), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3)]}

CASES += [
    case(F.layer_norm, _rows, [4], of(4), of(4), batch_dims=(0, None, None, None)),
    case(F.layer_norm, _rows, [3, 4], of(3, 4), name="two dimensions"),
    case(F.layer_norm, _rows, [4], name="no weight"),
    case(F.layer_norm, of(2, 4), [4], None, of(4), name="bias alone"),
    case(F.layer_norm, of(4), [4], of(4), of(4), 0.1, name="one row"),
    case(F.batch_norm, _images, of(3), positive(3), of(3), of(3), True, **_OWN_STATS),
    case(F.batch_norm, of(4, 3), of(3), positive(3), of(3), of(3), False, name="eval", **_OWN_STATS),
    case(F.batch_norm, _images, None, None, of(3), of(3), True, name="no statistics"),
    case(F.batch_norm, _images, None, None, None, None, True, name="no weight"),
    case(
        F.batch_norm,
        *(of(4, 3), of(3), positive(3), of(3), None, True, 0.3, 0.1),
        name="options",
        state=(1, 2),
        stacked=[(0, 1, 2, 3), (0, 1, 2)],
    ),
    case(
        F.batch_norm,
        *(of(4, 3), of(3), positive(3), of(3), of(3), False),
        name="batch",
        declines=True,
        batch_dims=(0, *(None,) * 5),
        **_OWN_STATS,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_over_several_calls(momentum: float | None) -> None:
    """With momentum None the module reads its count of batches on the host: equal in all members."""

    def three_batches(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norm = nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
        for step in range(3):
            out = norm(x + step)
        assert norm.running_mean is not None and norm.running_var is not None
        return out, norm.running_mean, norm.running_var, norm.num_batches_tracked

    check(three_batches, numbers(3, 5, 4))


@pytest.mark.usefixtures("composites")
def test_a_batch_of_one_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        check(lambda x: F.batch_norm(x, None, None, training=True), numbers(3, 1, 4))


@pytest.mark.usefixtures("composites")
def test_statistics_are_as_before_after_a_retreat() -> None:
    """The first run writes them, and is undone."""

    def parted(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        out = F.batch_norm(x, mean, var, training=True)
        return out * 2 if x.sum() > 0 else out

    x = numbers(2, 5, 4).detach().abs() * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    check(parted, x.requires_grad_(), numbers(2, 4, grad=False), numbers(2, 4, grad=False).abs())


@pytest.mark.usefixtures("composites")
def test_statistics_of_all_members_in_one_buffer() -> None:
    """Each member writes its own in a loop, one after the other: so they run."""
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    check(lambda x, m, v: F.batch_norm(x, m, v, training=True), numbers(2, 5, 4), mean, var, in_dims=(0, None, None))


def test_double_backward_writes_no_statistics_again() -> None:
    def penalised(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        out = F.batch_norm(x, mean, var, training=True).square().sum(0)[0]
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        return grad.square().sum()

    check(penalised, numbers(3, 5, 4), numbers(3, 4, grad=False), numbers(3, 4, grad=False).abs())


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_of_what_all_members_share(groups: int) -> None:
    """Its backward meets members' gradients, and means that are equal in all members."""
    check(
        lambda x, weight: F.group_norm(x, groups) * weight,
        numbers(3, 4, 5, seed=1, grad=True),
        numbers(3, 3, 4, 5),
        in_dims=(None, 0),
    )
