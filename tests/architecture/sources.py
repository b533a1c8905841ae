"""The files of the project, read and parsed once for all checks."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "memberwise"


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files below the folders, named relative to the root of the project."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)


@cache
def package() -> tuple[Source, ...]:
    """The files of the library itself."""
    return sources("src/memberwise")


@cache
def tracked() -> tuple[str, ...]:
    """Paths of all files under version control; all files of the folders that we write where there is no git."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return tuple(path for path in done.stdout.splitlines() if (ROOT / path).is_file())
    folders = ("src", "tests", "tools", "examples", "benchmarks", "survey", "docs")
    return tuple(_files(ROOT / folder for folder in folders))


def _files(folders: Iterable[Path]) -> Iterable[str]:
    for folder in folders:
        yield from (p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.suffix in (".py", ".md", ".toml"))
