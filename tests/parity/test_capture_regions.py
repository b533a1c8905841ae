"""A recording cut into regions computes what it computes whole, to the bit, and what repeats is compiled once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import memberwise
from memberwise import optim
from memberwise.capture import cache, compile, outline, regions
from memberwise.capture.program import Program
from memberwise.capture.regions import Uncut
from memberwise.capture.repeats import repeats
from memberwise.construction import build, stack
from memberwise.testing.tolerance import assert_equal
from tests.parity.test_capture import INPUTS, training

LAYERS = 4


# -- what repeats in a sequence


@given(st.text("ab", max_size=12), st.integers(1, 3))
def test_the_first_repeat_saves_most(text: str, shortest: int) -> None:
    found = repeats(text, shortest, 1, lambda repeat: repeat.starts[0])
    assert (found[0].saved if found else 0) == _most(text, shortest)


@given(st.text("abc", max_size=30))
def test_repeats_are_alike_and_apart(text: str) -> None:
    taken: set[int] = set()
    for repeat in repeats(text, 2, 2, lambda repeat: repeat.starts[0]):
        assert len({text[start : start + repeat.length] for start in repeat.starts}) == 1
        for start in repeat.starts:
            own = set(range(start, start + repeat.length))
            assert not own & taken
            taken |= own


def _most(text: str, shortest: int) -> int:
    """What the best stretch saves: each tried."""
    best = 0
    for length in range(shortest, len(text) + 1):
        for stretch in {text[k : k + length] for k in range(len(text) - length + 1)}:
            best = max(best, (text.count(stretch) - 1) * length)
    return best


# -- a recording, whole and cut


class Blocks(nn.Module):
    """Layers with a norm, dropout, and statistics that are written in place through views."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(LAYERS)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(LAYERS)])
        self.register_buffer("seen", torch.zeros(LAYERS, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            own, other = norm(layer(x)).chunk(2, 1)
            self.seen[k].mul_(0.9).add_(x.detach().mean(0))
            x = nn.functional.dropout(torch.cat([own.tanh(), other.relu()], 1), 0.25, self.training) + x
        return x


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0][:, -1]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "blocks": (Blocks, (8, 4)),
    "encoder": (Encoder, (2, 5, 8)),
    "recurrent": (Recurrent, (2, 12, 3)),
}


def recorded(step: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    captured = compile(step, backend="fx", chunk=10**6)
    for _ in range(3):
        captured(*inputs)
    return captured.captured.programs[0]


def assert_computes_the_same(program: Program, other: fx.GraphModule, calls: int = 2) -> None:
    """`other`, made of a program's recording, gives and writes the same, in memory of the same order."""
    whole, own = program.copies(program.values), program.copies(program.values)
    with torch.no_grad():
        for _ in range(calls):
            expected, found = program.graph.forward(*whole), other.forward(*own)
            for ours, theirs in zip((*found, *own), (*expected, *whole), strict=True):
                assert_equal(ours, theirs)
                assert ours.stride() == theirs.stride()


def step_of(name: str, members: int = 3) -> tuple[Callable[..., Any], torch.Tensor]:
    make, shape = MODELS[name]
    models = build(make, seeds=range(members))
    optimizer = optim.AdamW(models.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        losses = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))(models, x)
        losses.sum().backward()
        memberwise.clip_grad_norm_(models, 1.0)
        optimizer.step()
        return losses.detach()

    return step, torch.randn(shape)


@functools.cache
def program_of(name: str) -> Program:
    """A step's recording, which takes seconds, and which nobody changes."""
    return recorded(*step_of(name))


def _plain(made: list[fx.GraphModule]) -> outline.Begin:
    """A compiler that notes what it is given, and changes nothing."""

    def begun(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        made.append(graph)

        def end(trial: outline.Trial) -> outline.Run:
            graph.forward(*trial())
            return graph.forward

        return end

    return begun


def _cut(program: Program, made: list[fx.GraphModule]) -> tuple[Callable[..., Any], int]:
    end, count = outline.by_regions(program.graph, lambda: program.copies(program.values), _plain(made))
    return end(), count


def assert_the_same(program: Program, run: Callable[..., Any]) -> None:
    """Twice, on copies: the recording, operation by operation, and `run` give and write the same, to the bit."""
    whole, cut = program.copies(program.values), program.copies(program.values)
    for _ in range(2):
        expected, found = program.graph.forward(*whole), run(*cut)
        for ours, theirs in zip((*found, *cut), (*expected, *whole), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small steps, too."""
    monkeypatch.setattr(outline, "CALL", 0.0)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", MODELS)
def test_cut_it_computes_the_same(name: str) -> None:
    program = program_of(name)
    made: list[fx.GraphModule] = []
    run, count = _cut(program, made)
    assert_the_same(program, run)
    assert count >= len(made) + LAYERS, "what repeats is made once"
    operations = sum(node.op == "call_function" for node in program.graph.graph.nodes)
    assert sum(node.op == "call_function" for graph in made for node in graph.graph.nodes) < 0.7 * operations


@pytest.mark.parametrize("joined", [1, 2, 3, 100])
@pytest.mark.parametrize("name", MODELS)
def test_neighbours_that_do_the_same_are_joined(name: str, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "JOINED", (joined,))
    monkeypatch.setattr(outline, "LONG", 0)
    monkeypatch.setattr(outline, "MOST", 1.0)
    program = program_of(name)
    runs = [region.form for region in regions.regions(program.graph.graph)]
    lengths = [len([*run]) for _, run in itertools.groupby(runs)]
    made: list[fx.GraphModule] = []
    run, count = _cut(program, made)
    assert count == sum(math.ceil(length / joined) for length in lengths)
    assert max(lengths) > 2 or name == "blocks"
    assert_the_same(program, run)


@pytest.mark.parametrize(
    ("allowed", "long", "joined"), [(100, 10**6, 1), (9, 10**6, 2), (7, 10**6, 4), (0, 10**6, None), (0, 0, 8)]
)
def test_as_few_are_joined_as_the_step_allows(
    allowed: float, long: int, joined: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of twelve cells, each way; `allowed`: how many calls it has time for."""
    monkeypatch.setattr(outline, "_seconds", lambda *_: (allowed + 0.5) * outline.CALL / outline.SHARE)
    monkeypatch.setattr(outline, "LONG", long)
    monkeypatch.setattr(outline, "MOST", 1.0)
    program = program_of("recurrent")
    if joined is None:
        with pytest.raises(Uncut, match="too much of the step"):
            _cut(program, [])
        return
    assert _cut(program, [])[1] == len(regions.joined(regions.regions(program.graph.graph), joined))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_a_region_gives_on_is_a_view(name: str) -> None:
    """Who writes to it could not tell what else it writes."""
    program = program_of(name)
    for region in regions.regions(program.graph.graph):
        given = [region.nodes[k] for k in region.outputs]
        assert all(region.aliases.base(node) is node for node in given)
        changed = region.written_inputs()
        bases = [region.aliases.base(node) for node in region.inputs]
        assert all(bases.count(bases[k]) == 1 for k in changed), "what is written has one way in"


@pytest.mark.usefixtures("short")
def test_a_tensor_seen_two_ways_and_written_goes_in_whole() -> None:
    state, count = torch.zeros(6, 4), 6

    def step(x: torch.Tensor) -> torch.Tensor:
        for k in range(count):
            for _ in range(8):
                state[k].mul_(0.5).add_(x * state[(k + 1) % count].exp())
                x = (x + state.sum(0)).tanh()
        return x

    program = recorded(step, torch.randn(4))
    made: list[fx.GraphModule] = []
    run, _ = _cut(program, made)
    whole, cut = program.copies(program.values), program.copies(program.values)
    for ours, theirs in zip((*run(*cut), *cut), (*program.graph.forward(*whole), *whole), strict=True):
        assert torch.equal(ours, theirs)


def _squeezing(x: torch.Tensor) -> torch.Tensor:
    for _ in range(40):
        x = (x[None] * 2).squeeze_(0).tanh()
    return x


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x: x.tanh() * 2, "nothing in it repeats"),
        (_squeezing, "another shape in place"),
    ],
)
def test_what_is_not_cut(step: Callable[..., Any], reason: str) -> None:
    with pytest.raises(Uncut, match=reason):
        _cut(recorded(step, torch.randn(3)), [])


def test_a_short_step_is_not_cut() -> None:
    with pytest.raises(Uncut, match="too much of the step"):
        _cut(program_of("blocks"), [])


@pytest.mark.long
@pytest.mark.usefixtures("short")
def test_chunks_of_a_cut_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiler is called: all at once and in chunks, each cut, train alike."""
    counts: list[int] = []

    def cutting(graph: fx.GraphModule, trial: outline.Trial, _: Any) -> tuple[Callable[[], outline.Run], int]:
        end, count = outline.by_regions(graph, trial, _plain([]))
        counts.append(count)
        return end, count

    monkeypatch.setattr(cache, "by_regions", cutting)
    worlds = []
    for chunk, backend in ((10**6, "fx"), (2, "inductor")):
        step, data = step_of("encoder", members=4)
        captured = compile(step, chunk=chunk, backend=backend)
        torch.manual_seed(1)
        worlds.append([captured(torch.ones_like(data)) for _ in range(5)])
    assert counts and captured.captured.plans == ["2 at a time, as told"]
    for ours, theirs in zip(*worlds, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiler_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a message is a reason like any other."""

    def failing(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(cache, "_begun", failing)
    world = training("mlp", "sgd")
    step = compile(world.step)
    x = INPUTS["mlp"][1]()
    step(x), step(x)
    with pytest.warns(memberwise.StackWarning, match=r"AssertionError.*MW501"):
        step(x)
    assert step.captured.refusals[-1].found == "AssertionError"


def test_a_layer_that_was_watched_goes_back_outside() -> None:
    """Recorded, an LSTM runs by cells; its backward, outside of a recording that came to nothing, still knows."""
    models = stack([nn.LSTM(3, 64, batch_first=True) for _ in range(4)])
    x = torch.randn(32, 4, 3)
    with pytest.warns(memberwise.StackWarning, match="needs-graph|graph"):
        out = compile(lambda x: models(x)[0])(x)
    out.square().sum().backward()
    found = [parameter.grad.clone() for parameter in models.parameters()]
    models.zero_grad()
    models(x)[0].square().sum().backward()
    for ours, parameter in zip(found, models.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)
