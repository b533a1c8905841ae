"""What users bring into a model: each kind of tensor and tool, with what becomes of it in a stack.

`docs/tools.md` shows the table; `python -m tests.parity.tools_table` writes it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORKS = "works"
BY_MEMBERS = "by members"
"""The smallest module around it, or the whole call, runs member by member, and says so [MW207]."""

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"


class Using(nn.Module):
    """A model of two layers whose forward is `body(self, x)`, after `make(self)` has changed it."""

    def __init__(self, body: Callable[..., Any], make: Callable[[Any], Any] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
        self.body = body
        if make is not None:
            make(self)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The first layer's result."""
        return self.first(x).tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def through(self: Using, x: torch.Tensor) -> torch.Tensor:
    """A forward that uses both layers, for rows whose tool is in a layer."""
    return self.last(self.hidden(x))


@dataclass
class Tool:
    """One row.

    Attributes:
        name: what it is, in the words of the page.
        verdict: WORKS, BY_MEMBERS, or the code with which it is refused.
        body: the forward of a model that uses it.
        make: changes a new model, so that it has it.
        dtype: of the model and its input.
        grad: whether gradients flow.
        note: what the page says beside the verdict.
    """

    name: str
    verdict: str
    body: Callable[..., Any] = through
    make: Callable[[Any], Any] | None = None
    dtype: torch.dtype = torch.float64
    grad: bool = True
    note: str = ""


@dataclass
class Section:
    """Rows that belong together."""

    title: str
    tools: list[Tool] = field(default_factory=list)

    def __call__(self, name: str, verdict: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a row whose body is the decorated function."""

        def add(body: Callable[..., Any]) -> Callable[..., Any]:
            self.tools.append(Tool(name, verdict, body, **options))
            return body

        return add

    def add(self, name: str, verdict: str, body: Callable[..., Any] = through, **options: Any) -> None:
        """Add a row."""
        self.tools.append(Tool(name, verdict, body, **options))


def sections() -> list[Section]:
    """All of the table."""
    from tests.parity import tools_gradients, tools_modules, tools_surroundings, tools_tensors

    return [module.TABLE for module in (tools_tensors, tools_modules, tools_gradients, tools_surroundings)]


def rendered() -> list[str]:
    """The table's lines, as the page has them."""
    lines = []
    for section in sections():
        lines += [f"### {section.title}", "", "| what | verdict | |", "|---|---|---|"]
        lines += [f"| {tool.name} | {_shown(tool.verdict)} | {tool.note} |" for tool in section.tools]
        lines.append("")
    return lines


def _shown(verdict: str) -> str:
    if not verdict.startswith("MW"):
        return verdict
    return f"refused, [{verdict}](errors.md)"


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def on_page() -> list[str]:
    """The lines that the page has."""
    return [*PAGE.read_text().split(BEGIN)[1].split(END)[0].strip("\n").splitlines(), ""]


def write() -> None:
    """Put the table into the page."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, "", *rendered()]) + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
