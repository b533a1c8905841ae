"""A results file as Markdown, on the terminal or into a page.

    python -m benchmarks.render benchmarks/results/table.json
    python -m benchmarks.render benchmarks/results/table.json --into README.md

A page says where by the two lines of `MARKS`; what stands between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import schema, summary

MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def markdown(document: dict[str, Any]) -> str:
    """The document's table, losses in bold, with where it comes from and what is missing in it."""
    if document["kind"] == "overhead":
        return "\n".join(_rows(summary.overhead(document))) + "\n"
    lines = [*_rows(summary.times(document)), "", *_rows(summary.ratios(document)), "", summary.origin(document)]
    return "\n".join([*lines, *(f"\n{note}" for note in summary.notes(document))]) + "\n"


def _rows(cells: list[list[str]]) -> list[str]:
    heading, *rows = [[_bold(cell) for cell in row] for row in cells]
    rule = ["---", *("---:" for _ in heading[1:])]
    return ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]


def _bold(cell: str) -> str:
    return re.sub(r"^(.*) LOSS$", r"**\1 slower**", cell)


def into(page: str, text: str) -> str:
    """The page with `text` between its marks.

    >>> print(into("a\\n<!-- benchmarks: begin -->\\nold\\n<!-- benchmarks: end -->\\nz", "new"))
    a
    <!-- benchmarks: begin -->
    new
    <!-- benchmarks: end -->
    z
    """
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold the lines {begin!r} and {end!r} once each")
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n{text.rstrip()}\n{end}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description="Results as Markdown.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="replace what stands between the page's marks")
    options = parser.parse_args(argv)
    document = json.loads(options.results.read_text())
    if wrong := schema.problems(document):
        raise SystemExit("\n".join([f"{options.results} is no results file:", *wrong]))
    text = markdown(document)
    if options.into is None:
        print(text)
    else:
        options.into.write_text(into(options.into.read_text(), text))


if __name__ == "__main__":
    main()
