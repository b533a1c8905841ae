"""The recorded run of random cases (`make check-fuzz`): nothing is lost, whatever becomes of its processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from survey.fuzz import results, run
from survey.fuzz.worker import PROGRAMS, case

ENDS_AT_THREE = """
import json, os, sys
first, last = (int(arg.partition("=")[2]) for arg in sys.argv[3:])
for index in range(first, last):
    if index == 3:
        os.write(1, b'{"kind": "ri')
        os.abort()
    print(json.dumps({"kind": "right", "steps": index}), flush=True)
"""


def test_a_case_that_ends_its_process_is_recorded_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", ENDS_AT_THREE])
    found = [*run.lines(PROGRAMS, 1, 2, 6)]
    assert [line["kind"] for line in found] == ["right", "crashed", "right", "right"]
    assert [line["steps"] for line in found] == [2, 0, 4, 5]
    assert found[1]["case"] == case(PROGRAMS, 1, 3).to_json()


def test_what_several_processes_write_comes_together(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    right, wrong = {"kind": "right", "steps": 2}, {"kind": "wrong", "steps": 3, "what": "it", "case": {}}
    results.begin(path, 7, resume=True)
    results.add(path, 7, PROGRAMS, 1, results.chunk_of(500, [right, wrong]))
    results.begin(path, 7, resume=True)
    now = results.add(path, 7, PROGRAMS, 0, results.chunk_of(0, [right, right, right]))
    assert (now["cases"], now["steps"], now["counts"]) == (5, 11, {"right": 4, "wrong": 1})
    assert [failure["index"] for failure in now["failures"]] == [501]
    assert results.known(path, PROGRAMS) == {0: 3}, "what has failed runs again"
    assert results.add(path, 7, PROGRAMS, 1, results.chunk_of(500, [right, right]))["failures"] == []
    results.begin(path, 8, resume=True)
    assert results.known(path, PROGRAMS) == {}, "another seed is another run"
