"""One row of the table, measured: start every rival, check it, then time them all against each other.

`in_own_process` is how the command runs it: thread counts, compilers' caches and crashes of one row do not
reach another. What a row comes to is a dict as `schema.ROW` describes, or `Red`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import limits, schema, timing, verify
from benchmarks.case import Batch, Case
from benchmarks.cases import CASES
from benchmarks.machine import ROOT
from benchmarks.rival import Rival, Running
from benchmarks.rivals import RIVALS


class Red(Exception):
    """A rival's training differs from the loop's: nothing of this run may be written down."""


@dataclass(frozen=True)
class Request:
    """What to measure. `exact` adds the check in float64, which needs to be done for one thread count only."""

    case: str
    members: int
    threads: int
    rivals: tuple[str, ...]
    pace: timing.Pace = field(default_factory=timing.Pace)
    start_s: float = 180.0
    check_steps: int = 5
    exact: bool = True

    @property
    def name(self) -> str:
        return f"{self.case}-{self.members}"


@dataclass
class Started:
    """A rival after its start and check: `running`, or the reason why it does not run."""

    rival: Rival
    running: Running | None = None
    status: str = "timed"
    why: str = ""
    start_s: float | None = None


def measure(
    request: Request, cases: Mapping[str, Case] = CASES, rivals: Mapping[str, Rival] = RIVALS
) -> dict[str, object]:
    """The row, in this process. Raises `Red`, before any timing, if any rival is wrong."""
    torch.set_num_threads(request.threads)
    torch.set_flush_denormal(True)  # Adam's moments of a dead unit decay to denormals, slow on some processors
    case = cases[request.case]
    batches = case.batches(request.members, request.check_steps)
    started = start_all(request, case, [rivals[name] for name in request.rivals], batches)
    steps = {
        each.rival.name: lambda number, step=each.running.step: step(batches[number % len(batches)])
        for each in started
        if each.running is not None
    }
    samples = timing.interleaved(steps, request.pace)
    return document(request, case, started, samples)


def start_all(request: Request, case: Case, rivals: list[Rival], batches: list[Batch]) -> list[Started]:
    """Every rival, started and checked in float32, and before that in float64 if `request.exact`."""
    started = [Started(rival) for rival in rivals]
    red = []
    for dtype in (torch.float64, torch.float32) if request.exact else (torch.float32,):
        torch.compiler.reset()
        cast = [tuple(part.to(dtype) if part.is_floating_point() else part for part in batch) for batch in batches]
        expected = verify.of_loop(case, request.members, cast, dtype)
        for each in started:
            if each.status == "timed":
                wrong = start(each, request, case, cast, expected)
                red += [f"{request.name}, {each.rival.name}, {dtype}: {line}" for line in wrong]
    if red:
        raise Red("\n".join(red))
    return started


def start(each: Started, request: Request, case: Case, batches: list[Batch], expected: verify.Trajectory) -> list[str]:
    """Start one rival and train as many steps as there are batches; what its training gets wrong."""
    dtype = expected.losses.dtype
    each.running = None
    begin = time.perf_counter()
    try:
        with limits.at_most(request.start_s):
            running = each.rival.start(case, [model.to(dtype) for model in case.models(request.members)])
            found = verify.of_running(running, batches)
    except limits.OutOfTime:
        each.status, each.why = "cut", f"its start took more than {request.start_s:g} s"
        return []
    except Exception as error:
        each.status, each.why = "cannot", reason(error)
        return []
    each.start_s, each.running = round(time.perf_counter() - begin, 2), running
    return (verify.exactly if dtype is torch.float64 else verify.in_norm)(found, expected)


def reason(error: Exception) -> str:
    """The error's first line, without the paths in it."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {re.sub(r'/[^ :]+/', '', first)}"[:200]


def document(
    request: Request, case: Case, started: list[Started], samples: dict[str, list[float]]
) -> dict[str, object]:
    """The row as a results file has it."""
    figures = [figure(each, samples.get(each.rival.name, []), request.pace) for each in started]
    timed = [each for each in figures if each["samples_us"]]
    ours = {each.rival.name for each in started if each.rival.ours}
    return {
        "row": request.name,
        "about": case.about,
        "members": request.members,
        "shared": case.shared,
        "threads": request.threads,
        "figures": figures,
        "ratios": [
            {
                "of": mine["rival"],
                "to": other["rival"],
                "faster": schema.faster(mine["samples_us"], other["samples_us"]),
            }
            for mine in timed
            for other in timed
            if mine["rival"] in ours and other is not mine
        ],
    }


def figure(each: Started, samples: list[float], pace: timing.Pace) -> dict[str, object]:
    microseconds = [round(1e6 * sample, 2) for sample in samples]
    if each.status == "timed" and len(samples) < pace.rounds:
        each.status, each.why = "cut", f"{len(samples)} of {pace.rounds} rounds in {pace.budget_s:g} s"
    return {
        "rival": each.rival.name,
        "family": each.rival.family,
        "about": each.rival.about,
        "status": each.status,
        "why": each.why,
        "start_s": each.start_s,
        "samples_us": microseconds,
        "us": schema.of_samples(microseconds),
    }


def in_own_process(request: Request) -> dict[str, object]:
    """`measure` in a process of its own, with as many threads as asked for from its first moment."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "row.json")
        command = (sys.executable, "-W", "ignore", "-m", "benchmarks.row", json.dumps(asdict(request)), str(answer))
        environment = {**os.environ, "OMP_NUM_THREADS": str(request.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if not answer.exists():
            raise Red(f"{request.name}, {request.threads} threads: its process ended with code {done.returncode}")
        told = json.loads(answer.read_text())
    if "red" in told:
        raise Red(told["red"])
    return told


def main(asked: str, answer: str) -> None:
    """The other end of `in_own_process`."""
    told = json.loads(asked)
    request = Request(**{**told, "pace": timing.Pace(**told["pace"]), "rivals": tuple(told["rivals"])})
    try:
        row = measure(request)
    except Red as red:
        row = {"red": str(red)}
    Path(answer).write_text(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
