"""With seeds, member i is the plain script after `torch.manual_seed(seeds[i])`: weights, masks, samples, buffers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import memberwise
from memberwise import optim
from memberwise.testing.tolerance import assert_equal
from tests.parity.scripts import cnn, lstm, mlp, sampler, transformer

both = pytest.mark.usefixtures("composites")

SEEDS = [3, 0, 11]

Parameters = Sequence[torch.Tensor]
OPTIMIZERS: dict[ModuleType, Callable[[Parameters], torch.optim.Optimizer]] = {
    mlp: lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.05),
    cnn: lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    transformer: lambda p: optim.AdamW(p, lr=0.01),
    lstm: lambda p: optim.Adam(p, lr=0.02),
    sampler: lambda p: optim.SGD(p, lr=0.1),
}
SCRIPTS = pytest.mark.parametrize("script", OPTIMIZERS, ids=lambda script: script.__name__.split(".")[-1])


@pytest.fixture(scope="module")
def lone() -> Callable[[ModuleType, int], Any]:
    """What a script leaves: the trained model's state, and where the global stream stands. Run once each."""
    found: dict[Any, Any] = {}

    def run(script: ModuleType, seed: int) -> Any:
        if (script, seed) not in found:
            with torch.random.fork_rng(devices=[]):
                found[script, seed] = script.train(seed).state_dict(), torch.get_rng_state()
        return found[script, seed]

    return run


@both
@SCRIPTS
def test_a_built_stack(script: ModuleType, lone: Callable[[ModuleType, int], Any]) -> None:
    """The design's own loop: `build(seeds=)`, a loss written for one model, our optimizers and clipping."""
    before = torch.get_rng_state()
    stack = memberwise.build(script.make_model, seeds=SEEDS)
    optimizer = OPTIMIZERS[script](list(stack.parameters()))
    x, y = script.data()
    for _ in range(script.STEPS):
        optimizer.zero_grad()
        memberwise.vmap(script.loss_fn, in_dims=(0, None, None))(stack, x, y).sum().backward()
        if script is transformer:
            optim.clip_grad_norm_(stack.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(before, torch.get_rng_state()), "a seeded stack moved the global generator"
    for i, seed in enumerate(SEEDS):
        state, stream = lone(script, seed)
        own = stack[i].state_dict()
        assert own.keys() == state.keys()
        for name, expected in state.items():
            assert_equal(own[name], expected, f"seed {seed}: {name}")
        assert torch.equal(stack.generators[i].get_state(), stream), f"seed {seed}: its stream stands elsewhere"


@both
@SCRIPTS
def test_generators_by_hand(script: ModuleType, lone: Callable[[ModuleType, int], Any]) -> None:
    """The functional road: live models, `stack_module_state`, `generators=` from where each model's making left off."""
    models, generators = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in SEEDS:
            torch.manual_seed(seed)
            models.append(script.make_model())
            generators.append(torch.Generator())
            generators[-1].set_state(torch.get_rng_state())
    params, buffers = memberwise.stack_module_state(models)
    optimizer = OPTIMIZERS[script](list(params.values()))
    x, y = script.data()

    def loss(p: Any, b: Any) -> torch.Tensor:
        def call(tokens: torch.Tensor) -> torch.Tensor:
            return memberwise.functional_call(models[0], (p, b), (tokens,))

        return script.loss_fn(call, x, y)

    for _ in range(script.STEPS):
        optimizer.zero_grad()
        memberwise.vmap(loss, generators=generators)(params, buffers).sum().backward()
        if script is transformer:
            optim.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
    for i, seed in enumerate(SEEDS):
        state, stream = lone(script, seed)
        for name, value in {**params, **buffers}.items():
            assert_equal(value[i].detach(), state[name], f"seed {seed}: {name}")
        assert torch.equal(generators[i].get_state(), stream)


@both
@SCRIPTS
def test_the_packing_changes_nothing(script: ModuleType) -> None:
    """A seed's run among others, in another order, alone, or in chunks: one and the same within rounding."""

    def trained(seeds: Sequence[int], chunk_size: int | None) -> dict[int, dict[str, torch.Tensor]]:
        stack = memberwise.build(script.make_model, seeds=seeds)
        optimizer = OPTIMIZERS[script](list(stack.parameters()))
        x, y = script.data()
        for _ in range(3):
            optimizer.zero_grad()
            losses = memberwise.vmap(script.loss_fn, (0, None, None), chunk_size=chunk_size)(stack, x, y)
            losses.sum().backward()
            optimizer.step()
        return {seed: model.state_dict() for seed, model in zip(seeds, stack.unstack(), strict=True)}

    runs = [trained([4, 9, 2], None), trained([2, 4], None), trained([9], None), trained([9, 2, 4], 2)]
    for run in runs[1:]:
        for seed, state in run.items():
            for name, value in state.items():
                assert_equal(value, runs[0][seed][name], f"seed {seed}: {name}")


def test_different_seeds_differ_and_equal_seeds_agree() -> None:
    stack = memberwise.build(mlp.make_model, seeds=[1, 2, 1])
    x, y = mlp.data()
    losses = memberwise.vmap(mlp.loss_fn, (0, None, None))(stack, x, y)
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])


@pytest.mark.long
def test_as_a_program_the_script_prints_the_members_weights() -> None:
    """The script is a plain program that knows nothing of us; its printed numbers are the member's."""
    path = Path(mlp.__file__)
    assert "memberwise" not in path.read_text() and "tests" not in path.read_text()
    run = subprocess.run([sys.executable, str(path), "5"], capture_output=True, text=True, timeout=100, check=True)
    stack = memberwise.build(mlp.make_model, seeds=[8, 5])
    optimizer = OPTIMIZERS[mlp](list(stack.parameters()))
    x, y = mlp.data()
    for _ in range(mlp.STEPS):
        optimizer.zero_grad()
        memberwise.vmap(mlp.loss_fn, (0, None, None))(stack, x, y).sum().backward()
        optimizer.step()
    own = stack[1].state_dict()
    lines = run.stdout.splitlines()
    assert len(lines) == len(own)
    for line in lines:
        name, _, numbers = line.partition(" ")
        assert_equal(own[name], torch.tensor(ast.literal_eval(numbers), dtype=torch.float64), name)
