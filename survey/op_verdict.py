"""Whether a run gives what the loop gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from memberwise.testing.tolerance import tolerance
from survey.op_trial import Outcome, Trial
from survey.records import REFUSED, RIGHT, WRONG

UNSET = frozenset(("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"))
"""Operations whose results hold whatever the memory held."""

ROUNDING = 4.0
"""Units in the last place of the largest number of a result, that a sum in another order may be off from float64."""


@dataclass(frozen=True)
class Verdict:
    """How a run compares with the loop: right, refused (with a code) or wrong; what is wrong; whether it raised."""

    verdict: str
    code: str = ""
    what: str = ""
    raised: bool = False


def judged(run: Outcome, loop: Outcome, trial: Trial, *, draws: bool = True) -> Verdict:
    """Compare a run of `trial` with the loop, by the table of tolerances; where that fails, by a loop in float64.

    `draws`: whether what is drawn must be the same.
    """
    values = trial.name not in UNSET and (draws or not trial.draws)
    verdict = _compared(run, loop, values, None)
    if verdict.verdict != WRONG or verdict.raised:
        return verdict
    reference = trial.in_double().loop()
    return verdict if reference.error is not None else _compared(run, loop, values, reference)


def _compared(run: Outcome, loop: Outcome, values: bool, reference: Outcome | None) -> Verdict:
    """`values`: not only shapes and types; of the `reference`, twice the loop's distance is allowed, and rounding."""
    if run.error is not None:
        return _judge_error(run.error, loop.error)
    if loop.error is not None:
        return Verdict(WRONG, what=f"no error where the loop has {_line(loop.error)}")
    try:
        exact = (value for _, value in _of_loop(reference)) if reference is not None else repeat(None)
        for (what, alone), own, near in zip(_of_loop(loop), _of_stack(run, loop), exact, strict=False):
            _same(own, alone, values, what, near)
        if loop.seen is not None and run.seen is not None:
            _require(run.seen == loop.seen, f"a member sees results {run.seen}, alone {loop.seen}")
    except Mismatch as found:
        return Verdict(WRONG, what=str(found))
    return Verdict(RIGHT)


class Mismatch(Exception):
    """What a run gives, and the loop does not."""


def _judge_error(error: Exception, alone: Exception | None) -> Verdict:
    if alone is not None and isinstance(error, type(alone)):
        return Verdict(RIGHT)
    code = re.search(r"\[(MW\d+)\]", str(error))
    if code is not None:
        return Verdict(REFUSED, code.group(1), _line(error), True)
    return Verdict(WRONG, "", _line(error) + (f"; alone {_line(alone)}" if alone is not None else ""), True)


def _of_loop(loop: Outcome) -> Iterator[tuple[str, Any]]:
    """All that is compared, with its name."""
    for i, own in enumerate(loop.results):
        for leaf in tree_flatten(own)[0]:
            yield f"a result of member {i}", leaf
    for name in ("inputs", "grads"):
        for k, tensor in enumerate(getattr(loop, name)):
            yield f"{name} {k}", tensor
    for i, state in enumerate(loop.states):
        yield f"the random stream of member {i}", state


def _of_stack(run: Outcome, loop: Outcome) -> Iterator[Any]:
    """The same of a stacked run; a stream that no draw was taken from is where it was."""
    for i, own in enumerate(loop.results):
        spec = tree_flatten(own)[1]
        try:
            leaves = spec.flatten_up_to(run.results)
        except ValueError as error:
            raise Mismatch(f"the results have another structure: {error}") from error
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) <= i:
                raise Mismatch(f"a result has shape {tuple(leaf.shape)}, and no member axis")
            yield leaf[i] if isinstance(leaf, torch.Tensor | list) else leaf
    yield from run.inputs
    yield from run.grads
    yield from run.states or loop.states


def _same(own: Any, alone: Any, values: bool, what: str, exact: Any) -> None:
    if isinstance(own, torch.Tensor) and isinstance(alone, torch.Tensor):
        for name in ("shape", "dtype", "layout"):
            found, right = getattr(own, name), getattr(alone, name)
            _require(found == right, f"{what} has {name} {found}, alone {right}")
        if values and not _close(own, alone, exact):
            raise Mismatch(f"{what} differs by {_distance(own, alone):.1e}")
        return
    _require(type(own) is type(alone), f"{what} is a {type(own).__name__}, alone a {type(alone).__name__}")
    _require(not values or own == alone or own != own, f"{what} is {own!r}, alone {alone!r}")


def _close(own: torch.Tensor, alone: torch.Tensor, exact: torch.Tensor | None) -> bool:
    own, alone = _dense(own), _dense(alone)
    rtol, atol = tolerance(alone.dtype)
    if torch.allclose(own, alone, rtol, atol, equal_nan=True):
        return True
    return exact is not None and _distance(own, exact) <= max(2 * _distance(alone, exact), _rounding(alone))


def _rounding(alone: torch.Tensor) -> float:
    """What sums that cancel lose in another order: a few units in the last place of the largest result, which is not
    larger than their terms. n terms may lose n units (Higham, Accuracy and Stability of Numerical Algorithms, 4.2)."""
    if not alone.numel() or not (alone.is_floating_point() or alone.is_complex()):
        return 0.0
    return ROUNDING * torch.finfo(alone.dtype).eps * float(alone.abs().max())


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    kind = torch.complex128 if one.is_complex() else torch.float64
    return float((_dense(one).to(kind) - _dense(other).to(kind)).abs().max())


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Mismatch(what)


def _line(error: Exception | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
