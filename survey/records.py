"""What a sweep writes down: for each module or operation, what Memberwise did with it, and what torch.func did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
VERDICTS = (WRONG, REFUSED, RIGHT)
"""The worst first: the verdict of several runs is that of the worst one."""

SLOW = ("loop", "retreat")
"""The paths that take a step a member; what took one has its sentence in `justified`."""


@dataclass(frozen=True)
class Record:
    """One module or operation in one variant, all its sample inputs together.

    Attributes:
        name: torch's own: "nn.Conv2d", "nn.functional.unfold".
        variant: what else tells it from other records of that name: "train", "float64"; "" where nothing does.
        verdict: of Memberwise: "right", "refused" (with a code) or "wrong" (an error without a code is wrong too).
        code: of the refusal: "MW104"; "" elsewhere.
        what: the first line of what is wrong, or of the refusal; "" where it is right.
        paths: how often an operation took each path: {"rule": 12, "vmap": 1}.
        slow: {"aten.nms.default": "why"}: what ran member by member, and the reason that `explain` gives.
        torch: torch.func's verdict in the same comparison: "right", "wrong", or the first line of its error.
        samples: how many runs were compared.
    """

    name: str
    variant: str
    verdict: str
    code: str = ""
    what: str = ""
    paths: Mapping[str, int] = field(default_factory=dict)
    slow: Mapping[str, str] = field(default_factory=dict)
    torch: str = ""
    samples: int = 0


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of several runs together.

    >>> worst(["right", "wrong", "right"])
    'wrong'
    """
    return min(verdicts, key=VERDICTS.index, default=RIGHT)


def write(name: str, records: Iterable[Record], **head: Any) -> Path:
    """Write `survey/results/NAME.json`: the records, and on what they were made; never half a file."""
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        **head,
        "records": [asdict(record) for record in records],
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(document, indent=1) + "\n")
    return fresh.replace(path)


def exists(name: str) -> bool:
    """Whether there are results."""
    return (RESULTS / f"{name}.json").exists()


def read(name: str) -> tuple[dict[str, Any], list[Record]]:
    """The head and the records of `survey/results/NAME.json`."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return document, [Record(**record) for record in document.pop("records")]
