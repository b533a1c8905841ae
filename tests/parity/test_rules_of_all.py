"""Reductions of everything to one truth value, with members that differ in it: in random samples they seldom do."""

from __future__ import annotations

import pytest
import torch

import memberwise

VALUES = torch.tensor([[0, 0], [0, 1], [1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("op", [torch.ops.aten.any.default, torch.ops.aten.all.default])
def test_members_that_differ(op: torch._ops.OpOverload) -> None:
    assert memberwise.vmap(op)(VALUES).tolist() == [bool(op(member)) for member in VALUES]
