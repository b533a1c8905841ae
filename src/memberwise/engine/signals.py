"""What a half-done run says to the boundary: go back, and run member by member."""

from __future__ import annotations

from typing import Any, NoReturn

from memberwise.errors import EngineError, fail


class Retreat(BaseException):
    """The members part ways here. A BaseException, so that a user's `except Exception` does not swallow it.

    `whole_checkpoint`: not within the checkpoint that is being made, but around it.
    """

    def __init__(self, reason: str, region: Any = None, *, whole_checkpoint: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.region = region
        self.whole_checkpoint = whole_checkpoint


class Unlowered(Retreat):
    """The call asks for what a lowered tensor cannot give: go back, and run it again with all tensors raised."""


def part_ways(region: Any, what: str) -> NoReturn:
    """Retreat from a running call; afterwards (in its backward) there is no way back, and it is an error."""
    if region.running:
        raise Retreat(what, region)
    fail(EngineError, "MW208", what, do="Keep the value on the device, or run the members one by one")


class Decline:
    """A rule's answer that it does not serve this call; `explain()` prints the reason as it is.

    `by_member` says that torch's batching would not serve it either.
    """

    __slots__ = ("by_member", "reason")

    def __init__(self, reason: str, *, by_member: bool = False) -> None:
        self.reason = reason
        self.by_member = by_member
