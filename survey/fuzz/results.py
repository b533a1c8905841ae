"""What is known of a recorded run, chunk by chunk, in a file that several processes may write to."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from survey.fuzz.compare import MEMBERS, REFUSED, WRONG

CRASHED, SILENT = "crashed", "silent"
FAULTS = (WRONG, CRASHED, SILENT)

Document = dict[str, Any]


def chunk_of(first: int, found: list[dict[str, Any]]) -> Document:
    """What is kept of one chunk: how many of each verdict, and each failure with what it needs to be made again."""
    return {
        "steps": sum(line["steps"] for line in found),
        "counts": dict(Counter(line["kind"] for line in found)),
        "refusals": dict(Counter(line["code"] for line in found if line["kind"] == REFUSED)),
        "failures": [{"index": index, **line} for index, line in enumerate(found, first) if line["kind"] in FAULTS],
    }


def begin(path: Path, seed: int, *, resume: bool) -> None:
    """An empty file, unless it goes on with a run of the same seed; of that, the chunks with failures run again."""
    with _locked(path):
        before = _read(path)
        if not resume or before.get("seed") != seed:
            path.unlink(missing_ok=True)


def of(path: Path, kind: str) -> Document:
    """All that the file has of one kind."""
    return _read(path).get(kind) or _together({})


def known(path: Path, kind: str) -> dict[int, int]:
    """How many cases there are of the chunks that the file has without a failure."""
    chunks = of(path, kind)["chunks"]
    return {int(number): sum(chunk["counts"].values()) for number, chunk in chunks.items() if not chunk["failures"]}


def add(path: Path, seed: int, kind: str, number: int, chunk: Document) -> Document:
    """Write one more chunk down, beside what other processes have written meanwhile; what there is of its kind now."""
    with _locked(path):
        document = _read(path)
        chunks = of(path, kind)["chunks"]
        chunks[str(number)] = {"commit": machine.commit(), **chunk}
        head = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "seed": seed,
            "members": MEMBERS,
        }
        fresh = path.with_suffix(f".{number}.new")
        document = {**document, **head, kind: _together(chunks)}
        fresh.write_text(json.dumps(document, indent=1) + "\n")
        fresh.replace(path)
        return document[kind]


def _together(chunks: dict[str, Document]) -> Document:
    ordered = dict(sorted(chunks.items(), key=lambda item: int(item[0])))
    counts = sum((Counter(chunk["counts"]) for chunk in ordered.values()), Counter[str]())
    refusals = sum((Counter(chunk["refusals"]) for chunk in ordered.values()), Counter[str]())
    return {
        "cases": counts.total(),
        "steps": sum(chunk["steps"] for chunk in ordered.values()),
        "counts": dict(counts),
        "refusals": dict(refusals),
        "failures": [failure for chunk in ordered.values() for failure in chunk["failures"]],
        "chunks": ordered,
    }


def _read(path: Path) -> Document:
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
