"""A step recorded once and replayed: equal to the eager step, whatever values are set in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode  # the documented base of modes has no public home yet

from memberwise import optim
from memberwise.errors import EngineError
from memberwise.testing.tolerance import assert_equal
from tests.parity.lone_steps import ADAM, MEMBERS, SGD, SHAPES, backward_together, leaves, starts

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, SGD),
    "plain SGD": (optim.SGD, {"lr": SGD["lr"]}),
    "nesterov": (optim.SGD, {"lr": 0.03, "momentum": [0.9, 0.8, 0.7, 0.6, 0.5], "nesterov": True, "maximize": True}),
    "Adam": (optim.Adam, ADAM),
    "AdamW": (optim.AdamW, ADAM),
    "AMSGrad": (optim.AdamW, {**ADAM, "amsgrad": True, "maximize": True}),
    "one set": (optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
}


def record(params: dict[str, torch.Tensor], optimizer: Any, max_norm: Any = None) -> tuple[Callable[[], None], Any]:
    """A replay of clipping and step, and its graph. Recording runs the step, which is undone."""
    state = optimizer.capture_state()
    inputs = [*state, *params.values(), *(p.grad for p in params.values())]
    before = [tensor.detach().clone() for tensor in inputs]

    def step(*_: torch.Tensor) -> None:
        if max_norm is not None:
            optim.clip_grad_norm_(list(params.values()), max_norm)
        optimizer.step()

    graph = make_fx(step)(*inputs)
    with torch.no_grad():
        for tensor, value in zip(inputs, before, strict=True):
            tensor.copy_(value)

    def replay() -> None:
        optimizer.sync_hyperparameters()
        with torch.no_grad():
            graph(*state, *params.values(), *(p.grad for p in params.values()))

    return replay, graph


def twins(kind: Any, hyper: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any, dict[str, torch.Tensor], Any]:
    ours, theirs = leaves(starts()), leaves(starts())
    return ours, kind(list(ours.values()), **hyper), theirs, kind(list(theirs.values()), **hyper)


def change(step: int, name: str) -> dict[str, Any]:
    """What a schedule sets before a step: numbers for M values, M values for numbers, and anew."""
    settings: dict[int, dict[str, Any]] = {
        2: {"lr": 0.07},
        4: {"lr": [0.05, 0.04, 0.03, 0.02, 0.01], "weight_decay": 0.2},
        6: {"lr": torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05]), "weight_decay": [0.1, 0.2, 0.3, 0.4, 0.0]},
    }
    if "Adam" in name or "AMS" in name:
        settings[7] = {"betas": (0.7, [0.9, 0.8, 0.9, 0.8, 0.9]), "eps": 1e-6}
    if name == "SGD":
        settings[7] = {"momentum": [0.0, 0.9, 0.1, 0.2, 0.0], "dampening": 0.5}
    return settings.get(step, {})


@pytest.mark.parametrize("name", KINDS)
def test_a_recording_equals_the_eager_step_under_a_schedule(name: str) -> None:
    kind, hyper = KINDS[name]
    params, optimizer, others, eager = twins(kind, hyper)
    replay = None
    for step in range(10):
        for group in (optimizer.param_groups[0], eager.param_groups[0]):
            group.update(change(step, name))
        for side in (params, others):
            for value in side.values():
                value.grad = None
            backward_together(side, step)
        if replay is None:
            signature = optimizer.capture_signature()
            replay, _ = record(params, optimizer, max_norm=0.5)
        replay()
        optim.clip_grad_norm_(list(others.values()), 0.5)
        eager.step()
        for key in SHAPES:
            assert_equal(params[key].detach(), others[key].detach(), f"{key} after step {step}")
        assert optimizer.capture_signature() == signature


@pytest.mark.parametrize("name", KINDS)
def test_a_recording_reads_nothing_but_its_inputs_and_runs_pointwise_operators(name: str) -> None:
    kind, hyper = KINDS[name]
    params, optimizer, _, _ = twins(kind, hyper)
    backward_together(params, 0)
    _, graph = record(params, optimizer)
    nodes = list(graph.graph.nodes)
    assert not [node for node in nodes if node.op == "get_attr"]
    called = {str(node.target) for node in nodes if node.op == "call_function"}
    called = {name for name in called if not name.startswith("profiler.")}  # torch's own marks, no kernels
    arithmetic = "add sub mul div exp log sqrt lerp where neg rsub maximum ne eq"
    pointwise = {name + place for name in arithmetic.split() for place in ("", "_")}
    moving = {"copy_", "_to_copy", "view", "reshape", "unsqueeze", "detach"}
    assert {name.split(".")[1] for name in called} <= pointwise | moving


@pytest.mark.parametrize("name", KINDS)
def test_making_the_state_changes_no_result(name: str) -> None:
    kind, hyper = KINDS[name]
    params, optimizer, others, eager = twins(kind, hyper)
    first = optimizer.capture_state()
    for step in range(5):
        for side, each in ((params, optimizer), (others, eager)):
            each.zero_grad()
            backward_together(side, step)
            each.step()
        optimizer.capture_state()
    for key in SHAPES:
        assert torch.equal(params[key], others[key])
    assert [id(tensor) for tensor in optimizer.capture_state()] == [id(tensor) for tensor in first]


@pytest.mark.parametrize("name", KINDS)
def test_eager_and_recorded_steps_may_take_turns(name: str) -> None:
    """A replay writes counts behind the optimizer's back: as a compiled graph, without telling the version."""
    kind, hyper = KINDS[name]
    params, optimizer, others, eager = twins(kind, hyper)
    backward_together(params, 0)
    replay, _ = record(params, optimizer)
    for step in range(8):
        for side in (params, others):
            for value in side.values():
                value.grad = None
            backward_together(side, step)
        if step % 4 < 2:
            versions = [tensor._version for tensor in optimizer.capture_state()]
            replay()
            for tensor, version in zip(optimizer.capture_state(), versions, strict=True):
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))  # as compiled kernels leave it
        else:
            optimizer.step()
        eager.step()
    for key in SHAPES:
        assert_equal(params[key].detach(), others[key].detach(), key)


def test_counts_written_behind_the_optimizers_back_are_read_again() -> None:
    """A captured step may count members apart; `.data`, as compiled kernels, leaves the version as it is."""
    stacked = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    alone = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizer, loops = optim.Adam([stacked], lr=0.1), [torch.optim.Adam([p], lr=0.1) for p in alone]
    for step in range(4):
        if step == 2:
            optimizer.state[stacked]["step"].data[1] = 7
            loops[1].state[alone[1]]["step"].fill_(7)
            optimizer.sync_hyperparameters()
        stacked.grad = torch.full((3, 4), 1.0 + step, dtype=torch.float64)
        for parameter in alone:
            parameter.grad = stacked.grad[0].clone()
        for each in (optimizer, *loops):
            each.step()
    assert_equal(stacked.detach(), torch.stack([p.detach() for p in alone]))


def test_hyperparameter_tensors_follow_the_groups() -> None:
    optimizer = optim.AdamW([torch.zeros(3, 2, requires_grad=True)], lr=0.1, betas=([0.5, 0.6, 0.7], 0.9))
    tensors = optimizer.capture_state()
    assert [tensor.shape for tensor in tensors[:5]] == [(3,)] * 5
    assert [tensor.tolist() for tensor in tensors[:3]] == [[0.1] * 3, [0.5, 0.6, 0.7], [0.9] * 3]
    group = optimizer.param_groups[0]
    group["lr"] = [1.0, 2.0, 3.0]
    group["betas"][0][1] = 0.0
    optimizer.sync_hyperparameters()
    assert [tensor.tolist() for tensor in tensors[:2]] == [[1.0, 2.0, 3.0], [0.5, 0.0, 0.7]]
    group["lr"].mul_(2)
    optimizer.sync_hyperparameters()
    assert tensors[0].tolist() == [2.0, 4.0, 6.0]
    assert all(now is then for now, then in zip(optimizer.capture_state(), tensors, strict=True))


def test_what_needs_a_new_recording_shows_in_the_signature() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1)
    seen = [optimizer.capture_signature()]
    for change in (
        lambda: optimizer.param_groups[0].update(momentum=0.9),
        lambda: optimizer.param_groups[0].update(nesterov=True),
        lambda: optimizer.param_groups[0].update(maximize=True),
        lambda: weight.requires_grad_(False),
        lambda: optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]}),
    ):
        change()
        assert optimizer.capture_signature() not in seen
        seen.append(optimizer.capture_signature())
    adam = optim.Adam([weight])
    before = adam.capture_signature()
    adam.param_groups[0].update(lr=[1.0, 2.0, 3.0], eps=0.1, weight_decay=0.5, betas=(0.1, 0.2))
    assert adam.capture_signature() == before
    adam.param_groups[0]["amsgrad"] = True
    assert adam.capture_signature() != before


@pytest.mark.parametrize("name", ["SGD", "AdamW", "plain SGD"])
def test_recording_before_the_state_is_made_is_refused(name: str) -> None:
    kind, hyper = KINDS[name]
    params = leaves(starts())
    optimizer = kind(list(params.values()), **hyper)
    backward_together(params, 0)
    with pytest.raises(EngineError, match=r"Call capture_state\(\) before tracing.*\[MW406\]"):
        make_fx(lambda *_: optimizer.step())(*params.values())


def test_shared_parameters_are_recorded_too() -> None:
    def make() -> tuple[list[torch.Tensor], Any]:
        shared, own = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3, 2))
        shared._memberwise_shared = True
        shared.grad, own.grad = torch.linspace(-1, 1, 4), torch.ones(3, 2)
        return [shared, own], optim.AdamW([shared, own], lr=0.1)

    (params, optimizer), (others, eager) = make(), make()
    replay, _ = record(dict(enumerate(params)), optimizer)  # type: ignore[arg-type] # tensors under any keys
    for _ in range(3):
        replay()
        eager.step()
    for parameter, other in zip(params, others, strict=True):
        assert_equal(parameter.detach(), other.detach())


class _Watcher(TorchDispatchMode):
    def __init__(self, records: bool) -> None:
        super().__init__()
        self.records = records
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_mode_that_watches_sees_plain_operators(name: str, records: bool) -> None:
    kind, hyper = KINDS[name]
    params, optimizer, others, eager = twins(kind, hyper)
    for step in range(3):
        for side in (params, others):
            for value in side.values():
                value.grad = None
            backward_together(side, step)
        optimizer.capture_state()
        optimizer.sync_hyperparameters()
        with _Watcher(records) as mode:
            optimizer.step()
        eager.step()
        assert not [op for op in mode.seen if "fused" in op or ("_local_scalar_dense" in op and records)]
    for key in SHAPES:
        assert_equal(params[key].detach(), others[key].detach(), key)


def test_a_step_inside_torch_compile_equals_the_eager_one() -> None:
    params, optimizer, others, eager = twins(*KINDS["AdamW"])

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for i in range(4):
        optimizer.param_groups[0]["lr"] = eager.param_groups[0]["lr"] = [0.01 * (i + 1)] * MEMBERS
        for side, each in ((params, optimizer), (others, eager)):
            each.zero_grad()
            backward_together(side, i)
        step()
        eager.step()
    for key in SHAPES:
        assert_equal(params[key].detach(), others[key].detach(), key)
