"""Selection as an operation: what it does to any state, and to itself."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memberwise.members import positions, select

MEMBERS = 5


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=2)
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.int64])
    return st.builds(
        lambda shape, dtype, seed: torch.randint(
            0, 100, (MEMBERS, *shape), generator=torch.Generator().manual_seed(seed)
        ).to(dtype),
        shapes,
        dtypes,
        st.integers(0, 9),
    )


def states() -> st.SearchStrategy[Any]:
    neutral = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.booleans())
    return st.recursive(
        st.one_of(tensors(), neutral),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=6,
    )


INDICES = st.lists(st.integers(-MEMBERS, MEMBERS - 1), min_size=1, max_size=7)


def expected(state: Any, indices: list[int]) -> Any:
    """The same, in one breath."""
    if isinstance(state, torch.Tensor):
        return torch.stack([state[i] for i in indices])
    if isinstance(state, dict):
        return {key: expected(value, indices) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(expected(value, indices) for value in state)
    return state


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype is second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


@settings(deadline=None, max_examples=40)
@given(states(), INDICES)
def test_any_state(state: Any, indices: list[int]) -> None:
    found = select((torch.arange(MEMBERS), state), indices)
    assert equal(found[1], expected(state, indices))
    assert found[0].tolist() == [i % MEMBERS for i in indices]


@settings(deadline=None, max_examples=40)
@given(states(), st.data())
def test_selecting_twice_is_selecting_once(state: Any, data: st.DataObject) -> None:
    anchored = [torch.arange(MEMBERS), state]
    first = data.draw(INDICES)
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=5))
    twice = select(select(anchored, first), second)
    assert equal(twice, select(anchored, [first[i] for i in second]))


@settings(deadline=None, max_examples=40)
@given(states())
def test_selecting_all_changes_nothing(state: Any) -> None:
    anchored = [torch.arange(MEMBERS), state]
    assert equal(select(anchored, range(MEMBERS)), anchored)


@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
def test_bools_are_the_indices_of_the_true_ones(chosen: list[bool]) -> None:
    assert positions(chosen, len(chosen)).tolist() == [i for i, keep in enumerate(chosen) if keep]
