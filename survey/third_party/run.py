"""Run the architectures of the survey as stacks and in loops, and write down what came of it.

python -m survey.third_party.run                       all, into survey/results/third_party.json, docs/third_party.md
python -m survey.third_party.run 'GPT-2*' 'BERT*'      some, in place of what is written of them
python -m survey.third_party.run --dry 'GPT-2*'        printed only
python -m survey.third_party.run --help
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import logging
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memberwise.errors import MemberwiseError
from survey import records
from survey.third_party import compare, page
from survey.third_party.case import Case

FAMILIES = ("language", "vision", "graphs", "sequences", "science")
"""One file each, with its CASES."""

VARIANTS = (("train", False), ("train", True), ("eval", False))
"""Modes, and whether the members share their inputs."""

LIMIT_S = 300
"""Seconds for one architecture in one variant."""


def main(argv: list[str] | None = None) -> int:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m survey.third_party.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or patterns; all if none")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--fail", action="store_true", help="show the traceback of what is wrong")
    options = parser.parse_args(argv)
    console = Console()
    cases = _chosen(options.family, options.names)
    found = _survey(cases, console, options.fail)
    if not options.dry:
        _write(found)
        page.write()
    bad = [record for record in found if record.verdict != records.RIGHT]
    console.out(f"{len(found) - len(bad)} of {len(found)} right")
    return 1 if any(record.verdict == records.WRONG for record in found) else 0


def _variants(case: Case) -> list[tuple[str, bool]]:
    return [(mode, shared) for mode, shared in VARIANTS if mode in case.modes]


def _variant(mode: str, shared: bool) -> str:
    return f"{mode}, {'shared' if shared else 'own'} inputs"


def _write(found: list[records.Record]) -> None:
    """Write what was found in place of what is written of the same runs, in the order of the families."""
    cases = [case for _, case in _chosen(FAMILIES, [])]
    known = {(record.name, record.variant): record for record in _written()}
    known |= {(record.name, record.variant): record for record in found}
    of = {case.name: case.package for case in cases}
    kept = [
        known[key] for case in cases for key in ((case.name, _variant(*one)) for one in _variants(case)) if key in known
    ]
    packages = {package: version(package) for package in sorted({*of.values()})}
    records.write("third_party", kept, packages=packages, packages_of=of)


def _written() -> list[records.Record]:
    try:
        return records.read("third_party")[1]
    except FileNotFoundError:
        return []


def _show(record: records.Record, console: Console) -> None:
    console.out(f"{record.verdict}  {record.name}, {record.variant}  {record.code} {record.what}", highlight=False)
    for op, why in record.slow.items():
        console.out(f"       by members: {op}: {why}", highlight=False)


def _chosen(families: list[str], patterns: list[str]) -> list[tuple[str, Case]]:
    cases = [
        (family, case) for family in families for case in importlib.import_module(f"survey.third_party.{family}").CASES
    ]
    names = [case.name for _, case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"nothing is called {pattern!r}; there are {', '.join(names)}")
    return [pair for pair in cases if not patterns or any(fnmatch.fnmatch(pair[1].name, each) for each in patterns)]


def _survey(cases: list[tuple[str, Case]], console: Console, show: bool) -> list[records.Record]:
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(len(_variants(case)) for _, case in cases))
        for _, case in cases:
            for mode, shared in _variants(case):
                variant = _variant(mode, shared)
                progress.update(task, description=f"{case.name}, {variant}")
                record = judged(case, mode, shared, show)
                found.append(replace(record, name=case.name, variant=variant))
                _show(found[-1], console)
                progress.advance(task)
    return found


def judged(case: Case, mode: str, shared: bool, show: bool = False) -> records.Record:
    """One architecture in one variant."""
    start = time.perf_counter()
    with warnings.catch_warnings(), _limited():
        warnings.simplefilter("ignore")
        try:
            models = compare.members(case, mode)
            theirs = compare.in_a_loop(case, compare.copies(models), shared)
        except Exception as error:
            if show:
                traceback.print_exc()
            return records.Record("", "", records.WRONG, "", f"alone: {type(error).__name__}: {_first_line(error)}")
        try:
            ours = compare.stacked(case, compare.copies(models), shared)
            wrong = compare.differences(case, ours, theirs)
            paths, slow = _paths(case, models, shared)
        except MemberwiseError as error:
            if show:
                traceback.print_exc()
            return records.Record("", "", records.REFUSED, error.code, _first_line(error))
        except Exception as error:
            if show:
                traceback.print_exc()
            return records.Record("", "", records.WRONG, "", f"{type(error).__name__}: {_first_line(error)}")
    if show:
        print(*wrong, sep="\n", file=sys.stderr)
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    verdict = records.WRONG if wrong else records.RIGHT
    what = f"{len(wrong)} of {len(theirs.tensors)}: {wrong[0]}" if wrong else ""
    return records.Record("", "", verdict, "", what, paths, slow, samples=case.steps)


def _paths(case: Case, models: Any, shared: bool) -> tuple[dict[str, int], dict[str, str]]:
    rows = compare.explained(case, compare.copies(models), shared).rows
    paths: Counter[str] = Counter()
    for row in rows:
        paths[row.path] += row.count
    return dict(sorted(paths.items())), {row.op: row.reason for row in rows if row.path in records.SLOW}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    raise SystemExit(main())
