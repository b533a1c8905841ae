"""`import memberwise` is quick, quiet, and loads nothing that only some users need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

LAZY = ("rich", "triton", "optuna", "matplotlib", "sklearn", "torchmetrics", "torch._inductor", "torch._dynamo")

LOADED = "import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))"


def loaded_by(module: str) -> set[str]:
    """The names in sys.modules of a fresh interpreter after one import."""
    command = [sys.executable, "-W", "error", "-c", LOADED.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert not done.stderr, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def added() -> set[str]:
    """What `import memberwise` loads beyond `import torch`."""
    return loaded_by("memberwise") - loaded_by("torch")


@pytest.mark.parametrize("name", LAZY)
def test_loads_nothing_that_only_some_users_need(added: set[str], name: str) -> None:
    assert not [module for module in added if module == name or module.startswith(name + ".")]


def test_loads_the_library(added: set[str]) -> None:
    assert {"memberwise", "memberwise.engine", "memberwise.rules"} <= added
