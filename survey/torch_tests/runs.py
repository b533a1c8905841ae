"""PyTorch's test files under pytest, in a process of its own, and what came of each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from survey.torch_tests.plugin import COUNT, OUTCOMES, POINTED

ROOT = Path(__file__).parents[2]
FILES = ("test/functorch/test_vmap.py", "test/functorch/test_eager_transforms.py", "test/test_stateless.py")
"""The files that test vmap, ensembles and functional_call."""

NOT_RUN = {
    "TestVmapOperatorsOpInfo": "each operator of op_db: the sweep over operators compares them with a loop",
    "TestFunctionalize": "functionalize, which is no part of Memberwise",
    "TestCompileTransforms": "torch.compile of torch's own transforms",
}
"""Classes of tests that are not run, and why."""


@dataclass(frozen=True)
class Outcome:
    """What came of one test.

    Attributes:
        test: "test_vmap.py::TestVmapAPI::test_nested_with_same_map_dim".
        outcome: pytest's word: "passed", "failed" or "skipped".
        calls: how often the test called each of the functions that torch's names lead to.
        what: the error or the reason.
        expected: whether PyTorch expects the test to fail.
    """

    test: str
    outcome: str
    calls: dict[str, int] = field(default_factory=dict)
    what: str = ""
    expected: bool = False


def run(checkout: Path, *, pointed: bool, only: str = "") -> dict[str, Outcome]:
    """Run the files of a checkout, torch's names pointed at Memberwise or as they are; `only` picks as `-k` does."""
    files = [str(checkout / file) for file in FILES]
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        raise SystemExit(f"{checkout} is no checkout of pytorch: {', '.join(missing)} are missing")
    picks = [f"not {name}" for name in NOT_RUN] + [f"({only})"] * bool(only)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "outcomes"
        environment = {**os.environ, OUTCOMES: str(told), COUNT: f"{told}.count", "PYTHONPATH": _path()}
        environment |= {POINTED: "1"} if pointed else {}
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(checkout / "test")]
        command += ["--noconftest", "-p", "no:cacheprovider", "-p", "survey.torch_tests.plugin", "-q", "--tb=no"]
        command += ["--disable-warnings", "-k", " and ".join(picks), *files]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        _watch(process, told, "Memberwise" if pointed else "torch")
        lines = told.read_text().splitlines() if told.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {outcome.test: outcome for outcome in outcomes}


def _path() -> str:
    """Memberwise as this process has it, and this folder."""
    import memberwise

    return os.pathsep.join((str(Path(memberwise.__file__).parents[1]), str(ROOT)))


def _watch(process: subprocess.Popen[Any], told: Path, name: str) -> None:
    """A bar until the process ends."""
    with Progress() as progress:
        bar = progress.add_task(f"PyTorch's tests on {name}", total=None)
        while process.poll() is None:
            count = Path(f"{told}.count")
            total = int(count.read_text() or 0) if count.exists() else 0
            done = told.read_bytes().count(b"\n") if told.exists() else 0
            progress.update(bar, total=total or None, completed=done)
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
