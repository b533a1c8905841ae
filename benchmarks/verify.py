"""Is a rival right? Its training run is compared with that of a plain loop before anything is timed.

Adam divides a gradient by its own size. An element whose gradient is smaller than its rounding moves by a
full learning rate in a direction that rounding alone chose, so in float32 no two orders of summation agree
in every element. Therefore two comparisons, both with the project's one table of tolerances:

- `exactly`, in float64: every element of every loss, parameter and buffer.
- `in_norm`, in float32, of the object that is then timed: every loss, every integer, and the root mean square
  of all a member's parameters and buffers together. One bias left untrained is far beyond it. On top of the table
  it allows twice what the loop itself has lost to rounding, as its run in float64 tells: that member's loop for ours,
  any member's for the others, whose sums are in another order, and round another member's smallest gradients. What
  was right in float64, and is not ours, may be `PROVEN` times as far off: a sum beside a kink falls to the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.case import Batch, Case, side_by_side, watched
from benchmarks.rival import Running
from memberwise.testing.tolerance import tolerance

PROVEN = 4
"""(One bias of a perceptron that is left untrained is eight times as far off.)"""

SHOWN = 5
"""How many differences a report spells out."""


@dataclass(frozen=True)
class Trajectory:
    """What N training steps of M members left: losses (N, M), and parameters and buffers, each (M, ...).

    Of predictions, `losses` are what they gave, (N, M, ...). `precision` is the dtype that the table of tolerances is
    asked for, where autocast computed in another than the tensors have.
    """

    losses: Tensor
    state: dict[str, Tensor]
    precision: torch.dtype | None = None

    def first(self) -> Trajectory:
        """Of the first member alone."""
        return Trajectory(self.losses[:, :1], {name: value[:1] for name, value in self.state.items()}, self.precision)


def of_loop(case: Case, members: int, batches: list[Batch], dtype: torch.dtype, device: str = "cpu") -> Trajectory:
    """The reference: each member alone, in plain PyTorch, as its user would train it, with its own random numbers."""
    runs = []
    with torch.random.fork_rng(devices=[]):
        part = case.part()
        for member in range(members):
            model = case.member(member, part).to(device, dtype)
            own = [case.of_member(batch, member) for batch in batches]
            runs.append((_train if case.trains else _predict)(case, model, own))
    losses = torch.stack([torch.stack(each) for each, _ in runs], dim=1)
    return Trajectory(losses, {name: torch.stack([state[name] for _, state in runs]) for name in runs[0][1]})


def _train(case: Case, model: nn.Module, batches: list[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses, and what is left of one member."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = case.recipe.of_torch(trained)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = case.loss(model, *batch)
        loss.backward()
        if case.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, case.recipe.clip)
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: value.detach() for name, value in watched(model).items()}


def _predict(case: Case, model: nn.Module, batches: list[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        outputs = [case.loss(model, *batch) for batch in batches]
    return outputs, {name: value.detach() for name, value in watched(model).items()}


def of_running(running: Running, batches: Iterable[Batch]) -> Trajectory:
    """The same of a started rival; what it returns is copied, for it may be written to again."""
    if running.together > 1:
        losses = running.step(side_by_side([*batches])).detach().clone()
    else:
        losses = torch.stack([running.step(batch).detach().clone() for batch in batches])
    return Trajectory(losses, {name: value.detach().clone() for name, value in running.state().items()})


def drew_alike(one: Trajectory, other: Trajectory) -> bool:
    """Whether two runs in different dtypes drew the same numbers, as on a CPU; else neither measures the other."""
    return torch.allclose(one.losses[0].double(), other.losses[0].double(), rtol=1e-2)


def exactly(found: Trajectory, expected: Trajectory) -> list[str]:
    """Every tensor with a difference beyond the tolerance of its dtype in any element; empty if there is none."""
    return _report(found, expected, expected, _of_elements)


def in_norm(
    found: Trajectory, expected: Trajectory, exact: Trajectory, ours: bool = True, proven: bool = False
) -> list[str]:
    """The same, with all floating state of a member taken together, by its root mean square.

    `exact` is the loop's run in float64; `proven` says that the rival was right there.
    """
    slack = PROVEN if proven and not ours else 1
    if not ours:
        exact = _worst(expected, exact)
    kinds = [{name: (value.shape, value.dtype) for name, value in each.state.items()} for each in (found, expected)]
    if kinds[0] != kinds[1]:
        return _report(found, expected, expected, _of_elements)
    names = [name for name, value in expected.state.items() if value.is_floating_point()]
    if not names:
        return _report(found, expected, exact, _of_elements, slack)
    furthest = max(names, key=lambda name: (found.state[name] - expected.state[name]).square().mean().item())
    label = f"all parameters and buffers, {furthest} most of all"
    joined = [_joined(these, names, label) for these in (found, expected, exact)]
    return _report(*joined, _of_members, slack)


def _worst(expected: Trajectory, exact: Trajectory) -> Trajectory:
    """As if each member had lost to rounding what the one did that lost most."""

    def of(alone: Tensor, right: Tensor, members: int) -> Tensor:
        if not alone.is_floating_point():
            return right
        lost = (alone - right.to(alone.dtype)).movedim(members, 0)
        most = lost[lost.flatten(1).square().mean(1).argmax()]
        return alone - most.expand_as(lost).movedim(0, members)

    state = {name: of(expected.state[name], right, 0) for name, right in exact.state.items()}
    return Trajectory(of(expected.losses, exact.losses, 1), state, exact.precision)


def _joined(these: Trajectory, names: list[str], label: str) -> Trajectory:
    """The tensors of these names as one, (M, elements), called `label`."""
    rest = {name: value for name, value in these.state.items() if name not in names}
    parts = [
        these.state[name].flatten(1) if these.state[name].ndim > 1 else these.state[name][:, None] for name in names
    ]
    return Trajectory(these.losses, {**rest, label: torch.cat(parts, 1)}, these.precision)


def _of_elements(value: Tensor) -> Tensor:
    """(M, ...) -> (M, elements)."""
    return value.abs().reshape(len(value), -1)


def _of_members(value: Tensor) -> Tensor:
    """(M, ...) -> (M, 1), the root mean square; integers stay as they are, for they must be equal."""
    elements = _of_elements(value)
    return elements.square().mean(1, keepdim=True).sqrt() if value.is_floating_point() else elements


def _report(
    found: Trajectory, expected: Trajectory, exact: Trajectory, size: Callable[[Tensor], Tensor], slack: int = 1
) -> list[str]:
    lines = list(_differences(found, expected, exact, size, slack))
    hidden = len(lines) - SHOWN
    return lines if hidden <= 0 else [*lines[:SHOWN], f"and {hidden} more"]


def _differences(
    found: Trajectory, expected: Trajectory, exact: Trajectory, size: Callable[[Tensor], Tensor], slack: int
) -> Iterator[str]:
    """The first step whose losses are wrong, then every tensor that is."""
    for step, losses in enumerate(zip(found.losses, expected.losses, exact.losses, strict=True)):
        if line := _of_tensor(f"loss of step {step}", *losses, _of_elements, expected.precision, slack):
            yield line
            break
    if unmatched := expected.state.keys() ^ found.state.keys():
        yield f"parameters or buffers on one side only: {', '.join(sorted(unmatched))}"
    for name, alone in expected.state.items():
        if name not in found.state:
            continue
        if line := _of_tensor(name, found.state[name], alone, exact.state[name], size, expected.precision, slack):
            yield line


def _of_tensor(
    name: str,
    mine: Tensor,
    alone: Tensor,
    exact: Tensor,
    size: Callable[[Tensor], Tensor],
    precision: torch.dtype | None,
    slack: int,
) -> str | None:
    """Which members' parts of a tensor, (M, ...), lie further off than the table allows, in one line."""
    if (mine.shape, mine.dtype) != (alone.shape, alone.dtype):
        return f"{name}: {tuple(mine.shape)} {mine.dtype} where the loop has {tuple(alone.shape)} {alone.dtype}"
    coarse = precision is not None and alone.is_floating_point()
    rtol, atol = tolerance(precision if coarse else alone.dtype)
    off, allowed = size(mine - alone), atol + rtol * size(alone)
    if alone.is_floating_point():
        allowed = allowed + 2 * size(alone - exact.to(alone.dtype))
    allowed = slack * allowed
    wrong = ~(off <= allowed)  # so written, NaN is wrong
    if not wrong.any():
        return None
    member, element = divmod(int((off - allowed).nan_to_num(torch.inf).argmax()), off.shape[1])
    return (
        f"{name}: {int(wrong.any(1).sum())} of {len(off)} members wrong, most of all member {member}, "
        f"off by {off[member, element].item():.3g} where {allowed[member, element].item():.3g} is allowed"
    )
