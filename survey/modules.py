"""All modules of torch.nn, each as a stack of three: right, refused by name, or wrong, and by which paths.

    make check-modules
    python -m survey.modules --only Conv2d LSTM      these alone, in the place of their former results

Compared with a loop are outputs, gradients of parameters and inputs, and buffers: with gradients, without, with second
gradients (in float64) and under autocast, the inputs each member's own; and with gradients and one input for all.
Beside it stands what torch.func does with the same.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rich.progress import track

from memberwise.errors import MemberwiseError
from survey import records
from survey.found import Found, kinds_differ, values_differ
from survey.records import REFUSED, RIGHT, WRONG, Record
from survey.samples import LISTS, MEMBERS, Sample, entries, samples
from survey.trial import WAYS, Trial, alone, by_torch, together

TRIALS = (("gradients", True), *((way, False) for way in WAYS))
"""Each way, and whether one input serves all members."""

DTYPE = "float32; float64 for second gradients"


@dataclass
class Tally:
    """What all trials of one module in one mode came to."""

    verdicts: list[tuple[str, str, str]] = field(default_factory=list)
    torch: list[str] = field(default_factory=list)
    paths: Counter[str] = field(default_factory=Counter)
    slow: dict[str, str] = field(default_factory=dict)

    def record(self, name: str, variant: str) -> Record:
        """All of it together: the worst verdict stands."""
        verdict = records.worst(verdict for verdict, _, _ in self.verdicts)
        code, what = next((rest for found, *rest in self.verdicts if found == verdict), ("", ""))
        if not self.verdicts:
            verdict, what = WRONG, "nothing was compared: no lone run succeeds"
        rival = next((found for found in self.torch if found != RIGHT), RIGHT)
        return Record(name, variant, verdict, code, what, dict(self.paths), self.slow, rival, len(self.verdicts))


def examined(info: Any, training: bool) -> Record:
    """The record of one module in one mode."""
    tally = Tally()
    for sample in samples(info, training):
        for way, shared in TRIALS:
            trial = Trial(sample.make, sample.inputs, shared, way)
            _try(tally, sample, trial.wide() if way == "second gradients" else trial)
    return tally.record(info.name, "train" if training else "eval")


def _try(tally: Tally, sample: Sample, trial: Trial) -> None:
    try:
        lone, drew = alone(trial)
    except Exception:
        return  # no such run alone: a second derivative that torch does not have
    where = f"{sample.about or 'plain'}, {trial.way}, {'shared' if trial.shared else 'own'} inputs"
    truth = _truth(trial, drew)
    if trial.way == "gradients" and trial.is_mapped:
        tally.torch.append(_torch_verdict(trial, lone, drew, truth))
    try:
        ours, entries = together(trial)
    except MemberwiseError as error:
        tally.verdicts.append((REFUSED, error.code, f"{where}: {_line(error)}"))
        return
    except Exception as error:
        tally.verdicts.append((WRONG, "", f"{where}: {_line(error)}"))
        return
    for entry in entries:
        tally.paths[entry.path] += entry.count
        if entry.path in records.SLOW:
            tally.slow[entry.op] = entry.reason.partition("\n")[0]
    what = kinds_differ(ours, lone) or values_differ(ours, lone, truth, narrow=trial.way == "autocast")
    tally.verdicts.append((WRONG, "", f"{where}: {what}") if what else (RIGHT, "", ""))


def _truth(trial: Trial, drew: bool) -> Callable[[], Found | None]:
    """The lone run in float64, made when it is asked for; where something is drawn, the draws are others."""
    return cache(lambda: None if drew else alone(trial.wide())[0])


def _torch_verdict(trial: Trial, lone: Found, drew: bool, truth: Callable[[], Found | None]) -> str:
    """Of what is drawn at random, torch.func's values are another stream's: shapes and types are compared alone."""
    try:
        found = by_torch(trial)
    except Exception as error:
        return _line(error)
    return WRONG if kinds_differ(found, lone) or (not drew and values_differ(found, lone, truth)) else RIGHT


def _line(error: BaseException) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {first}"


def main(arguments: list[str] | None = None) -> int:
    """Sweep; the exit status is 1 where a module is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these modules alone, in the place of their former results"
    )
    parser.add_argument("--of", nargs="+", choices=LISTS, default=[*LISTS], help="torch's list, or what it leaves out")
    options = parser.parse_args(arguments)
    chosen = options.only
    warnings.simplefilter("ignore")
    status = 0
    for name in options.of:
        found = []
        for info, training in track(entries(LISTS[name], chosen), name, disable=None):
            found.append(record := examined(info, training))
            if chosen or record.verdict != RIGHT or record.slow:
                print(" ".join((record.name, record.variant, record.verdict, record.what)), *_slow(record), flush=True)
        print(summary(found))
        if found:
            print(records.write(name, _beside(name, found) if chosen else found, members=MEMBERS, dtype=DTYPE))
        status |= any(record.verdict == WRONG for record in found)
    return int(status)


def _beside(name: str, found: list[Record]) -> list[Record]:
    """The former results, those that were found anew in their places."""
    new = {(record.name, record.variant): record for record in found}
    former = records.read(name)[1] if records.exists(name) else []
    former = [new.pop((record.name, record.variant), record) for record in former]
    return [*former, *new.values()]


def _slow(record: Record) -> list[str]:
    return [f"\n    {op} member by member: {reason}" for op, reason in record.slow.items()]


def summary(found: list[Record]) -> str:
    """How many modules are right, refused, wrong, in all their modes; and torch.func's."""
    names = {record.name for record in found}
    counts = Counter(records.worst(r.verdict for r in found if r.name == name) for name in names)
    rival = sum(all(r.torch == RIGHT for r in found if r.name == name) for name in names)
    own = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (RIGHT, REFUSED, WRONG))
    return f"{len(names)} modules: {own}; by torch.func {rival} right"


if __name__ == "__main__":
    sys.exit(main())
