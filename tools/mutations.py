"""Break each rule in turn, and demand that the tests turn red.

    make check-mutations
    python tools/mutations.py --only aten::add linear      rules whose name starts so
    python tools/mutations.py --processes 2

First the tests run once, and it is noted which of them use which rule. Then each rule is broken in each way that
`tests/architecture/checks_can_fail/sabotage.py` knows, and the tests that use it run again, quickest first, until one
is red. A way that changes no value in any of them is no mutation (all members draw zeros alike), and is counted apart;
a rule that no test uses, or of which a mutation stays green, is a fault, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "architecture" / "checks_can_fail" / "mutations.json"
TESTS = ("tests/parity", "--ignore-glob=*capture*", "--ignore-glob=*test_strict*")
"""All that use rules, but for what breaks them itself."""
MOST_TESTS, MOST_IDLE = 60, 60
"""How many of the tests in which a mutation changes something must stay green before it counts as survived, and how
many may see no change at all."""

EXCUSED = {
    **dict.fromkeys(("aten::empty_like", "aten::new_empty", "aten::new_empty_strided"), "any value is a right one"),
    **dict.fromkeys(
        ("aten::where.Scalar", "aten::where.ScalarOther", "aten::where.ScalarSelf"),
        "torch turns it into where.self before it is dispatched",
    ),
    **dict.fromkeys(
        ("aten::cudnn_batch_norm", "aten::cudnn_batch_norm_backward"),
        "there is no cuDNN on a CPU: tests/parity/test_rules_cudnn.py runs on a GPU",
    ),
}
"""Rules of which no mutation can be seen, and why."""

sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CI"] = "true"  # hypothesis: the same examples each time

import pytest  # noqa: E402 the path and the environment come first
import torch  # noqa: E402 likewise
from _pytest.runner import runtestprotocol  # noqa: E402 likewise

from tests.architecture.checks_can_fail import sabotage  # noqa: E402 likewise


@dataclass
class Verdict:
    """What became of one mutation: `red`, `survived`, `no effect` or `untested`."""

    rule: str
    kind: str
    verdict: str
    test: str = ""


class Session:
    """A pytest session that runs its tests as often as it is asked to."""

    def __init__(self, only: tuple[str, ...], processes: int) -> None:
        self.only = only
        self.processes = processes
        self.users: dict[Any, list[tuple[float, pytest.Item]]] = defaultdict(list)
        self.failing: list[str] = []
        self.verdicts: list[Verdict] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of running each test once."""
        rules = sabotage.of_rules()  # before the tests add their own
        mutations = rules + sabotage.of_composites(self.note_users(session.items))
        chosen = [mutation for mutation in mutations if mutation.name.startswith(self.only)]
        say(f"{len(session.items)} tests ran, {len(self.failing)} of them red; {len(chosen)} mutations to judge")
        self.verdicts = in_parts(lambda own: [self.judge(mutation) for mutation in own], chosen, self.processes)
        return True

    def note_users(self, items: list[pytest.Item]) -> sabotage.Uses:
        """Run every test once, unbroken, and note the rules it uses."""
        with sabotage.watching() as uses:
            for item in items:
                uses.targets.clear()
                start = time.perf_counter()
                red = is_red(item)
                seconds = time.perf_counter() - start
                if red:
                    self.failing.append(item.nodeid)
                for target in () if red else uses.targets:
                    self.users[target].append((seconds, item))
        return uses

    def judge(self, mutation: sabotage.Mutation) -> Verdict:
        """Run the tests that use the rule, quickest first, until one is red."""
        users = sorted(self.users[mutation.target], key=lambda user: user[0])
        effective = idle = 0
        for _, item in users:
            with mutation.active():
                red = is_red(item)
            if red:
                return Verdict(mutation.name, mutation.kind, "red", item.nodeid)
            effective += mutation.effects > 0
            idle += mutation.effects == 0
            if effective == MOST_TESTS or idle == MOST_IDLE:
                break
        verdict = "survived" if effective else "no effect" if users else "untested"
        if mutation.name in EXCUSED:
            verdict = f"excused: {EXCUSED[mutation.name]}"
        return Verdict(mutation.name, mutation.kind, verdict)


def is_red(item: pytest.Item) -> bool:
    """Run one test by itself; whether it fails."""
    if hasattr(item, "_request"):
        item._initrequest()  # type: ignore[attr-defined] # a test is made to run once, and this makes it anew
    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def in_parts(judge: Callable[[list[Any]], list[Verdict]], work: list[Any], processes: int) -> list[Verdict]:
    """Judge in forked processes, each its part of the work: what ran before need not run again."""
    if processes == 1:
        return judge(work)
    folder = Path(tempfile.mkdtemp())
    children = []
    for part in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                found = [asdict(verdict) for verdict in judge(work[part::processes])]
                (folder / f"{part}.json").write_text(json.dumps(found))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("a process that judged mutations died")
    found = [json.loads((folder / f"{part}.json").read_text()) for part in range(processes)]
    return [Verdict(**verdict) for part in found for verdict in part]


def document(session: Session) -> dict[str, Any]:
    """The results: how many of each verdict, and for each rule what turned red, survived or had no effect."""
    rules: dict[str, dict[str, str]] = defaultdict(dict)
    for verdict in sorted(session.verdicts, key=lambda verdict: (verdict.rule, verdict.kind)):
        if verdict.verdict == "red":
            rules[verdict.rule][verdict.kind] = f"red: {verdict.test}"
        elif not (verdict.verdict == "no effect" and verdict.kind.startswith("forget")):
            rules[verdict.rule][verdict.kind] = verdict.verdict
    return {
        "torch": torch.__version__,
        "verdicts": dict(sorted(Counter(v.verdict.partition(":")[0] for v in session.verdicts).items())),
        "rules": rules,
    }


def say(text: str) -> None:
    """Print at once, also where the output is a file."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rules whose name starts so")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="what pytest is to collect")
    parser.add_argument("--out", type=Path, help="the results file; without --only it is the committed one")
    options = parser.parse_args(arguments)
    session = Session(tuple(options.only) or ("",), options.processes)
    os.chdir(ROOT)
    quiet = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([*quiet, *options.tests], plugins=[session])
    faults = [v for v in session.verdicts if v.verdict in ("survived", "untested")]
    for verdict in faults:
        say(f"{verdict.verdict}: {verdict.rule}, {verdict.kind}")
    for test in session.failing:
        say(f"red without any mutation: {test}")
    out = options.out or (None if options.only else RESULTS)
    if out is not None:
        out.write_text(json.dumps(document(session), indent=1) + "\n")
    found = Counter(verdict.verdict.partition(":")[0] for verdict in session.verdicts)
    say(", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items())) or "nothing was judged")
    return 1 if faults or session.failing or not session.verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
