"""A stack against a plain loop over the same models: outputs, gradients, buffers, random streams, over some steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import tolerance
from survey.third_party.case import Case, Inputs

MEMBERS = 3


@dataclass
class Run:
    """What one run left behind: tensors by name, M first (of shared inputs' gradients: their sum), and other values."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def members(case: Case, mode: str) -> list[nn.Module]:
    """Models with weights of their own, in float64, none of them near the zeros of a fresh initialisation."""
    models = []
    for i in range(MEMBERS):
        _seed(i)
        model = case.make().to(case.dtype).train(mode == "train")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        models.append(model)
    return models


def inputs(case: Case, shared: bool, step: int) -> list[Inputs]:
    """Each member's inputs of one step; `shared`: the same for all."""
    seeds = [0 if shared else i for i in range(MEMBERS)]
    rows = [case.inputs(torch.Generator().manual_seed(1000 * step + seed)) for seed in seeds]
    return [{name: t.to(case.dtype) if t.is_floating_point() else t for name, t in row.items()} for row in rows]


def in_a_loop(case: Case, models: list[nn.Module], shared: bool) -> Run:
    """Each model alone, as a script would run it."""
    runs: list[Run] = []
    for i, model in enumerate(models):
        _seed(100 + i)
        run = Run()
        for step in range(case.steps):
            own = {name: _leaf(case, name, tensor) for name, tensor in inputs(case, shared, step)[i].items()}
            _backward(case.run(model, **own), run, step, lead=1)
            run.tensors |= {f"step {step} grad of {name}": _grad(own[name]) for name in own if own[name].requires_grad}
        run.tensors["stream"] = torch.get_rng_state()
        _note_state(model, run)
        runs.append(run)
    names = runs[0].tensors
    found = Run({name: _stacked([run.tensors[name] for run in runs]) for name in names})
    for name, tensor in found.tensors.items():
        if shared and " grad of " in name and not tensor.is_nested:
            found.tensors[name] = tensor.sum(0)
    found.values = {name: [run.values[name] for run in runs] for name in runs[0].values}
    return found


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """The members' tensors as one; nested where they are of different shapes, which no stack can return."""
    if len({row.shape for row in rows}) > 1:
        return torch.nested.nested_tensor(rows)
    return torch.stack(rows)


def stacked(case: Case, models: list[nn.Module], shared: bool) -> Run:
    """All models as one stack."""
    stack = memberwise.stack(models)
    stack.generators = [torch.Generator().manual_seed(100 + i) for i in range(len(stack))]
    _seed(100)
    run = Run()
    for step in range(case.steps):
        own = _joined(case, inputs(case, shared, step), shared)
        _backward(mapped(case, shared)(stack, own), run, step, lead=len(stack))
        run.tensors |= {f"step {step} grad of {name}": _grad(own[name]) for name in own if own[name].requires_grad}
    run.tensors["stream"] = torch.stack([generator.get_state() for generator in stack.generators])
    _note_state(stack, run)
    return run


def mapped(case: Case, shared: bool) -> Any:
    """The case's function for all members: takes the stack, and the inputs as one dict."""
    return memberwise.vmap(lambda model, own: case.run(model, **own), (0, None if shared else 0))


def explained(case: Case, models: list[nn.Module], shared: bool) -> memberwise.report.Explanation:
    """How each operation ran, once what is found out in a first call is known."""
    stack = memberwise.stack(models)
    stack.generators = [torch.Generator().manual_seed(100 + i) for i in range(len(stack))]
    for step in range(2):
        own = _joined(case, inputs(case, shared, step), shared)
        found = memberwise.explain(mapped(case, shared), stack, own)
    return found


def differences(case: Case, ours: Run, theirs: Run) -> list[str]:
    """What of a stack's run is another than the loop's, in a sentence each."""
    found = [f"{name} is missing" for name in theirs.tensors.keys() - ours.tensors.keys()]
    found += [f"{name} is not there alone" for name in ours.tensors.keys() - theirs.tensors.keys()]
    for name in theirs.tensors.keys() & ours.tensors.keys():
        found += _difference(name, ours.tensors[name], theirs.tensors[name], case.exact)
    for name, column in theirs.values.items():
        mine = ours.values.get(name)
        if mine != column and any(mine != value for value in column):
            found.append(f"{name}: {mine!r}, alone {column!r}")
    return sorted(found)


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.dtype) -> list[str]:
    if theirs.is_nested:
        return [f"{name} is of another shape in each member alone"]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [f"{name}: {ours.dtype} {tuple(ours.shape)}, alone {theirs.dtype} {tuple(theirs.shape)}"]
    rtol, atol = tolerance(exact if theirs.dtype is torch.float64 else theirs.dtype)
    if torch.allclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True):
        return []
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    return [f"{name} is off by {(ours.to(wide) - theirs.to(wide)).abs().max():.1e}"]


def tensors_of(value: Any, path: str = "output", seen: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The tensors and plain values in what a model returns, by path; objects such as caches are looked into."""
    if isinstance(value, torch.Tensor | str | int | float | bool) or value is None:
        return {path: value}
    if id(value) in seen or isinstance(value, type | nn.Module) or callable(value):
        return {}
    seen |= {id(value)}
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        entries = vars(value).items()
    found: dict[str, Any] = {}
    for key, entry in entries:
        found |= tensors_of(entry, f"{path}.{key}", seen)
    return found


def _backward(out: Any, run: Run, step: int, lead: int) -> None:
    """Note the outputs, and backward from all of them, each with numbers of its own."""
    roots, cotangents = [], []
    for path, leaf in tensors_of(out).items():
        if not isinstance(leaf, torch.Tensor):
            run.values[f"step {step} {path}"] = leaf
            continue
        run.tensors[f"step {step} {path}"] = leaf.detach().clone()
        if leaf.requires_grad:
            roots.append(leaf)
            cotangents.append(_numbers(leaf, lead))
    if roots:
        torch.autograd.backward(roots, cotangents)


def _numbers(root: torch.Tensor, lead: int) -> torch.Tensor:
    own = torch.cos(torch.arange(1, root.numel() // lead + 1, dtype=torch.float64)).to(root.dtype)
    return own.repeat(lead).view(root.shape)


def _note_state(module: nn.Module, run: Run) -> None:
    for name, parameter in module.named_parameters():
        run.tensors[f"grad {name}"] = _grad(parameter)
    for name, buffer in module.named_buffers():
        run.tensors[f"buffer {name}"] = buffer.detach().clone()


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().to_dense().clone()


def _leaf(case: Case, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_(tensor.is_floating_point() and name not in case.untracked)


def _joined(case: Case, rows: list[Inputs], shared: bool) -> Inputs:
    first = rows[0]
    return {
        name: _leaf(case, name, first[name] if shared else torch.stack([row[name] for row in rows])) for name in first
    }


def _seed(seed: int) -> None:
    """All global streams; numpy's and Python's the same for all members, since their draws are no member's own."""
    torch.manual_seed(seed)
    numpy.random.seed(0)
    random.seed(0)


def copies(models: list[nn.Module]) -> list[nn.Module]:
    """The same models again."""
    return copy.deepcopy(models)
