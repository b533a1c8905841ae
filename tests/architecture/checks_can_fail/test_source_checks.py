"""Each rule of the house is shown an offence, and must find it."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.architecture import checks
from tests.architecture.sources import Source


def source(text: str, path: str = "src/memberwise/module.py") -> Source:
    return Source(path, text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._jit()",
        "import torch as t\nt._C",
        "import torch._dynamo",
        "from torch import _inductor",
        "from torch.utils import _pytree as pytree",
        "from torch.utils._pytree import tree_map",
        "from torch import nn\nnn.modules._functions",
        "import torch.utils._pytree",
        "def f():\n    from torch._subclasses import FakeTensor",
    ],
)
def test_private_torch_is_found(text: str) -> None:
    assert checks.private_torch([source(text)])


@pytest.mark.parametrize("text", ["import torch\ntorch.ops.aten._conj", "torch._C", "from torch import __version__"])
def test_what_is_no_private_torch_passes(text: str) -> None:
    assert checks.private_torch([source(text)]) == []


NOQA, IGNORE = "# no" + "qa", "# type: " + "ignore"  # in one piece they would be offences in this file


@pytest.mark.parametrize(
    "comment",
    [NOQA, f"{NOQA}: E501", f"{NOQA} a reason without a code", IGNORE, f"{IGNORE}[misc]", f"{IGNORE} # why"],
)
def test_unexplained_suppression_is_found(comment: str) -> None:
    assert checks.unexplained_suppressions([source(f"x = 1  {comment}")])


@pytest.mark.parametrize("comment", [f"{NOQA}: E501 a table reads best so", f"{IGNORE}[misc] # no stub has it"])
def test_explained_suppression_passes(comment: str) -> None:
    assert checks.unexplained_suppressions([source(f"x = 1  {comment}")]) == []


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.skip\ndef test(): pass",
        "@pytest.mark.xfail()\ndef test(): pass",
        "@pytest.mark.skipif(True)\ndef test(): pass",
        "pytest.skip()",
        "pytest.skip('slow')",
        "marks = [pytest.mark.xfail]",
    ],
)
def test_unexplained_skip_is_found(text: str) -> None:
    assert checks.unexplained_skips([source(text)])


@pytest.mark.parametrize(
    "text",
    [
        "pytest.skip('no compiler on this machine')",
        "@pytest.mark.skipif(True, reason='needs a GPU of two')\ndef test(): pass",
        "pytest.param(1, marks=pytest.mark.xfail(reason=WHY))",
        "self.skip(1)",
    ],
)
def test_explained_skip_passes(text: str) -> None:
    assert checks.unexplained_skips([source(text)]) == []


def test_lengths_count_code_only() -> None:
    text = 'def f(x):\n    """Say.\n\n    More.\n    """\n    # why\n\n    y = x\n    return y\n'
    assert list(checks.function_lengths([source(text)]).values()) == [3]


def test_long_file_is_found() -> None:
    assert checks.too_long_files([source("x = 1\n" * 11)], 10)
    assert not checks.too_long_files([source("x = 1\n" * 10)], 10)


def module(**names: object) -> ModuleType:
    made = ModuleType("made")
    vars(made).update(names, __all__=list(names))
    return made


def bare(x, y: int) -> int:
    """Documented."""
    return y


def undocumented(x: int) -> int:
    return x


class Half:
    """A class with a method of which nothing is said."""

    def method(self, x) -> int:
        return 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (bare, "made.name: x is not annotated"),
        (undocumented, "made.name has no docstring"),
        (Half, "made.name.method: x is not annotated"),
        (Half, "made.name.method has no docstring"),
        (None, "made.name does not exist"),
    ],
)
def test_faulty_export_is_found(value: object, found: str) -> None:
    assert found in checks.faulty_exports(module(name=value))


def test_missing_example_is_found() -> None:
    assert checks.without_example(module(name=bare)) == ["made.name"]


PAGE = "### MW1: one\nBecause.\n\n### MW2: two\nBecause.\n"


@pytest.mark.parametrize(
    ("codes", "page", "found"),
    [
        ({"MW1": "one", "MW2": "two", "MW3": "three"}, PAGE, "MW3 has no entry"),
        ({"MW1": "one"}, PAGE, "MW2 is no code"),
        ({"MW1": "one", "MW2": "zwei"}, PAGE, "MW2: the page says 'two', the table 'zwei'"),
        ({"MW1": "one", "MW2": "two"}, PAGE.replace("Because.", "", 1), "MW1 has an empty entry"),
    ],
)
def test_differing_page_is_found(codes: dict[str, str], page: str, found: str) -> None:
    assert found in checks.differing_codes(codes, page)


def test_agreeing_page_passes() -> None:
    assert checks.differing_codes({"MW1": "one", "MW2": "two"}, PAGE) == []


def test_unused_code_is_found() -> None:
    assert checks.unused_codes(["MW1", "MW2"], [source("fail('MW1')")]) == ["MW2"]


def test_machine_path_is_found() -> None:
    home = "/ho" + "me/ada"
    assert checks.machine_paths({"README.md": f"see {home}/x"})
    assert not checks.machine_paths({"README.md": "see a/work/b, ~/work/c, /home/me/d and https://x.org/home/e"})
