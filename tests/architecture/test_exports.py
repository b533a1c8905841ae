"""Every public name exists, is annotated, documented, and shown in an example."""

from __future__ import annotations

import importlib

import pytest

from tests.architecture.checks import faulty_exports, without_example

PUBLIC = ("memberwise", "memberwise.optim", "memberwise.testing")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_annotated_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert faulty_exports(module) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_show_an_example(name: str) -> None:
    assert without_example(importlib.import_module(name)) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_public_is_left_out(name: str) -> None:
    """What the module defines or imports from the library by a public name is listed."""
    module = importlib.import_module(name)
    ours = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "").startswith("memberwise")
    }
    assert ours <= set(module.__all__)
