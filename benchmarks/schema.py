"""What a results file holds, and the check that it holds that: shapes, and figures that follow from samples.

A shape is a type, a set of allowed strings, `Maybe(shape)` for what may be null, `[shape]` for a list of
any length, or a dict that names every key.
"""

from __future__ import annotations

import copy
import itertools
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
HEAD = {
    "schema": int,
    "kind": {"table", "overhead", "workloads"},
    "date": str,
    "machine": MACHINE,
    "versions": VERSIONS,
}
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
MEASURED = {"date": str, "commit": str, "load_before": NUMBER}
WORKLOAD = {
    **ROW,
    "case": str,
    "workload": str,
    "recipe": str,
    "steps": int,
    "floor": {
        "flops": int,
        "bytes": int,
        "flops_per_s": NUMBER,
        "bytes_per_s": NUMBER,
        "us": NUMBER,
        "binding": {"flops", "bytes"},
    },
    "figures": [
        {
            **FIGURE,
            "status": {*STATUS, "wrong", "left out"},
            "group": int,
            "members": int,
            "checked": str,
            "memory_bytes": Maybe(int),
            "kernels": Maybe(int),
            "member_steps_per_s": Maybe(NUMBER),
            "over_one": Maybe(INTERVAL),
            "share_of_floor": Maybe(NUMBER),
            "compile_s": Maybe(NUMBER),
        }
    ],
    "ratios": [{**RATIO, "group": int}],
    "measured": MEASURED,
}
BREAK_EVEN = {"case": str, "threads": int, "of": str, "to": str, "members": Maybe(int)}
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
    "workloads": {
        **HEAD,
        "versions": {**VERSIONS, "jax": str, "tensordict": str},
        "settings": {**SETTINGS, "exact_members": int, "memory_gib": NUMBER, "row_s": NUMBER, "cold": bool},
        "rows": [WORKLOAD],
        "break_even": [BREAK_EVEN],
    },
    "overhead": {**HEAD, "threads": int, "operations": [COST], "empty": [EMPTY]},
}


def problems(document: Any) -> list[str]:
    """Everything that is wrong with a results document; empty if it may be written."""
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in DOCUMENTS:
        return [f"kind: expected one of {sorted(DOCUMENTS)}, found {kind!r}"]
    found = list(_misshapen(document, DOCUMENTS[kind], kind))
    found += _indiscreet(document, kind)
    if not found and kind != "overhead":
        found += [line for row in document["rows"] for line in _unfounded(row, document["settings"]["rounds"])]
    if not found and kind == "workloads":
        found += [line for row in document["rows"] for line in _underived(row)]
        if document["break_even"] != break_even(document["rows"]):
            found.append("workloads.break_even: not what its rows say")
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
    samples = {(figure.get("group"), figure["rival"]): figure["samples_us"] for figure in row["figures"]}
    for figure in row["figures"]:
        where = f"{row['row']}, {row['threads']} threads, {figure['rival']}"
        if figure["us"] != of_samples(figure["samples_us"]):
            yield f"{where}: its figures are not those of its samples"
        if (figure["status"] == "timed") != (len(figure["samples_us"]) == rounds):
            yield f"{where}: {figure['status']}, with {len(figure['samples_us'])} of {rounds} samples"
        if figure["status"] != "timed" and not figure["why"]:
            yield f"{where}: {figure['status']}, and no word why"
    for ratio in row["ratios"]:
        mine, others = (samples.get((ratio.get("group"), ratio[side])) for side in ("of", "to"))
        if not mine or not others or ratio["faster"] != faster(mine, others):
            yield f"{row['row']}: the ratio of {ratio['of']} to {ratio['to']} is not that of their samples"


def _underived(row: dict[str, Any]) -> Iterator[str]:
    """Figures that do not follow from the others of their row."""
    again = copy.deepcopy(row)
    derive(again)
    for found, figure in zip(row["figures"], again["figures"], strict=True):
        for key in sorted(figure):
            if found[key] != figure[key]:
                yield f"{row['row']}, {figure['rival']}: its {key} is not what its samples say"


def derive(row: dict[str, Any]) -> None:
    """Write into a row's figures what follows from their samples, the floor and the one model's samples."""
    alone = {figure["group"]: figure["samples_us"] for figure in row["figures"] if figure["family"] == "one model"}
    for figure in row["figures"]:
        median = figure["us"]["median"] if figure["us"] else None
        one = alone.get(figure["group"])
        floor_us = row["floor"]["us"] * figure["members"] / row["members"]
        figure["member_steps_per_s"] = median and digits(1e6 * figure["members"] / median)
        figure["over_one"] = faster(one, figure["samples_us"]) if median and one else None
        figure["share_of_floor"] = median and digits(floor_us / median)
        figure["compile_s"] = median and round(max(0.0, figure["start_s"] - row["steps"] * median / 1e6), 1)


def break_even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and family: from which M on ours is as fast, of the M measured; None if from none of them.

    As fast means that the upper bound of "times as fast" is not below 1, in this row and those with more members.
    """
    ratios: dict[tuple[str, int, str, str], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: -row["members"]):
        for (mine, family), high in _best_ratios(row).items():
            ratios.setdefault((row["case"], row["threads"], mine, family), []).append((row["members"], high))
    found = []
    for (case, threads, mine, family), falling in ratios.items():
        fast = itertools.takewhile(lambda each: each[1] >= 1, falling)
        members = min((members for members, _ in fast), default=None)
        found.append({"case": case, "threads": threads, "of": mine, "to": family, "members": members})
    return found


def _best_ratios(row: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By (ours, family): the upper bound of how many times as fast, against the family's fastest rival."""
    families = {figure["rival"]: figure["family"] for figure in row["figures"]}
    slowest: dict[tuple[str, str], tuple[float, float]] = {}
    for ratio in row["ratios"]:
        key = ratio["of"], families[ratio["to"]]
        told = ratio["faster"]["median"], ratio["faster"]["high"]
        slowest[key] = min(slowest.get(key, told), told)
    return {key: high for key, (_, high) in slowest.items()}


def digits(value: float) -> float:
    """Four significant ones."""
    return float(f"{value:.4g}")


def of_samples(samples: list[float]) -> dict[str, float] | None:
    """The interval of a median as a results file has it; None without samples."""
    return rounded(intervals.of_median(samples)) if samples else None


def faster(samples: list[float], others: list[float]) -> dict[str, float]:
    """How many times as fast as `others`, round by round."""
    return rounded(intervals.of_ratio(others, samples))


def rounded(interval: intervals.Interval) -> dict[str, float]:
    """As a results file has it: four significant digits."""
    return {key: digits(value) for key, value in interval._asdict().items()}
