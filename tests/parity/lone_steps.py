"""The loop that the optimizers are compared with: a small network and an optimizer a member, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SHAPES = {"w1": (5, 3), "b1": (5,), "scale": (), "w2": (2, 5)}

#: Five sets of hyperparameters, by optimizer; every one differs between the members.
ADAM = {
    "lr": [1e-3, 3e-2, 1e-2, 0.0, 0.1],
    "betas": ([0.9, 0.0, 0.5, 0.99, 0.8], [0.999, 0.9, 0.98, 0.95, 0.99]),
    "eps": [1e-8, 1e-4, 1e-10, 1e-8, 1e-2],
    "weight_decay": [0.0, 0.1, 0.01, 0.3, 0.05],
}
SGD = {
    "lr": [1e-3, 3e-2, 1e-2, 0.0, 0.1],
    "momentum": [0.9, 0.0, 0.5, 0.99, 0.0],
    "dampening": [0.0, 0.5, 0.3, 0.1, 0.9],
    "weight_decay": [0.0, 0.1, 0.01, 0.3, 0.05],
}
MEMBERS = 5


def starts(members: int = MEMBERS, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stacked initial values."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(members, *s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def leaves(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trainable copies."""
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


def loss(params: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    """What one member minimises at a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(params["w1"].dtype)
    hidden = torch.tanh(x @ params["w1"].T + params["b1"]) * params["scale"]
    return (hidden @ params["w2"].T - x[:, :2]).square().mean()


def own(hyper: dict[str, Any], member: int) -> dict[str, Any]:
    """One member's hyperparameters."""

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(pick(item) for item in value)
        return value[member] if isinstance(value, list) else value

    return {name: pick(value) for name, value in hyper.items()}


def run_alone(
    kind: type[torch.optim.Optimizer],
    hyper: dict[str, Any],
    steps: int,
    *,
    members: int = MEMBERS,
    max_norm: float | Sequence[float] | None = None,
    spoil: Callable[[int, int, dict[str, torch.Tensor]], None] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Parameters of each member after its own run, stacked."""
    ends = []
    for member in range(members):
        params = leaves({name: value[member] for name, value in starts(members, dtype).items()})
        optimizer = kind(params.values(), **own(hyper, member), **options)
        for step in range(steps):
            optimizer.zero_grad()
            loss(params, step).backward()
            if spoil is not None:
                spoil(step, member, params)
            if max_norm is not None:
                limit = max_norm if isinstance(max_norm, float) else max_norm[member]
                torch.nn.utils.clip_grad_norm_(params.values(), limit)
            optimizer.step()
        ends.append(params)
    return {name: torch.stack([params[name].detach() for params in ends]) for name in SHAPES}


def backward_together(params: dict[str, torch.Tensor], step: int) -> None:
    """Gradients of all members: the very operations of the lone runs, on views."""
    members = len(params["w1"])
    sum(loss({name: value[i] for name, value in params.items()}, step) for i in range(members)).backward()
