"""A rule without a case fails the suite; so does a case for what has no rule."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from memberwise.rules.registry import COMPOSITES, RULES

_TESTS = Path(__file__).parents[1] / "parity"


def _tested() -> dict[Any, str]:
    """Each operation and function that a file of rule cases runs: its `CASES`, and what it says is tested alone."""
    found: dict[Any, str] = {}
    for path in sorted(_TESTS.glob("test_rules_*.py")):
        module = importlib.import_module(f"tests.parity.{path.stem}")
        for op in [case.op for case in getattr(module, "CASES", [])] + list(getattr(module, "ALONE", {})):
            found[op] = path.name
    return found


def test_every_rule_has_a_case() -> None:
    tested = _tested()
    without = [str(op) for op in (*RULES, *COMPOSITES) if op not in tested and _is_aten(op)]
    assert not without, f"rules without a case in tests/parity/test_rules_*.py: {sorted(without)}"


def test_every_case_has_a_rule() -> None:
    stale = {str(op): name for op, name in _tested().items() if op not in RULES and op not in COMPOSITES}
    assert not stale, f"cases for what has no rule: {stale}"


def _is_aten(op: Any) -> bool:
    """Other tests register rules for operations of their own."""
    schema = getattr(op, "_schema", None)
    return schema is None or schema.name.startswith("aten::")


def test_a_rule_without_a_case_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail."""
    monkeypatch.setitem(RULES, torch.ops.aten.logdet.default, lambda *_: None)
    with pytest.raises(AssertionError, match="logdet"):
        test_every_rule_has_a_case()
