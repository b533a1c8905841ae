"""Put the figures of results files into the pages: no number in them is typed by hand.

    make readme

`demo-output/digits.json`, if it is there, becomes `benchmarks/results/digits.json`, which is committed. README.md gets
the demo's figures and the ratios of the benchmark's table, docs/benchmarks.md the whole of all tables. What has no
results file keeps its words.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("workloads", "workloads-avx2", "overhead")
"""Of docs/benchmarks.md, that are called as their results files are."""
sys.path.insert(0, str(ROOT))

from benchmarks import render, summary  # noqa: E402 they lie beside this folder, not in the environment


def between(page: str, mark: str, text: str) -> str:
    """The page with `text` between the lines of one mark; an error unless it has them once each.

    >>> print(between("a\\n<!-- x: begin -->\\nold\\n<!-- x: end -->\\nb", "x", "new"))
    a
    <!-- x: begin -->
    new
    <!-- x: end -->
    b
    """
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold the marks of {mark!r} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}{text.rstrip()}\n{end}{rest.split(end)[1]}"


def demo(report: dict[str, Any]) -> str:
    """What the demo found, as two tables in Markdown."""
    count, one, alone = report["members"], report["as_one"], report["alone"]
    rows = [
        f"| {name} | {row['best']:.4f} | {row['median']:.4f} | {row['ensemble']:.4f} |"
        for name, row in report["held_out"].items()
    ]
    members = f"`make demo`, on held-out data | best member | median member | ensemble of {count}"
    loop = f"member by member, in plain PyTorch (scaled from {len(alone['members'])})"
    times = [
        f"| {count} members as one stack | {one['seconds']:.1f} s |",
        f"| of it to record and compile the step | {one['seconds_starting']:.1f} s |",
        f"| {loop} | {alone['seconds_scaled']:.1f} s |",
        f"| times as fast, and once the step is compiled | {report['ratio']:.1f}, {report['ratio_of_steps']:.1f} |",
    ]
    where = f"{report['steps']} steps, {_threads(report['threads'])}, torch {report['torch']}"
    return "\n".join([f"| {members} |", "|---|---:|---:|---:|", *rows, "", f"| {where} | |", "|---|---:|", *times])


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def ratios(document: dict[str, Any]) -> str:
    """How many times as fast a step is, row by row."""
    heading, *rows = summary.ratios(document)
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *rows]
    bold = [[re.sub(r"^(.*) LOSS$", r"**\1 slower**", cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in bold)


def fill(page: Path, texts: Mapping[str, Any]) -> None:
    """Write the page with each text, if there is one, at its mark."""
    text = page.read_text()
    for mark, given in texts.items():
        text = between(text, mark, given) if given else text
    page.write_text(text)


def read(name: str) -> dict[str, Any] | None:
    """A results file, if there is one."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    """Fill both pages."""
    if (fresh := ROOT / "demo-output" / "digits.json").exists():
        shutil.copy(fresh, RESULTS / "digits.json")
    found, table = map(read, ("digits.json", "table.json"))
    fill(ROOT / "README.md", {"demo": found and demo(found), "table": table and ratios(table)})
    files = {"benchmarks": table, **{mark: read(f"{mark}.json") for mark in MARKS}}
    whole = {mark: document and render.markdown(document) for mark, document in files.items()}
    fill(ROOT / "docs" / "benchmarks.md", whole)


if __name__ == "__main__":
    main()
