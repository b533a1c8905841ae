"""A replay draws what the eager step would draw: the same numbers, from the same streams, in the same order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memberwise._torch import bernoulli
from memberwise.capture import compile
from memberwise.engine.boundary import vmap
from memberwise.generators import drawing_from, make_generators
from tests.parity.twins import Twins, assert_same

P = torch.tensor([0.2, 0.5, 0.9])

DRAWS: dict[str, Any] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.4),
    "dropout2d": lambda x: nn.functional.dropout2d(x[None, :, :, None], 0.4),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.4, training=True),
    "rand": lambda x: torch.rand(2, 3),
    "randn": lambda x: torch.randn(3) + torch.randn(2, 3),
    "rand_like": torch.rand_like,
    "randn_like of a transposed": lambda x: torch.randn_like(x.t()).contiguous(),
    "randint": lambda x: torch.randint(0, 9, (3,)),
    "randperm": lambda x: x[:, torch.randperm(3)],
    "normal_": lambda x: torch.empty(2, 3).normal_(1.0, 2.0),
    "uniform_ of a view": lambda x: torch.zeros(4, 3)[1:3].uniform_(),
    "uniform_ of every other": lambda x: torch.zeros(4, 3)[::2].uniform_(),
    "exponential_": lambda x: torch.empty(3).exponential_(),
    "bernoulli_": lambda x: torch.empty(3).bernoulli_(0.3),
    "bernoulli by a tensor": lambda x: torch.bernoulli(P),
    "bernoulli_ by a tensor": lambda x: torch.empty(3).bernoulli_(P),
    "multinomial of an input": lambda x: torch.multinomial(P, 2),
    "normal of tensors": lambda x: torch.normal(P, 1.0),
    "rand double": lambda x: torch.rand(3, dtype=torch.float64),
    "written after": lambda x: torch.rand(3).mul_(2).add_(1),
    "gumbel_softmax": lambda x: nn.functional.gumbel_softmax(x),
    "attention dropout": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
    "rrelu": lambda x: nn.functional.rrelu(x, training=False),
    "nothing drawn": lambda x: nn.functional.dropout(x, 0.0) + torch.rand(0, 3).sum(),
    "into state": lambda x: x.copy_(torch.rand(2, 3)),
    "shuffled": lambda x: torch.stack([x[i] for i in (1, 0)]) * torch.rand(1) + torch.rand(1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_kind_of_draw(name: str) -> None:
    twins = Twins(lambda: SimpleNamespace(step=DRAWS[name]))
    for _ in range(4):
        twins.call(torch.randn(2, 3))
    assert twins.captured.replayed == 3, [refusal.sentence() for refusal in twins.captured.refusals]


@pytest.mark.parametrize("name", ["dropout", "uniform_ of every other", "randn_like of a transposed", "randint"])
def test_with_a_generator_of_its_own(name: str) -> None:
    def make() -> SimpleNamespace:
        generator = torch.Generator().manual_seed(7)

        def step(x: torch.Tensor) -> torch.Tensor:
            first = torch.rand(3, generator=generator)
            with drawing_from(generator):
                second = DRAWS[name](x)
            third = torch.empty(3).bernoulli_(0.5, generator=generator)
            return first.sum() + second.sum() + third.sum() + torch.rand(1)

        return SimpleNamespace(step=step, state=lambda: generator.get_state(), generator=generator)

    twins = Twins(make)
    for _ in range(4):
        twins.call(torch.randn(2, 3))
        assert torch.equal(twins.world.state(), twins.eager.state())
    assert twins.captured.replayed == 3, [refusal.sentence() for refusal in twins.captured.refusals]


def test_a_generator_exchanged_for_another() -> None:
    box = SimpleNamespace(generator=torch.Generator().manual_seed(1))
    captured = compile(lambda: torch.rand(3, generator=box.generator), backend="fx")
    for _ in range(3):
        captured()
    box.generator = torch.Generator().manual_seed(2)
    assert torch.equal(captured(), torch.rand(3, generator=torch.Generator().manual_seed(2)))


def test_a_drawn_tensor_that_is_kept_is_not_drawn_into_again() -> None:
    captured = compile(lambda: (torch.rand(3), torch.empty(3).uniform_(), torch.empty(4).uniform_()[1:]), backend="fx")
    kept = [captured() for _ in range(4)]
    copies = [[tensor.clone() for tensor in out] for out in kept]
    captured()
    for out, copy in zip(kept, copies, strict=True):
        for tensor, before in zip(out, copy, strict=True):
            assert torch.equal(tensor, before)
    assert not torch.equal(kept[2][0], kept[3][0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_draws_the_same_again_once(use_reentrant: bool) -> None:
    def make() -> SimpleNamespace:
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5)).double()

        def step(x: torch.Tensor) -> torch.Tensor:
            net.zero_grad()
            x = x.detach().requires_grad_()
            out = checkpoint(net, x, use_reentrant=use_reentrant)
            loss = (out * torch.rand(8, dtype=torch.float64)).pow(2).sum()
            loss.backward()
            return loss

        return SimpleNamespace(step=step, net=net)

    twins = Twins(make)
    for _ in range(5):
        twins.call(torch.randn(2, 3, dtype=torch.float64))
    assert twins.captured.replayed >= 3, [refusal.sentence() for refusal in twins.captured.refusals]


def test_draws_in_backward() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(3)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.rand(3)

    def make() -> SimpleNamespace:
        weight = torch.ones(3, requires_grad=True)

        def step() -> torch.Tensor:
            weight.grad = None
            loss = Noisy.apply(weight).exp().sum()
            loss.backward()
            return loss

        return SimpleNamespace(step=step, weight=weight)

    twins = Twins(make)
    for _ in range(5):
        twins.call()
    assert twins.captured.replayed >= 3


def _members(seeds: list[int] | None, members: int = 3) -> SimpleNamespace:
    """M members of one layer with dropout, trained by hand."""
    weight = torch.randn(members, 4, 3, dtype=torch.float64, requires_grad=True)
    generators = None if seeds is None else make_generators(seeds)

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(x @ w.t(), 0.5)
        noise = torch.randn(4, dtype=torch.float64) + torch.rand(1, dtype=torch.float64)
        return (hidden + noise).pow(2).mean() * (1 + torch.multinomial(torch.ones(4), 1).sum())

    def step(x: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        losses = vmap(loss, (0, None), randomness="different", generators=generators)(weight, x)
        losses.sum().backward()
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=0.1)
        return losses

    return SimpleNamespace(step=step, weight=weight, generators=generators or [])


@pytest.mark.parametrize("seeds", [None, [0, 1, 2], [5, 5, 5]], ids=["global", "a stream each", "equal seeds"])
def test_members_draw_each_its_own(seeds: list[int] | None) -> None:
    twins = Twins(lambda: _members(seeds))
    for _ in range(5):
        twins.call(torch.randn(6, 3, dtype=torch.float64))
        for ours, theirs in zip(twins.world.generators, twins.eager.generators, strict=True):
            assert torch.equal(ours.get_state(), theirs.get_state())
    assert twins.captured.replayed >= 3 or seeds == [5, 5, 5], [r.sentence() for r in twins.captured.refusals]


def test_a_seeded_step_leaves_the_global_stream_alone() -> None:
    world = _members([0, 1, 2])
    captured = compile(world.step, backend="fx")
    for _ in range(4):
        before = torch.get_rng_state()
        captured(torch.ones(6, 3, dtype=torch.float64))
        assert torch.equal(torch.get_rng_state(), before)
    assert captured.captured.replayed == 2


def test_eager_and_captured_calls_may_alternate() -> None:
    """Both read and move the same streams, so any mixture is the same run."""
    mixed, eager = _members([0, 1, 2]), _members([0, 1, 2])
    with torch.no_grad():
        mixed.weight.copy_(eager.weight)
    captured = compile(mixed.step, backend="fx")
    for k in range(9):
        x = torch.randn(6, 3, dtype=torch.float64)
        ours = mixed.step(x) if k % 3 == 2 else captured(x)
        assert_same([ours.detach()], [eager.step(x).detach()], "returned", exact=True)
    assert captured.captured.replayed >= 3


# -- merging


def _inputs_drawn(captured: Any) -> list[tuple[int, ...]]:
    return [tuple(draw.example.shape) for _, draw in captured.captured.programs[0].draws]


def _drawn_by_members(body: Any, members: int, *shape: int, dtype: torch.dtype = torch.float32) -> Twins:
    """Worlds in which members with streams of their own have drawn four times."""

    def make() -> SimpleNamespace:
        generators = make_generators(range(members))
        step = vmap(body, randomness="different", generators=generators)
        return SimpleNamespace(step=lambda x: step(x), generators=generators)

    twins = Twins(make)
    for _ in range(4):
        twins.call(torch.randn(members, *shape, dtype=dtype))
        for ours, theirs in zip(twins.world.generators, twins.eager.generators, strict=True):
            assert torch.equal(ours.get_state(), theirs.get_state())
    assert twins.captured.replayed == 3
    return twins


@pytest.mark.parametrize("inside", ["dropout", "rand", "two layers", "both"])
def test_draws_of_members_are_one_input_of_the_program(inside: str) -> None:
    body = {
        "dropout": lambda x: nn.functional.dropout(x, 0.5),
        "rand": lambda x: x * torch.rand(3),
        "two layers": lambda x: nn.functional.dropout(nn.functional.dropout(x, 0.2), 0.4),
        "both": lambda x: nn.functional.dropout(x, 0.2) + torch.randn(3),
    }[inside]
    twins = _drawn_by_members(body, 4, 3)
    assert _inputs_drawn(twins.function) == [(4, 3)] * (1 if inside in ("dropout", "rand") else 2)


@pytest.mark.parametrize("how", ["at once", "one after the other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_large_masks_of_members(how: str, dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All generators draw at once where they can, into whatever order of memory, and where they cannot, in turn."""
    if how == "one after the other":
        monkeypatch.setattr(bernoulli, "can_draw", lambda *args, **named: False)

    def body(x: torch.Tensor) -> torch.Tensor:
        x = x if order == "contiguous" else x.t()
        return (
            nn.functional.dropout(x, 0.3)
            + torch.rand(1, dtype=dtype)
            + nn.functional.dropout(x[:31].clone(), 0.6).sum()
        )

    twins = _drawn_by_members(body, 3, 41, 41, dtype=dtype)
    large = [draw for _, draw in twins.captured.programs[0].draws if draw.example.numel() > 3]
    assert len(large) == 2
    if how == "one after the other" or bernoulli.can_draw([large[0].example], 0.5, [torch.Generator()]):
        assert [bool(draw.at_once) for draw in large] == [how == "at once"] * 2


FILLS: dict[str, Any] = {
    "all but one": lambda x, g: [x[i].uniform_(generator=g[i]) for i in range(2)],
    "backwards": lambda x, g: [x[i].uniform_(generator=g[i]) for i in (2, 1, 0)],
    "read in between": lambda x, g: [x[0].uniform_(generator=g[0]), x.mul_(2), x[1].uniform_(), x[2].uniform_()],
    "drawn in between": lambda x, g: [x[0].uniform_(), torch.rand(3), x[1].uniform_(), x[2].uniform_()],
    "part of a slice": lambda x, g: [x[i][1:].uniform_() for i in range(3)],
    "slices read later": lambda x, g: [x[i].uniform_().mul_(i) for i in range(3)],
    "across": lambda x, g: [x[:, i].uniform_() for i in range(3)],
    "twice": lambda x, g: [x[i].uniform_() for i in (0, 1, 2, 0, 1, 2)],
    "memory order": lambda x, g: [x.t()[i].uniform_() for i in range(3)],
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_that_only_look_like_members(name: str) -> None:
    def make() -> SimpleNamespace:
        generators = make_generators(range(3))

        def step(y: torch.Tensor) -> torch.Tensor:
            x = torch.zeros(3, 3)
            parts = FILLS[name](x, generators)
            return x * y + sum(part.sum() for part in parts)

        return SimpleNamespace(step=step, generators=generators)

    twins = Twins(make)
    for _ in range(4):
        twins.call(torch.randn(3))
    assert twins.captured.replayed == 3
