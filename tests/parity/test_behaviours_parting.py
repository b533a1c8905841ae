"""Where one module of a stack reads values in which members differ: that module runs by members, the rest stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memberwise
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import cotangent, joined, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def positive(x: torch.Tensor) -> bool:
    return bool(x.detach().sum() > 0)


class Reader(nn.Module):
    """Reads a value; has a parameter, a written and an assigned buffer, a draw before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.steps += 1
        x = F.dropout(x, 0.3, self.training)
        self.mean = 0.5 * self.mean + x.detach().mean(0)
        y = self.inner(x) * scale
        return F.dropout(y * 2 if positive(x) else y.sin(), 0.3, self.training)


class Several(Reader):
    """Returns a dict with a tuple in it, and takes a keyword."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        y = super().forward(x, scale)
        return {"y": y, "pair": (y.mean(0), None), "name": "several"}


class Deep(nn.Module):
    """The reader two levels down, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Reader()) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.blocks[0][2](x)


class WithKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several, self.head = Several(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.several(x, scale=0.5)
        return self.head(found["y"]) + found["pair"][0][:2]


class Hooked(nn.Module):
    """Hooks on the module that parts ways."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.reader.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        self.reader.register_forward_hook(lambda m, args, out: out + 1)
        self.reader.register_full_backward_hook(lambda m, gi, go: tuple(g * 3 for g in gi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(x.tanh())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reader, self.reentrant = nn.Linear(4, 4), Reader(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.reader, self.first(x), use_reentrant=self.reentrant)


class CheckpointsInside(nn.Module):
    """Parts ways, then checkpoints a part of itself, in which it draws."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.4)), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if positive(x * self.part[0].weight.sum()) else x
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


class WritesWhatItGot(nn.Module):
    """A child writes its argument in place, differentiably, and parts ways; the parent uses the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.child = nn.Linear(4, 4), Scales()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        rows = hidden[1:]
        return self.child(rows).sum() + hidden.sin() + rows.mean()


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(self.scale)
        return x * 2 if positive(x) else x.exp()


class Tied(nn.Module):
    """The reader's weight is another layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reader = nn.Linear(4, 4), Reader()
        self.first.weight = self.reader.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.first(x))


class Borrows(nn.Module):
    """A child that uses a parameter of its parent, and a tensor that the parent made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.child = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(4, dtype=x.dtype) + x.mean(0)
        body = Body(lambda own: own * self.scale + bias if positive(own) else own - self.scale)
        return body(x)


class Body(nn.Module):
    """A module made in a forward, of no stack."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    """Steps until each member is done: another number of steps for each."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt = nn.GRUCell(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, steps = torch.zeros_like(x), 0
        while steps < 5 and (steps == 0 or self.halt(hidden).mean() < 0.1):
            hidden, steps = self.cell(x, hidden), steps + 1
        return hidden * steps


class Routed(nn.Module):
    """A mixture of experts: each row goes where its member's gate sends it, expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().squeeze(1)
            if len(rows):
                out[rows] += weights[rows, None] * expert(x[rows])
        return out


class InTheHead(nn.Module):
    """The whole model's own forward reads, after its layers have run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.head(self.drop(self.norm(x)))
        return self.drop(y) if positive(y) else y


class Result(NamedTuple):
    y: torch.Tensor
    auxiliary: torch.Tensor


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()

    def forward(self, x: torch.Tensor) -> Result:
        y = self.reader(x)
        return Result(y, y.pow(2).mean())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "reader": Reader,
    "between others": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Reader(), nn.Dropout(0.2)),
    "two readers": lambda: nn.Sequential(Reader(), nn.Linear(4, 4), Reader()),
    "deep": Deep,
    "keyword and dict": WithKeyword,
    "hooks": Hooked,
    "checkpoint": lambda: Checkpointed(False),
    "checkpoint reentrant": lambda: Checkpointed(True),
    "checkpoint inside": lambda: nn.Sequential(nn.Linear(4, 4), CheckpointsInside(False)),
    "checkpoint inside, reentrant": lambda: nn.Sequential(nn.Linear(4, 4), CheckpointsInside(True)),
    "checkpoint in the head": lambda: CheckpointsInside(False),
    "writes what it got": WritesWhatItGot,
    "tied": Tied,
    "borrows": Borrows,
    "recurrent": Recurrent,
    "routed": Routed,
    "in the head": InTheHead,
    "named": Named,
}


def leaves(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("name", MODELS)
def test_parting(name: str, shared: bool, training: bool) -> None:
    """Three calls in a row: the first finds out, the others know."""
    make = lambda: MODELS[name]().double().train(training)  # noqa: E731 # a factory, as `build` takes it
    seeds = [3, 1, 4, 5]
    stack = memberwise.build(make, seeds=seeds)
    inputs = [numbers(4, 5, 4, seed=k) if not shared else numbers(5, 4, seed=k) for k in range(3)]
    lone_inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outs = [stack(x if shared else memberwise.each(x)) for x in inputs]
    backward(outs)
    models = []
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        models.append(make())
        lone = [models[i](x if shared else x[i]) for x in lone_inputs]
        backward(lone, outs, i)
        for mine, theirs in zip(outs, lone, strict=True):
            assert type(mine) is type(theirs)
            for a, b in zip(leaves(mine), leaves(theirs), strict=True):
                assert_equal(a[i].detach(), b.detach(), f"member {i}")
        for key, buffer in models[i].named_buffers():
            assert_equal(dict(stack.named_buffers())[key][i], buffer, f"member {i}: {key}")
        assert torch.equal(stack.generators[i].get_state(), torch.get_rng_state()), f"member {i}'s stream"
        assert getattr(stack[i], "calls", 0) == getattr(models[i], "calls", 0)
    for key, p in stack.named_parameters():
        alone = [dict(model.named_parameters())[key] for model in models]
        expected = joined([own.grad for own in alone], alone, 0)
        assert (p.grad is None) == (expected is None), key
        if expected is not None:
            assert_equal(p.grad, expected, key)
    for mine, theirs in zip(inputs, lone_inputs, strict=True):
        assert_equal(mine.grad, theirs.grad, "gradient of an input")


def backward(outs: list[Any], whole: list[Any] | None = None, member: int = 0) -> None:
    """From all outputs at once, each with a fixed gradient, or with one member's part of it."""
    flat = [t for out in outs for t in leaves(out)]
    shapes = flat if whole is None else [t for out in whole for t in leaves(out)]
    grads = [cotangent(t, k) for k, t in enumerate(shapes)]
    torch.autograd.backward(flat, grads if whole is None else [grad[member].clone() for grad in grads])


def test_only_the_module_that_parts_runs_by_members() -> None:
    stack = memberwise.build(lambda: MODELS["between others"]().double(), seeds=range(4))
    x = numbers(5, 4, grad=False)
    stack(x)
    with trace.recording() as record:
        stack(x)
    by_members = {entry.op for entry in record.entries.values() if entry.path == "retreat"}
    assert by_members == {"Reader"}
    norm = [entry for entry in record.entries.values() if "batch" in entry.op.lower()]
    assert norm and all(entry.path == "rule" for entry in norm)


def test_a_failing_module_fails_as_alone_and_leaves_all_as_it_was() -> None:
    class Fails(Reader):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            y = super().forward(x, scale)
            if self.steps > 1:
                raise ArithmeticError("too far")
            return y

    stack = memberwise.build(lambda: nn.Sequential(nn.BatchNorm1d(4), Fails()).double(), seeds=range(3))
    stack(numbers(5, 4, grad=False))
    with pytest.raises(ArithmeticError, match="too far"):
        stack(numbers(5, 4, grad=False))
    assert all(type(t) in (torch.Tensor, nn.Parameter) for t in [*stack.parameters(), *stack.buffers()])
    assert {len(t) for t in [*stack.parameters(), *stack.buffers()]} == {3}
