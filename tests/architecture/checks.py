"""The rules of the house as functions: sources in, a list of offences out. An empty list is a pass.

Each has a test in `checks_can_fail/` that shows it an offence and demands that it is found.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from tests.architecture.sources import Source

# -- private corners of torch


def private_torch(sources: Iterable[Source]) -> list[str]:
    """Uses of names of torch that start with an underscore: `torch._C`, `from torch.utils import _pytree`.

    `torch.ops.aten._conj` is none: operators are the dispatcher's vocabulary, with or without an underscore.
    """
    return [
        f"{source.path}:{line}: {name}"
        for source in sources
        for name, line in _torch_names(source.tree)
        if not name.startswith("torch.ops.") and re.search(r"\._(?!_)", name)
    ]


def _torch_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted names that lead into torch, imports and attributes alike, whatever torch is called here."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in filter(lambda alias: _is_torch(alias.name), node.names):
                known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and _is_torch(node.module or "") and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node)):
            head, _, rest = name.partition(".")
            if head in known:
                yield f"{known[head]}.{rest}", node.lineno


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of nested attributes; "" where something else than a name is at its start."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""  # type: ignore[attr-defined] # only attributes come this far


# -- suppressions

_CODES = re.compile(r"^[:\s]*(\[[^\]]*\])?[:\s]*([A-Z]+\d+[,\s]*)*")
_MARKS = ("skip", "skipif", "xfail", "importorskip")


def unexplained_suppressions(sources: Iterable[Source]) -> list[str]:
    """`# noqa` and `type: ignore` without a code or without a reason behind it on their line."""
    return [
        f"{source.path}:{line}: {comment}"
        for source in sources
        for line, comment in _comments(source)
        if _is_unexplained(comment)
    ]


def _comments(source: Source) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _is_unexplained(comment: str) -> bool:
    found = re.search(r"(noqa|type:\s*ignore|pyright:\s*ignore)", comment)
    if not found:
        return False
    rest = comment[found.end() :]
    codes = _CODES.match(rest)
    coded = bool(codes and codes.group().strip(" :"))
    reason = rest[codes.end() :] if codes else rest
    return not coded or not re.search(r"\w+", reason)


def unexplained_skips(sources: Iterable[Source]) -> list[str]:
    """Skips and expected failures without a reason of some words."""
    return [
        f"{source.path}:{node.lineno}: {name}"
        for source in sources
        for name, node, reason in _skips(source.tree)
        if len(reason.split()) < 2
    ]


def _skips(tree: ast.Module) -> Iterator[tuple[str, ast.expr, str]]:
    """Each use of a skip or xfail, with its reason ("" if it has none)."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        target = node.func if isinstance(node, ast.Call) else node
        name = _dotted(target) if isinstance(target, ast.Attribute) and id(node) not in called else ""
        if name.rpartition(".")[2] in _MARKS and name.startswith("pytest."):
            yield name, node, _reason(node)  # type: ignore[misc] # an expression: it has a dotted name


def _reason(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    given = [keyword.value for keyword in node.keywords if keyword.arg in ("reason", "msg")]
    given += [arg for arg in node.args[:1] if isinstance(arg, ast.Constant | ast.JoinedStr)]
    texts = [part for value in given for part in ast.walk(value) if isinstance(part, ast.Constant)]
    names = [value for value in given if isinstance(value, ast.Name)]
    return "a named reason" if names else " ".join(str(part.value) for part in texts)


# -- sizes


def function_lengths(sources: Iterable[Source]) -> dict[str, int]:
    """Lines of code a function: docstring, comments and blank lines left out, inner functions counted in."""
    return {
        f"{source.path}:{node.lineno} {node.name}": _code_lines(source, node)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _code_lines(source: Source, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, *_ = node.body
    quoted = set(range(first.lineno, (first.end_lineno or 0) + 1)) if ast.get_docstring(node) else set()
    numbers = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    lines = ((number, source.lines[number - 1].strip()) for number in numbers if number not in quoted)
    return sum(1 for _, line in lines if line and not line.startswith("#"))


def too_long_files(sources: Iterable[Source], most: int) -> list[str]:
    """Files of more than `most` lines."""
    return [f"{source.path}: {len(source.lines)} lines" for source in sources if len(source.lines) > most]


def share(values: Iterable[int], part: float) -> int:
    """The value below or at which `part` of the values lie.

    >>> share([1, 2, 3, 4], 0.5)
    2
    """
    ordered = sorted(values)
    return ordered[max(0, round(len(ordered) * part) - 1)]


# -- the public names


def faulty_exports(module: ModuleType) -> list[str]:
    """Public names that do not exist, or lack a docstring or an annotation."""
    found = []
    for name in module.__all__:
        value = getattr(module, name, None)
        where = f"{module.__name__}.{name}"
        if value is None:
            found.append(f"{where} does not exist")
        elif not isinstance(value, ModuleType):
            found += _faults(where, value)
    return found


def _faults(where: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        own = [(f"{where}.{name}", part) for name, part in _public_methods(value)]
        return _undocumented(where, value) + [fault for pair in own for fault in _faults(*pair)]
    if callable(value):
        return _undocumented(where, value) + _unannotated(where, value)
    return []


def _public_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The functions that the class itself defines, `__init__` and `__call__` among them."""
    for name, part in vars(cls).items():
        part = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
        if inspect.isfunction(part) and (not name.startswith("_") or name in ("__init__", "__call__")):
            yield name, part


def _undocumented(where: str, value: Any) -> list[str]:
    inherited = where.endswith(("__init__", "__call__"))  # the class's docstring speaks for them
    return [] if inherited or (inspect.getdoc(value) or "").strip() else [f"{where} has no docstring"]


def _unannotated(where: str, value: Any) -> list[str]:
    signature = inspect.signature(value)
    bare = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    if signature.return_annotation is signature.empty:
        bare.append("the return value")
    return [f"{where}: {name} is not annotated" for name in bare]


def without_example(module: ModuleType) -> list[str]:
    """Public functions and classes whose docstring shows no example; records, which are only returned, need none."""
    values = {name: getattr(module, name) for name in module.__all__}
    records = {n for n, v in values.items() if dataclasses.is_dataclass(v) or "Attributes:" in (v.__doc__ or "")}
    shown = {n: v for n, v in values.items() if n not in records and (inspect.isclass(v) or inspect.isfunction(v))}
    return [f"{module.__name__}.{name}" for name, value in shown.items() if ">>>" not in (value.__doc__ or "")]


# -- pages


def differing_codes(codes: Mapping[str, str], page: str) -> list[str]:
    """Codes that docs/errors.md lacks, has and should not, or gives another meaning."""
    headings = dict(re.findall(r"^### (MW\d+): (.+)$", page, re.MULTILINE))
    found = [f"{code} has no entry" for code in codes if code not in headings]
    found += [f"{code} is no code" for code in headings if code not in codes]
    found += [
        f"{code}: the page says {headings[code]!r}, the table {codes[code]!r}"
        for code in codes
        if code in headings and headings[code] != codes[code]
    ]
    return found + [f"{code} has an empty entry" for code in _empty_entries(page)]


def _empty_entries(page: str) -> list[str]:
    parts = re.split(r"^### (MW\d+): .+$", page, flags=re.MULTILINE)[1:]
    return [code for code, body in zip(parts[::2], parts[1::2], strict=True) if not body.split("\n##")[0].strip()]


def unused_codes(codes: Iterable[str], sources: Iterable[Source]) -> list[str]:
    """Codes that no file but the table itself names."""
    texts = [source.text for source in sources if not source.path.endswith("memberwise/errors.py")]
    return [code for code in codes if not any(code in text for text in texts)]


_NOBODY = r"(?!(?:me|you|user|someone)\b)"
_MACHINE_PATH = re.compile(rf"(?<![\w.:/~-])/(?:home|root|Users|work|opt|mnt|data)/{_NOBODY}[\w.-]+")


def machine_paths(texts: Mapping[str, str]) -> list[str]:
    """Paths of one machine in files that go to others."""
    return [
        f"{path}:{number}: {found.group()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for found in _MACHINE_PATH.finditer(line)
    ]
