"""Evenly spaced values between ends of each member's own.

torch's batching computes them in the type of the ends, alone they are computed in the type of the result: from a
float32 end it gave float64 results that were right to seven digits, from 1.7 whole numbers that did not begin at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.engine.signals import Decline
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten


def _wide(kind: torch.dtype) -> torch.dtype:
    """What steps are counted in."""
    if not kind.is_floating_point and not kind.is_complex:
        return torch.float64
    return torch.float32 if kind in (torch.float16, torch.bfloat16) else kind


def _spaced(form: Callable[..., torch.Tensor]) -> Any:
    def rule(info: Any, in_dims: Any, start: Any, end: Any, steps: int, *base: float, **options: Any) -> Any:
        is_complex = _is_complex(start, end)
        default = torch.get_default_dtype()
        kind = options.pop("dtype", None) or (default.to_complex() if is_complex else default)
        device = options.pop("device", None) or "cpu"
        if any(options.values()) or kind is torch.bool or (is_complex and not kind.is_complex):
            return Decline("special memory, or a type that a lone call refuses")
        ends = [torch.as_tensor(value, dtype=kind, device=device).to(_wide(kind)) for value in (start, end)]
        ends = [end.unsqueeze(1) if at == 0 else end for end, at in zip(ends, in_dims, strict=False)]
        return form(_line(*ends, steps), *base).to(kind), 0

    return rule


def _is_complex(*ends: Any) -> bool:
    return any(end.is_complex() if isinstance(end, torch.Tensor) else isinstance(end, complex) for end in ends)


def _line(start: torch.Tensor, end: torch.Tensor, steps: int) -> torch.Tensor:
    """From both ends to the middle, as torch's kernel."""
    place = torch.arange(steps, dtype=start.dtype.to_real(), device=start.device)
    step = (end - start) / max(steps - 1, 1)
    return torch.where(place < max(steps // 2, 1), start + step * place, end - step * (steps - 1 - place))


def _power(line: torch.Tensor, base: float = 10.0) -> torch.Tensor:
    return torch.pow(base, line)


for _ends in ("Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor"):
    register_rule(getattr(_aten.linspace, _ends), _spaced(lambda line: line))
    register_rule(getattr(_aten.logspace, _ends), _spaced(_power))
