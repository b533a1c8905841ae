"""Whatever a user changes between calls, in whatever order: the captured step is the eager one, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import nn

from memberwise.capture.step import KEPT
from tests.parity.twins import Twins


def make() -> SimpleNamespace:
    """A step with a bit of everything that a recording takes for granted."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)).double()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"scale": 1.0, "reset": True, "penalty": False}
    target = [torch.zeros(2, dtype=torch.float64)]
    mean = SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if options["reset"]:
            opt.zero_grad()
        noise = torch.rand(3, generator=generator, dtype=torch.float64)
        loss = (net(x + noise) - target[0]).pow(2).mean() * options["scale"]
        if options["penalty"]:
            loss = loss + sum(p.pow(2).sum() for p in net.parameters())
        loss.backward()
        opt.step()
        mean.loss = 0.9 * mean.loss + 0.1 * loss.detach()
        return {"loss": loss, "mean": mean.loss}

    return SimpleNamespace(
        step=step, net=net, opt=opt, options=options, target=target, mean=mean, generator=generator, hook=None
    )


class Training(RuleBasedStateMachine):
    """Two worlds alike; every rule acts on both, and each call compares all of them."""

    @initialize()
    def begin(self) -> None:
        self.twins = Twins(make, diverges=True)  # it climbs, where the scale is negative

    @rule(batch=st.sampled_from([2, 3]), times=st.integers(1, 4))
    def call(self, batch: int, times: int) -> None:
        for _ in range(times):
            self.twins.call(torch.randn(batch, 3, dtype=torch.float64))
        assert torch.equal(self.twins.world.generator.get_state(), self.twins.eager.generator.get_state())
        assert len(self.twins.captured.programs) <= KEPT

    @rule(name=st.sampled_from(["scale"]), value=st.sampled_from([0.5, 1.0, 2, -1.0]))
    def scale(self, name: str, value: float) -> None:
        self.twins.both(lambda world: world.options.update({name: value}))

    @rule(name=st.sampled_from(["reset", "penalty"]), value=st.booleans())
    def option(self, name: str, value: bool) -> None:
        self.twins.both(lambda world: world.options.update({name: value}))

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.twins.both(lambda world: world.net.train(mode))

    @rule(p=st.sampled_from([0.0, 0.2, 1.0]))
    def dropout(self, p: float) -> None:
        self.twins.both(lambda world: setattr(world.net[2], "p", p))

    @rule(lr=st.sampled_from([0.1, 0.01]))
    def rate(self, lr: float) -> None:
        self.twins.both(lambda world: world.opt.param_groups[0].update(lr=lr))

    @rule(set_to_none=st.booleans())
    def zero(self, set_to_none: bool) -> None:
        self.twins.both(lambda world: world.net.zero_grad(set_to_none))

    @rule(value=st.sampled_from([0.0, 1.0]), in_place=st.booleans())
    def aim(self, value: float, in_place: bool) -> None:
        def change(world: SimpleNamespace) -> None:
            if in_place:
                world.target[0].fill_(value)
            else:
                world.target[0] = torch.full((2,), value, dtype=torch.float64)

        self.twins.both(change)

    @rule()
    def freeze(self) -> None:
        self.twins.both(lambda world: world.net[0].weight.requires_grad_(not world.net[0].weight.requires_grad))

    @rule()
    def renew(self) -> None:
        def change(world: SimpleNamespace) -> None:
            world.net[4].weight.data = torch.ones(2, 4, dtype=torch.float64)

        self.twins.both(change)

    @rule()
    def hook(self) -> None:
        def change(world: SimpleNamespace) -> None:
            if world.hook is None:
                world.hook = world.net[1].register_forward_hook(lambda module, args, out: out * 2)
            else:
                world.hook.remove()
                world.hook = None

        self.twins.both(change)

    @rule(seed=st.integers(0, 3))
    def reseed(self, seed: int) -> None:
        self.twins.both(lambda world: (torch.manual_seed(seed), world.generator.manual_seed(seed)))


Training.TestCase.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTraining = Training.TestCase


def test_two_changes_at_once() -> None:
    """A target is exchanged, which is taken over, and a parameter frozen, which is not to be forgotten over it."""
    twins = Twins(make)
    for _ in range(3):
        twins.call(torch.randn(2, 3, dtype=torch.float64))
    twins.both(lambda world: world.net[0].weight.requires_grad_(False))
    twins.both(lambda world: world.target.__setitem__(0, torch.ones(2, dtype=torch.float64)))
    for _ in range(3):
        twins.call(torch.randn(2, 3, dtype=torch.float64))


def test_a_frozen_parameter_that_has_a_gradient() -> None:
    """`zero_grad` takes it away; recorded when there was one, and when there was none."""
    twins = Twins(make)

    def freeze(world: SimpleNamespace) -> None:
        world.net[0].weight.requires_grad_(not world.net[0].weight.requires_grad)

    for frozen in (False, True, True, False, True, False, False, True, True):
        if twins.eager.net[0].weight.requires_grad is frozen:
            twins.both(freeze)
        twins.call(torch.randn(2, 3, dtype=torch.float64))
