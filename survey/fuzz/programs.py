"""Random programs for one member: a model that calls instructions on a pool of tensors, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from survey.fuzz.instructions import VALUES, WRITES, Unfit
from survey.fuzz.layers import LAYERS


@dataclass(frozen=True)
class Step:
    """One instruction: its name, which tensors of the pool it takes (modulo the pool's size), and under what."""

    name: str
    first: int
    second: int
    under: str = ""


@dataclass(frozen=True)
class Program:
    """What one member's model does, and how it is called.

    Attributes:
        steps: of its forward.
        through: "vmap", "functional_call" or "stack".
        training: the model's mode.
        calls: how often it is called, before its backward.
        backward: how, of `BACKWARDS`.
        dtype: of all that is given.
        composites: whether layers run by their composite rules.
    """

    steps: tuple[Step, ...]
    through: str = "vmap"
    training: bool = True
    calls: int = 1
    backward: str = "once"
    dtype: str = "float64"
    composites: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Program:
        return cls(**{**found, "steps": tuple(Step(**step) for step in found["steps"])})

    def with_steps(self, steps: Sequence[Step]) -> Program:
        return replace(self, steps=tuple(steps))


def _checkpointed(reentrant: bool) -> Callable[..., Any]:
    return lambda value, a, b: checkpoint(value, a, b, use_reentrant=reentrant)


def _in(context: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def run(value: Callable[..., Any], a: torch.Tensor, b: torch.Tensor) -> Any:
        with context():
            return value(a, b)

    return run


def _saved() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t)


UNDER: dict[str, Callable[..., Any]] = {
    "": lambda value, a, b: value(a, b),
    "no_grad": _in(torch.no_grad),
    "enable_grad": _in(torch.enable_grad),
    "inference": _in(torch.inference_mode),
    "saved-tensor hooks": _in(_saved),
    "autocast": _in(lambda: torch.autocast("cpu", torch.bfloat16)),
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
}
BACKWARDS = ("once", "twice", "each", "grad", "double", "none")
SHAPES = ((2, 3), (3, 3), (3,), (2, 3))
"""Two inputs that require a gradient, one that does not, and one that all members share."""
TRACKED = (0, 1, 3)
SHARED = 3
LARGEST = 48
"""Elements; a program of expansions would grow without end."""
NAMES = [*VALUES, *WRITES, *LAYERS]
WEIGHTS = [1.0] * len(VALUES) + [2.0] * len(WRITES) + [2.5] * len(LAYERS)


def drawn(random: Random, longest: int = 8) -> Program:
    """A program; whether a lone run can take it is another question."""
    through = random.choice(("vmap", "functional_call", "stack", "stack"))
    names = [name for name in NAMES if through != "vmap" or name not in LAYERS]
    weights = [weight for name, weight in zip(NAMES, WEIGHTS, strict=True) if through != "vmap" or name not in LAYERS]
    steps = []
    for _ in range(random.randint(1, longest)):
        (name,) = random.choices(names, weights)
        under = random.choice([*UNDER]) if random.random() < 0.15 else ""
        steps.append(Step(name, random.randint(0, 9), random.randint(0, 9), under))
    return Program(
        tuple(steps),
        through,
        training=random.random() < 0.7,
        calls=random.choice((1, 1, 1, 2)),
        backward=random.choice(("once", *BACKWARDS)),
        dtype="float32" if any(step.under == "autocast" for step in steps) else "float64",
        composites=random.random() < 0.7,
    )


class Model(nn.Module):
    """The layers that a program calls, and its forward."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps = program.steps
        self.layers = nn.ModuleDict({step.name: LAYERS[step.name]() for step in program.steps if step.name in LAYERS})
        self.own = nn.Parameter(torch.randn(2, 3))

    def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
        return execute(self.steps, pool_of(given, self.own), self.layers)


def pool_of(given: Sequence[torch.Tensor], own: torch.Tensor) -> list[torch.Tensor]:
    """What the steps start with: the inputs, and results; what all members share is not written."""
    return [*given[:SHARED], given[SHARED] * 1, given[0] * 1, own * 1]


reached = [0]
"""The step that is being run; where a lone run fails, it is this one that fails."""


def execute(steps: Sequence[Step], pool: list[torch.Tensor], layers: Any = None) -> list[torch.Tensor]:
    """Run the steps on a pool; what was given is no result."""
    for k, step in enumerate(steps):
        reached[0] = k
        take(step, pool, layers)
    reached[0] = len(steps)
    return pool[SHARED:]


def take(step: Step, pool: list[torch.Tensor], layers: Any) -> None:
    """Run one step; a value goes into the pool."""
    a, b = pool[step.first % len(pool)], pool[step.second % len(pool)]
    if step.name in WRITES:
        UNDER[step.under](WRITES[step.name], a, b)
        return
    value = VALUES[step.name] if step.name in VALUES else lambda a, b: layers[step.name](a)
    out = UNDER[step.under](value, a, b)
    if out.numel() > LARGEST:
        raise Unfit
    pool.append(out)


def model_of(program: Program, member: int) -> Model:
    """A member's model, with values of its own."""
    torch.default_generator.manual_seed(100 + member)  # torch.manual_seed writes down a traceback
    model = Model(program).to(getattr(torch, program.dtype))
    return model.train(program.training)


def inputs(program: Program, member: int, shaken: float = 0.0) -> list[torch.Tensor]:
    """One member's; the last is the same for all. `shaken` moves them by as much."""
    generator = torch.Generator().manual_seed(member)
    own = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[:SHARED]]
    own.append(torch.randn(SHAPES[SHARED], generator=generator.manual_seed(99), dtype=torch.float64))
    own = [t * (1 + shaken) for t in own]
    return [t.to(getattr(torch, program.dtype)).requires_grad_(k in TRACKED) for k, t in enumerate(own)]
