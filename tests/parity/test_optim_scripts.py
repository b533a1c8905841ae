"""A hundred steps of a stack with five sets of hyperparameters, against five runs of a plain script."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.members import select
from memberwise.testing.tolerance import assert_equal

SCRIPT = runpy.run_path(str(Path(__file__).parent / "scripts" / "five_rates.py"))
KINDS = {"adamw": optim.AdamW, "sgd": optim.SGD}


def as_columns(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """The scripts' sets, one list a hyperparameter."""
    columns: dict[str, Any] = {name: [own[name] for own in sets] for name in sets[0]}
    if "betas" in columns:
        columns["betas"] = tuple(map(list, zip(*columns["betas"], strict=True)))
    return columns


def train(
    params: dict[str, torch.Tensor], template: nn.Module, optimizer: Any, limits: list[float], steps: range
) -> None:
    def loss(own: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(memberwise.functional_call(template, own, (x,)), y)

    for step in steps:
        optimizer.zero_grad()
        memberwise.vmap(loss, (0, None, None))(params, *SCRIPT["batch"](step)).sum().backward()
        optim.clip_grad_norm_(list(params.values()), limits)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_equals_the_scripts(kind: str) -> None:
    models = [SCRIPT["network"](seed) for seed in range(5)]
    params, _ = memberwise.stack_module_state(models)
    optimizer = KINDS[kind](list(params.values()), **as_columns(SCRIPT["SETS"][kind]))
    train(params, models[0], optimizer, SCRIPT["CLIP"], range(100))
    for member in range(5):
        for name, value in SCRIPT["main"](kind, member).items():
            assert_equal(params[name].detach()[member], value, f"member {member}: {name}")


def test_members_that_are_left_equal_the_scripts_too() -> None:
    models = [SCRIPT["network"](seed) for seed in range(5)]
    params, _ = memberwise.stack_module_state(models)
    optimizer = optim.AdamW(list(params.values()), **as_columns(SCRIPT["SETS"]["adamw"]))
    train(params, models[0], optimizer, SCRIPT["CLIP"], range(30))
    params, optimizer = select((params, optimizer), [4, 1])
    train(params, models[0], optimizer, [SCRIPT["CLIP"][i] for i in (4, 1)], range(30, 60))
    for place, member in enumerate([4, 1]):
        for name, value in SCRIPT["main"]("adamw", member, 60).items():
            assert_equal(params[name].detach()[place], value, f"member {member}: {name}")


def test_a_stack_module_travels_with_its_optimizer() -> None:
    stack = memberwise.stack([SCRIPT["network"](seed) for seed in range(4)])
    optimizer = optim.AdamW(optim.param_groups(stack, weight_decay=0.1), lr=[0.1, 0.2, 0.3, 0.4])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    stack, optimizer = select((stack, optimizer), [3, 0, 3])
    x, y = SCRIPT["batch"](0)
    memberwise.vmap(lambda m, x, y: nn.functional.cross_entropy(m(x), y), (0, None, None))(stack, x, y).sum().backward()
    norms = optim.clip_grad_norm_(stack, 1.0)
    before = [parameter.detach().clone() for parameter in stack.parameters()]
    optimizer.step()
    assert norms.shape == (3,) and norms[0] == norms[2] != norms[1]
    for parameter, old in zip(stack.parameters(), before, strict=True):
        moved = (parameter.detach() - old).abs()
        assert torch.equal(moved[0], moved[2]) and (moved[0] > moved[1]).any()


def test_shared_state_of_a_stack_is_one_to_its_optimizer() -> None:
    trunk = nn.Linear(3, 3)
    stack = memberwise.stack([nn.Sequential(trunk, nn.Linear(3, 2)) for _ in range(3)], shared=("0.*",))
    with pytest.raises(ValueError, match=r"is shared by all members.*\[MW403\]"):
        optim.SGD(stack.named_parameters(), lr=[0.1, 0.2, 0.3])
    optimizer = optim.SGD(stack.named_parameters(), lr=0.1, momentum=0.9)
    assert optimizer.members == 3 and optimizer.param_groups[0].shared == (True, True, False, False)
    stack(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    new, copied = select((stack, optimizer), [2, 2])
    assert copied.param_groups[0].shared == (True, True, False, False)
    assert copied.param_groups[0]["params"][0] is next(iter(new.parameters()))
