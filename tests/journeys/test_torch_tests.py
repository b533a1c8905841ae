"""PyTorch's own tests on Memberwise: the parts of the runner, and what its last run found."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import memberwise
from survey.torch_tests import __main__ as command
from survey.torch_tests import page, pointing, runs, verdicts
from survey.torch_tests.left_out import LEFT_OUT
from survey.torch_tests.runs import Outcome
from survey.torch_tests.verdicts import EXCUSED, FAILED, PASSED, SKIPPED, TORCHS, UNTOUCHED, judge


@pytest.fixture
def pointed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for names in pointing.NAMES.values() for name in names):
        module, _, attribute = name.rpartition(".")
        place = importlib.import_module(module)
        monkeypatch.setattr(place, attribute, getattr(place, attribute))  # put back at the end
    pointing.point()
    pointing.calls.clear()


def test_torch_s_names_lead_to_memberwise(pointed: None) -> None:
    import functorch

    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    with pytest.raises(memberwise.MemberwiseError):
        torch.func.stack_module_state([])
    params, _ = torch.func.stack_module_state(models)
    seen = []
    for vmap in (torch.vmap, torch.func.vmap, functorch.vmap):
        vmap(lambda p: seen.append(type(p["weight"]).__name__) or p["weight"])(params)
    assert all(name.startswith("MemberTensor") for name in seen) and len(seen) == 3
    torch.func.functional_call(models[0], {}, torch.ones(2))
    torch.nn.utils.stateless.functional_call(models[0], {}, torch.ones(2))
    assert pointing.calls == {"vmap": 3, "functional_call": 2, "stack_module_state": 2}


ONE = "a.py::A::test_one"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (Outcome(ONE, "passed", {"vmap": 1}), Outcome(ONE, "passed"), PASSED),
        (Outcome(ONE, "passed"), Outcome(ONE, "passed"), UNTOUCHED),
        (Outcome(ONE, "failed", {"vmap": 1}, "why"), Outcome(ONE, "passed"), FAILED),
        (Outcome(ONE, "failed", {"vmap": 1}, "why"), Outcome(ONE, "failed"), TORCHS),
        (Outcome(ONE, "failed", {"vmap": 1}, "why"), Outcome(ONE, "skipped", expected=True), TORCHS),
        (Outcome(ONE, "skipped"), Outcome(ONE, "skipped"), SKIPPED),
        (None, Outcome(ONE, "passed"), FAILED),
    ],
)
def test_two_outcomes_make_a_verdict(ours: Outcome | None, theirs: Outcome, verdict: str) -> None:
    assert [one.verdict for one in judge({ONE: ours} if ours else {}, {ONE: theirs}, {})] == [verdict]


def test_a_failure_with_a_reason_is_left_out_and_a_needless_reason_is_told() -> None:
    left_out = {"a reason": ("a.py::A::test_*",), "another": ("b.py::*",)}
    passed = {ONE: Outcome(ONE, "passed")}
    found = judge({ONE: Outcome(ONE, "failed", {"vmap": 1})}, passed, left_out)
    assert [(one.verdict, one.why) for one in found] == [(EXCUSED, "a reason")]
    assert verdicts.stale(found, left_out) == ["b.py::*"]
    assert verdicts.stale(judge(passed, passed, left_out), left_out) == ["a.py::A::test_*", "b.py::*"]


TESTS = {
    "test/functorch/test_vmap.py": """
import torch, unittest
class TestVmapAPI(unittest.TestCase):
    def test_calls(self): self.assertTrue(torch.equal(torch.vmap(torch.sin)(torch.ones(2)), torch.ones(2).sin()))
    def test_does_not(self): pass
    def test_item(self):
        with self.assertRaises(RuntimeError): torch.vmap(lambda x: x.item() * x)(torch.arange(2.0))
    @unittest.expectedFailure
    def test_expected(self): assert False
class TestFunctionalize(unittest.TestCase):
    def test_not_run(self): assert False
""",
    "test/functorch/test_eager_transforms.py": "",
    "test/test_stateless.py": "",
}


@pytest.mark.long
def test_a_run_writes_down_each_test(tmp_path: Path) -> None:
    for name, text in TESTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {test.rpartition("::")[2]: outcome for test, outcome in runs.run(tmp_path, pointed=True).items()}
    assert {name: outcome.outcome for name, outcome in found.items()} == {
        "test_calls": "passed",
        "test_does_not": "passed",
        "test_item": "failed",
        "test_expected": "skipped",
    }
    assert found["test_calls"].calls == {"vmap": 1} and not found["test_does_not"].calls
    assert found["test_expected"].expected
    assert "RuntimeError not raised" in found["test_item"].what


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"test/functorch/test_vmap\.py.* missing"):
        runs.run(tmp_path, pointed=True)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(command.PATH.read_text())


def test_the_page_is_that_of_the_results(document: dict[str, Any]) -> None:
    assert command.PAGE.read_text() == page.render(document)


def test_nothing_fails_and_each_test_left_out_has_its_reason(document: dict[str, Any]) -> None:
    tests = document["tests"]
    assert not [test for test, (verdict, _) in tests.items() if verdict == FAILED]
    assert {why for verdict, why in tests.values() if verdict == EXCUSED} == {*LEFT_OUT}
    assert {verdict for verdict, _ in tests.values()} <= {*verdicts.VERDICTS}
    assert sum(verdict == PASSED for verdict, _ in tests.values()) > 500
