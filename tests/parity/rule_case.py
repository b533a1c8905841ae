"""One rule's test: an operation, one member's arguments, and what `check_rule` is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from memberwise.testing import check_rule

DTYPES = (torch.float32, torch.bfloat16)
"""What every rule of ours is run in; half and complex numbers: what users' rules are run in, too."""


@dataclass
class RuleCase:
    """`make` gives one member's arguments anew; `served` lists by start of name the runs that must go by the rule."""

    op: Any
    make: Callable[[], tuple[Any, ...]]
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    declines: bool = False

    def __str__(self) -> str:
        return f"{getattr(self.op, '_name', getattr(self.op, '__name__', self.op))} {self.name}".strip()

    def check(self) -> None:
        """Run it; unless it `declines`, every run must have gone by the rule."""
        checked = check_rule(self.op, *self.make(), **{"dtypes": DTYPES, "autocast": False, **self.options})
        assert self.declines or not checked.declined, f"not by the rule: {checked.declined}"


def case(op: Any, *args: Any, name: str = "", declines: bool = False, **options: Any) -> RuleCase:
    """A case of fixed arguments; `declines` says that the rule leaves some runs to the ladder."""
    return RuleCase(op, lambda: args, name, options, declines)


def of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Reproducible normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    """Reproducible numbers in (0.1, 0.9)."""
    return 0.1 + 0.8 * torch.rand(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


def whole(high: int, *shape: int) -> torch.Tensor:
    """Reproducible integers below `high`, each at least once where there is room."""
    count = max(1, torch.Size(shape).numel())
    return torch.arange(count)[torch.randperm(count, generator=torch.Generator().manual_seed(1))].view(shape) % high
