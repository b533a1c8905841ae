"""Operations that may run in more than one way.

Eagerly a rule takes the way that its own estimate says. A recorded step is planned: the recording notes which
operations had a choice, and the plan may have it recorded anew with another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Choices(threading.local):
    """Of one thread.

    Attributes:
        asked: the ways beside the usual one, by operation, since somebody wanted to know.
        taken: the way of each operation that shall not run as usual.
    """

    def __init__(self) -> None:
        self.asked: dict[str, tuple[str, ...]] | None = None
        self.taken: dict[str, str] = {}


_choices = _Choices()


def way(operation: str, usual: str, *others: str) -> str:
    """How an operation is recorded now."""
    if _choices.asked is not None:
        _choices.asked[operation] = others
    return _choices.taken.get(operation, usual)


@contextmanager
def noted() -> Iterator[dict[str, tuple[str, ...]]]:
    """Which operations have a choice within the block, and what it is beside the usual way.

    >>> with noted() as asked:
    ...     way("layer", "as one", "by parts")
    'as one'
    >>> asked
    {'layer': ('by parts',)}
    """
    before, _choices.asked = _choices.asked, {}
    try:
        yield _choices.asked
    finally:
        _choices.asked = before


@contextmanager
def taking(**ways: str) -> Iterator[None]:
    """Within the block, these operations run so.

    >>> with taking(layer="by parts"):
    ...     way("layer", "as one", "by parts")
    'by parts'
    """
    before, _choices.taken = _choices.taken, {**_choices.taken, **ways}
    try:
        yield
    finally:
        _choices.taken = before
