"""Bad input to an optimizer: what the message names, its code, and that nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memberwise import optim
from memberwise.errors import ArgumentError


def weight(members: int = 3, *shape: int) -> torch.Tensor:
    return torch.zeros(members, *shape, requires_grad=True)


def shared(*shape: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(*shape))
    parameter._memberwise_shared = True
    return parameter


ADAM_VALUES = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}
SGD_VALUES = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}
CASES = [(optim.Adam, name) for name in ADAM_VALUES] + [(optim.AdamW, "eps")] + [(optim.SGD, n) for n in SGD_VALUES]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_wrong_number_of_values(kind: Any, name: str) -> None:
    """In the constructor, in a group, and set later: expected and found."""
    pattern = rf"{name}: expected 1 or 3 values, found 2.*\[MW401\]"
    with pytest.raises(ArgumentError, match=pattern):
        kind([weight()], **{name: [0.1, 0.2]})
    with pytest.raises(ArgumentError, match=pattern):
        kind([{"params": [weight()], name: torch.tensor([0.1, 0.2])}])
    optimizer = kind([weight()])
    before = optimizer.param_groups[0][name]
    with pytest.raises(ArgumentError, match=pattern):
        optimizer.param_groups[0][name] = [0.1, 0.2]
    assert optimizer.param_groups[0][name] == before


@pytest.mark.parametrize(
    ("betas", "found"),
    [
        ((0.9, [0.9, 0.8]), r"betas\[1\]: expected 1 or 3 values, found 2"),
        (([0.9] * 4, 0.9), r"betas\[0\]: expected 1 or 3 values, found 4"),
        ((0.9,), r"betas: expected 2 entries"),
        ([0.9, 0.8, 0.7], r"betas: expected 2 entries"),
        (0.9, r"betas: expected 2 entries, found 0.9"),
    ],
)
def test_betas(betas: Any, found: str) -> None:
    with pytest.raises(ArgumentError, match=found + r".*\[MW401\]"):
        optim.Adam([weight()], betas=betas)


@pytest.mark.parametrize("value", ["0.1", None, ["a", "b", "c"], object(), torch.zeros(3, 1), torch.zeros(1, 3)])
def test_what_is_no_number(value: Any) -> None:
    optimizer = optim.SGD([weight()])
    with pytest.raises(ArgumentError, match=r"lr: expected .*found.*\[MW401\]"):
        optimizer.param_groups[0]["lr"] = value
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    "value",
    [(0.1, 0.2, 0.3), range(3), np.array([0.1, 0.2, 0.3]), [np.float32(0.5)] * 3, [torch.tensor(0.5)] * 3],
)
def test_what_holds_numbers(value: Any) -> None:
    lr = optim.SGD([weight()], lr=value).param_groups[0]["lr"]
    assert lr.tolist() == [float(item) for item in value]


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), True])
def test_what_is_one_number(value: Any) -> None:
    parameter = weight(3, 2)
    optimizer = optim.SGD([parameter], lr=value)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.detach().unique().tolist() == [-float(value)]


def test_values_out_of_range_are_listed_with_their_members() -> None:
    with pytest.raises(ArgumentError) as caught:
        optim.Adam([weight()], lr=[0.1, -1.0, float("nan")], betas=(1.0, [0.9, -0.1, 0.9]), eps=-1.0)
    message = str(caught.value)
    assert caught.value.code == "MW402"
    for part in (
        "lr: expected at least 0, found -1.0 for member 1, nan for member 2",
        "betas[0]: expected at least 0 and below 1, found 1.0",
        "betas[1]: expected at least 0 and below 1, found -0.1 for member 1",
        "eps: expected at least 0, found -1.0",
    ):
        assert part in message


@pytest.mark.parametrize("hyper", [{"momentum": [0.9, 0.0, 0.9]}, {}, {"momentum": 0.9, "dampening": [0, 0.1, 0]}])
def test_nesterov_needs_momentum_and_no_dampening_in_each_member(hyper: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"nesterov: expected a momentum and no dampening, found member.*\[MW402\]"):
        optim.SGD([weight()], nesterov=True, **hyper)
    with pytest.raises(ValueError):  # as torch, for one member
        torch.optim.SGD([weight()], nesterov=True, **{n: v[1] if isinstance(v, list) else v for n, v in hyper.items()})


@pytest.mark.parametrize(
    ("kind", "option"),
    [(optim.Adam, "amsgrad"), (optim.Adam, "maximize"), (optim.SGD, "nesterov"), (optim.SGD, "maximize")],
)
def test_options_are_one_for_all(kind: Any, option: str) -> None:
    for value in ([True, False, True], torch.tensor([True, False, True])):
        with pytest.raises(ArgumentError, match=rf"{option}: expected one value for all members.*\[MW403\]"):
            kind([weight()], **{option: value})
        optimizer = kind([weight()])
        with pytest.raises(ArgumentError, match=rf"{option}: expected one value"):
            optimizer.param_groups[0][option] = value


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_differentiable_steps_are_not_offered(kind: Any) -> None:
    with pytest.raises(ArgumentError, match=r"differentiable: expected False, found True.*\[MW403\]"):
        kind([weight()], differentiable=True)


def test_parameters_with_other_numbers_of_members_are_listed() -> None:
    named = [("a", weight(3, 2)), ("b", weight(4)), ("c", torch.zeros((), requires_grad=True)), ("d", weight(3))]
    with pytest.raises(ArgumentError) as caught:
        optim.SGD(named)
    message = str(caught.value)
    assert "expected 3 members" in message and "[MW404]" in message
    assert "group 0: parameter 'b' has 4" in message and "group 0: parameter 'c' has no member axis" in message
    assert "parameter 'd'" not in message and "_memberwise_shared" in message
    with pytest.raises(ArgumentError, match=r"group 1: parameter 0 has 4"):
        optim.SGD([{"params": [weight(3)]}, {"params": [weight(4)]}])
    with pytest.raises(ArgumentError, match=r"at least one.*parameter 0 has 0.*\[MW404\]"):
        optim.SGD([weight(0, 2)])


def test_a_shared_parameter_needs_one_value_for_all() -> None:
    parameters = [("own", weight(3, 2)), ("trunk", shared(4))]
    with pytest.raises(ArgumentError, match=r"lr: expected one value, as parameter 'trunk' is shared.*\[MW403\]"):
        optim.AdamW(parameters, lr=[0.1, 0.2, 0.3])
    optimizer = optim.AdamW(parameters, lr=[0.1, 0.1, 0.1])
    with pytest.raises(ArgumentError, match=r"betas\[1\]: expected one value, as parameter 'trunk'"):
        optimizer.param_groups[0]["betas"] = (0.9, [0.9, 0.9, 0.8])
    optim.AdamW([{"params": parameters[:1], "lr": [0.1, 0.2, 0.3]}, {"params": parameters[1:], "lr": 0.1}])


def test_values_written_in_place_beside_a_shared_parameter_are_found_at_the_step() -> None:
    own, trunk = weight(3, 2), shared(4)
    optimizer = optim.SGD([own, trunk], lr=[0.1, 0.1, 0.1])
    own.grad, trunk.grad = torch.ones_like(own), torch.ones_like(trunk)
    optimizer.param_groups[0]["lr"][1] = 0.5
    for act in (optimizer.step, optimizer.sync_hyperparameters):
        with pytest.raises(ArgumentError, match=r"lr: expected one value"):
            act()
    assert not own.detach().any() and not trunk.detach().any()


def test_several_values_need_a_member_axis() -> None:
    with pytest.raises(ArgumentError, match=r"lr: expected one value \(no parameter has a member axis\), found 3"):
        optim.SGD([shared(4)], lr=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("value", [[1.0, 2.0], torch.zeros(4)])
def test_a_scheduler_that_writes_a_wrong_number_of_values(value: Any) -> None:
    optimizer = optim.SGD([weight()], lr=[0.1, 0.2, 0.3])
    with pytest.raises(ArgumentError, match=r"expected 1 or 3 values, found.*\[MW401\]"):
        optimizer.param_groups[0]["lr"].fill_(torch.as_tensor(value))
    assert optimizer.param_groups[0]["lr"].tolist() == [0.1, 0.2, 0.3]


MISUSES: list[tuple[Callable[[], Any], type[Exception]]] = [
    (lambda: optim.SGD([]), ValueError),
    (lambda: optim.SGD(weight()), TypeError),
    (lambda: optim.SGD([weight() * 2]), ValueError),
    (lambda: optim.SGD(["w"]), TypeError),  # type: ignore[list-item]  # that is the point
]


@pytest.mark.parametrize(("misuse", "error"), MISUSES)
def test_what_torch_refuses_is_refused(misuse: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        misuse()
