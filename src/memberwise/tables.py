"""Plain tables for a terminal; rich is loaded when one is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A table as text; a column whose name starts with ">" is set flush right.

    >>> print(render("Sums", ["of", ">is"], [["1 and 2", "3"]]))
    Sums
      of        is
     ──────────────
      1 and 2    3
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="", header_style="", pad_edge=True
    )
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=160, color_system=None, record=False, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*(line for line in lines if line), *notes])
