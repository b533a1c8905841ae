"""State in huge pages: asked for of the system, and of no consequence but for speed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim, pages

SIZE = 1 << 20
"""Numbers of a member: four megabytes."""


def _flags(tensor: torch.Tensor) -> str:
    """What the system notes about the memory in the middle of a tensor."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    return ""


@pytest.mark.skipif(pages._advise() is None or not Path("/proc/self/smaps").exists(), reason="no huge pages here")
@pytest.mark.parametrize("how", ["stack", "build", "iterator"])
def test_state_asks_for_huge_pages(how: str) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("a kernel without huge pages")
    models = [nn.Linear(SIZE, 1, bias=False) for _ in range(2)]
    made = {
        "stack": lambda: memberwise.stack(models),
        "build": lambda: memberwise.build(lambda: nn.Linear(SIZE, 1, bias=False), seeds=range(2)),
        "iterator": lambda: memberwise.stack(iter(models)),
    }[how]()
    optimizer = optim.Adam(made.parameters())
    optimizer.zero_grad()
    made(torch.ones(1, SIZE)).sum().backward()
    optimizer.step()
    (weight,) = made.parameters()
    assert " hg" in _flags(optimizer.state[weight]["exp_avg"])
    if how != "iterator":  # which grows in memory that is moved
        assert " hg" in _flags(weight)


def test_a_system_without_huge_pages_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_advise", lambda: None)
    tensor = torch.empty(2 * SIZE)
    assert pages.in_huge_pages(tensor) is tensor


@pytest.mark.parametrize("kind", ["meta", "vmap", "small"])
def test_what_has_no_memory_of_its_own_passes(kind: str) -> None:
    if kind == "vmap":
        torch.vmap(pages.in_huge_pages)(torch.zeros(2, 2 * SIZE))
    else:
        tensor = torch.empty(2 * SIZE if kind == "meta" else 3, device="meta" if kind == "meta" else "cpu")
        assert pages.in_huge_pages(tensor) is tensor
