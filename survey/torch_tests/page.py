"""`docs/torch_tests.md` from the results."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from survey.torch_tests.verdicts import EXCUSED, FAILED, VERDICTS

HEAD = """# PyTorch's own tests, pointed at Memberwise

`make check-torch-tests PYTORCH=<a checkout of pytorch>` runs PyTorch's tests twice: with these names leading to
Memberwise ({names}), and with torch's own. What torch calls under other names, inside `jacrev` for example, stays
torch's. A test counts as passed only if it has called Memberwise.

This page is written by that command, from `survey/results/torch_tests.json`, which lists every test with its verdict.
"""


def render(document: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD.format(names=", ".join(f"`{name}`" for name in document["names"])), *_made(document)]
    parts += ["## How many", _counts(document["tests"]), "## Left out", *_left_out(document["tests"])]
    failed = [(test, why) for test, (verdict, why) in document["tests"].items() if verdict == FAILED]
    if failed:
        parts += ["## Failed", "\n".join(f"- `{test}`: {why.splitlines()[0]}" for test, why in failed)]
    not_run = "\n".join(f"- `{name}`: {why}." for name, why in document["not_run"].items())
    return "\n\n".join([*parts, "## Not run", not_run]) + "\n"


def _made(document: Mapping[str, Any]) -> list[str]:
    versions = document["versions"]
    return [
        f"Run on {document['date']} with torch {versions['torch']} and Memberwise {versions['memberwise']} "
        f"({versions['commit']}). The tests: {document['source']}."
    ]


def _counts(tests: Mapping[str, Any]) -> str:
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    for test, (verdict, _) in tests.items():
        by_class["::".join(test.split("::")[:2])][verdict] += 1
    total = sum(by_class.values(), Counter())
    rows = [f"| {name} | {_row(found)} |" for name, found in by_class.items()]
    legend = [f"- {verdict}: {meaning}." for verdict, meaning in VERDICTS.items()]
    head = [f"| | {' | '.join(VERDICTS)} |", "|---|" + "---:|" * len(VERDICTS)]
    return "\n".join([*head, *rows, f"| **all** | {_row(total)} |", "", *legend])


def _row(found: Mapping[str, int]) -> str:
    return " | ".join(str(found.get(verdict, 0)) for verdict in VERDICTS)


def _left_out(tests: Mapping[str, Any]) -> list[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for test, (verdict, why) in tests.items():
        if verdict == EXCUSED:
            by_reason[why].append(test)
    return [
        f"**{why}** ({len(found)}):\n\n" + "\n".join(f"- `{test}`" for test in found)
        for why, found in by_reason.items()
    ]
