"""The first table: its cases against its rivals, checked, timed and written down.

python -m benchmarks.run                     all rows, into results/table.json
python -m benchmarks.run 'mlp-*' lstm-16     some rows, printed only
python -m benchmarks.run --help
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, row, schema, summary, timing, worker
from benchmarks.cases import CASES, FIRST
from benchmarks.rivals import FIRST as FIRST_RIVALS
from benchmarks.rivals import RIVALS

RESULTS = Path(__file__).parent / "results"
Measure = Callable[[row.Request], dict[str, object]]


def add_pace(parser: argparse.ArgumentParser, pace: timing.Pace) -> None:
    """What both commands ask of how long, and how closely, is measured."""
    parser.add_argument("--rounds", type=int, default=pace.rounds)
    parser.add_argument("--block", type=float, default=pace.block_s, help="seconds of a rival in a round")
    parser.add_argument("--budget", type=float, default=pace.budget_s, help="seconds of a rival in a row")
    parser.add_argument("--start", type=float, default=row.Request.start_s, help="seconds of a rival's start")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="check in float64 as well")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    pace = timing.Pace()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="names or patterns, e.g. 'mlp-*'; the first table's if none"
    )
    parser.add_argument("--rivals", nargs="+", metavar="RIVAL", help="names or patterns; the first table's if none")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: results/table-cuda.json, one thread")
    parser.add_argument("--threads", nargs="+", type=int, help="on a CPU 1 and 2, if none are named")
    add_pace(parser, pace)
    parser.add_argument("--steps", type=int, default=row.Request.check_steps, help="steps that are checked")
    parser.add_argument("--out", type=Path, help="the results file; without ROWs or RIVALs results/table.json")
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    options.threads = options.threads or ([1, 2] if on_cpu else [1])
    if options.out is None and not options.rows and options.rivals is None:
        options.out = RESULTS / ("table.json" if on_cpu else f"table-{options.device}.json")
    return options


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The names that a pattern matches, in their own order. A pattern that matches nothing is an error."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"nothing is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, each) for each in patterns)]


def requests_of(options: argparse.Namespace) -> list[row.Request]:
    """One for each row and thread count."""
    cases = CASES.values() if options.rows else FIRST
    rows = {f"{case.name}-{members}": (case.name, members) for case in cases for members in case.members}
    return [
        row.Request(
            *rows[name],
            threads=threads,
            rivals=tuple(matching(list(RIVALS), options.rivals or list(FIRST_RIVALS))),
            pace=timing.Pace(options.rounds, options.block, options.budget),
            start_s=options.start,
            check_steps=options.steps,
            exact=options.exact and threads == options.threads[0],
            device=options.device,
        )
        for name in matching(list(rows), options.rows)
        for threads in options.threads
    ]


def document_of(options: argparse.Namespace, rows: list[dict[str, object]], before: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": schema.VERSION,
        "kind": "table",
        "date": datetime.date.today().isoformat(),
        "machine": before,
        "versions": machine.versions(),
        "settings": {
            "rounds": options.rounds,
            "block_s": options.block,
            "budget_s": options.budget,
            "start_s": options.start,
            "check_steps": options.steps,
            "exact": options.exact,
        },
        "rows": rows,
    }


def write(document: dict[str, Any], path: Path) -> None:
    """Into `path`, samples on one line, if it is a results document."""
    if wrong := schema.problems(document):
        raise SystemExit("\n".join(["not written, this is no results document:", *wrong]))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    path.write_text(re.sub(r"\[[\s\d.,e+-]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def print_cells(cells: summary.Cells, console: Console) -> None:
    heading, *rows = cells
    table = Table()
    for number, column in enumerate(heading):
        table.add_column(column, justify="left" if number == 0 else "right")
    for cells in rows:
        table.add_row(*(f"[red]{cell}[/]" if cell.endswith("LOSS") else cell for cell in cells))
    console.print(table)


def show(document: dict[str, Any], console: Console) -> None:
    print_cells(summary.times(document), console)
    if any(row["ratios"] for row in document["rows"]):
        print_cells(summary.ratios(document), console)
    console.print(summary.origin(document), *summary.notes(document), sep="\n", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None, measure: Measure = worker.measure) -> None:
    """Measure, print, write; ends with code 1, and writes nothing, if any check was red."""
    options, console = options_of(argv), Console()
    before = machine.machine(options.device)
    if before["load_before"] > 0.5:
        console.print(f"[yellow]this machine is busy (load {before['load_before']}): figures will be rough[/]")
    rows, red = [], []
    for request in requests_of(options):
        console.print(f"{request.name}, threads {request.threads} ...", highlight=False)
        try:
            rows.append(measure(request))
        except row.Red as error:
            red.append(str(error))
            console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
    if red:
        raise SystemExit("a rival's training differs from the loop's: no figures")
    document = document_of(options, rows, before)
    show(document, console)
    if options.out is not None:
        write(document, options.out)
        console.print(f"written: {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
