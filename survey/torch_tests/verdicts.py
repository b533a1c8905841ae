"""What a test's two outcomes, on Memberwise and on torch, say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from survey.torch_tests.runs import Outcome

PASSED, EXCUSED, FAILED = "passed", "left out", "failed"
UNTOUCHED, SKIPPED, TORCHS = "untouched", "skipped", "fails on torch"
VERDICTS = {
    PASSED: "called Memberwise, and passed",
    EXCUSED: "called Memberwise, and asks for what Memberwise does otherwise; the reasons stand below",
    FAILED: "called Memberwise, and failed",
    TORCHS: "fails here with torch's own names, too; some are expected to by PyTorch",
    UNTOUCHED: "called none of the names",
    SKIPPED: "skipped by PyTorch: it needs a GPU, or is switched off",
}


@dataclass(frozen=True)
class Verdict:
    """Of one test; `why` is the reason it is left out, or what failed."""

    test: str
    verdict: str
    why: str = ""


def judge(
    ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome], left_out: Mapping[str, tuple[str, ...]]
) -> list[Verdict]:
    """A verdict for each test of both runs, in order."""
    return [_judged(test, ours.get(test), theirs.get(test), left_out) for test in {**theirs, **ours}]


def _judged(
    test: str, ours: Outcome | None, theirs: Outcome | None, left_out: Mapping[str, tuple[str, ...]]
) -> Verdict:
    if theirs is not None and (theirs.outcome == "failed" or theirs.expected):
        return Verdict(test, TORCHS, "expected" if theirs.expected else theirs.what)
    if ours is None:
        return Verdict(test, FAILED, "no outcome: the process ended")
    if ours.outcome == "failed":
        why = reason(test, left_out)
        return Verdict(test, EXCUSED, why) if why else Verdict(test, FAILED, ours.what)
    if ours.outcome == "skipped":
        return Verdict(test, SKIPPED, ours.what)
    return Verdict(test, PASSED if ours.calls else UNTOUCHED)


def reason(test: str, left_out: Mapping[str, tuple[str, ...]]) -> str:
    """Why a test is left out, or "" if it is not.

    >>> reason("a.py::B::test_c", {"tests a private name": ("a.py::B::test_*",)})
    'tests a private name'
    """
    return next((why for why, patterns in left_out.items() if any(fnmatchcase(test, one) for one in patterns)), "")


def stale(verdicts: list[Verdict], left_out: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The patterns that leave out no test that would fail: they have had their day."""
    needed = [one.test for one in verdicts if one.verdict == EXCUSED]
    return [one for patterns in left_out.values() for one in patterns if not any(fnmatchcase(t, one) for t in needed)]
