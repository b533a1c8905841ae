"""What is shown while a step is compiled: on a terminal alone."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from memberwise.capture import cache, compile, progress
from tests.parity.test_capture import INPUTS, training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _compiled(error: io.StringIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> str:
    """What is written while a small step is compiled."""

    def compiling(graph: Any, inputs: Any, how: Any) -> Any:
        progress.told("compiling a step, by what repeats", 1, 3)
        return lambda trial: graph.forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_begun", compiling)
    monkeypatch.setattr(sys, "stderr", error)
    world, x = training("mlp", "sgd"), INPUTS["mlp"][1]()
    step = compile(world.step, chunk=10**6)
    for _ in range(4):
        step(x)
    assert not progress._shown
    return error.getvalue()


def test_a_terminal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = _compiled(Terminal(), monkeypatch, tmp_path)
    assert "by what repeats" in text and "1/3" in text


def test_a_file_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert _compiled(io.StringIO(), monkeypatch, tmp_path) == ""


def test_a_failing_compiler_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError), progress.compiling():
        raise RuntimeError
    assert not progress._shown
