"""A stack goes through any sequence of what modules go through, next to a list of models that does the same.

`make check-fuzz ARGS="--sequences 5000"` runs many more of them.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from survey.fuzz import sequences
from survey.fuzz.sequences import ACTIONS, History


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from([*ACTIONS]), st.integers(0, 63)), min_size=1, max_size=8),
    parts=st.booleans(),
)
def test_any_sequence(size: int, actions: list[tuple[str, int]], parts: bool) -> None:
    sequences.check(History(size, tuple(actions), parts))


def test_a_history_survives_json() -> None:
    history = History(2, (("call", 3), ("to", 1)), parts=True)
    assert History.from_json(history.to_json()) == history


def test_a_stack_that_comes_apart_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An action that only the models go through."""
    monkeypatch.setitem(ACTIONS, "step", lambda pair, seed: (pair[0], sequences.trained(pair, seed)[1][::-1]))
    kind, what = sequences.compared(History(2, (("step", 0),)))
    assert kind == sequences.WRONG
    assert "layers.0.weight" in what
