"""torch's own schedulers drive member-wise optimizers: each member's rate is what its own scheduler would give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from memberwise import optim
from memberwise.errors import ArgumentError

RATES = [0.1, 0.02, 0.5]

#: Every scheduler of torch that computes the next rate from the initial or the present one.
MAKERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 4], 0.1),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.25, 1.0, 4),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 5, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=10),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.9)], o
    ),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 2), schedules.CosineAnnealingLR(o, 4)], [2]
    ),
}


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int = 7) -> list[Any]:
    """The rate at each step, as numbers."""
    seen = []
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        lr = optimizer.param_groups[0]["lr"]
        seen.append(lr.tolist() if isinstance(lr, torch.Tensor) else lr)
        optimizer.step()
        scheduler.step()
    return seen


def alone(maker: Callable[[Any], Any], lr: float) -> tuple[list[float], torch.Tensor]:
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=lr)
    return rates(maker(optimizer), optimizer), parameter.detach()


@pytest.mark.parametrize("given", ["list", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_rates_and_results_are_those_of_a_scheduler_a_member(name: str, given: str) -> None:
    lr = RATES if given == "list" else torch.tensor(RATES, dtype=torch.float64)
    stacked = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = optim.AdamW([stacked], lr=lr)
    seen = rates(MAKERS[name](optimizer), optimizer)
    for member, rate in enumerate(RATES):
        expected, end = alone(MAKERS[name], rate)
        found = [row[member] if isinstance(row, list) else row for row in seen]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
        torch.testing.assert_close(stacked.detach()[member], end, rtol=1e-10, atol=1e-10)
    assert len({str(row) for row in seen}) > 1


@pytest.mark.parametrize("name", MAKERS)
def test_one_rate_for_all_stays_a_number(name: str) -> None:
    optimizer = optim.AdamW([torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)], lr=0.1)
    assert rates(MAKERS[name](optimizer), optimizer) == alone(MAKERS[name], 0.1)[0]
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_plateau_drives_one_rate_for_all() -> None:
    optimizer = optim.SGD([torch.zeros(3, 4, requires_grad=True)], lr=0.1)
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_plateau_over_rates_of_members_is_refused_by_name() -> None:
    optimizer = optim.SGD([torch.zeros(3, 4, requires_grad=True)], lr=RATES)
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    with pytest.raises(ArgumentError, match=r"expected one number, found 3.*ReduceLROnPlateau.*\[MW409\]"):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"].tolist() == RATES


def test_a_schedule_of_its_own_for_each_member() -> None:
    """A factor may be (M,) itself, also where one rate for all was given."""
    factors = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    for lr in (0.1, [0.1, 0.1, 0.1]):
        optimizer = optim.SGD([torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)], lr=lr)
        scheduler = schedules.LambdaLR(optimizer, lambda epoch: factors**epoch)
        for epoch in range(1, 4):
            scheduler.optimizer.step()
            scheduler.step()
            assert optimizer.param_groups[0]["lr"].tolist() == pytest.approx((0.1 * factors**epoch).tolist())


def test_one_cycle_moves_the_betas_too() -> None:
    stacked = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = optim.AdamW([stacked], lr=RATES, betas=(0.9, [0.99, 0.9, 0.999]))
    scheduler = schedules.OneCycleLR(optimizer, 0.3, total_steps=10)
    rates(scheduler, optimizer, 3)
    first, second = optimizer.param_groups[0]["betas"]
    assert 0.85 < first < 0.95 and second.tolist() == [0.99, 0.9, 0.999]


def test_groups_are_driven_apart() -> None:
    """One tensor of rates given to two groups must not become one rate: schedulers write into it in place."""
    lr = torch.tensor(RATES, dtype=torch.float64)
    first, second = (torch.zeros(3, 4, requires_grad=True) for _ in range(2))
    for groups in ([{"params": [first]}, {"params": [second]}], optim.param_groups([first, second], lr=lr)):
        optimizer = optim.SGD(groups, lr=lr)
        scheduler = schedules.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 0.1**epoch])
        optimizer.step()
        scheduler.step()
        for group, factor in zip(optimizer.param_groups, (0.5, 0.1), strict=True):
            assert group["lr"].tolist() == pytest.approx([rate * factor for rate in RATES])
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})
        assert optimizer.param_groups[-1]["lr"].tolist() == RATES
        lr.copy_(torch.tensor(RATES, dtype=torch.float64))


def test_a_rate_given_as_a_tensor_is_the_users_tensor() -> None:
    """As in torch: writing into it is seen."""
    lr = torch.tensor(RATES, dtype=torch.float64)
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = optim.SGD([weight], lr=lr)
    lr.mul_(10)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight[:, 0].tolist() == pytest.approx([-10 * rate for rate in RATES])


def test_setting_values_through_every_door_of_a_dict() -> None:
    group = optim.SGD([torch.zeros(3, 4, requires_grad=True)], lr=0.1).param_groups[0]
    for assign in (
        lambda: group.__setitem__("lr", RATES),
        lambda: group.update(lr=RATES),
        lambda: group.update({"lr": RATES}),
        lambda: group.__ior__({"lr": RATES}),
    ):
        group["lr"] = 0.1
        assign()
        assert group["lr"].tolist() == RATES


def test_a_scheduler_goes_on_after_its_state_was_loaded() -> None:
    def make() -> tuple[Any, Any]:
        optimizer = optim.AdamW([torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)], lr=RATES)
        return optimizer, schedules.CosineAnnealingLR(optimizer, 6)

    optimizer, scheduler = make()
    rates(scheduler, optimizer, 3)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = rates(scheduler, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, scheduler = make()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert rates(scheduler, optimizer, 3) == expected
