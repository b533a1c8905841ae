"""One row of the table, measured: start every rival, check it, then time them all against each other.

What a row comes to is a dict as `schema.ROW` describes (`schema.WORKLOAD` with its costs), or `Red`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

import torch

from benchmarks import costs, feed, limits, schema, timing, verify
from benchmarks.case import Batch, Case, side_by_side
from benchmarks.cases import CASES
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import RIVALS
from memberwise import StackWarning


class Red(Exception):
    """A rival's training differs from the loop's: nothing of this run may be written down."""


@dataclass(frozen=True)
class Request:
    """What to measure. `exact` adds the check in float64, which needs to be done for one thread count only.

    With `costs` a row holds memory, kernels and the floor too, and a rival that is wrong is a line of it, without a
    figure; `exact_members` is how many members are enough in float64, `memory_gib` how much the rivals that run side
    by side may hold: ours run beside each group of the others. After `row_s` seconds no other rival is started.
    Compiled code is made anew, or kept in the folder `cache`: starts are then those of a machine that has seen the row.
    """

    case: str
    members: int
    threads: int
    rivals: tuple[str, ...]
    pace: timing.Pace = field(default_factory=timing.Pace)
    start_s: float = 180.0
    check_steps: int = 5
    exact: bool = True
    device: str = "cpu"
    costs: bool = False
    exact_members: int | None = None
    memory_gib: float | None = None
    row_s: float | None = None
    cache: str | None = None

    @property
    def name(self) -> str:
        return f"{self.case}-{self.members}"

    def steps_of(self, case: Case) -> int:
        """How many are checked."""
        return self.check_steps if case.steps is None else min(case.steps, self.check_steps)

    @property
    def longest_s(self) -> float:
        """What measuring takes at the very most; beyond it something hangs."""
        return 60 + (4 if self.costs else 2) * len(self.rivals) * (self.start_s + self.pace.budget_s)


@dataclass
class Started:
    """A rival after its start and check: `running`, or the reason why it does not run.

    `proven` says that it was right in float64.
    """

    rival: Rival
    running: Running | None = None
    status: str = "timed"
    why: str = ""
    start_s: float | None = None
    checked: str = ""
    proven: bool = False
    memory_bytes: int | None = None
    kernels: int | None = None
    group: int = 0
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """A start of every rival and what it is compared with; the `last` starts what is counted and timed."""

    case: Case
    dtype: torch.dtype
    batches: list[Batch]
    expected: verify.Trajectory
    exact: verify.Trajectory
    members: int
    said: str
    last: bool
    wrong_in_float64: dict[str, list[str]] = field(default_factory=dict)
    """Of ours that had to be looked at there, by name: they run beside each group."""

    def again(self, each: Started) -> bool:
        """Whether a rival beside a later group has been through this one already."""
        return each.group > 0 and not self.last and (each.rival.ours or each.rival.alone)

    @property
    def can_be_decided(self) -> bool:
        """Whether float64 can tell a wrong training from rounding: the loop ran in it, with the same random numbers."""
        return self.dtype is not torch.float64 and self.case.precision is None and self.case.still is None

    def of(self, rival: Rival) -> bool:
        """Whether this rival's training can be compared: its random numbers are the loop's, or there are none."""
        return self.case.still is None or rival.draws_alone


def measure(request: Request) -> dict[str, object]:
    """The row, in this process. Raises `Red`, before any timing, if any rival is wrong."""
    torch.set_num_threads(request.threads)
    if torch.device(request.device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # as for matmul: float32 is checked as float32, whoever runs
    torch.set_flush_denormal(True)  # Adam's moments of a dead unit decay to denormals, slow on some processors
    case = CASES[request.case]
    batches = [_to(batch, request.device) for batch in case.batches(request.members, request.steps_of(case))]
    checks = list(checks_of(request, case, batches))
    started: list[Started] = []
    begin = time.perf_counter()
    gc.freeze()  # what is there already is no rival's; to look through it each time takes seconds
    for number, group in enumerate(groups(request, case)):
        running = start_all(request, [Started(rival, group=number) for rival in group], checks, begin)
        _let_go()
        gc.freeze()  # nor is what all of them have compiled, while one runs
        clock(request, case, running, batches)
        started += running
        gc.unfreeze()
        torch.compiler.reset()  # what the group has compiled holds its models, in cycles that may not be frozen
        _let_go()
        gc.freeze()
    gc.unfreeze()
    floor = costs.floor(case, request.members, batches[0], request.device) if request.costs else None
    return document(request, case, started, floor)


def _let_go() -> None:
    """What nobody holds any more is the system's again: a stack of a thousand has gigabytes, and waits in a cycle."""
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):  # other systems than glibc's
        ctypes.CDLL(None).malloc_trim(0)


def groups(request: Request, case: Case) -> list[list[Rival]]:
    """The rivals that run side by side: all, or as many as fit into memory, ours and the one model with each group."""
    rivals = [RIVALS[name] for name in request.rivals]
    if request.memory_gib is None:
        return [rivals]
    model = case.models(1)[0]
    one = sum(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)
    each = request.members * one * (3 + case.recipe.passes // 2)  # parameter, gradient, moments; a copy on the way
    always = [rival for rival in rivals if rival.ours or rival.alone]
    others = [rival for rival in rivals if rival not in always]
    room = max(1, int(request.memory_gib * 2**30 // each) - len(always))
    parts = [others[begin : begin + room] for begin in range(0, len(others), room)] or [[]]
    return [[rival for rival in rivals if rival in part or rival in always] for part in parts]


def checks_of(request: Request, case: Case, batches: list[Batch]) -> Iterator[Check]:
    """The last of them starts what is timed. A case that draws is checked without its draws before."""

    def check(case: Case, dtype: torch.dtype, members: int, said: str, last: bool = False) -> Check:
        mine = [batch if case.shared else tuple(part[:members] for part in batch) for batch in batches]
        cast = {each: [_to(batch, each) for batch in mine] for each in (dtype, torch.float64)}
        exact = verify.of_loop(case, members, cast[torch.float64], torch.float64, request.device)
        expected = exact
        if dtype is not torch.float64:
            expected = verify.of_loop(case, members, cast[dtype], dtype, request.device)
            expected = verify.Trajectory(expected.losses, expected.state, case.precision)
            if case.still is not None and not verify.drew_alike(expected, exact):
                exact = expected
        return Check(case, dtype, cast[dtype], expected, exact, members, said, last)

    few = min(request.members, request.exact_members or request.members)
    still, said = case.without_draws(), "training" if case.trains else "prediction"
    if request.exact:
        yield check(still, torch.float64, few, said if still is case else f"{said} without its draws")
    elif still is not case:
        yield check(still, torch.float32, few, f"{said} without its draws")
    yield check(case, torch.float32, request.members, said, last=True)


def start_all(request: Request, started: list[Started], checks: list[Check], begin: float) -> list[Started]:
    """Every rival, started and checked. Raises `Red` if one is wrong, or with `costs` says so in its line.

    `begin` is when the row began: once its time is spent, the rivals that are left are cut, but for ours.
    """
    red = []
    for check in checks:
        torch.compiler.reset()
        for each in sorted(started, key=_starts_late):
            if each.status != "timed" or check.again(each):
                continue
            spent = request.row_s is not None and time.perf_counter() - begin > request.row_s
            if spent and not (each.rival.ours or each.rival.alone):
                each.status, each.why, each.running = "cut", f"the row's {request.row_s:g} s were spent before it", None
                continue
            wrong = start(each, request, check)
            red += [f"{request.name}, {each.rival.name}, {check.dtype}: {line}" for line in wrong]
            if wrong and request.costs:
                each.status, each.why, each.running = "wrong", f"{check.said}, {check.dtype}: {wrong[0]}", None
    if red and not request.costs:
        raise Red("\n".join(red))
    return started


def _starts_late(each: Started) -> bool:
    """False for what tries its plans on copies of its state: it starts while little else is held."""
    return not each.rival.family.startswith("memberwise captured")


def _to(batch: Batch, where: torch.dtype | str) -> Batch:
    """On another device, or in another dtype; labels stay integers."""
    return tuple(part.to(where) if isinstance(where, str) or part.is_floating_point() else part for part in batch)


def start(each: Started, request: Request, check: Check) -> list[str]:
    """Start one rival and train as many steps as there are batches; what its training gets wrong."""
    if missing := [package for package in each.rival.needs if find_spec(package) is None]:
        each.status, each.why = "left out", f"not installed: {', '.join(missing)}"
        return []
    each.running = None
    _let_go()
    memory = costs.Memory(request.device) if request.costs and check.last else None
    begin = time.perf_counter()
    try:
        running, found = trained(each.rival, request, check, check.dtype)
    except limits.OutOfTime:
        each.status, each.why = "cut", f"its start took more than {request.start_s:g} s"
        return []
    except Cannot as error:
        each.status, each.why = "cannot", str(error)
        return []
    except Exception as error:
        each.status, each.why = "cannot", reason(error)
        return []
    each.start_s, each.running = round(time.perf_counter() - begin, 2), running
    wrong = compared(found, each, check) if check.of(each.rival) else []
    if wrong and each.rival.ours and check.can_be_decided:
        with contextlib.suppress(limits.OutOfTime, StackWarning):  # undecided it stays
            wrong = decided(each.rival, request, check)
    if check.of(each.rival):
        each.checked = check.said
        each.proven = each.proven or (check.dtype is torch.float64 and not wrong)
    if memory is not None and not wrong:
        count(each, request, check, memory, found)
    return wrong


def trained(rival: Rival, request: Request, check: Check, dtype: torch.dtype) -> tuple[Running, verify.Trajectory]:
    """The rival, started, and what the steps of the check left."""
    with limits.at_most(request.start_s), warnings.catch_warnings():
        warnings.filterwarnings("error", _EAGERLY, StackWarning)
        models = [model.to(request.device, dtype) for model in check.case.models(check.members)]
        running = rival.start(check.case, models)
        del models
        return running, verify.of_running(running, (_to(batch, dtype) for batch in check.batches))


def compared(found: verify.Trajectory, each: Started, check: Check) -> list[str]:
    rival = each.rival
    expected, exact = ((one.first() if rival.alone else one) for one in (check.expected, check.exact))
    if check.dtype is torch.float64:
        return verify.exactly(found, expected)
    return verify.in_norm(found, expected, exact, ours=rival.ours, proven=each.proven)


def decided(rival: Rival, request: Request, check: Check) -> list[str]:
    """What is wrong in float64, every element of every member.

    Among a thousand networks with kinks some have an activation so close to one that a last bit of float32 sends it to
    the other side, and their gradient is another by more than what rounding alone costs them.
    """
    if rival.name not in check.wrong_in_float64:
        found = trained(rival, request, check, torch.float64)[1]
        _let_go()
        check.wrong_in_float64[rival.name] = verify.exactly(found, check.exact)
    return check.wrong_in_float64[rival.name]


def count(each: Started, request: Request, check: Check, memory: costs.Memory, found: verify.Trajectory) -> None:
    """Bytes and kernels of one step; what the check found goes first, for it is memory too."""
    found.state.clear()
    running, batch = each.running, check.batches[0]
    if running.memory is not None:
        each.memory_bytes = running.memory(batch)
        return
    batch = side_by_side([batch]) if running.together > 1 else batch
    each.memory_bytes = memory.peak(lambda: running.step(batch))
    each.kernels = costs.kernels(lambda: running.step(batch), request.device)


_EAGERLY = r"(?s).*\[MW50\d\]"
"""A captured step that says it runs eagerly has no figure under the name of a captured one."""


def reason(error: Exception) -> str:
    """The error's first line, without the paths in it."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {re.sub(r'/[^ :]+/', '', first)}"[:200]


def clock(request: Request, case: Case, started: list[Started], batches: list[Batch]) -> None:
    """Time all that run, side by side."""
    data = feed.of(case, batches)

    def step_of(running: Running) -> timing.Step:
        batch, step = (running.feed or feed.in_torch)(data), running.step
        return lambda number: step(batch(number))

    running = {each.rival.name: each for each in started if each.running is not None}
    steps = {name: step_of(each.running) for name, each in running.items()}
    calls = {name: each.running.together for name, each in running.items()}
    finish = timing.finisher(request.device)
    for name, samples in timing.interleaved(steps, request.pace, finish=finish, together=calls).items():
        running[name].samples = samples
        running[name].running = None


def document(request: Request, case: Case, started: list[Started], floor: costs.Floor | None) -> dict[str, object]:
    """The row as a results file has it."""
    figures = [(each, figure(each, request.pace)) for each in started]
    timed = [(each, figure) for each, figure in figures if figure["samples_us"]]
    row = {
        "row": request.name,
        "about": case.about,
        "members": request.members,
        "shared": case.shared,
        "threads": request.threads,
        "figures": [figure for _, figure in figures],
        "ratios": [
            {
                "of": mine["rival"],
                "to": other["rival"],
                "faster": schema.faster(mine["samples_us"], other["samples_us"]),
                **({"group": each.group} if request.costs else {}),
            }
            for each, mine in timed
            for beside, other in timed
            if each.rival.ours and other is not mine and beside.group == each.group
        ],
    }
    return row if floor is None else with_costs(row, request, case, [each for each, _ in figures], floor)


def with_costs(
    row: dict[str, object], request: Request, case: Case, started: list[Started], floor: costs.Floor
) -> dict[str, object]:
    """The same with what `schema.WORKLOAD` has more: of each rival, and of the row."""
    for each, figure in zip(started, row["figures"], strict=True):
        own = 1 if each.rival.alone else request.members
        more = {
            "group": each.group,
            "members": own,
            "checked": each.checked,
            "memory_bytes": each.memory_bytes,
            "kernels": each.kernels,
        }
        figure.update(more)
    row |= {"case": case.name, "workload": case.workload, "recipe": case.recipe.about if case.trains else "prediction"}
    row["steps"] = request.steps_of(case)
    row["floor"] = {**asdict(floor), "us": floor.us, "binding": floor.binding}
    schema.derive(row)
    return row


def figure(each: Started, pace: timing.Pace) -> dict[str, object]:
    samples = each.samples
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
