"""The plot of a results file of workloads: time per member against M, a line for each rival.

python -m benchmarks.plot benchmarks/results/workloads.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import schema

WIDTH = 3
"""Panels a row of the picture."""


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel a case and thread count; both axes are logarithmic. The floor is dotted, ours are thick."""
    from matplotlib import pyplot  # slow to import, and not everybody draws

    panels = panels_of(document)
    height = -(-len(panels) // WIDTH)
    figure, axes = pyplot.subplots(height, WIDTH, figsize=(5 * WIDTH, 3.6 * height), squeeze=False)
    colours = {rival: f"C{number % 10}" for number, rival in enumerate(rivals_of(document))}
    styles = {rival: "-" if number < 10 else "--" for number, rival in enumerate(colours)}
    for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for rival, points in lines.items():
            ours = rival.startswith("memberwise")
            look = {"color": "black", "linestyle": ":"} if rival == "floor" else {}
            look = look or {"color": colours[rival], "linestyle": styles[rival], "linewidth": 2.5 if ours else 1.2}
            ax.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=rival, **look)
        ax.set(title=title, xscale="log", yscale="log", xlabel="M", ylabel="us per member")
        ticks = sorted({members for points in lines.values() for members, _ in points})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    known = {name: line for ax in axes.flat for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.9 / (3.6 * height)))
    figure.legend(known.values(), known.keys(), loc="upper center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def panels_of(document: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By case and rival: (M, microseconds per member)."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in document["rows"]:
        panel = panels.setdefault(f"{row['case']}, {row['threads']} threads", {})
        for figure in row["figures"]:
            points = panel.setdefault(figure["rival"], []) if figure["us"] else []
            if figure["us"] and all(members != row["members"] for members, _ in points):
                points.append((row["members"], figure["us"]["median"] / figure["members"]))
        panel.setdefault("floor", []).append((row["members"], row["floor"]["us"] / row["members"]))
    return panels


def rivals_of(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(figure["rival"] for row in document["rows"] for figure in row["figures"]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    options = parser.parse_args(argv)
    document = json.loads(options.results.read_text())
    if wrong := schema.problems(document):
        raise SystemExit("\n".join([f"{options.results} is no results file:", *wrong]))
    draw(document, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
