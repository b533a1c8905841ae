"""What a results file holds, and the check that it holds that: shapes, and figures that follow from samples.

A shape is a type, a set of allowed strings, `Maybe(shape)` for what may be null, `[shape]` for a list of
any length, or a dict that names every key.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import intervals

VERSION = 1


class Maybe(NamedTuple):
    shape: Any


NUMBER = (int, float)
STATUS = {"timed", "cut", "cannot"}
INTERVAL = {"median": NUMBER, "low": NUMBER, "high": NUMBER}
MACHINE = {
    "processor": str,
    "cores": int,
    "memory_gib": NUMBER,
    "system": str,
    "load_before": NUMBER,
    "accelerator": Maybe(str),
}
VERSIONS = {"python": str, "commit": str, "memberwise": str, "torch": str}
HEAD = {"schema": int, "kind": {"table", "overhead"}, "date": str, "machine": MACHINE, "versions": VERSIONS}
FIGURE = {
    "rival": str,
    "family": str,
    "about": str,
    "status": STATUS,
    "why": str,
    "start_s": Maybe(NUMBER),
    "samples_us": [NUMBER],
    "us": Maybe(INTERVAL),
}
RATIO = {"of": str, "to": str, "faster": INTERVAL}
ROW = {
    "row": str,
    "about": str,
    "members": int,
    "shared": bool,
    "threads": int,
    "figures": [FIGURE],
    "ratios": [RATIO],
}
SETTINGS = {"rounds": int, "block_s": NUMBER, "budget_s": NUMBER, "start_s": NUMBER, "check_steps": int, "exact": bool}
COST = {
    "operation": str,
    "rival": str,
    "members": int,
    "way": {"no grad", "forward", "forward and backward"},
    "us": INTERVAL,
}
EMPTY = {"rival": str, "members": int, "us": INTERVAL}
DOCUMENTS = {
    "table": {**HEAD, "settings": SETTINGS, "rows": [ROW]},
    "overhead": {**HEAD, "threads": int, "operations": [COST], "empty": [EMPTY]},
}


def problems(document: Any) -> list[str]:
    """Everything that is wrong with a results document; empty if it may be written."""
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in DOCUMENTS:
        return [f"kind: expected one of {sorted(DOCUMENTS)}, found {kind!r}"]
    found = list(_misshapen(document, DOCUMENTS[kind], kind))
    found += _indiscreet(document, kind)
    if not found and kind == "table":
        found += [line for row in document["rows"] for line in _unfounded(row, document["settings"]["rounds"])]
    return found


def _misshapen(value: Any, shape: Any, where: str) -> Iterator[str]:
    match shape:
        case Maybe(inner):
            if value is not None:
                yield from _misshapen(value, inner, where)
        case set():
            if value not in shape:
                yield f"{where}: expected one of {sorted(shape)}, found {value!r}"
        case [inner]:
            if not isinstance(value, list):
                yield f"{where}: expected a list, found {value!r}"
                return
            for number, item in enumerate(value):
                yield from _misshapen(item, inner, f"{where}[{number}]")
        case dict():
            yield from _misshapen_dict(value, shape, where)
        case _:
            if not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
                yield f"{where}: expected {shape}, found {value!r}"


def _misshapen_dict(value: Any, shape: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected keys {sorted(shape)}, found {value!r}"
        return
    for key in sorted(shape.keys() ^ value.keys()):
        yield f"{where}.{key}: {'missing' if key in shape else 'not in the schema'}"
    for key in shape.keys() & value.keys():
        yield from _misshapen(value[key], shape[key], f"{where}.{key}")


def _indiscreet(value: Any, where: str) -> Iterator[str]:
    """Strings that hold an absolute path or this machine's name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _indiscreet(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _indiscreet(item, f"{where}[{number}]")
    elif isinstance(value, str):
        if re.search(r"(?<![\w.])/\w+/", value):
            yield f"{where}: holds an absolute path: {value!r}"
        if platform.node() and platform.node() in value.split():
            yield f"{where}: holds the machine's name"


def _unfounded(row: dict[str, Any], rounds: int) -> Iterator[str]:
    """Figures that do not follow from the samples beside them, and cuts that are not said."""
    samples = {figure["rival"]: figure["samples_us"] for figure in row["figures"]}
    for figure in row["figures"]:
        where = f"{row['row']}, {row['threads']} threads, {figure['rival']}"
        if figure["us"] != of_samples(figure["samples_us"]):
            yield f"{where}: its figures are not those of its samples"
        if (figure["status"] == "timed") != (len(figure["samples_us"]) == rounds):
            yield f"{where}: {figure['status']}, with {len(figure['samples_us'])} of {rounds} samples"
        if figure["status"] != "timed" and not figure["why"]:
            yield f"{where}: {figure['status']}, and no word why"
    for ratio in row["ratios"]:
        mine, others = samples.get(ratio["of"]), samples.get(ratio["to"])
        if not mine or not others or ratio["faster"] != faster(mine, others):
            yield f"{row['row']}: the ratio of {ratio['of']} to {ratio['to']} is not that of their samples"


def of_samples(samples: list[float]) -> dict[str, float] | None:
    """The interval of a median as a results file has it; None without samples."""
    return rounded(intervals.of_median(samples)) if samples else None


def faster(samples: list[float], others: list[float]) -> dict[str, float]:
    """How many times as fast as `others`, round by round."""
    return rounded(intervals.of_ratio(others, samples))


def rounded(interval: intervals.Interval) -> dict[str, float]:
    """As a results file has it: four significant digits."""
    return {key: float(f"{value:.4g}") for key, value in interval._asdict().items()}
