"""What pyright says of the public names: each parameter and result annotated, each type known.

    python tools/public_types.py

Public is what `__all__` of these modules lists, with the public methods of its classes. pyright's own
`--verifytypes` judges every name of every module instead; this picks out of its answer.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MODULES = ("memberwise", "memberwise.optim", "memberwise.testing")
JUDGED = ("function", "method", "class", "type alias")


def public_names(modules: Iterable[str]) -> set[str]:
    """Where each public name is defined, in dotted form.

    >>> "memberwise.trees.each" in public_names(["memberwise"])
    True
    """
    found = set()
    for module in map(importlib.import_module, modules):
        for name in module.__all__:
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("memberwise"):
                found.add(f"{value.__module__}.{value.__qualname__}")
    return found


def faults(symbols: Iterable[dict[str, Any]], public: set[str]) -> Iterator[str]:
    """Each public function, method or class whose types pyright does not know, and why."""
    for symbol in symbols:
        owner, _, last = symbol["name"].rpartition(".")
        is_method = owner in public and not last.startswith("_")
        if symbol["category"] in JUDGED and (symbol["name"] in public or is_method):
            for diagnostic in symbol["diagnostics"]:
                text = " ".join(diagnostic["message"].split())
                if "docstring" not in text and not _is_of_a_part(text):
                    yield f"{symbol['name']}: {text}"


def _is_of_a_part(text: str) -> bool:
    """Whether only an attribute of some class in the annotation is inferred: the annotation itself is there."""
    return "partially unknown" in text


def verify() -> list[dict[str, Any]]:
    """All symbols that `pyright --verifytypes memberwise` knows; it finds the package by the Python on the PATH."""
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join((folder, os.environ.get("PATH", "")))
    command = [str(Path(folder, "pyright")), "--verifytypes", "memberwise", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)
    return json.loads(done.stdout)["typeCompleteness"]["symbols"]


def main() -> int:
    """Print the faults; the exit status is 1 if there are any."""
    public = public_names(MODULES)
    symbols = verify()
    unseen = public - {symbol["name"] for symbol in symbols}
    found = sorted(set(faults(symbols, public))) + [f"{name}: pyright does not find it" for name in sorted(unseen)]
    print("\n".join(found) or f"{len(public)} public names, all of known types")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
