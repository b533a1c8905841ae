"""One row of the table, measured: start every rival, check it, then time them all against each other.

What a row comes to is a dict as `schema.ROW` describes, or `Red`.
"""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass, field

import torch

from benchmarks import limits, schema, timing, verify
from benchmarks.case import Batch, Case
from benchmarks.cases import CASES
from benchmarks.rival import Rival, Running
from benchmarks.rivals import RIVALS
from memberwise import StackWarning


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
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.case}-{self.members}"

    @property
    def longest_s(self) -> float:
        """What measuring takes at the very most; beyond it something hangs."""
        return 60 + 2 * len(self.rivals) * (self.start_s + self.pace.budget_s)


@dataclass
class Started:
    """A rival after its start and check: `running`, or the reason why it does not run."""

    rival: Rival
    running: Running | None = None
    status: str = "timed"
    why: str = ""
    start_s: float | None = None


def measure(request: Request) -> dict[str, object]:
    """The row, in this process. Raises `Red`, before any timing, if any rival is wrong."""
    torch.set_num_threads(request.threads)
    if torch.device(request.device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # as for matmul: float32 is checked as float32, whoever runs
    torch.set_flush_denormal(True)  # Adam's moments of a dead unit decay to denormals, slow on some processors
    case = CASES[request.case]
    batches = [_to(batch, request.device) for batch in case.batches(request.members, request.check_steps)]
    started = start_all(request, case, [RIVALS[name] for name in request.rivals], batches)
    steps = {
        each.rival.name: lambda number, step=each.running.step: step(batches[number % len(batches)])
        for each in started
        if each.running is not None
    }
    samples = timing.interleaved(steps, request.pace, finish=timing.finisher(request.device))
    return document(request, case, started, samples)


def start_all(request: Request, case: Case, rivals: list[Rival], batches: list[Batch]) -> list[Started]:
    """Every rival, started and checked in float32, and before that in float64 if `request.exact`."""
    started = [Started(rival) for rival in rivals]
    red = []
    exact = verify.of_loop(
        case, request.members, [_to(batch, torch.float64) for batch in batches], torch.float64, request.device
    )
    for dtype in (torch.float64, torch.float32) if request.exact else (torch.float32,):
        torch.compiler.reset()
        cast = [_to(batch, dtype) for batch in batches]
        expected = (
            exact if dtype is torch.float64 else verify.of_loop(case, request.members, cast, dtype, request.device)
        )
        for each in started:
            if each.status == "timed":
                wrong = start(each, request, case, cast, expected, exact)
                red += [f"{request.name}, {each.rival.name}, {dtype}: {line}" for line in wrong]
    if red:
        raise Red("\n".join(red))
    return started


def _to(batch: Batch, where: torch.dtype | str) -> Batch:
    """On another device, or in another dtype; labels stay integers."""
    return tuple(part.to(where) if isinstance(where, str) or part.is_floating_point() else part for part in batch)


def start(
    each: Started,
    request: Request,
    case: Case,
    batches: list[Batch],
    expected: verify.Trajectory,
    exact: verify.Trajectory,
) -> list[str]:
    """Start one rival and train as many steps as there are batches; what its training gets wrong."""
    dtype = expected.losses.dtype
    each.running = None
    begin = time.perf_counter()
    try:
        with limits.at_most(request.start_s), warnings.catch_warnings():
            warnings.filterwarnings("error", _EAGERLY, StackWarning)
            running = each.rival.start(
                case, [model.to(request.device, dtype) for model in case.models(request.members)]
            )
            found = verify.of_running(running, batches)
    except limits.OutOfTime:
        each.status, each.why = "cut", f"its start took more than {request.start_s:g} s"
        return []
    except Exception as error:
        each.status, each.why = "cannot", reason(error)
        return []
    each.start_s, each.running = round(time.perf_counter() - begin, 2), running
    return verify.exactly(found, expected) if dtype is torch.float64 else verify.in_norm(found, expected, exact)


_EAGERLY = r"(?s).*\[MW50\d\]"
"""A captured step that says it runs eagerly has no figure under the name of a captured one."""


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
