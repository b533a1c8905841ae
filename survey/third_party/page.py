"""docs/third_party.md, from survey/results/third_party.json."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from survey import records
from survey.records import Record

PAGE = Path(__file__).parents[2] / "docs" / "third_party.md"

HEAD = """\
# Architectures that others wrote

Each model is made three times from its config, without weights, and run as a stack and in a plain loop: two calls or
more in a row, forward and backward, in training with its draws and in evaluation, with inputs of each member's own and
with shared ones. Right means that outputs (caches and other objects that come out included), gradients of all
parameters and floating inputs, buffers and random streams equal the loop's, in float64 by the one table of tolerances.
Architectures that compute in float32 inside, or take nothing else, are held to float32's row of that table.

`make check-third-party` makes an environment of its own, runs all of it and writes this page. `make check-third-party
ARGS="'GPT-2*'"` runs some. The packages are no dependencies of Memberwise; their versions are pinned in
`survey/third_party/constraints.txt`.

"by rule" and "by torch" count operations of one call and its backward that ran once for all members, by a rule of
Memberwise or by torch's own batching of that operation; "by members" those that ran member by member.
"""


def write() -> Path:
    """Write the page."""
    PAGE.write_text(text())
    return PAGE


def text() -> str:
    """The page as it follows from the results."""
    head, found = records.read("third_party")
    names = dict.fromkeys(record.name for record in found)
    right = [record for record in found if record.verdict == records.RIGHT]
    on = f"{head['machine']['processor']}, torch {head['versions']['torch']}, {head['date']}"
    lines = [HEAD, f"**{len(right)} of {len(found)} runs right, of {len(names)} architectures** ({on}).", ""]
    for package, rows in groupby(found, key=lambda record: head["packages_of"][record.name]):
        lines += [f"## {package} {head['packages'][package]}", ""]
        lines += ["| architecture | verdict | by rule | by torch | by members |", "|---|---|---:|---:|---:|"]
        lines += [_row(name, [*runs]) for name, runs in groupby(rows, key=lambda record: record.name)]
        lines += [""]
    return "\n".join([*lines, *_slow(found)])


def _row(name: str, runs: list[Record]) -> str:
    verdict = records.worst(run.verdict for run in runs)
    if verdict != records.RIGHT:
        verdict = "; ".join(dict.fromkeys(f"{run.verdict} {run.code} ({run.variant})" for run in runs if run.what))
    paths = [max(sum(run.paths.get(path, 0) for path in kind) for run in runs) for kind in _KINDS]
    return " | ".join([f"| {name}", verdict, *map(str, paths)]) + " |"


_KINDS = (("rule",), ("vmap",), records.SLOW)


def _slow(found: Iterable[Record]) -> list[str]:
    """What ran member by member, and why."""
    lines = ["## What runs member by member", "", "| operation or module | why | in |", "|---|---|---|"]
    where: dict[tuple[str, str], list[str]] = {}
    for record in found:
        for op, why in record.slow.items():
            where.setdefault((op.replace("<lambda>", "the whole function"), why.splitlines()[0]), []).append(
                record.name
            )
    for (op, why), names in sorted(where.items()):
        lines.append(f"| `{op}` | {why} | {', '.join(dict.fromkeys(names))} |")
    return [*lines, ""]


if __name__ == "__main__":
    write()
