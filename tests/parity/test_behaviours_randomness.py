"""randomness= as in torch: "error", "different", "same"; generators=; and torch's validation, type by type."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memberwise import vmap
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

Draw = Callable[[torch.Tensor], torch.Tensor]

DRAWS: dict[str, Draw] = {
    "rand": lambda x: torch.rand(50, dtype=x.dtype),
    "randn": lambda x: torch.randn(50, dtype=x.dtype) + x,
    "randint": lambda x: torch.randint(1000, (50,)),
    "randperm": lambda x: torch.randperm(50),
    "rand_like": lambda x: torch.rand_like(x),
    "dropout": lambda x: F.dropout(x + 10, 0.5),
    "dropout1d": lambda x: F.dropout1d((x + 10).view(1, 50, 1), 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_ of a fresh one": lambda x: torch.empty(50).uniform_(),
    "multinomial": lambda x: torch.multinomial(torch.ones(50), 20),
    "normal": lambda x: torch.normal(x, 1.0),
    "rrelu": lambda x: F.rrelu(x - 10, 0.1, 0.9, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 10, 5), x.view(1, 10, 5), x.view(1, 10, 5), dropout_p=0.5
    ),
    "distribution": lambda x: torch.distributions.Normal(0.0, 1.0).sample((50,)),
    "init": lambda x: torch.nn.init.normal_(torch.empty(50)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_error_is_the_default(name: str) -> None:
    x = numbers(3, 50, grad=False)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        torch.vmap(DRAWS[name])(x)
    with pytest.raises(RuntimeError, match="MW202"):
        vmap(DRAWS[name])(x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", DRAWS)
def test_different(name: str) -> None:
    x = numbers(1, 50, grad=False).expand(3, 50)
    out = vmap(DRAWS[name], randomness="different")(x)
    assert len({tuple(row.flatten().tolist()) for row in out}) == 3
    torch.manual_seed(5)
    first = vmap(DRAWS[name], randomness="different")(x)
    torch.manual_seed(5)
    assert torch.equal(vmap(DRAWS[name], randomness="different")(x), first)


@pytest.mark.parametrize("name", DRAWS)
def test_same(name: str) -> None:
    """All members draw what a lone run would draw now, and the stream moves as far."""
    x = numbers(1, 50, grad=False).expand(3, 50)
    torch.manual_seed(5)
    out = vmap(DRAWS[name], randomness="same")(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    lone = DRAWS[name](x[0].clone())
    assert torch.equal(state, torch.get_rng_state())
    for row in out:
        assert_equal(row, lone)


def test_same_with_members_own_values() -> None:
    x = numbers(3, 50, grad=False)
    out = vmap(lambda own: F.dropout(own.abs() + 1, 0.5), randomness="same")(x)
    masks = out != 0
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2]) and masks.any() and not masks.all()
    assert_equal(out, (x.abs() + 1) * 2 * masks)


NO_DRAW: dict[str, Draw] = {
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "attention without dropout": lambda x: F.scaled_dot_product_attention(x.view(1, 10, 5), *[x.view(1, 10, 5)] * 2),
    "lstm without dropout": lambda x: torch.nn.LSTM.forward(LSTM, x.view(1, 10, 5))[0],
    "rrelu in eval": lambda x: F.rrelu(x),
    "a generator of its own": lambda x: x + torch.rand(50, generator=torch.Generator().manual_seed(3)),
}
LSTM = torch.nn.LSTM(5, 2, dropout=0.5, num_layers=2).double().eval()


@pytest.mark.parametrize("name", [name for name in NO_DRAW if "generator" not in name])
def test_what_does_not_draw_is_allowed(name: str) -> None:
    check(NO_DRAW[name], numbers(3, 50), gradients=False)


def test_a_generator_of_the_users_own_inside() -> None:
    """`generator=` inside: as in torch, refused under "error"; under "different" every member draws its own."""
    for mapped in (torch.vmap, vmap):
        with pytest.raises(RuntimeError, match="random"):
            mapped(NO_DRAW["a generator of its own"])(numbers(3, 50, grad=False))


def test_generators_are_moved_once_a_call_and_the_global_one_never() -> None:
    generators = [torch.Generator().manual_seed(i) for i in (1, 2, 3)]
    x = numbers(3, 50, grad=False)
    before = torch.get_rng_state()
    first = vmap(DRAWS["dropout"], generators=generators)(x)
    second = vmap(DRAWS["dropout"], generators=generators)(x)
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(first, second)
    for i in range(3):
        torch.manual_seed(i + 1)
        assert_equal(first[i], DRAWS["dropout"](x[i]))
        assert_equal(second[i], DRAWS["dropout"](x[i]))
        assert torch.equal(generators[i].get_state(), torch.get_rng_state())


def test_members_on_generators_that_stand_differently() -> None:
    """Streams need not have moved alike before the call."""
    generators = [torch.Generator().manual_seed(7) for _ in range(3)]
    torch.rand(5, generator=generators[1])
    torch.randn(3, generator=generators[2])
    states = [generator.get_state() for generator in generators]
    out = vmap(DRAWS["randn"], generators=generators)(numbers(3, 50, grad=False))
    for i, state in enumerate(states):
        torch.set_rng_state(state)
        assert_equal(out[i], DRAWS["randn"](numbers(3, 50, grad=False)[i]))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_generators(count: int) -> None:
    with pytest.raises(ValueError, match="MW201"):
        vmap(DRAWS["rand"], generators=[torch.Generator()] * count)(numbers(3, 50, grad=False))


def test_chunks_draw_from_their_own_generators() -> None:
    check(DRAWS["randn"], numbers(5, 50), seeds=[5, 4, 3, 2, 1], chunk_size=2)


x3 = numbers(3, 4, grad=False)
WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "randomness": (lambda m: m(torch.sin, randomness="random")(x3), RuntimeError),
    "in_dims of another kind": (lambda m: m(torch.sin, in_dims="0")(x3), ValueError),
    "in_dims a list": (lambda m: m(torch.mul, in_dims=[0, 0])(x3, x3), ValueError),
    "in_dims a float": (lambda m: m(torch.sin, in_dims=1.0)(x3), ValueError),
    "in_dims None": (lambda m: m(torch.sin, in_dims=None)(x3), ValueError),
    "in_dims all None": (lambda m: m(torch.mul, in_dims=(None, None))(x3, x3), ValueError),
    "in_dims too many": (lambda m: m(torch.sin, in_dims=(0, 0))(x3), ValueError),
    "in_dims too few": (lambda m: m(torch.mul, in_dims=(0,))(x3, x3), ValueError),
    "in_dims of another structure": (lambda m: m(lambda t: t[0], in_dims=([0, 0],))([x3]), ValueError),
    "in_dims for no tensor": (lambda m: m(torch.mul, in_dims=(0, 0))(x3, 2.0), ValueError),
    "in_dim out of range": (lambda m: m(torch.sin, in_dims=2)(x3), ValueError),
    "in_dim below range": (lambda m: m(torch.sin, in_dims=-3)(x3), ValueError),
    "in_dim of a scalar": (lambda m: m(torch.sin)(torch.tensor(1.0)), ValueError),
    "in_dim a bool in a tuple": (lambda m: m(torch.sin, in_dims=("a",))(x3), ValueError),
    "no input": (lambda m: m(lambda: torch.ones(3))(), ValueError),
    "sizes that differ": (lambda m: m(torch.mul)(x3, torch.ones(2, 4)), ValueError),
    "no member": (lambda m: m(torch.sin)(torch.ones(0, 4)), ValueError),
    "out_dims of another kind": (lambda m: m(torch.sin, out_dims="lol")(x3), ValueError),
    "out_dims a float": (lambda m: m(torch.sin, out_dims=0.0)(x3), ValueError),
    "out_dims too many": (lambda m: m(torch.sin, out_dims=(0, 0))(x3), ValueError),
    "out_dims too few": (lambda m: m(lambda x: (x, x), out_dims=(0,))(x3), ValueError),
    "out_dims out of range": (lambda m: m(torch.sin, out_dims=2)(x3), IndexError),
    "out_dims below range": (lambda m: m(torch.sin, out_dims=-3)(x3), IndexError),
    "out_dims None for a member": (lambda m: m(torch.sin, out_dims=None)(x3), ValueError),
    "chunk_size zero": (lambda m: m(torch.sin, chunk_size=0)(x3), ValueError),
    "chunk_size negative": (lambda m: m(torch.sin, chunk_size=-1)(x3), ValueError),
    "an error of the function": (lambda m: m(lambda x: x[10])(x3), IndexError),
    "a shape error of the function": (lambda m: m(lambda x: x @ torch.ones(7))(x3), RuntimeError),
}
WORDS = {
    "randomness": "allowed values for randomness",
    "in_dims a list": "expected `in_dims` to be int or a (potentially nested) tuple",
    "in_dims too few": "in_dims is not compatible with the structure of `inputs`",
    "in_dims for no tensor": "Got in_dim=0 for an input but the input is of type",
    "in_dim out of range": "Got in_dim=2 for some input, but that input is a Tensor of dimensionality 2",
    "no input": "got no inputs",
    "sizes that differ": "xpected all tensors to have the same size in the mapped dimension",
    "in_dims all None": "at least one Tensor",
    "out_dims of another kind": "must be an int, None or a python collection of ints",
    "out_dims too many": "not compatible",
    "out_dims None for a member": "can not return a BatchedTensor when out_dim is None",
    "chunk_size zero": "chunk_size should be None or greater than 0. (got 0)",
}
"""What a program that reads torch's errors may look for."""
NOT_IN_TORCH = {"no member": "torch says RuntimeError, or nothing, by operation"}


@pytest.mark.parametrize("name", WRONG)
def test_validation(name: str) -> None:
    """The conditions are torch's, and so are the types (ours may be subclasses of them)."""
    attempt, kind = WRONG[name]
    words = re.escape(WORDS.get(name, ""))
    if name not in NOT_IN_TORCH:
        with pytest.raises(kind, match=words):
            attempt(torch.vmap)
    before = x3.clone()
    with pytest.raises(kind, match=words):
        attempt(vmap)
    assert torch.equal(x3, before)


RIGHT: dict[str, Callable[[Any], Any]] = {
    "in_dims an int for a nest": lambda m: m(lambda t: t["a"] + t["b"][0])({"a": x3, "b": [x3]}),
    "in_dims a tuple of one": lambda m: m(torch.sin, in_dims=(1,))(x3),
    "partial": lambda m: m(__import__("functools").partial(torch.mul, torch.tensor(2.0)))(x3),
    "a method": lambda m: m(torch.Tensor.sin)(x3),
    "a module": lambda m: m(torch.nn.ReLU())(x3),
    "a callable object": lambda m: m(type("Call", (), {"__call__": lambda self, x: x * 2})())(x3),
    "out_dims None of a plain value": lambda m: m(lambda x: torch.ones(2), out_dims=None)(x3),
    "used as a decorator": lambda m: m(lambda x, y: x * y, in_dims=(0, None))(x3, torch.ones(4)),
    "kwargs": lambda m: m(lambda x, *, y: x * y)(x3, y=x3),
    "a plain result": lambda m: m(lambda x: torch.ones(2))(x3),
    "int inputs": lambda m: m(lambda x, k: x * k, in_dims=(0, None))(x3, 3),
    "chunked": lambda m: m(torch.sin, chunk_size=2)(x3),
    "out_dims one for a list": lambda m: m(lambda x: [x, x], out_dims=1)(x3)[1],
    "a bool tensor": lambda m: m(lambda x: x > 0)(x3),
    "complex": lambda m: m(lambda x: torch.fft.fft(x))(x3),
    "nested": lambda m: m(m(torch.sin))(x3),
    "expanded input": lambda m: m(torch.sin)(x3[:1].expand(3, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_accepted_as_torch_does(name: str) -> None:
    assert_equal(RIGHT[name](vmap), RIGHT[name](torch.vmap))


def test_signature_is_kept() -> None:
    def documented(x: torch.Tensor) -> torch.Tensor:
        """What it says."""
        return x

    mapped = vmap(documented)
    assert mapped.__name__ == "documented" and mapped.__doc__ == "What it says."


@pytest.mark.parametrize("fill", ["normal_", "random_", "bernoulli_"])
def test_same_from_a_generator_that_is_given(fill: str) -> None:
    generator = torch.Generator().manual_seed(5)
    fills = lambda t: getattr(t, fill)(generator=generator)  # noqa: E731 # one line, as its name says
    out = vmap(fills, randomness="same")(torch.empty(4, 20))
    expected = getattr(torch.empty(20), fill)(generator=torch.Generator().manual_seed(5))
    assert torch.equal(out, expected.expand(4, 20))
    after = torch.Generator().manual_seed(5)
    getattr(torch.empty(20), fill)(generator=after)
    assert torch.equal(generator.get_state(), after.get_state())


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_same_in_all_chunks(chunk_size: int) -> None:
    torch.manual_seed(3)
    out = vmap(lambda x: x + torch.rand(2), randomness="same", chunk_size=chunk_size)(torch.zeros(5, 2))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(out, torch.rand(2).expand(5, 2))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("batched", [True, False])
def test_same_from_a_generator_that_is_given_in_a_run_by_members(batched: bool) -> None:
    """Twice, as it is remembered that the members part ways."""

    def drawn(x: torch.Tensor) -> torch.Tensor:
        assert x.item() >= 0
        like = torch.zeros(20) + x if batched else torch.empty(20)
        return torch.stack([like.normal_(generator=generator), torch.rand(20, generator=generator), torch.rand(20)])

    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = vmap(drawn, randomness="same")(torch.arange(4.0))
        after = generator.get_state(), torch.get_rng_state()
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(3)
        assert torch.equal(out, drawn(torch.tensor(0.0)).expand(4, 3, 20))
        assert all(map(torch.equal, after, (generator.get_state(), torch.get_rng_state())))


def test_where_members_part_ways_is_remembered_for_one_kind_of_randomness() -> None:
    """Under "different" they draw into what all share, under "same" they do not part."""
    fill = lambda shared, x: shared.normal_() * x  # noqa: E731 # one line of code, by which it is remembered
    for randomness, retreats in (("different", True), ("same", False)) * 2:
        with warnings.catch_warnings(), trace.recording() as record:
            warnings.simplefilter("ignore")
            vmap(fill, in_dims=(None, 0), randomness=randomness)(torch.empty(20), torch.ones(4))
        assert any(entry.path == "retreat" for entry in record.entries.values()) == retreats
