"""What repeats in a sequence: the stretches that occur again, longest savings first."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

RIVALS = 32
"""Of so many stretches that save the same (a layer may begin at any of its operations), the best is taken."""


class Repeat(NamedTuple):
    """A stretch of `length` entries that begins at each of `starts`, none over another."""

    length: int
    starts: list[int]

    @property
    def saved(self) -> int:
        """Entries that need not be looked at if the others are known."""
        return (len(self.starts) - 1) * self.length


def repeats(tokens: Sequence[Hashable], shortest: int, least: int, cost: Callable[[Repeat], float]) -> list[Repeat]:
    """Stretches that recur and overlap nowhere, until no other saves `least` entries.

    Args:
        tokens: the sequence; equal entries are alike.
        shortest: entries that a stretch must have.
        least: entries that a repeat must save.
        cost: decides between repeats that save the same: the lowest is taken.

    >>> repeats("abcxabcyabc", 2, 3, lambda repeat: repeat.starts[0])
    [Repeat(length=3, starts=[0, 4, 8])]
    """
    numbers = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    sequence = [numbers[token] for token in tokens]
    found: list[Repeat] = []
    while True:
        candidates = [one for one in _candidates(sequence) if one.length >= shortest and one.saved >= least]
        if not candidates:
            return found
        most = max(repeat.saved for repeat in candidates)
        best = min([repeat for repeat in candidates if repeat.saved == most][:RIVALS], key=cost)
        found.append(best)
        for start in best.starts:  # nothing else is like what is taken
            for k in range(start, start + best.length):
                sequence[k] = -1 - k


def _candidates(sequence: list[int]) -> Iterator[Repeat]:
    """The longest stretch that begins at each set of places that begin alike."""
    order = _suffixes(sequence)
    shared = [*_shared(sequence, order), 0]
    open_at: list[tuple[int, int]] = []  # (length, first place in `order`)
    for k, length in enumerate(shared):
        first = k
        while open_at and open_at[-1][0] > length:
            known, first = open_at.pop()
            yield _apart(known, sorted(order[first : k + 1]))
        if length and (not open_at or open_at[-1][0] < length):
            open_at.append((length, first))


def _apart(length: int, places: list[int]) -> Repeat:
    """Of the places, as many as do not overlap."""
    starts: list[int] = []
    for place in places:
        if not starts or place >= starts[-1] + length:
            starts.append(place)
    return Repeat(length, starts)


def _suffixes(sequence: list[int]) -> list[int]:
    """Where the sequence's ends begin, in their order (by doubling, Manber and Myers 1993)."""
    count, step = len(sequence), 1
    rank = sequence
    order = sorted(range(count), key=rank.__getitem__)
    while step < count:
        keys = [(rank[k], rank[k + step] if k + step < count else -count - 1) for k in range(count)]
        order.sort(key=keys.__getitem__)
        rank = [0] * count
        for before, now in pairwise(order):
            rank[now] = rank[before] + (keys[before] != keys[now])
        if count and rank[order[-1]] == count - 1:
            break
        step *= 2
    return order


def _shared(sequence: list[int], order: list[int]) -> list[int]:
    """How far each end agrees with the next in order (Kasai et al. 2001)."""
    count = len(sequence)
    place = [0] * count
    for k, start in enumerate(order):
        place[start] = k
    shared, length = [0] * max(count - 1, 0), 0
    for start in range(count):
        if place[start] == count - 1:
            length = 0
            continue
        other = order[place[start] + 1]
        while max(start, other) + length < count and sequence[start + length] == sequence[other + length]:
            length += 1
        shared[place[start]] = length
        length = max(length - 1, 0)
    return shared
