"""Two worlds made alike: in one the step runs as it is, in the other it is captured. Then everything is compared.

A world is made by a function that returns a namespace with `step` and, under any other names, what the step works
with. `Twins.both(action)` applies an action to each world; `Twins.call(*args)` calls both steps and compares
returned values, all tensors of both worlds, their gradients, and where the global random stream stands.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

from memberwise.capture import CapturedStep, compile
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


def assert_same(captured: Any, eager: Any, what: str, exact: bool) -> None:
    """The tensors in both are the same, to the bit or within the table's tolerance."""
    from memberwise.testing.tolerance import assert_equal

    ours, theirs = tensors_of(captured), tensors_of(eager)
    assert list(ours) == list(theirs), f"{what}: {ours.keys() ^ theirs.keys()}"
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, f"{what}{name}: {ours[name].dtype} is not {tensor.dtype}"
        if exact and not rounds:
            assert_close(  # to the bit; a training that diverges alike is alike
                ours[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{what}{name}: {ours[name]} is not {tensor}"
            )
        else:
            assert_equal(ours[name], tensor, f"{what}{name}")


class Twins:
    """An eager world and a captured one."""

    def __init__(self, make: Callable[[], SimpleNamespace], *, backend: str = "fx", exact: bool = True) -> None:
        torch.manual_seed(0)
        self.eager = make()
        torch.manual_seed(0)
        self.world = make()
        self.exact = exact
        self.streams = [torch.get_rng_state()] * 2
        self.function = compile(self.world.step, backend=backend)
        self.captured: CapturedStep = self.function.captured

    def both(self, action: Callable[[SimpleNamespace], Any]) -> None:
        """Do the same in both worlds."""
        for index, world in enumerate((self.eager, self.world)):
            torch.set_rng_state(self.streams[index])
            action(world)
            self.streams[index] = torch.get_rng_state()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call both steps with copies of the arguments; the captured one's answer."""
        outs, given = [], []
        for index, step in enumerate((self.eager.step, self.function)):
            torch.set_rng_state(self.streams[index])
            own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            outs.append(step(*own, **kwargs))
            given.append(own)
            self.streams[index] = torch.get_rng_state()
        assert_same(outs[1], outs[0], "returned", self.exact)
        assert_same(given[1], given[0], "arguments", self.exact)
        assert_same(self.world, self.eager, "world", self.exact)
        assert torch.equal(*self.streams), "the global stream stands elsewhere"
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
