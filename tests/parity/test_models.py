"""Every kind of model against its lone run: outputs, losses, gradients of parameters and inputs, buffers, draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import cotangent
from tests.parity.models import CASES, STEPS, Case, loss, targets

pytestmark = pytest.mark.usefixtures("composites")

Run = dict[str, Any]


def lone_runs(models: Sequence[nn.Module], x: torch.Tensor, labels: torch.Tensor, shared: bool, draw: bool) -> Run:
    """Each model alone, as a script would run it; `x` is shared, or holds one entry a member."""
    runs: list[dict[str, torch.Tensor]] = []
    size = len(models)
    with torch.random.fork_rng(devices=[]):
        for i, model in enumerate(models):
            own_x = x.detach().clone() if shared else x[i].detach().clone()
            own_x.requires_grad_(x.requires_grad)
            if draw:
                torch.manual_seed(100 + i)
            out = model(own_x)
            value = loss(out, labels if shared else labels[i])
            given = cotangent(out.new_empty(size, *out.shape), 0)[i]
            torch.autograd.backward([out, value], [given, torch.ones_like(value)])
            run = {"out": out.detach(), "loss": value.detach(), "stream": torch.get_rng_state()}
            for name, p in model.named_parameters():
                assert p.grad is not None
                run[f"grad {name}"] = p.grad
            for name, buffer in model.named_buffers():
                run[f"buffer {name}"] = buffer
            if own_x.requires_grad:
                assert own_x.grad is not None
                run["grad of x"] = own_x.grad
            runs.append(run)
    found = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
    if shared and "grad of x" in found:
        found["grad of x"] = found["grad of x"].sum(0)
    return found


def stacked_run(models: Sequence[nn.Module], x: torch.Tensor, labels: torch.Tensor, shared: bool, draw: bool) -> Run:
    """All models at once, through the functional road."""
    params, buffers = memberwise.stack_module_state(list(models))
    template = models[0]
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(models))] if draw else None
    x = x.detach().clone().requires_grad_(x.requires_grad)

    def one(p: Any, b: Any, own_x: torch.Tensor, own_labels: torch.Tensor) -> Any:
        out = memberwise.functional_call(template, (p, b), (own_x,))
        return out, loss(out, own_labels)

    dim = None if shared else 0
    out, value = memberwise.vmap(one, (0, 0, dim, dim), generators=generators)(params, buffers, x, labels)
    torch.autograd.backward([out, value], [cotangent(out, 0), torch.ones_like(value)])
    run: Run = {"out": out.detach(), "loss": value.detach()}
    run |= {f"grad {name}": p.grad for name, p in params.items()}
    run |= {f"buffer {name}": buffer for name, buffer in buffers.items()}
    if generators is not None:
        run["stream"] = torch.stack([generator.get_state() for generator in generators])
    if x.requires_grad:
        run["grad of x"] = x.grad
    return run


def module_run(models: Sequence[nn.Module], x: torch.Tensor, labels: torch.Tensor, shared: bool, draw: bool) -> Run:
    """All models at once, as one module and a loss written for one model."""
    stack = memberwise.stack(models)
    if draw:
        stack.generators = [torch.Generator().manual_seed(100 + i) for i in range(len(models))]
    x = x.detach().clone().requires_grad_(x.requires_grad)

    def one(model: nn.Module, own_x: torch.Tensor, own_labels: torch.Tensor) -> Any:
        out = model(own_x)
        return out, loss(out, own_labels)

    dim = None if shared else 0
    out, value = memberwise.vmap(one, (0, dim, dim))(stack, x, labels)
    torch.autograd.backward([out, value], [cotangent(out, 0), torch.ones_like(value)])
    run: Run = {"out": out.detach(), "loss": value.detach()}
    run |= {f"grad {name}": p.grad for name, p in stack.named_parameters()}
    run |= {f"buffer {name}": buffer for name, buffer in stack.named_buffers()}
    if stack.generators is not None:
        run["stream"] = torch.stack([generator.get_state() for generator in stack.generators])
    if x.requires_grad:
        run["grad of x"] = x.grad
    again = memberwise.stack(models).eval()
    before = [buffer.clone() for buffer in again.buffers()]
    assert_equal(again(x if shared else memberwise.each(x)), lone_outputs(models, x, shared), "the stack itself")
    for buffer, old in zip(again.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    return run


def lone_outputs(models: Sequence[nn.Module], x: torch.Tensor, shared: bool) -> torch.Tensor:
    """Each model's output in eval mode."""
    copies = [copy.deepcopy(model).eval() for model in models]
    return torch.stack([model(x if shared else x[i]) for i, model in enumerate(copies)])


def compare(
    case: Case, size: int, batch: int, shared: bool, mode: str, dtype: torch.dtype, road: Any = stacked_run
) -> None:
    """One point of the grid. Modes: eval; train without draws (p = 0); train with dropout drawn a member."""
    models = case.members(size, dtype, p=0.3 if mode == "train" else 0.0)
    for model in models:
        model.train(mode != "eval")
    lead = (batch,) if shared else (size, batch)
    x = case.inputs(*lead, dtype=dtype)
    labels = targets(*lead, STEPS) if case is CASES["transformer"] else targets(*lead)
    loop = lone_runs(copy.deepcopy(models), x, labels, shared, mode == "train")
    ours = road(models, x, labels, shared, mode == "train")
    if mode != "train":
        del loop["stream"]
    assert ours.keys() == loop.keys()
    for name, expected in loop.items():
        assert_equal(ours[name], expected, name)
    for model, again in zip(models, case.members(size, dtype), strict=True):
        for (name, now), (_, before) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(now, before), f"the call changed the original model's {name}"
    assert batch == 0 or all(expected.ne(0).any() for name, expected in loop.items() if name.startswith("grad"))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize(
    ("size", "mode"), [(m, mode) for m in (1, 3, 8) for mode in ("eval", "train")] + [(3, "train without draws")]
)
@pytest.mark.parametrize("kind", CASES)
def test_float64(kind: str, size: int, mode: str, batch: int, shared: bool) -> None:
    compare(CASES[kind], size, batch, shared, mode, torch.float64)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", CASES)
def test_float32(kind: str, shared: bool, mode: str) -> None:
    compare(CASES[kind], 3, 4, shared, mode, torch.float32)


@pytest.mark.parametrize("mode", ["eval", "train", "train without draws"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", CASES)
def test_as_one_module(kind: str, shared: bool, mode: str) -> None:
    compare(CASES[kind], 3, 4, shared, mode, torch.float64, module_run)


@pytest.mark.parametrize("kind", CASES)
def test_five_training_steps(kind: str) -> None:
    """Parameters and buffers after some steps, so that an error that only shows in the next step is seen."""
    case, size = CASES[kind], 3
    models = case.members(size, torch.float64)
    params, buffers = memberwise.stack_module_state([model.train() for model in models])
    generators = [torch.Generator().manual_seed(i) for i in range(size)]
    labels = targets(4, STEPS) if case is CASES["transformer"] else targets(4)
    data = [case.inputs(4, dtype=torch.float64, seed=step).detach() for step in range(5)]

    def one(p: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
        return loss(memberwise.functional_call(models[0], (p, b), (x,)), labels)

    optimizer = torch.optim.SGD(params.values(), lr=0.01, momentum=0.9)
    for x in data:
        optimizer.zero_grad()
        memberwise.vmap(one, (0, 0, None), generators=generators)(params, buffers, x).sum().backward()
        optimizer.step()
    with torch.random.fork_rng(devices=[]):
        for i, model in enumerate(models):
            torch.manual_seed(i)
            lone = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            for x in data:
                lone.zero_grad()
                loss(model(x), labels).backward()
                lone.step()
            for name, expected in [*model.named_parameters(), *model.named_buffers()]:
                assert_equal({**params, **buffers}[name][i].detach(), expected.detach(), f"member {i}: {name}")
