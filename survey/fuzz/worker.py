"""One chunk of random cases: a line of JSON for each, so that whoever reads knows where a crash came."""

from __future__ import annotations

import argparse
import json
from random import Random
from typing import Any

import torch

from survey.fuzz import programs, sequences, shrink
from survey.fuzz.compare import REFUSED, WRONG, compared

PROGRAMS, SEQUENCES = KINDS = ("programs", "sequences")


def case(kind: str, seed: int, index: int) -> Any:
    """Program, or history, number `index`: any of them can be made anew."""
    if kind == PROGRAMS:
        return programs.drawn(Random(f"{seed}-{index}"))
    return sequences.drawn(Random(f"sequence {seed}-{index}"))


def line(one: Any) -> dict[str, object]:
    """What became of it; a failure is made small first."""
    return _of_history(one) if isinstance(one, sequences.History) else _of_program(one)


def _of_program(program: programs.Program) -> dict[str, object]:
    verdict = compared(program)
    out: dict[str, object] = {"kind": verdict.kind, "steps": len(verdict.program.steps)}
    if verdict.kind == REFUSED:
        return {**out, "code": verdict.code, "what": verdict.what}
    if verdict.kind == WRONG:
        small = shrink.shrunk(verdict.program, lambda one: compared(one).kind == WRONG, shrink.smaller_program)
        return {**out, "what": compared(small).what, "case": small.to_json()}
    return out


def _of_history(history: sequences.History) -> dict[str, object]:
    kind, _ = sequences.compared(history)
    out: dict[str, object] = {"kind": kind, "steps": len(history.actions)}
    if kind == WRONG:
        small = shrink.shrunk(history, lambda one: sequences.compared(one)[0] == WRONG, sequences.smaller)
        return {**out, "what": sequences.compared(small)[1], "case": small.to_json()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    for name in ("seed", "first", "last"):
        parser.add_argument(f"--{name}", type=int, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for index in range(chosen.first, chosen.last):
        print(json.dumps(line(case(chosen.kind, chosen.seed, index))), flush=True)


if __name__ == "__main__":
    main()
