"""A results file as Markdown: `python -m benchmarks.render benchmarks/results/table.json`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import schema, summary


def markdown(document: dict[str, Any]) -> str:
    """The document's table, losses in bold, with where it comes from and what is missing in it."""
    if document["kind"] == "overhead":
        return "\n".join([*lines_of(summary.overhead(document)), "", summary.origin(document)]) + "\n"
    if document["kind"] == "workloads":
        tables = (summary.times, summary.against, summary.costs, summary.even)
        lines = [line for table in tables for line in (*lines_of(table(document)), "")]
        return "\n".join([*lines, summary.origin(document), *(f"\n{note}" for note in summary.notes(document))]) + "\n"
    lines = [*lines_of(summary.times(document)), "", *lines_of(summary.ratios(document)), "", summary.origin(document)]
    return "\n".join([*lines, *(f"\n{note}" for note in summary.notes(document))]) + "\n"


def lines_of(cells: summary.Cells) -> list[str]:
    """The lines of a Markdown table.

    >>> print("\\n".join(lines_of([["row", "eager / loop"], ["a", "0.80 (0.75-0.84) LOSS"]])))
    | row | eager / loop |
    | --- | ---: |
    | a | **0.80 (0.75-0.84) slower** |
    """
    heading, *rows = [[_bold(cell) for cell in row] for row in cells]
    rule = ["---", *("---:" for _ in heading[1:])]
    return ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]


def _bold(cell: str) -> str:
    return re.sub(r"^(.*) LOSS$", r"**\1 slower**", cell)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description="Results as Markdown.")
    parser.add_argument("results", type=Path)
    options = parser.parse_args(argv)
    document = json.loads(options.results.read_text())
    if wrong := schema.problems(document):
        raise SystemExit("\n".join([f"{options.results} is no results file:", *wrong]))
    print(markdown(document))


if __name__ == "__main__":
    main()
