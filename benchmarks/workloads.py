"""The table of workloads: W1 to W12 against every rival installed, with memory, kernels, the floor and a plot.

python -m benchmarks.workloads               all rows, into results/workloads.json, row by row
python -m benchmarks.workloads --resume      the rows that are not there yet
python -m benchmarks.workloads W3 'W7-*'     some rows, printed only
python -m benchmarks.workloads W3 --again    the same, in place of what results/workloads.json has of them
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, plot, row, run, schema, summary, timing, worker
from benchmarks.cases import WORKLOADS
from benchmarks.rivals import RIVALS

PACE = timing.Pace(rounds=20, block_s=0.03, budget_s=8.0)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workloads", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a workload (W3), a row, or a pattern; all if none")
    parser.add_argument("--rivals", nargs="+", default=["*"], metavar="RIVAL", help="names or patterns")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: results/workloads-cuda.json, one thread")
    parser.add_argument("--threads", nargs="+", type=int, help="on a CPU as many as there are cores, if none are named")
    run.add_pace(parser, PACE)
    parser.add_argument("--steps", type=int, default=row.Request.check_steps, help="steps that are checked, at most")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that rivals side by side may hold")
    parser.add_argument("--row", type=float, default=2400.0, help="seconds of a row, after which no rival is started")
    parser.add_argument("--cache", help="a folder that keeps compiled code; without, all starts are cold")
    parser.add_argument("--members", type=int, help="only rows with at most so many members")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file that are measured already")
    parser.add_argument("--again", action="store_true", help="measure these rows anew, and keep the others of the file")
    parser.add_argument("--out", type=Path, help="the results file; without ROWs or RIVALs results/workloads.json")
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    options.threads = options.threads or [(os.cpu_count() or 1) if on_cpu else 1]
    whole = not options.rows and options.rivals == ["*"] and options.members is None
    if options.out is None and (whole or options.again):
        options.out = run.RESULTS / ("workloads.json" if on_cpu else f"workloads-{options.device}.json")
    return options


def requests_of(options: argparse.Namespace) -> list[row.Request]:
    """One for each row and thread count; the check in float64 is with the fewest members of each case."""
    rows = {f"{case.name}-{members}": (case, members) for case in WORKLOADS for members in case.members}
    names = {name: {name, case.name, case.workload} for name, (case, _) in rows.items()}
    known = sorted(set().union(*names.values()))
    for pattern in options.rows:
        if not fnmatch.filter(known, pattern):
            raise SystemExit(f"nothing is called {pattern!r}; there are {', '.join(known)}")
    return [
        row.Request(
            case.name,
            members,
            threads=threads,
            rivals=tuple(run.matching(list(RIVALS), options.rivals)),
            pace=timing.Pace(options.rounds, options.block, options.budget),
            start_s=options.start,
            check_steps=options.steps,
            exact=options.exact and threads == options.threads[0] and members == min(case.members),
            device=options.device,
            costs=True,
            exact_members=EXACT_MEMBERS,
            memory_gib=options.memory,
            row_s=options.row,
            cache=options.cache,
        )
        for name, (case, members) in rows.items()
        if not options.rows or any(fnmatch.filter(names[name], pattern) for pattern in options.rows)
        if options.members is None or members <= options.members
        for threads in options.threads
    ]


EXACT_MEMBERS = 3
"""In float64 every element is compared; that a fourth member is treated like the third shows in float32."""


def document_of(options: argparse.Namespace, rows: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    document = run.document_of(options, rows, before)
    settings = {
        **document["settings"],
        "exact_members": EXACT_MEMBERS,
        "memory_gib": options.memory,
        "row_s": options.row,
        "cold": options.cache is None,
    }
    more = {"kind": "workloads", "settings": settings, "break_even": schema.break_even(rows)}
    return {**document, **more, "versions": machine.versions(("jax", "tensordict"))}


def before_it(options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a results file that is to be gone on with; it must be of this machine and these settings."""
    if not options.resume and not options.again:
        return {}
    if options.out is None:
        raise SystemExit("--resume goes on with a results file: name it with --out, or leave ROW and --rivals out")
    if not options.out.exists():
        return {}
    document = json.loads(options.out.read_text())
    if wrong := schema.problems(document):
        raise SystemExit("\n".join([f"{options.out.name} is no results file:", *wrong]))
    ours = document_of(options, [], machine.machine(options.device))
    differs = [key for key in ("settings", "versions") if _known(ours[key]) != _known(document[key])]
    differs += [
        key for key in ("processor", "cores", "accelerator") if ours["machine"][key] != document["machine"][key]
    ]
    if differs:
        raise SystemExit(f"{options.out.name} differs in {', '.join(differs)}: start anew, without --resume")
    return {(each["row"], each["threads"]): each for each in document["rows"]}


def _known(versions: dict[str, Any]) -> dict[str, Any]:
    """Without the commit, which each row tells for itself."""
    return {key: value for key, value in versions.items() if key != "commit"}


def measured(request: row.Request, measure: run.Measure) -> dict[str, Any]:
    """The row, and when and from what it was measured."""
    load = machine.machine()["load_before"]
    told = {"date": datetime.date.today().isoformat(), "commit": machine.commit(), "load_before": load}
    return {**measure(request), "measured": told}


def wrong_in(rows: list[dict[str, Any]]) -> list[str]:
    """Where ours differs from the loop. A rival that does (a compiler's fault in torch, say) is a line of the table."""
    return [
        f"{each['row']}, {figure['rival']}: {figure['why']}"
        for each in rows
        for figure in each["figures"]
        if figure["status"] == "wrong" and figure["family"].startswith("memberwise")
    ]


def show(document: dict[str, Any], console: Console) -> None:
    for cells in (summary.costs(document), summary.even(document)):
        run.print_cells(cells, console)
    console.print(summary.origin(document), *summary.notes(document), sep="\n", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None, measure: run.Measure = worker.measure) -> None:
    """Measure, print, write after each row; ends with code 1 if a check of ours was red."""
    options, console = options_of(argv), Console()
    before = machine.machine(options.device)
    if before["load_before"] > 0.5:
        console.print(f"[yellow]this machine is busy (load {before['load_before']}): figures will be rough[/]")
    held, requests, red = before_it(options), requests_of(options), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=len(requests))
        for request in requests:
            progress.update(task, description=f"{request.name}, {request.threads} threads")
            key = request.name, request.threads
            if key not in held or options.again:
                try:
                    held[key] = measured(request, measure)
                except row.Red as error:
                    held.pop(key, None)
                    red.append(str(error))
                    console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
                if options.out is not None and held:
                    run.write(document_of(options, list(held.values()), before), options.out)
            progress.advance(task)
    document = document_of(options, list(held.values()), before)
    show(document, console)
    if options.out is not None and held:
        plot.draw(document, options.out.with_suffix(".png"))
        console.print(f"written: {os.path.relpath(options.out)} and its plot")
    if red := red + wrong_in(document["rows"]):
        raise SystemExit("\n".join(["without a figure, for a process that ended or a training that is wrong:", *red]))


if __name__ == "__main__":
    main()
