"""The examples of a Markdown page: found, and run as a reader would who types them in from the top.

    python tools/snippets.py README.md

All ```python blocks of a page share one namespace. One with `>>>` in it is a doctest; any other is run as it is.
"""

from __future__ import annotations

import doctest
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One block, and the line of the page on which its code begins."""

    page: str
    line: int
    code: str


def snippets(page: Path) -> list[Snippet]:
    """The Python blocks of a page, in order."""
    text = page.read_text()
    return [Snippet(str(page), text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in FENCE.finditer(text)]


def run(found: list[Snippet]) -> dict[str, Any]:
    """Run snippets in one namespace; errors name the page and its line."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in found:
        if ">>>" in snippet.code:
            _run_doctest(snippet, names)
        else:
            code = compile("\n" * (snippet.line - 1) + snippet.code, snippet.page, "exec", dont_inherit=True)
            exec(code, names)
    return names


def _run_doctest(snippet: Snippet, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(snippet.code, names, snippet.page, snippet.page, snippet.line - 1)
    doctest.DebugRunner().run(test, clear_globs=False)
    names.update(test.globs)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(snippets(Path(name)))
