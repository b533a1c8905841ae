"""docs/coverage.md, from the results of the sweeps: what runs as a stack, by which paths, next to torch.func.

make coverage                       both sweeps, then the page
python -m survey.coverage_page      the page alone
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from survey import records
from survey.justified import unjustified, why
from survey.records import REFUSED, RIGHT, SLOW, WRONG, Record

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"

SWEEPS = {
    "modules": (
        "Modules that torch has samples for",
        """Every module of `torch.testing._internal.common_modules.module_db`, in training and evaluation, with all
sample inputs, M = 3, the inputs each member's own, and shared: with gradients, without, with second gradients, and
under autocast (of which outputs and the dtypes of gradients are compared, not their values). Compared are outputs,
gradients of parameters and inputs, and buffers. Second gradients are run in float64, and not recorded.""",
    ),
    "more_modules": (
        "Further modules, and further samples",
        "What that list leaves out, in the same way.",
    ),
    "operations": (
        "Operations",
        """Every operation of `torch.testing._internal.common_methods_invocations.op_db` that runs on the CPU, M = 3,
its sample inputs stacked and shared by turns, forward and backward where it has one.""",
    ),
}
"""Results file -> heading, and what was swept."""

HEAD = """# Coverage

What happens to every module and operation that torch has test samples for, when members run it as a stack. Written by
`make coverage` from the results of two sweeps, `survey/results/*.json`; nothing on this page is typed by hand.

**right**: as the members alone, within the table of tolerances of `memberwise.testing`; of operations, where sums
cancel and that fails, no further from float64 than twice what the members are, or than four units in the last place of
the largest result. **refused**: by an error with a code of [errors.md](errors.md). **wrong**: anything else. Paths
are those that `memberwise.explain` tells: *rule*, *vmap* (torch's batching of that one operation), *loop* (that
operation member by member), *retreat* (a module or the whole function member by member). What took one of the last two
has its reason at the end of each part. Where the column of torch.func is empty, that run holds no answer of it.
"""


def main() -> int:
    """Write the page; the exit status is 1 if something runs member by member and nobody has said why."""
    PAGE.write_text(page())
    faults = [fault for name in present() for fault in unjustified(records.read(name)[1])]
    for fault in faults:
        print(f"runs member by member, with no sentence in survey/justified.py: {fault}")
    return int(bool(faults))


def present() -> list[str]:
    """The sweeps that have results."""
    return [name for name in SWEEPS if records.exists(name)]


def page() -> str:
    """The whole text."""
    return "\n".join([HEAD, *(_part(name) for name in present())])


def _part(name: str) -> str:
    head, found = records.read(name)
    title, about = SWEEPS[name]
    machine, versions = head["machine"], head["versions"]
    where = f"torch {versions['torch']}, {machine['processor']}, {head['date']}{_so_far(head)}"
    parts = [
        f"## {title}\n",
        f"{about}\n",
        f"{where}\n",
        _summary(found),
        _table(found),
        _reasons(found),
        _faults(found),
    ]
    return "\n".join(part for part in parts if part)


def _so_far(head: dict[str, Any]) -> str:
    """What a sweep that was stopped has not come to."""
    done, of = head.get("done"), head.get("of")
    return "" if done == of else f". The first {done} of {of} are recorded; of the others this page says nothing yet"


def _summary(found: Sequence[Record]) -> str:
    """How many names are right in all their variants."""
    by_name = _by_name(found)
    ours = Counter(records.worst(record.verdict for record in own) for own in by_name.values())
    theirs = sum(all(record.torch == RIGHT for record in own) for own in by_name.values())
    paths = Counter(path for own in by_name.values() for path in {path for r in own for path in r.paths})
    lines = [
        f"| | of {len(by_name)} |",
        "|---|---:|",
        *(f"| {verdict} | {ours[verdict]} |" for verdict in (RIGHT, REFUSED, WRONG)),
        *([f"| right by torch.func | {theirs} |"] if any(record.torch for record in found) else []),
        *(f"| some operation by {path} | {paths[path]} |" for path in ("rule", "vmap", *SLOW)),
    ]
    return "\n".join(lines) + "\n"


def _table(found: Sequence[Record]) -> str:
    lines = ["| name | verdict | paths | torch.func |", "|---|---|---|---|"]
    lines += [_row(name, own) for name, own in _by_name(found).items()]
    return "\n".join(lines) + "\n"


def _row(name: str, own: Sequence[Record]) -> str:
    """One name; variants that differ are told apart."""
    verdicts = _told({record.variant: f"{record.verdict} {record.code}".strip() for record in own})
    paths = [path for path in ("rule", "vmap", *SLOW) if any(path in record.paths for record in own)]
    theirs = _told({record.variant: _short(record.torch) for record in own})
    return f"| {name} | {verdicts} | {', '.join(paths)} | {theirs} |"


def _told(values: dict[str, str]) -> str:
    if len({*values.values()}) == 1:
        return next(iter(values.values()))
    return "; ".join(f"{variant}: {value}" for variant, value in values.items())


def _short(text: str) -> str:
    """An error's first words, fit for a table."""
    text = text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return text if len(text) <= 60 else text[:57] + "..."


def _reasons(found: Sequence[Record]) -> str:
    """What runs member by member, and why nothing faster is right."""
    rows = {
        (record.name, op): why(record, op) or f"not justified yet: {_plain(reason)}"
        for record in found
        for op, reason in record.slow.items()
    }
    if not rows:
        return ""
    lines = ["### Member by member, and why\n", "| name | what | why |", "|---|---|---|"]
    lines += [f"| {name} | {_op(op)} | {reason} |" for (name, op), reason in rows.items()]
    return "\n".join(lines) + "\n"


def _op(op: str) -> str:
    return "the whole call" if op in ("_call", "<lambda>", "call") else f"`{op}`"


def _faults(found: Sequence[Record]) -> str:
    """What is refused or wrong, in its own words."""
    lines = [f"- {r.name} ({r.variant}): {_plain(r.what)}" for r in found if r.verdict != RIGHT]
    return "\n".join(["### Not right\n", *lines]) + "\n" if lines else ""


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")


def _by_name(found: Iterable[Record]) -> dict[str, list[Record]]:
    by_name: dict[str, list[Any]] = {}
    for record in found:
        by_name.setdefault(record.name, []).append(record)
    return by_name


if __name__ == "__main__":
    sys.exit(main())
