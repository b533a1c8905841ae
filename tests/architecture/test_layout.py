"""Private torch in one folder, a reason with every suppression, files and functions of a readable size."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.architecture.checks import (
    function_lengths,
    machine_paths,
    private_torch,
    share,
    too_long_files,
    unexplained_skips,
    unexplained_suppressions,
)
from tests.architecture.sources import PACKAGE, ROOT, package, sources, tracked

OURS = ("src", "tests", "tools", "examples", "benchmarks", "survey")
LONGEST_FILE = 500
MEDIAN_FUNCTION, LONG_FUNCTION = 8, 35
TEXT = (".py", ".md", ".toml", ".txt", ".json", ".yml", ".cfg")


def test_private_torch_stays_in_its_folder() -> None:
    assert private_torch(source for source in package() if "/_torch/" not in source.path) == []


def test_every_private_corner_says_what_public_way_is_missing() -> None:
    corners = [source for source in package() if "/_torch/" in source.path and "__init__" not in source.path]
    assert corners
    silent = [s.path for s in corners if not any(word in s.text.split('"""')[1] for word in ("ublic", "issing"))]
    assert silent == []


def test_every_private_corner_has_a_test() -> None:
    """One that fails when torch changes there: it names the corner's module."""
    corners = [source.path for source in package() if "/_torch/" in source.path and "__init__" not in source.path]
    tests = [source.text for source in sources("tests")]
    named = {path: path.rpartition("/")[2].removesuffix(".py") for path in corners}
    uses = {path: re.compile(rf"_torch(\.| import [\w, ]*\b){name}\b") for path, name in named.items()}
    assert [path for path, use in uses.items() if not any(use.search(text) for text in tests)] == []


def test_suppressions_have_a_reason() -> None:
    assert unexplained_suppressions(sources(*OURS)) == []


def test_skips_have_a_reason() -> None:
    assert unexplained_skips(sources(*OURS)) == []


def test_files_are_short(record_property: pytest.RecordProperty) -> None:
    lengths = [len(source.lines) for source in package()]
    record_property("file_lines_median_p90", (share(lengths, 0.5), share(lengths, 0.9)))
    assert too_long_files(package(), LONGEST_FILE) == []
    assert share(lengths, 0.5) <= 150


def test_functions_are_short(record_property: pytest.RecordProperty) -> None:
    lengths = function_lengths(package())
    record_property("function_lines_median_p90", (share(lengths.values(), 0.5), share(lengths.values(), 0.9)))
    assert share(lengths.values(), 0.5) <= MEDIAN_FUNCTION
    assert share(lengths.values(), 0.9) <= LONG_FUNCTION


def test_as_many_lines_of_tests_as_of_source() -> None:
    source = sum(len(file.lines) for file in package())
    assert sum(len(file.lines) for file in sources("tests")) >= source


def test_modules_import_without_work() -> None:
    """Names of modules are nouns: none shadows a public function."""
    import memberwise

    functions = {name for name in memberwise.__all__ if callable(getattr(memberwise, name))}
    modules = {source.path.removeprefix("src/memberwise/").removesuffix(".py") for source in package()}
    folders = {path.partition("/")[0] for path in modules if "/" in path}
    assert not functions & (modules | folders)


def test_every_module_has_its_place_in_the_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = set(re.findall(r"memberwise\.(\w+)", str([contract.get("layers", []) for contract in contracts])))
    placed |= set(re.findall(r"memberwise\.(\w+)", str([contract.get("modules", []) for contract in contracts])))
    files = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"} - {"__init__"}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert files | folders == placed


def test_no_path_of_one_machine() -> None:
    texts = {path: (ROOT / path).read_text(errors="replace") for path in tracked() if path.endswith(TEXT)}
    assert len(texts) > 10
    assert machine_paths(texts) == []
