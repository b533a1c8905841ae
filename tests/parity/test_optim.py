"""Member-wise optimizers against an optimizer a member: parameters after many steps, member by member."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memberwise import optim
from memberwise.testing.tolerance import assert_equal
from tests.parity.lone_steps import ADAM, MEMBERS, SGD, SHAPES, backward_together, leaves, loss, run_alone, starts

KINDS = {
    "SGD": (optim.SGD, torch.optim.SGD, SGD),
    "Adam": (optim.Adam, torch.optim.Adam, ADAM),
    "AdamW": (optim.AdamW, torch.optim.AdamW, ADAM),
}
ONE = {
    "SGD": {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.01},
    "AdamW": {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1},
}


def run_together(
    kind: type[optim.Adam] | type[optim.SGD],
    hyper: dict[str, Any],
    steps: int,
    *,
    members: int = MEMBERS,
    max_norm: Any = None,
    spoil: Any = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, torch.Tensor]:
    params = leaves(starts(members, dtype))
    optimizer = kind(list(params.values()), **hyper, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward_together(params, step)
        if spoil is not None:
            for member in range(members):
                spoil(step, member, params)
        if max_norm is not None:
            optim.clip_grad_norm_(list(params.values()), max_norm)
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


def check(together: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    for name in alone:
        assert_equal(together[name], alone[name], name)


def moved(ends: dict[str, torch.Tensor]) -> bool:
    return all(not torch.equal(ends[name], value) for name, value in starts(len(ends["w1"])).items())


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_five_members_with_five_sets_after_a_hundred_clipped_steps(name: str, fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]
    together = run_together(kind, hyper, 100, max_norm=0.5, fused=fused)
    check(together, run_alone(lone, hyper, 100, max_norm=0.5))
    assert moved(together)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_one_set_for_all(name: str, fused: bool | None) -> None:
    kind, lone, _ = KINDS[name]
    check(run_together(kind, ONE[name], 30, fused=fused), run_alone(lone, ONE[name], 30))


@pytest.mark.parametrize("name", KINDS)
def test_to_the_bit_against_torchs_fused_optimizers(name: str) -> None:
    kind, lone, hyper = KINDS[name]
    together, alone = run_together(kind, hyper, 20), run_alone(lone, hyper, 20, fused=True)
    for key in SHAPES:
        assert torch.equal(together[key], alone[key]), key


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"amsgrad": True, "maximize": True}])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_options_of_adam(name: str, options: dict[str, bool], fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]
    check(run_together(kind, hyper, 20, fused=fused, **options), run_alone(lone, hyper, 20, **options))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", [{"nesterov": True}, {"maximize": True}])
def test_options_of_sgd(options: dict[str, bool], fused: bool | None) -> None:
    hyper = {"lr": SGD["lr"], "momentum": [0.9, 0.1, 0.5, 0.99, 0.3], "weight_decay": 0.01}
    check(
        run_together(optim.SGD, hyper, 20, fused=fused, **options),
        run_alone(torch.optim.SGD, hyper, 20, **options),
    )


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("members", [1, 2, 8])
def test_numbers_of_members(members: int, fused: bool | None) -> None:
    hyper = {"lr": [0.01 * (i + 1) for i in range(members)], "weight_decay": [0.1 * (i % 2) for i in range(members)]}
    check(
        run_together(optim.AdamW, hyper, 10, members=members, fused=fused),
        run_alone(torch.optim.AdamW, hyper, 10, members=members),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_errors_in_low_precision_are_no_larger_than_twice_the_loops(
    name: str, fused: bool | None, dtype: torch.dtype
) -> None:
    kind, lone, _ = KINDS[name]
    hyper = {**ONE[name], "lr": [0.01, 0.02, 0.03, 0.04, 0.05]}
    together, alone = run_together(kind, hyper, 5, dtype=dtype, fused=fused), run_alone(lone, hyper, 5, dtype=dtype)
    exact = run_alone(lone, hyper, 5, dtype=torch.float64)
    for key in SHAPES:
        error, loops = ((ends[key].double() - exact[key]).abs().max() for ends in (together, alone))
        assert error <= 2 * loops + torch.finfo(dtype).eps, key


# -- isolation


def spoil(step: int, member: int, params: dict[str, torch.Tensor]) -> None:
    """Member 1 gets a NaN, member 3 an infinity, at step 4."""
    value = {1: float("nan"), 3: float("inf")}.get(member)
    if step == 4 and value is not None:
        grad = params["w1"].grad
        (grad if grad.ndim == 2 else grad[member]).fill_(value)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_a_member_that_is_not_finite_stays_alone(name: str, max_norm: float | None, fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]
    hyper = {**hyper, "lr": 0.02}
    together = run_together(kind, hyper, 10, spoil=spoil, max_norm=max_norm, fused=fused)
    untouched = run_together(kind, hyper, 10, max_norm=max_norm, fused=fused)
    for key in SHAPES:
        assert torch.equal(together[key][[0, 2, 4]], untouched[key][[0, 2, 4]])  # not a bit of another member
    check(together, run_alone(lone, hyper, 10, spoil=spoil, max_norm=max_norm))
    assert together["w1"][1].isnan().all() and together["w1"][3].isnan().any()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_infinite_parameters_that_do_not_decay_stay_infinite(name: str, fused: bool | None) -> None:
    kind, lone, _ = KINDS[name]
    mask = torch.tensor([0.0, -float("inf")], dtype=torch.float64)
    own, stacked = mask.clone().requires_grad_(), mask.repeat(2, 1).requires_grad_()
    optimizers = [lone([own], lr=0.1, weight_decay=0.0), kind([stacked], lr=[0.1, 0.1], weight_decay=0.0, fused=fused)]
    for _ in range(2):
        own.grad, stacked.grad = torch.zeros_like(own), torch.zeros_like(stacked)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(stacked[1], own) and own[1] == -float("inf")


# -- gradients that are not there, or not as expected


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_parameter_without_gradient_stays_and_does_not_count_the_step(name: str, fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]

    def drop(step: int, member: int, params: dict[str, torch.Tensor]) -> None:
        if step in (0, 3):
            params["b1"].grad = None

    check(run_together(kind, hyper, 8, spoil=drop, fused=fused), run_alone(lone, hyper, 8, spoil=drop))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_complex_parameters(name: str, fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]
    start = torch.randn(MEMBERS, 3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    stacked = start.clone().requires_grad_()
    alone = [row.clone().requires_grad_() for row in start]
    optimizer = kind([stacked], **hyper, fused=fused)
    loops = [lone([p], **{k: pick(v, i) for k, v in hyper.items()}) for i, p in enumerate(alone)]
    for step in range(10):
        grad = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(step))
        stacked.grad = grad.clone()
        for parameter, row in zip(alone, grad, strict=True):
            parameter.grad = row.clone()
        for each in (optimizer, *loops):
            each.step()
    assert_equal(stacked.detach(), torch.stack([p.detach() for p in alone]))


def pick(value: Any, member: int) -> Any:
    if isinstance(value, tuple):
        return tuple(pick(item, member) for item in value)
    return value[member] if isinstance(value, list) else value


@pytest.mark.parametrize("where", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("name", KINDS)
def test_strides_that_differ_between_parameter_and_gradient(name: str, where: str) -> None:
    """torch's fused CPU kernels walk through memory, and pair up wrong elements here."""
    kind, lone, _ = KINDS[name]
    start = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = start.transpose(1, 2).contiguous().transpose(1, 2)
    turned_grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    stacked = (start if where == "gradient" else turned).clone().requires_grad_()
    alone = start.clone().requires_grad_()
    optimizers = kind([stacked], **ONE[name]), lone([alone], **ONE[name])
    for _ in range(3):
        stacked.grad, alone.grad = grad if where == "parameter" else turned_grad, grad
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(stacked.detach(), alone.detach())


# -- values that change


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_values_set_later(name: str, fused: bool | None) -> None:
    """A number, a list, a tensor, and writing into what the group holds; each from its step on."""
    kind, lone, hyper = KINDS[name]
    settings = {2: 0.5, 4: [0.01, 0.2, 0.03, 0.4, 0.05], 6: torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2])}
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper, fused=fused)
    alone = [leaves({n: v[i] for n, v in starts().items()}) for i in range(MEMBERS)]
    loops = [lone(p.values(), **{k: pick(v, i) for k, v in hyper.items()}) for i, p in enumerate(alone)]
    for step in range(12):
        if step in settings:
            optimizer.param_groups[0]["lr"] = settings[step]
            for i, loop in enumerate(loops):
                value = settings[step]
                loop.param_groups[0]["lr"] = value if isinstance(value, float) else float(value[i])
        if step == 9:
            optimizer.param_groups[0]["lr"][1:3] *= 0.25
            for loop in loops[1:3]:
                loop.param_groups[0]["lr"] *= 0.25
        optimizer.zero_grad()
        backward_together(params, step)
        optimizer.step()
        for i, loop in enumerate(loops):
            loop.zero_grad()
            loss(alone[i], step).backward()
            loop.step()
    for key in SHAPES:
        assert_equal(params[key].detach(), torch.stack([own[key].detach() for own in alone]), key)


@pytest.mark.parametrize("fused", [None, False])
def test_momentum_taken_up_laid_down_and_taken_up_again(fused: bool | None) -> None:
    """torch starts a buffer with the undampened gradient at the first step with momentum, and keeps it without."""
    momenta = {0: [0.0, 0.9, 0.5], 3: [0.7, 0.0, 0.5], 6: [0.7, 0.8, 0.0], 8: [0.0, 0.0, 0.9], 9: [0.3, 0.4, 0.5]}
    generator = torch.Generator().manual_seed(0)
    stacked = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    alone = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizer = optim.SGD([stacked], lr=0.1, momentum=momenta[0], dampening=[0.3, 0.5, 0.7], fused=fused)
    loops = [
        torch.optim.SGD([p], lr=0.1, momentum=m, dampening=d)
        for p, m, d in zip(alone, momenta[0], [0.3, 0.5, 0.7], strict=True)
    ]
    for step in range(12):
        if step in momenta:
            optimizer.param_groups[0]["momentum"] = momenta[step]
            for loop, momentum in zip(loops, momenta[step], strict=True):
                loop.param_groups[0]["momentum"] = momentum
        stacked.grad = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        for parameter, row in zip(alone, stacked.grad, strict=True):
            parameter.grad = row.clone()
        for each in (optimizer, *loops):
            each.step()
    assert_equal(stacked.detach(), torch.stack([p.detach() for p in alone]))


def test_groups_with_values_of_their_own() -> None:
    params = leaves(starts())
    weights, others = [params["w1"], params["w2"]], [params["b1"], params["scale"]]
    decays = [0.0, 0.1, 0.2, 0.3, 0.4]
    optimizer = optim.AdamW(
        [{"params": weights, "weight_decay": decays}, {"params": others, "lr": 0.1}], lr=ADAM["lr"], weight_decay=0.0
    )
    alone = [leaves({n: v[i] for n, v in starts().items()}) for i in range(MEMBERS)]
    loops = [
        torch.optim.AdamW(
            [
                {"params": [own["w1"], own["w2"]], "weight_decay": decays[i]},
                {"params": [own["b1"], own["scale"]], "lr": 0.1},
            ],
            lr=ADAM["lr"][i],
            weight_decay=0.0,
        )
        for i, own in enumerate(alone)
    ]
    for step in range(10):
        optimizer.zero_grad()
        backward_together(params, step)
        optimizer.step()
        for own, loop in zip(alone, loops, strict=True):
            loop.zero_grad()
            loss(own, step).backward()
            loop.step()
    for key in SHAPES:
        assert_equal(params[key].detach(), torch.stack([own[key].detach() for own in alone]), key)


# -- storage that moves, counts that change


@pytest.mark.parametrize("name", KINDS)
def test_parameters_whose_data_is_exchanged_between_steps(name: str) -> None:
    """Views of an earlier storage must not be what is updated."""
    kind, lone, hyper = KINDS[name]
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper)
    for step in range(6):
        optimizer.zero_grad()
        backward_together(params, step)
        optimizer.step()
        for value in params.values():
            value.data = value.data.clone()
    check({k: v.detach() for k, v in params.items()}, run_alone(lone, hyper, 6))


def test_a_step_is_seen_by_autograd_as_a_write() -> None:
    """As with torch's optimizers, backward through a graph older than the step is an error, not a wrong number."""
    for lr in (0.1, [0.1, 0.2]):
        weight = torch.ones(2, 3, requires_grad=True)
        optimizer = optim.SGD([weight], lr=lr)
        out = (weight * weight).sum()
        weight.grad = torch.ones(2, 3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("fused", [None, False])
def test_members_that_have_taken_different_numbers_of_steps(fused: bool | None) -> None:
    """As after population based training: member 1 starts over, by its count and averages."""
    stacked = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    alone = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizer = optim.Adam([stacked], lr=0.1, fused=fused)
    loops = [torch.optim.Adam([p], lr=0.1) for p in alone]
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        if step == 4:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[stacked][name][1] = 0
            loops[1] = torch.optim.Adam([alone[1]], lr=0.1)
        if step == 7:
            optimizer.param_groups[0]["lr"] = [0.1, 0.2, 0.1]
            loops[1].param_groups[0]["lr"] = 0.2
        stacked.grad = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        for parameter, row in zip(alone, stacked.grad, strict=True):
            parameter.grad = row.clone()
        for each in (optimizer, *loops):
            each.step()
    assert optimizer.state[stacked]["step"].tolist() == [9, 5, 9]
    assert_equal(stacked.detach(), torch.stack([p.detach() for p in alone]))


@pytest.mark.parametrize("name", KINDS)
def test_steps_in_inference_mode(name: str) -> None:
    kind, lone, hyper = KINDS[name]
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper)
    for step in range(4):
        optimizer.zero_grad()
        backward_together(params, step)
        with torch.inference_mode(step % 2 == 0):
            optimizer.param_groups[0]["lr"] = hyper["lr"]
            optimizer.param_groups[0]["weight_decay"] = torch.tensor(hyper["weight_decay"], dtype=torch.float64)
            optimizer.step()
    check({k: v.detach() for k, v in params.items()}, run_alone(lone, hyper, 4))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_parameters_without_elements(name: str, fused: bool | None) -> None:
    kind, _, hyper = KINDS[name]
    empty, full = torch.zeros(5, 0, 3, requires_grad=True), torch.zeros(5, 2, requires_grad=True)
    optimizer = kind([empty, full], **hyper, fused=fused)
    empty.grad, full.grad = torch.zeros_like(empty), torch.ones_like(full)
    optimizer.step()
    assert empty.shape == (5, 0, 3) and full.detach()[[0, 1, 2, 4]].all()


# -- shared parameters


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_shared_parameter_is_updated_as_one(name: str, fused: bool | None) -> None:
    kind, lone, _ = KINDS[name]
    shared = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    shared._memberwise_shared = True
    scalar = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    scalar._memberwise_shared = True
    own = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (shared, scalar, own)]
    optimizers = kind([shared, scalar, own], **ONE[name], fused=fused), lone(twins, **ONE[name])
    for step in range(5):
        for parameter, twin in zip((shared, scalar, own), twins, strict=True):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, twin in zip((shared, scalar, own), twins, strict=True):
        assert_equal(parameter.detach(), twin.detach())
    if name != "SGD":
        assert optimizers[0].state[shared]["step"].shape == ()
        assert optimizers[0].state[own]["step"].shape == (2,)
