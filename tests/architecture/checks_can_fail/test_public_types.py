"""`make types` finds a public name whose types are not written down; the symbols are as pyright answers them."""

from __future__ import annotations

import pytest

from tools.public_types import MODULES, faults, public_names

BARE = [{"message": 'Type annotation for parameter "x" is missing'}]
PUBLIC = {"memberwise.trees.each", "memberwise.module.Stack"}


def symbol(name: str, category: str, diagnostics: list[dict[str, str]]) -> dict[str, object]:
    return {"name": name, "category": category, "diagnostics": diagnostics}


@pytest.mark.parametrize(
    "found",
    [symbol("memberwise.trees.each", "function", BARE), symbol("memberwise.module.Stack.select", "method", BARE)],
)
def test_bare_public_name_is_found(found: dict[str, object]) -> None:
    assert list(faults([found], PUBLIC))


@pytest.mark.parametrize(
    "passed",
    [
        symbol("memberwise.trees.inner", "function", BARE),
        symbol("memberwise.module.Stack._member", "method", BARE),
        symbol("memberwise.trees.each", "function", [{"message": "No docstring found"}]),
        symbol("memberwise.trees.each", "function", []),
    ],
)
def test_others_pass(passed: dict[str, object]) -> None:
    assert list(faults([passed], PUBLIC)) == []


def test_public_names_are_those_of_the_modules() -> None:
    assert public_names(MODULES) >= PUBLIC
