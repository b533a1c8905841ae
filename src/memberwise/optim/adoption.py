"""What an optimizer takes in, checked as a whole before any of it is kept: groups, and saved state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from memberwise.errors import ArgumentError, fail
from memberwise.optim.group import Group, name_of

#: The attribute, on a parameter, that says it has no member axis: one copy serves all members.
SHARED = "_memberwise_shared"


def is_shared(parameter: torch.Tensor) -> bool:
    """Whether `parameter` has no member axis."""
    return bool(getattr(parameter, SHARED, False))


def count_members(named: Iterable[tuple[str, torch.Tensor]], known: int | None = None) -> int | None:
    """M of named parameters, and of earlier ones if it is `known`; None if every parameter is shared.

    Raises ArgumentError (MW404) listing the parameters that have another number of members, or no member axis.
    """
    stacked = [(name, parameter) for name, parameter in named if not is_shared(parameter)]
    members = next((p.shape[0] for _, p in stacked if p.ndim), None) if known is None else known
    problems = [
        f"{name} has {parameter.shape[0] if parameter.ndim else 'no member axis'}"
        for name, parameter in stacked
        if not parameter.ndim or parameter.shape[0] != members or not members
    ]
    if problems:
        what = f"expected {members or 'at least one'} members in each parameter, found: {'; '.join(problems[:10])}"
        fail(ArgumentError, "MW404", what, do=f"Set `{SHARED} = True` on parameters that all members share")
    return members


def new_count(parameter: torch.Tensor, taken: float = 0.0) -> torch.Tensor:
    """The steps taken, one count a member (M,), or () for a shared parameter; float32, as torch's."""
    shape = () if is_shared(parameter) else parameter.shape[:1]
    return torch.full(shape, taken, dtype=torch.float32, device=parameter.device)


def fit_state(state: Mapping[Any, Any], groups: list[Group]) -> dict[Any, Any]:
    """Loaded state with one step count a member, where torch keeps one a parameter, or (SGD) none.

    Raises ArgumentError (MW408) listing the tensors that do not have their parameter's shape.
    """
    fitted, problems = dict(state), []
    for i, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            kept = {name: value for name, value in state.get(parameter, {}).items() if value is not None}
            if parameter in state:
                fitted[parameter] = kept
            if kept:
                kept["step"] = _fit_count(kept.get("step", 1.0), parameter)
                where = f"group {i}: {name_of(group, position)}"
                problems += [f"{where}: {text}" for text in _misfits(kept, parameter)]
    if problems:
        fail(ArgumentError, "MW408", "; ".join(problems[:10]), do="Load into an optimizer of as many members")
    return fitted


def _fit_count(count: Any, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(count, torch.Tensor) and count.ndim:
        return count.to(parameter.device, torch.float32)
    return new_count(parameter, float(count))


def _misfits(kept: Mapping[str, Any], parameter: torch.Tensor) -> Iterator[str]:
    for name, value in kept.items():
        expected = new_count(parameter).shape if name == "step" else parameter.shape
        if isinstance(value, torch.Tensor) and value.shape != expected:
            yield f"{name}: expected shape {tuple(expected)}, found {tuple(value.shape)}"
