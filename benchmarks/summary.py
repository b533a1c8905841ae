"""A results document as the cells of a table, for the terminal and for Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Figure = dict[str, Any]
Row = dict[str, Any]
Cells = list[list[str]]
"""A heading and its lines."""

RATIOS = (
    ("memberwise captured", ("loop",), "captured / loop"),
    ("memberwise captured", ("torch.vmap", "torch.vmap compiled"), "captured / torch.vmap at its best"),
    ("memberwise", ("loop",), "eager / loop"),
    ("memberwise", ("torch.vmap",), "eager / torch.vmap"),
)
"""The ratio columns: of which family to which others, and the heading."""


def times(document: dict[str, Any]) -> Cells:
    """One line a row, one column a family: milliseconds a step."""
    families = list(dict.fromkeys(figure["family"] for row in document["rows"] for figure in row["figures"]))
    heading = ["ms a step", "workload", "threads", *families]
    return [
        heading,
        *(
            [row["row"], _workload(row), str(row["threads"]), *(_time(row, family) for family in families)]
            for row in document["rows"]
        ),
    ]


def ratios(document: dict[str, Any]) -> Cells:
    """One line a row: how many times as fast Memberwise is."""
    heading = ["times as fast", "threads", *(heading for *_, heading in RATIOS)]
    return [heading, *([row["row"], str(row["threads"]), *_ratios(row)] for row in document["rows"])]


def overhead(document: dict[str, Any]) -> Cells:
    """One line an operation and way, one column a rival: microseconds an operation; at last the empty region."""
    costs = {(cost["operation"], cost["way"], cost["rival"]): cost["us"]["median"] for cost in document["operations"]}
    rivals = list(dict.fromkeys(rival for *_, rival in costs))
    lines = list(dict.fromkeys((operation, way) for operation, way, _ in costs))
    empty = {cost["rival"]: f"{cost['us']['median']:.1f}" for cost in document["empty"]}
    return [
        ["us an operation", *rivals],
        *([", ".join(line), *(f"{costs[*line, rival]:.1f}" for rival in rivals)] for line in lines),
        ["an empty region", *(empty.get(rival, "") for rival in rivals)],
    ]


AGAINST = (
    (("loop", "loop compiled"), "loop, eager or compiled"),
    (("torch.vmap", "torch.vmap compiled"), "torch.vmap"),
    (("folded by hand",), "folded by hand"),
    (("tensordict",), "tensordict"),
    (("JAX",), "JAX"),
    (("loop in a CUDA graph",), "loop in a CUDA graph"),
)
"""What the captured step is compared with on the page of workloads: families, each at its best, and the heading."""


def against(document: dict[str, Any]) -> Cells:
    """Of the workloads: how many times as fast the captured step is as each family at its best."""
    heading = ["captured, times as fast", "threads", *(heading for _, heading in AGAINST)]
    lines = [
        [
            row["row"] + of.removeprefix(_STEP_BY_STEP),
            str(row["threads"]),
            *(_best(row, families, of) for families, _ in AGAINST),
        ]
        for row in _rows(document)
        for of in _captured(row)
    ]
    means = [
        [name, "", *(_mean(document, families, ours) for families, _ in AGAINST)]
        for name, ours in (("geometric mean, a step a call", _STEP_BY_STEP), ("geometric mean, at its best", None))
    ]
    return [heading, *lines, *means]


_STEP_BY_STEP = "memberwise captured"


def _captured(row: Row) -> list[str]:
    """Our captured families: a step a call, and several, if that has figures in it."""
    timed = dict.fromkeys(figure["family"] for figure in row["figures"] if figure["us"])
    return [_STEP_BY_STEP, *(family for family in timed if family.startswith(f"{_STEP_BY_STEP},"))]


def _rows(document: dict[str, Any]) -> list[Row]:
    return document["rows"]


def _best(row: Row, families: tuple[str, ...], of: str) -> str:
    ratio = least(row, families, of)
    return verdict(ratio) if ratio else ""


def _mean(document: dict[str, Any], families: tuple[str, ...], of: str | None) -> str:
    """Over the rows, of one captured family, or of the fastest of ours in each."""
    found = []
    for row in _rows(document):
        ours = [least(row, families, each) for each in ([of] if of else _captured(row))]
        found += [max(ratio["median"] for ratio in ours if ratio)] if any(ours) else []
    return f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}" if found else ""


def least(row: Row, families: tuple[str, ...], of: str) -> dict[str, float] | None:
    """The ratio of ours to the fastest rival of these families; None without figures."""
    family = {figure["rival"]: figure["family"] for figure in row["figures"]}
    found = [
        ratio["faster"] for ratio in row["ratios"] if family[ratio["of"]] == of and family[ratio["to"]] in families
    ]
    return min(found, key=lambda faster: faster["median"], default=None)


def costs(document: dict[str, Any]) -> Cells:
    """Of the workloads: all that is known of each rival, one line a row and rival."""
    heading = ["row", "rival", "ms a step", "captured, times as fast", "times one model", "member-steps a second"]
    lines = [[*heading, "floor reached", "kernels", "MiB a member", "compile s", "checked"]]
    for row in _rows(document):
        seen: dict[str, Figure] = {}
        for figure in row["figures"]:
            if figure["us"] or figure["rival"] not in seen:
                seen.setdefault(figure["rival"], figure)
        lines += [[f"{row['row']} ({_threads(row)})", *_costs(row, figure)] for figure in seen.values()]
    return lines


def _costs(row: Row, figure: Figure) -> list[str]:
    if not figure["us"]:
        return [figure["rival"], figure["status"], *[""] * 8]
    faster = [ratio["faster"] for ratio in row["ratios"] if (ratio["of"], ratio["to"]) == (_CAPTURED, figure["rival"])]
    size = figure["memory_bytes"]
    return [
        figure["rival"],
        milliseconds(figure["us"]["median"]) + " (cut)" * (figure["status"] == "cut"),
        verdict(faster[0]) if faster and figure["family"] != _ONE else "",
        f"{figure['over_one']['median']:.2f}" if figure["over_one"] else "",
        f"{figure['member_steps_per_s']:.4g}",
        f"{100 * figure['share_of_floor']:.0f}%",
        "" if figure["kernels"] is None else str(figure["kernels"]),
        "" if size is None else f"{size / figure['members'] / 2**20:.2f}",
        f"{figure['compile_s']:.1f}",
        figure["checked"] or "ran",
    ]


_CAPTURED, _ONE = "memberwise-captured", "one model"


def even(document: dict[str, Any]) -> Cells:
    """Of the workloads: from which M on the captured step is as fast as each family."""
    families = [family for families, _ in AGAINST for family in families]
    found = {
        (each["case"], each["threads"], each["to"]): each["members"]
        for each in document["break_even"]
        if each["of"] == _CAPTURED
    }
    lines = dict.fromkeys((case, threads) for case, threads, _ in found)
    return [
        ["break-even M of those measured", "threads", *families],
        *(
            [case, str(threads), *(_members(found, (case, threads, family)) for family in families)]
            for case, threads in lines
        ),
    ]


def _members(found: dict[Any, int | None], key: tuple[str, int, str]) -> str:
    if key not in found:
        return ""
    return "none" if found[key] is None else str(found[key])


def notes(document: dict[str, Any]) -> list[str]:
    """Every figure that is missing or was cut, and why; one line for each rival and reason."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for row in document["rows"]:
        for figure in row["figures"]:
            if figure["status"] != "timed":
                key = figure["rival"], figure["status"], figure["why"]
                rows.setdefault(key, []).append(f"{row['row']} ({_threads(row)})")
    once = {key: ", ".join(dict.fromkeys(where)) for key, where in rows.items()}  # ours run beside each group
    return [f"{rival} {status} in {where}: {why}" for (rival, status, why), where in once.items()]


def origin(document: dict[str, Any]) -> str:
    """What was measured, where and when, in one paragraph."""
    machine, versions = document["machine"], document["versions"]
    kinds = {"overhead": _OVERHEAD, "table": _TABLE, "workloads": _WORKLOADS}
    what = kinds[document["kind"]].format(document.get("settings", {}).get("rounds"))
    place = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"
    where = f"{place}, torch {versions['torch']}"
    return f"{what} {where}, commit {versions['commit']}, {document['date']}."


_TABLE = (
    "Milliseconds a step of all members (zero_grad, forward, backward, Adam): the median of at most {} interleaved "
    "rounds. A column is the fastest of its family's rivals in that row. Times as fast: medians over neighbouring "
    "rounds, with their 95% interval; above 1 Memberwise is ahead."
)
_WORKLOADS = (
    "Milliseconds a step of all members (data indexing, zero_grad, forward, backward, clipping, optimizer; or one "
    "prediction): the median of at most {} interleaved rounds. A column is the fastest of its family's rivals in that "
    "row. Times as fast: medians over neighbouring rounds, with their 95% interval; above 1 Memberwise is ahead. The "
    "floor is the operations at the rate of a large product, or the bytes at that of a large copy, both measured with "
    "the row. Rivals whose members draw other random numbers than each alone are checked without draws."
)
_OVERHEAD = (
    "Microseconds an operation on 8 x 8 tensors, four members, in a chain inside one call, one thread: what Python "
    "costs. Plain torch runs one member."
)


def fastest(row: Row, families: tuple[str, ...]) -> Figure | None:
    """The fastest rival of these families in the row, if any was timed."""
    timed = [figure for figure in row["figures"] if figure["family"] in families and figure["us"]]
    return min(timed, key=lambda figure: figure["us"]["median"], default=None)


def milliseconds(us: float) -> str:
    """
    >>> milliseconds(862.4), milliseconds(12345.6), milliseconds(135512.0)
    ('0.86', '12.3', '136')
    """
    return f"{us / 1e3:.{2 if us < 1e4 else 1 if us < 1e5 else 0}f}"


def verdict(faster: dict[str, float]) -> str:
    """A ratio and its interval, said in words where Memberwise does not win.

    >>> verdict({"median": 2.5, "low": 2.4, "high": 2.61}), verdict({"median": 0.8, "low": 0.75, "high": 0.84})
    ('2.50 (2.40-2.61)', '0.80 (0.75-0.84) LOSS')
    >>> verdict({"median": 1.01, "low": 0.97, "high": 1.04})
    '1.01 (0.97-1.04) tie'
    """
    low, high = faster["low"], faster["high"]
    said = " LOSS" if high < 1 else " tie" if low <= 1 else ""
    return f"{faster['median']:.2f} ({low:.2f}-{high:.2f}){said}"


def _threads(row: Row) -> str:
    return f"{row['threads']} thread" + "s" * (row["threads"] > 1)


def _workload(row: Row) -> str:
    return f"{row['about']}, M = {row['members']}"


def _time(row: Row, family: str) -> str:
    best = fastest(row, (family,))
    if best is not None:
        return milliseconds(best["us"]["median"]) + " (cut)" * (best["status"] == "cut")
    return next((figure["status"] for figure in row["figures"] if figure["family"] == family), "")


def _ratios(row: Row) -> Iterator[str]:
    ratios = {(ratio["of"], ratio["to"]): ratio["faster"] for ratio in row["ratios"]}
    for family, others, _ in RATIOS:
        mine, other = fastest(row, (family,)), fastest(row, others)
        yield verdict(ratios[mine["rival"], other["rival"]]) if mine and other else ""
