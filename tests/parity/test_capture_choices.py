"""An operation that can run in more than one way gives the same in each, recorded and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.capture import chunks, compile, plan
from memberwise.engine.choices import noted, taking, way
from tests.parity.test_capture_chunks import as_if_compiled
from tests.parity.twins import assert_same


class Reader(nn.Module):
    """Two layers, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _training(members: int) -> tuple[memberwise.Stack[Reader], object]:
    stack = memberwise.build(Reader, seeds=range(members))
    opt = optim.SGD(stack.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        losses = stack(x).square().mean((1, 2))
        losses.sum().backward()
        opt.step()
        return losses

    return stack, step


@pytest.mark.chooses
@pytest.mark.parametrize("members", [4, 5])
@pytest.mark.parametrize("size", [1, 2])
def test_a_recorded_lstm_runs_by_calls(members: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks: the library's kernel once a member, whose gradients and states are those of the cells."""
    monkeypatch.setattr(plan.Planner, "chunks", lambda self, told, *_: self.of(self.prepared(told, "lstm by calls"), 1))
    x, found = torch.randn(4, 6, 3), []
    for chunk in (members + 1, size):
        stack, step = _training(members)
        captured = compile(step, chunk=chunk, backend="fx")  # type: ignore[arg-type] # of one tensor
        losses = [captured(x) for _ in range(5)]
        assert captured.captured.replayed == 3  # the second call finds gradients, and is recorded too
        found.append(({"losses": losses}, stack.state_dict()))
    run = captured.captured.programs[0].run
    assert isinstance(run, chunks.Chunks)
    assert "lstm_layer_backward" in str(run.run.__self__.graph)
    assert captured.captured.programs[0].choices == {"lstm": ("by calls",)}
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_same(ours, theirs, "by calls", exact=False)


@pytest.mark.chooses
def test_the_plan_takes_the_faster_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def seconds(self: object, *runs: object, **rounds: int) -> list[float]:
        return [0.5 if "lstm_layer" in str(getattr(run, "run", "") and run.run.__self__.graph) else 1.0 for run in runs]

    monkeypatch.setattr(plan.Planner, "_seconds", seconds)
    texts = []
    for _ in range(2):  # the second time as remembered
        _, step = _training(4)
        captured = compile(step, backend="fx").captured  # type: ignore[attr-defined] # of the function
        as_if_compiled(captured, monkeypatch)
        for _ in range(3):
            captured((torch.randn(4, 6, 3),), {})
        texts.append(captured.plans[0])
    assert texts[0].startswith("one at a time, lstm by calls: ")
    assert texts[1] == f"{texts[0]}, as measured before"


def test_ways_end_with_their_block() -> None:
    with taking(lstm="by calls"), noted() as asked:
        assert way("lstm", "by cells", "by calls") == "by calls"
        assert way("other", "this", "that") == "this"
    assert asked == {"lstm": ("by calls",), "other": ("that",)}
    assert way("lstm", "by cells", "by calls") == "by cells"


def test_doubles_have_no_choice() -> None:
    stack = memberwise.build(Reader, seeds=range(2), dtype=torch.float64)
    captured = compile(lambda x: stack(x).square().mean((1, 2)).detach(), backend="fx").captured  # type: ignore[attr-defined] # of the function
    captured((torch.randn(4, 6, 3, dtype=torch.float64),), {})
    assert captured.programs[0].choices == {}
