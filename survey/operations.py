"""Every operation of torch's own test table for M members, against a loop: right, or refused by name.

    make check-operations                             an hour; each operation is recorded when it is done
    make check-operations ARGS=--resume               from where the last run of this commit stopped
    python -m survey.operations 'linalg.*' cumsum     these alone; nothing is written
    python -m survey.operations lu_solve --again      these alone, in place of what is recorded of them

Each is called out of place and in place, with all tensors stacked and with one of them stacked and the others shared;
without gradients, where strides and aliases are looked at too, and with gradients. Beside it stands what torch.func
does.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import machine
from memberwise.engine import trace
from survey import records
from survey.op_samples import MEMBERS, samples
from survey.op_table import TABLE, name_of
from survey.op_trial import Trial
from survey.op_verdict import Verdict, judged
from survey.records import RIGHT, SLOW, WRONG, Record

DTYPES = (torch.float32, torch.float64)
PATHS = ("rule", "vmap", *SLOW)
FEW = 6
"""With so many samples or fewer, each is tried with every choice of one stacked argument; else with one by turns."""


def variants(op: Any) -> dict[str, Any]:
    """The forms in which an operation is called."""
    found = {"": op.op}
    if op.inplace_variant is not None:
        found["in place"] = op.inplace_variant
    return found


def choices(count: int, turn: int, every: bool) -> Iterator[list[bool]]:
    """Which arguments are stacked: all of them, and one alone (each, or by turns)."""
    yield [True] * count
    if count > 1:
        for k in range(count):
            if every or k == turn % count:
                yield [place == k for place in range(count)]


def trials(op: Any, dtype: torch.dtype, variant: str, stop: int | None = None) -> Iterator[Trial]:
    """All that is tried of one operation in one dtype and form."""
    in_place = variant == "in place"
    own = [*samples(op, dtype, stop)]
    for turn, sample in enumerate(own):
        if in_place and sample.broadcasts:
            continue
        for stacked in choices(len(sample.columns), turn, len(own) <= FEW):
            for follows in (False, True):
                # what torch cannot stack is no question to Memberwise
                with suppress(RuntimeError, NotImplementedError):
                    yield Trial(op.name, variants(op)[variant], sample, stacked, in_place=in_place, follows=follows)


class Tally:
    """What became of the trials of one operation, in one dtype and form."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.rivals: Counter[Verdict] = Counter()
        self.paths: Counter[str] = Counter()
        self.slow: dict[str, str] = {}

    def add(self, trial: Trial) -> None:
        """Run one trial by the loop, by the stack and, with gradients, by torch.func."""
        loop = trial.loop()
        with trace.recording() if trial.follows else nullcontext() as record:
            run = trial.stack()
        self.verdicts[judged(run, loop, trial)] += 1
        if record is not None:
            self._note(record)
            self.rivals[judged(trial.torch_func(), loop, trial, draws=False)] += 1

    def _note(self, record: trace.Record) -> None:
        for entry in record.entries.values():
            if entry.path in PATHS:
                self.paths[entry.path] += entry.count
            if entry.path in SLOW:
                self.slow.setdefault(entry.op, entry.reason.partition("\n")[0])

    def record(self, name: str, variant: str) -> Record:
        """All of it, the worst first."""
        verdict = _worst(self.verdicts)
        rival = _worst(self.rivals)
        torch_says = rival.what if rival.raised else rival.verdict
        total = sum(self.verdicts.values())
        found = verdict.verdict, verdict.code, verdict.what
        return Record(name, variant, *found, dict(self.paths), self.slow, torch_says, total)


def _worst(verdicts: Counter[Verdict]) -> Verdict:
    """A silent fault is worse than an error."""
    return min(verdicts, key=lambda one: (records.VERDICTS.index(one.verdict), one.raised), default=Verdict(RIGHT))


def survey(op: Any, stop: int | None = None, details: bool = False) -> Iterator[Record]:
    """The records of one operation."""
    for dtype in DTYPES:
        if dtype not in op.supported_dtypes("cpu"):
            continue
        for variant in variants(op):
            tally = Tally()
            for trial in trials(op, dtype, variant, stop):
                tally.add(trial)
            form = f"{str(dtype).removeprefix('torch.')} {variant}".strip()
            if details:
                _print_details(name_of(op), form, tally)
            if tally.verdicts:
                yield tally.record(name_of(op), form)


def _print_details(name: str, form: str, tally: Tally) -> None:
    for verdict, count in tally.verdicts.most_common():
        print(f"  {name} {form}: {count} {verdict.verdict} {verdict.code} {verdict.what}")


def apart(op: Any, stop: int | None, seconds: float, details: bool = False) -> list[Record]:
    """The same in a process of its own: what takes it down takes down one operation."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(there, op, stop, details), daemon=True)
    child.start()
    there.close()
    found: list[Record] = []
    try:
        while here.poll(seconds):
            found.append(here.recv())
    except EOFError:
        child.join()
        if child.exitcode == 0:
            return found
    child.kill()
    child.join()
    what = f"the process ended with {child.exitcode}" if child.exitcode != -9 else f"no end within {seconds:.0f} s"
    return [*found, Record(name_of(op), "", WRONG, what=what)]


def _send(there: Any, op: Any, stop: int | None, details: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for record in survey(op, stop, details):
        there.send(record)


def recorded() -> tuple[int, list[Record]]:
    """How many operations a run of this commit has recorded, and its records; of any other run, none."""
    if not records.exists("operations"):
        return 0, []
    head, found = records.read("operations")
    return (head["done"], found) if head["versions"] == machine.versions() and _is_committed(head) else (0, [])


def _is_committed(head: dict[str, Any]) -> bool:
    """Sources that differ from their commit may differ from those of the last run, too."""
    return not head["versions"]["commit"].endswith(("+", "unknown"))


def swept(resume: bool, seconds: float) -> list[Record]:
    """All operations, recorded one by one."""
    before, found = recorded() if resume else (0, [])
    for done, own in enumerate(_run(TABLE[before:], None, seconds), before + 1):
        found += own
        records.write("operations", found, members=MEMBERS, done=done, of=len(TABLE))
    return found


def again(chosen: Sequence[Any], seconds: float) -> list[Record]:
    """These operations, mended since, in the place of what is recorded of them."""
    head, before = records.read("operations")
    found = [*chain(*_run(chosen, None, seconds))]
    names = {name_of(op) for op in chosen}
    kept = [record for record in before if record.name not in names]
    order = {name_of(op): place for place, op in enumerate(TABLE)}
    merged = sorted((*kept, *found), key=lambda record: order[record.name])
    own = {**head.get("again", {}), **dict.fromkeys(sorted(names), machine.versions()["commit"])}
    first = head.get("begun", head["versions"]["commit"])
    records.write("operations", merged, members=MEMBERS, done=head["done"], of=head["of"], begun=first, again=own)
    return found


def _run(chosen: Sequence[Any], stop: int | None, seconds: float, details: bool = False) -> Iterator[list[Record]]:
    with Progress(auto_refresh=False) as progress:  # a thread that draws would not survive a fork
        task = progress.add_task("operations", total=len(chosen))
        for op in chosen:
            progress.update(task, description=name_of(op), refresh=True)
            yield apart(op, stop, seconds, details)
            progress.advance(task)


def main(argv: list[str] | None = None) -> int:
    """Survey the operations named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m survey.operations", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or patterns, e.g. 'linalg.*'; all if none")
    parser.add_argument("--resume", action="store_true", help="go on where the last run of this commit stopped")
    parser.add_argument("--again", action="store_true", help="write down those named anew, mended since the last run")
    parser.add_argument("--first", type=int, help="only so many samples of each; nothing is written")
    parser.add_argument("--seconds", type=float, default=600, help="what one dtype and form of an operation may take")
    options = parser.parse_args(argv)
    if options.again:
        found = again([op for op in TABLE if name_of(op) in options.names], options.seconds)
    elif options.names or options.first:
        patterns = options.names or ["*"]
        chosen = [op for op in TABLE if any(fnmatch.fnmatch(name_of(op), pattern) for pattern in patterns)]
        found = [*chain(*_run(chosen, options.first, options.seconds, details=bool(options.names)))]
    else:
        found = swept(options.resume, options.seconds)
    counts = Counter(record.verdict for record in found)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in records.VERDICTS))
    for record in found:
        if record.verdict == WRONG:
            print(f"{record.name} {record.variant}: {record.what}")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
