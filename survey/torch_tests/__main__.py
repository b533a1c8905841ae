"""PyTorch's own tests of vmap, functional_call and stack_module_state, pointed at Memberwise.

    make check-torch-tests PYTORCH=<a checkout of pytorch>
    python -m survey.torch_tests CHECKOUT -k TestVmapAPI         these alone; nothing is written

The exit status is 1 if a test fails that is not in `left_out.py`, or if an entry there has become needless.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from survey.records import RESULTS
from survey.torch_tests import page
from survey.torch_tests.left_out import LEFT_OUT
from survey.torch_tests.pointing import NAMES
from survey.torch_tests.runs import FILES, NOT_RUN, ROOT, run
from survey.torch_tests.verdicts import FAILED, VERDICTS, Verdict, judge, stale

PAGE = ROOT / "docs" / "torch_tests.md"
PATH = RESULTS / "torch_tests.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of pytorch, of the version of torch that is installed")
    parser.add_argument("-k", dest="only", default="", help="run the tests that pytest's -k picks; write nothing")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    ours, theirs = (run(checkout, pointed=pointed, only=options.only) for pointed in (True, False))
    verdicts = judge(ours, theirs, LEFT_OUT)
    needless = [] if options.only else stale(verdicts, LEFT_OUT)
    report(verdicts, needless)
    if not options.only:
        write(verdicts, options.checkout)
    return int(bool(needless) or any(one.verdict == FAILED for one in verdicts))


def report(verdicts: list[Verdict], needless: list[str]) -> None:
    """What failed, and how many there are of each kind."""
    for one in verdicts:
        if one.verdict == FAILED:
            print(f"FAILED {one.test}\n    {one.why[:500]}")
    for pattern in needless:
        print(f"left_out.py: {pattern} leaves out no test that fails; take it out")
    counts = Counter(one.verdict for one in verdicts)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))


def write(verdicts: list[Verdict], checkout: Path) -> None:
    """The results, and the page."""
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "source": source(checkout),
        "files": {file: hashlib.sha256((checkout / file).read_bytes()).hexdigest() for file in FILES},
        "names": sorted(name for names in NAMES.values() for name in names),
        "not_run": NOT_RUN,
        "tests": {one.test: [one.verdict, one.why] for one in sorted(verdicts, key=lambda one: one.test)},
    }
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(page.render(document))


def source(checkout: Path) -> str:
    """Which tests these are: the checkout's tag or commit, or what its `version.txt` says."""
    told = subprocess.run(
        ("git", "-C", str(checkout), "describe", "--tags", "--always"), capture_output=True, text=True, check=False
    )
    inside = (checkout / ".git").exists()
    return f"pytorch {told.stdout.strip()}" if inside else (checkout / "version.txt").read_text().strip()


if __name__ == "__main__":
    sys.exit(main())
