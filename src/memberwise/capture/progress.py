"""A line on a terminal that says what is being compiled, and for how long; elsewhere nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_shown: list[Any] = []


@contextmanager
def compiling() -> Iterator[None]:
    """While this lasts, `told` is shown, with the seconds so far; the line is gone when it ends."""
    if not sys.stderr.isatty() or _shown:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        _shown.append((progress, progress.add_task("memberwise: compiling a step", total=None)))
        try:
            yield
        finally:
            _shown.pop()


def told(what: str, done: int | None = None, total: int | None = None) -> None:
    """What is under way now, and how much of it is done."""
    for progress, task in _shown:
        progress.update(task, description=f"memberwise: {what}", completed=done or 0, total=total)
