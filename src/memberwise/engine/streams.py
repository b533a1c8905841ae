"""The global random stream during a call: alone it is the member's own, which the function may set, save and put back.

`torch.manual_seed` and its kin are no operations that a dispatch sees. So the call looks, at each draw and at its end,
whether the global stream stands where the call has left it; if not, the function moves the stream itself, and runs
member by member, where the global stream is the member's.
"""

from __future__ import annotations

from memberwise.generators import global_generators, state_as_value, state_of


class GlobalStreams:
    """The global generators as a call found them.

    Args:
        apart: whether the members draw from streams of their own; then the global ones show a mark, another after
            each draw, so that a state saved before the draw and put back after it is seen.
    """

    __slots__ = ("_apart", "_expected", "_found", "_generators", "_marks")

    def __init__(self, apart: bool) -> None:
        self._apart = apart
        self._marks = 0
        self._generators = global_generators()
        self._found = [generator.get_state() for generator in self._generators]
        self._expected: list[bytes] | None = None

    def moved(self) -> bool:
        """Whether something else than a draw of the call has moved them."""
        if self._expected is None:
            self._expected = [*map(state_as_value, self._found)]
        return [*map(state_of, self._generators)] != self._expected

    def moved_at_the_end(self) -> bool:
        """The same, where all draws are made: what a call without draws sets is set M times in a loop, too."""
        return (self._apart or self._expected is not None) and self.moved()

    def drawn(self) -> None:
        """The call has drawn."""
        if self._apart:
            self._marks += 1
            for generator in self._generators:
                generator.manual_seed(self._marks)
        self._expected = [*map(state_of, self._generators)]

    def put_back(self) -> None:
        """As the call found them."""
        for generator, state in zip(self._generators, self._found, strict=True):
            generator.set_state(state)

    def close(self) -> None:
        """At the end of the call: draws from the members' streams have left no trace in the global ones."""
        if self._marks:
            self.put_back()


MOVED = "the function sets the global random stream, which alone is the member's"
