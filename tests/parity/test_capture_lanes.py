"""Chunks on separate cores: the same training, whatever each thread's own settings are."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from memberwise.capture import chunks, compile, plan
from memberwise.capture.into import writing_into
from memberwise.capture.lanes import in_lanes
from memberwise.capture.program import Like
from tests.parity.test_capture import INPUTS, KINDS, training
from tests.parity.test_capture_chunks import Clock, as_if_compiled
from tests.parity.twins import assert_same


def _everywhere(work: Any, lanes: int = 2) -> list[Any]:
    """What `work` gives in each lane."""
    found: list[Any] = [None] * lanes
    met = threading.Barrier(lanes)

    def once(k: int) -> None:
        met.wait()  # so that no lane takes two
        found[k] = work()

    in_lanes(lanes, once, lanes)
    return found


@pytest.mark.usefixtures("two_threads")
def test_a_lane_has_one_thread_and_the_others_keep_theirs() -> None:
    assert _everywhere(torch.get_num_threads) == [1, 1]
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [2]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("work", ["conv", "bmm", "pointwise"])
def test_kernels_run_in_lanes(work: str) -> None:
    """One that waits for as many threads as it was told of would wait for ever."""
    x = torch.randn(4, 64, 3, 28, 28)
    weight = torch.randn(6, 3, 5, 5)
    found: list[Any] = [None] * 4

    def run(k: int) -> None:
        if work == "conv":
            options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            out = torch.conv2d(x[k], weight)
            found[k] = torch.ops.aten.convolution_backward(out, x[k], weight, [6], *options, [True, True, True])
        elif work == "bmm":
            found[k] = (torch.bmm(x[k].flatten(0, 1), x[k].flatten(0, 1)),)
        else:
            found[k] = (x[k].exp(), x[k].sum())

    in_lanes(2, run, 4)
    lanes = list(found)
    torch.set_num_threads(1)
    for k in range(4):
        run(k)
        torch.testing.assert_close(lanes[k], found[k])


def test_lanes_compute_as_the_thread_that_waits() -> None:
    def settings() -> tuple[bool, bool, bool]:
        tiny = torch.full((4,), 1e-40)
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), bool((tiny * 1.0 == 0).all())

    assert _everywhere(settings) == [(False, False, False)] * 2
    with torch.inference_mode():
        assert _everywhere(settings) == [(True, False, False)] * 2
    if torch.set_flush_denormal(True):
        try:
            assert _everywhere(settings) == [(False, False, True)] * 2
        finally:
            torch.set_flush_denormal(False)
        assert _everywhere(settings) == [(False, False, False)] * 2


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_chunk_runs_once(count: int) -> None:
    done: list[int] = []
    in_lanes(3, done.append, count)
    assert sorted(done) == list(range(count))


def test_an_error_in_a_lane_is_raised_once_all_have_ended() -> None:
    done: list[int] = []

    def work(k: int) -> None:
        if k == 1:
            raise ValueError("chunk 1")
        done.append(k)

    with pytest.raises(ValueError, match="chunk 1"):
        in_lanes(2, work, 5)
    assert sorted(done) == [0, 2, 3, 4]
    in_lanes(2, done.append, 1)


def test_lanes_may_be_shared_by_threads() -> None:
    sums = [0, 0]

    def caller(own: int) -> None:
        for _ in range(50):
            parts = [0] * 5
            in_lanes(2, lambda k, parts=parts: parts.__setitem__(k, k + own), 5)
            sums[own] += sum(parts)

    threads = [threading.Thread(target=caller, args=(own,)) for own in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sums == [50 * 10, 50 * 15]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "members", "lanes"), [(1, 5, 2), (2, 5, 2), (2, 4, 2), (1, 4, 3), (2, 7, 3)])
def test_each_kind_trains_the_same(
    kind: str, size: int, members: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all chunks fill lanes, some are left, or members are left over."""
    monkeypatch.setattr(plan.Planner, "chunks", lambda self, told: self.of(self.prepared(told), lanes))
    rounds: list[int] = []

    def noted(lanes: int, work: Any, count: int) -> None:
        rounds.append(count)
        in_lanes(lanes, work, count)

    monkeypatch.setattr(chunks, "in_lanes", noted)
    x, worlds = INPUTS[kind][1](), []
    for chunk in (10**6, size):
        torch.manual_seed(0)
        world = training(kind, "adamw" if kind == "mlp" else "sgd", members=members)
        captured = compile(world.step, chunk=chunk, backend="fx")
        worlds.append(([captured(x) for _ in range(4)], world))
    assert_same(worlds[1][0], worlds[0][0], "returned", exact=False)
    assert_same(worlds[1][1], worlds[0][1], "world", exact=False)
    full = members // size // lanes * lanes
    assert rounds == [full] * len(rounds) and len(rounds) >= 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("seconds", "size", "lanes"),
    [
        ({"of_1": 0.9, "of_1_on_2": 0.5, "of_2_on_2": 0.6}, 1, 2),
        ({"of_1": 0.9, "of_1_on_2": 0.5, "of_2_on_2": 0.4}, 2, 2),
        ({"of_1": 0.9, "of_1_on_2": 1.4, "of_2_on_2": 1.4, "of_2": 0.95}, 1, 1),
        ({"of_1": 1.1, "of_1_on_2": 1.4, "of_2_on_2": 1.4}, 0, 1),
    ],
)
@pytest.mark.chooses
def test_the_plan_tries_both(
    seconds: dict[str, float], size: int, lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(plan.Planner, "_seconds", Clock(whole=1.0, **seconds))
    texts = []
    for _ in range(2):  # the second time as remembered
        torch.manual_seed(0)
        captured = compile(training("mlp", "sgd", members=4).step, backend="fx").captured
        as_if_compiled(captured, monkeypatch)
        for _ in range(4):
            captured((INPUTS["mlp"][1](),), {})
        run = captured.programs[0].run
        assert isinstance(run, chunks.Chunks) == bool(size)
        assert not size or (run.size, run.lanes) == (size, lanes)
        texts.append(captured.plans[0])
    assert texts[1] == f"{texts[0]}, as measured before"
    assert texts[0].startswith(str(plan.Candidate(size, lanes)))


def _two_results() -> fx.GraphModule:
    """x + 1, halved in place after it was returned; its transpose; and x itself."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    more = graph.call_function(torch.ops.aten.add.Tensor, (x, 1.0))
    turned = graph.call_function(torch.ops.aten.t.default, (more,))
    graph.call_function(torch.ops.aten.mul_.Tensor, (more, 0.5))
    graph.output((more, turned, x, more))
    return fx.GraphModule({}, graph)


def test_results_are_written_once_they_are_final() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    into = [torch.full(shape, -1.0) for shape in ((2, 3), (3, 2), (2, 3), (2, 3))]
    assert writing_into(_two_results())(x, *into) == ()
    for ours, theirs in zip(into, _two_results()(x), strict=True):
        assert torch.equal(ours, theirs)


def test_no_results_and_no_operations() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((x,))
    into = torch.zeros(2)
    writing_into(fx.GraphModule({}, graph))(torch.ones(2), into)
    assert torch.equal(into, torch.ones(2))
    empty = fx.Graph()
    empty.placeholder("x")
    empty.output(())
    assert writing_into(fx.GraphModule({}, empty))(torch.ones(2)) == ()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3).t(),
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(1, 3).expand(2, 3),
        torch.zeros(4, 6)[:, ::2],
    ],
)
def test_another_tensor_like_it_lies_as_a_copy_does(tensor: torch.Tensor) -> None:
    other = Like.of(tensor).empty()
    assert (other.shape, other.stride(), other.dtype) == (
        tensor.shape,
        torch.empty_like(tensor).stride(),
        tensor.dtype,
    )
