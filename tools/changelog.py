"""Gather the lines of changelog.d/ into CHANGELOG.md, as a new release at its top.

python tools/changelog.py 0.2.0          and commit what it changed
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("added", "changed", "fixed", "removed")


def kind_of(name: str) -> str:
    """The kind in a file's name; an error if it is none.

    >>> kind_of("select-slices.added.md")
    'added'
    """
    kind = name.split(".")[-2] if name.count(".") == 2 else ""
    if kind not in KINDS:
        raise SystemExit(f"changelog.d/{name}: expected NAME.KIND.md, KIND one of {', '.join(KINDS)}")
    return kind


def release(version: str, date: str, lines: dict[str, list[str]]) -> str:
    """The section of one release.

    >>> print(release("0.2.0", "2030-01-31", {"fixed": ["A fault."]}))
    ## 0.2.0 (2030-01-31)
    <BLANKLINE>
    ### Fixed
    - A fault.
    """
    parts = [f"## {version} ({date})"]
    for kind in (kind for kind in KINDS if lines.get(kind)):
        items = ["- " + "\n  ".join(line.strip().splitlines()) for line in lines[kind]]
        parts.append("\n".join([f"### {kind.capitalize()}", *items]))
    return "\n\n".join(parts)


def main(version: str) -> None:
    """Write the release, and remove the files that it was gathered from."""
    files = sorted(path for path in (ROOT / "changelog.d").glob("*.md") if path.name != "README.md")
    lines: dict[str, list[str]] = {}
    for path in files:
        lines.setdefault(kind_of(path.name), []).append(path.read_text())
    page = ROOT / "CHANGELOG.md"
    head, _, rest = page.read_text().partition("\n## ")
    parts = [head.rstrip(), release(version, datetime.date.today().isoformat(), lines), rest and "## " + rest]
    page.write_text("\n\n".join(filter(None, parts)).rstrip() + "\n")
    for path in files:
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
