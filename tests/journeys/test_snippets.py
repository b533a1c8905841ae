"""The examples in the pages run, from top to bottom, as a reader would type them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, tracked
from tools.snippets import Snippet, run, snippets

OURS = ("README.md", "CONTRIBUTING.md", "docs/")  # the folders' own pages show parts of programs
PAGES = [path for path in tracked() if path.endswith(".md") and path.startswith(OURS) and snippets(ROOT / path)]


def test_the_readme_is_among_them() -> None:
    assert "README.md" in PAGES
    assert len(snippets(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(snippets(ROOT / page))


PAGE = """\
```python
x = 1
```
text
```
not python
```
```python
>>> x + 1
2
```
"""


def test_blocks_are_found_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert [(snippet.line, snippet.code) for snippet in snippets(page)] == [(2, "x = 1\n"), (9, ">>> x + 1\n2\n")]
    assert run(snippets(page))["x"] == 1


@pytest.mark.parametrize("code", ["assert False", "raise ValueError", ">>> 1 + 1\n3\n", "x = unknown"])
def test_a_wrong_snippet_fails(code: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 any error will do: each snippet fails in a way of its own
        run([Snippet("page", 1, code)])


def test_an_error_names_the_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run([Snippet("page.md", 7, "\n1 / 0\n")])
    assert caught.traceback[-1].lineno + 1 == 8
    assert str(caught.traceback[-1].path).endswith("page.md")
