"""What a call takes is told by a part of it: of steps that are alike by one, of chunks by some after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from memberwise.capture import clock
from memberwise.capture.chunks import Chunks, Result, Source
from memberwise.capture.clock import Clock
from memberwise.capture.program import Like

MEMBERS, STEPS = 10, 3


class Seconds:
    """Time that passes when something runs, one second each; and which members ran."""

    def __init__(self) -> None:
        self.ran: list[list[int]] = []

    def __call__(self) -> float:
        return float(len(self.ran))

    def run(self, x: torch.Tensor, *into: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.ran.append(x.tolist())
        for each in into:
            each.copy_(x)
        return () if into else (x + 0,)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    seconds = Seconds()
    monkeypatch.setattr(clock.time, "perf_counter", seconds)
    return seconds


def _chunks(run: Callable[..., object], size: int) -> Chunks:
    like = Like.of(torch.arange(MEMBERS))
    rest = run if MEMBERS % size else None
    return Chunks(run, rest, size, [Source(0, 0)], [Result(like, 0)])  # type: ignore[arg-type] # returns nothing


def _clock(run: Callable[..., object]) -> Clock:
    return Clock(run, [[torch.arange(MEMBERS)]] * STEPS, (), lambda: None)  # type: ignore[arg-type] # of no result


def test_all_at_once_runs_one_step_of_several(passed: Seconds) -> None:
    timed = _clock(passed.run)
    assert [timed.seconds(), timed.seconds()] == [STEPS, STEPS]
    assert passed.ran == [list(range(MEMBERS))] * 2


@pytest.mark.parametrize(("size", "piece", "chunks"), [(1, 2.0 * STEPS, 2), (2, 1.0, 1), (3, 1.0, 1)])
def test_of_long_calls_some_chunks_run_each_time_the_next(
    size: int, piece: float, chunks: int, passed: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "PIECE", piece)
    timed, all_chunks = _clock(_chunks(passed.run, size)), list(torch.arange(MEMBERS).split(size))
    count = MEMBERS // size  # those of members left over stand for no other
    found = [timed.seconds() for _ in range(2 * count)]
    assert found == pytest.approx([STEPS * MEMBERS / size] * len(found))
    begins = itertools.cycle(range(0, count - chunks + 1, chunks))
    next(begins)  # to tell how many are enough
    turns = [next(begins) for _ in found]
    expected = [all_chunks[0], *(all_chunks[turn + k] for turn in turns for k in range(chunks))]
    assert passed.ran == [members.tolist() for members in expected for _ in range(STEPS)]


def test_short_calls_run_whole(passed: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "PIECE", 6.0 * STEPS)
    timed = _clock(_chunks(passed.run, 1))
    assert [timed.seconds(), timed.seconds()] == [STEPS * MEMBERS] * 2
    assert len(passed.ran) == STEPS * (1 + 2 * MEMBERS)
