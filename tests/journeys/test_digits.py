"""The demo, in a tiny setting, as a user runs it: and what it wrote is read as a user would read it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.architecture.sources import ROOT

EXAMPLE = ROOT / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo wrote: 2 seeds x 4 learning rates, one epoch."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(EXAMPLE), "--epochs", "1", "--seeds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    for said in ("ensemble of 8", "accuracy", "NLL", "ECE", "scaled from 4 members", "ratio", "largest deviation"):
        assert said in " ".join(done.stdout.split()), done.stdout
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    """The figures."""
    return json.loads((folder / "digits.json").read_text())


def test_members_equal_their_lone_runs(report: dict[str, Any]) -> None:
    """After one epoch rounding has not grown yet: no more than in the lone run itself, and no answer differs."""
    found = report["alone"]["stack_from_alone"]
    assert 0 < found["largest_after_first_epoch"] < 1e-3
    assert found["answers_that_differ"] == 0


def test_figures_are_those_of_the_saved_stack(folder: Path, digits: ModuleType, report: dict[str, Any]) -> None:
    """Each member is loaded into a plain model, and the figures are computed anew by plain loops."""
    stacked = load_file(folder / "stack.safetensors")
    x, y = digits.load()["test"]
    members = []
    for i in range(report["members"]):
        model = digits.make_model()
        model.load_state_dict({name: tensor[i] for name, tensor in stacked.items()})
        with torch.no_grad():
            members.append(model.eval()(x).softmax(-1))
    best = members[report["best_member"]]
    ensemble = sum(members) / len(members)
    for who, p in (("best", best), ("ensemble", ensemble)):
        right = sum(int(row.argmax()) == int(label) for row, label in zip(p, y, strict=True))
        assert report["held_out"]["accuracy"][who] == pytest.approx(right / len(y), abs=2 / len(y))
        nll = sum(-float(row[label].log()) for row, label in zip(p, y, strict=True)) / len(y)
        assert report["held_out"]["NLL"][who] == pytest.approx(nll, rel=1e-3)


def test_best_member_is_a_plain_state_dict(folder: Path, digits: ModuleType, report: dict[str, Any]) -> None:
    state = torch.load(folder / "best_member.pt", weights_only=True)
    digits.make_model().load_state_dict(state, strict=True)
    stacked = load_file(folder / "stack.safetensors")
    for name, tensor in state.items():
        assert torch.equal(tensor, stacked[name][report["best_member"]]), name


def test_plot_is_a_picture(folder: Path) -> None:
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_times_add_up(report: dict[str, Any]) -> None:
    alone, one = report["alone"], report["as_one"]
    assert alone["seconds_scaled"] == pytest.approx(alone["seconds"] * report["members"] / len(alone["members"]))
    assert report["ratio"] == pytest.approx(alone["seconds_scaled"] / one["seconds"])
    assert 0 <= one["seconds_starting"] < one["seconds"]


def test_ece_against_a_plain_loop(digits: ModuleType) -> None:
    p, y = torch.randn(2, 200, 4).mul(3).softmax(-1), torch.randint(4, (200,))
    for member in range(2):
        expected = 0.0
        for low in range(digits.BINS):
            rows = [
                (float(row.max()), int(row.argmax()) == int(label))
                for row, label in zip(p[member], y, strict=True)
                if min(int(float(row.max()) * digits.BINS), digits.BINS - 1) == low
            ]
            if rows:
                gap = sum(right for _, right in rows) / len(rows) - sum(sure for sure, _ in rows) / len(rows)
                expected += len(rows) / len(y) * abs(gap)
        assert float(digits.ece(p, y)[member]) == pytest.approx(expected, abs=1e-5)


def test_ensembles_of_one_and_of_all(digits: ModuleType) -> None:
    p, y = torch.randn(6, 50, 4).softmax(-1), torch.randint(4, (50,))
    sizes = digits.by_size(p, y, draws=200)
    assert list(sizes) == [1, 2, 4, 6]
    assert sizes[6] == pytest.approx(float(digits.accuracy(p.mean(0), y)))
    assert sizes[1] == pytest.approx(float(digits.accuracy(p, y).mean()), abs=0.05)


def test_batches_are_those_of_the_seed(digits: ModuleType) -> None:
    one, again, other = (list(digits.batches(seed, 100, 2)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for e, f in zip(one, again, strict=True) for a, b in zip(e, f, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    assert not torch.equal(one[0][0], one[1][0])
    assert sorted(torch.cat(one[0]).tolist()) == sorted(set(torch.cat(one[0]).tolist()))
