"""`make` as a newcomer meets it: the list of targets, and what it says when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tools import changelog, preflight

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make itself is not on this machine")
PROMISED = ("demo", "test", "lint", "types", "doctest", "snippets", "imports", "check-mutations", "bench")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the project's folder."""
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@needs_make
def test_help_lists_the_targets() -> None:
    done = make("help")
    assert done.returncode == 0
    assert set(PROMISED) <= set(re.findall(r"^ *make ([a-z-]+)", done.stdout, re.MULTILINE))


@needs_make
def test_without_python_it_says_what_to_install(tmp_path: Path) -> None:
    done = make(str(tmp_path / ".ready"), "READY=" + str(tmp_path / ".ready"), "PYTHON=python9.9")
    assert done.returncode != 0
    assert "Install Python 3.11 or newer" in done.stdout


@needs_make
def test_another_torch_has_an_environment_of_its_own() -> None:
    done = make("--dry-run", "--always-make", "test", "TORCH=2.14.1")
    assert "-m venv .venv-2.14.1" in done.stdout
    assert "s/^torch==.*/torch==2.14.1/" in done.stdout
    assert ".venv-2.14.1/bin/python -m pytest" in done.stdout


def test_this_machine_lacks_nothing_for_an_environment() -> None:
    assert preflight.main([]) == 0


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_missing_venv_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == module else object())
    said = preflight.missing_for_venv()
    assert f"module {module!r} is missing" in said
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in said


def test_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "OLDEST", (9, 9))
    assert "needs Python 9.9 or newer" in preflight.missing_for_venv()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert preflight.main(["compiler"]) == 1
    said = capsys.readouterr().err
    assert "no compiler was found" in said
    assert "apt install g++" in said


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if preflight.missing_for_compiler():
        pytest.skip("this machine has no compiler to try it with")
    monkeypatch.setattr(preflight, "PROGRAM", preflight.PROGRAM.replace("Python.h", "NoSuchHeader.h"))
    assert "NoSuchHeader.h" in preflight.missing_for_compiler()


def test_changes_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changelog, "ROOT", tmp_path)
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\nAll.\n\n## 0.1.0 (2030-01-01)\n\n### Added\n- All of it.\n")
    (tmp_path / "changelog.d" / "README.md").write_text("how")
    (tmp_path / "changelog.d" / "slices.added.md").write_text("`select` takes a slice.\nAlso a mask.\n")
    changelog.main("0.2.0")
    text = (tmp_path / "CHANGELOG.md").read_text()
    assert re.search(
        r"^## 0\.2\.0 \([\d-]+\)\n\n### Added\n- `select` takes a slice\.\n  Also a mask\.\n\n## 0\.1\.0", text, re.M
    )
    assert [path.name for path in (tmp_path / "changelog.d").iterdir()] == ["README.md"]


def test_fragments_have_a_kind() -> None:
    names = [path.name for path in (ROOT / "changelog.d").glob("*.md") if path.name != "README.md"]
    assert all(changelog.kind_of(name) in changelog.KINDS for name in names)
    with pytest.raises(SystemExit, match=r"expected NAME\.KIND\.md"):
        changelog.kind_of("slices.md")
