"""Two worlds made alike: in one the step runs as it is, in the other it is captured. Then everything is compared.

A world is made by a function that returns a namespace with `step` and, under any other names, what the step works
with. `Twins.both(action)` applies an action to each world; `Twins.call(*args)` calls both steps and compares
returned values, all tensors of both worlds, their gradients, and where the global random stream stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

from memberwise.capture import CapturedStep, compile
from memberwise.capture.chunker import _nudged
from tests.plans import rounds


def tensors_of(value: Any, name: str = "", seen: set[int] | None = None) -> dict[str, torch.Tensor]:
    """All tensors in nested dicts, lists, tuples, namespaces, modules and optimizers, by a readable name."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        found = {name: value.detach()}
        if value.is_leaf and value.grad is not None:
            found[f"{name}.grad"] = value.grad
        return found
    if id(value) in seen:
        return {}
    seen.add(id(value))
    if isinstance(value, nn.Module):
        entries = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif isinstance(value, torch.optim.Optimizer):
        entries = {str(k): state for k, state in enumerate(value.state.values())}
    elif isinstance(value, SimpleNamespace):
        entries = {key: entry for key, entry in vars(value).items() if key != "step"}
    elif isinstance(value, dict):
        entries = value
    elif isinstance(value, list | tuple):
        entries = dict(enumerate(value))
    else:
        return {}
    return {
        key: tensor
        for label, entry in entries.items()
        for key, tensor in tensors_of(entry, f"{name}.{label}", seen).items()
    }


ROUNDINGS = 64
"""How many times a nudge of the last bit another order of sums may carry a result."""


def assert_same(captured: Any, eager: Any, what: str, exact: bool, nudged: Any = None) -> None:
    """The tensors in both are the same: to the bit, within the table's tolerance, or within what a nudge changes."""
    from memberwise.testing.tolerance import assert_equal

    ours, theirs, near = tensors_of(captured), tensors_of(eager), tensors_of(nudged)
    assert list(ours) == list(theirs), f"{what}: {ours.keys() ^ theirs.keys()}"
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, f"{what}{name}: {ours[name].dtype} is not {tensor.dtype}"
        if exact and not rounds:
            assert_close(  # to the bit; a training that diverges alike is alike
                ours[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{what}{name}: {ours[name]} is not {tensor}"
            )
        elif name not in near or _off(ours[name], tensor) > ROUNDINGS * _off(near[name], tensor):
            assert_equal(ours[name], tensor, f"{what}{name}")


def _off(tensor: torch.Tensor, other: torch.Tensor) -> float:
    """By how much they differ, at most; infinitely, where only one of them is not a number."""
    same = (tensor == other) | (tensor.isnan() & other.isnan())
    apart = (tensor.double() - other.double()).abs().nan_to_num(math.inf).masked_fill(same, 0)
    return float(apart.max()) if tensor.numel() else 0.0


def _nudge(world: SimpleNamespace) -> None:
    """Change what is computed with in its last bit."""
    for tensor in tensors_of(world).values():
        tensor.copy_(_nudged(tensor))


class Twins:
    """An eager world and a captured one.

    A training that `diverges` carries each rounding as far. Where captured steps round otherwise, it is held against
    a third world, eager and nudged in the last bit.
    """

    def __init__(
        self, make: Callable[[], SimpleNamespace], *, backend: str = "fx", exact: bool = True, diverges: bool = False
    ) -> None:
        self.worlds = []
        for _ in range(3 if diverges and rounds else 2):
            torch.manual_seed(0)
            self.worlds.append(make())
        self.eager, self.world, *nudged = self.worlds
        for world in nudged:
            _nudge(world)
        self.exact = exact
        self.streams = [torch.get_rng_state()] * len(self.worlds)
        self.function = compile(self.world.step, backend=backend)
        self.captured: CapturedStep = self.function.captured

    def both(self, action: Callable[[SimpleNamespace], Any]) -> None:
        """Do the same in all worlds."""
        for index, world in enumerate(self.worlds):
            torch.set_rng_state(self.streams[index])
            action(world)
            self.streams[index] = torch.get_rng_state()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call both steps with copies of the arguments; the captured one's answer."""
        outs, given = [], []
        for index, step in enumerate([self.eager.step, self.function, *(world.step for world in self.worlds[2:])]):
            torch.set_rng_state(self.streams[index])
            own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            outs.append(step(*own, **kwargs))
            given.append(own)
            self.streams[index] = torch.get_rng_state()
        for what, (eager, captured, *nudged) in {"returned": outs, "arguments": given, "world": self.worlds}.items():
            assert_same(captured, eager, what, self.exact, *nudged)
        assert torch.equal(*self.streams[:2]), "the global stream stands elsewhere"
        return outs[1]

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """Call until a recording is replayed; fails if none ever is."""
        for _ in range(5):
            before = self.captured.replayed
            self.call(*args, **kwargs)
            if self.captured.replayed > before:
                return
        raise AssertionError(f"never replayed: {[refusal.sentence() for refusal in self.captured.refusals]}")

    def replays(self, *args: Any, **kwargs: Any) -> bool:
        """Whether one more call is a replay."""
        before = self.captured.replayed
        self.call(*args, **kwargs)
        return self.captured.replayed == before + 1
