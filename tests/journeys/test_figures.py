"""Figures in the pages come from results files, and go where the marks are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.sources import ROOT
from tools import figures

REPORT: dict[str, Any] = {
    "members": 8,
    "steps": 31,
    "threads": 1,
    "torch": "2.13.0",
    "held_out": {"accuracy": {"best": 0.98, "median": 0.97, "ensemble": 0.99}},
    "as_one": {"seconds": 20.0, "seconds_starting": 10.0},
    "alone": {"members": [0, 2, 5, 7], "seconds": 30.0, "seconds_scaled": 60.0},
    "ratio": 3.0,
    "ratio_of_steps": 6.0,
}


def test_the_demo_as_a_table() -> None:
    said = figures.demo(REPORT)
    assert "| accuracy | 0.9800 | 0.9700 | 0.9900 |" in said
    assert "| member by member, in plain PyTorch (scaled from 4) | 60.0 s |" in said
    assert "| times as fast, and once the step is compiled | 3.0, 6.0 |" in said


@pytest.mark.parametrize("page", ["no marks", "<!-- a: begin -->\nx", "<!-- a: begin -->\n<!-- a: end -->\n" * 2])
def test_a_page_without_its_marks_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="must hold the marks"):
        figures.between(page, "a", "text")


def test_pages_are_filled_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    for folder in ("docs", "results", "demo-output"):
        (tmp_path / folder).mkdir()
    for page in ("README.md", "docs/benchmarks.md"):
        (tmp_path / page).write_text((ROOT / page).read_text())
    (tmp_path / "demo-output" / "digits.json").write_text(json.dumps(REPORT))
    figures.main()
    assert json.loads((tmp_path / "results" / "digits.json").read_text()) == REPORT
    assert figures.demo(REPORT) in (tmp_path / "README.md").read_text()
    figures.main()  # a second time changes nothing
    assert (tmp_path / "README.md").read_text().count("ensemble of 8") == 1


def test_figures_in_the_readme_are_those_of_the_files() -> None:
    readme = (ROOT / "README.md").read_text()
    found, table = figures.read("digits.json"), figures.read("table.json")
    assert figures.demo(found) in readme if found else "run `make demo`" in readme
    assert figures.ratios(table) in readme if table else "run `make bench`" in readme
