"""One chunk of random cases: a line of JSON for each, so that whoever reads knows where a crash came."""

from __future__ import annotations

import argparse
import json
from random import Random

import torch

from survey.fuzz.compare import REFUSED, WRONG, compared
from survey.fuzz.programs import Program, drawn
from survey.fuzz.shrink import shrunk


def case(seed: int, index: int) -> Program:
    """Program number `index`: any of them can be made anew."""
    return drawn(Random(f"{seed}-{index}"))


def line(program: Program) -> dict[str, object]:
    """What became of it; a failure is made small first."""
    verdict = compared(program)
    out: dict[str, object] = {"kind": verdict.kind, "steps": len(verdict.program.steps)}
    if verdict.kind == REFUSED:
        return {**out, "code": verdict.code, "what": verdict.what}
    if verdict.kind == WRONG:
        small = shrunk(verdict.program, lambda one: compared(one).kind == WRONG)
        return {**out, "what": compared(small).what, "program": small.to_json()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("seed", "first", "last"):
        parser.add_argument(f"--{name}", type=int, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for index in range(chosen.first, chosen.last):
        print(json.dumps(line(case(chosen.seed, index))), flush=True)


if __name__ == "__main__":
    main()
