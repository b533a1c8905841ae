"""torch's own table of operations, with their random streams left to the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.testing._internal import common_methods_invocations


def _unseeded(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


common_methods_invocations.wrapper_set_seed = _unseeded  # else each random operation sets one seed for all members

TABLE: list[Any] = common_methods_invocations.op_db


def name_of(op: Any) -> str:
    """As torch's tests call it: `nn.functional.pad.circular`."""
    return ".".join(filter(None, (op.name, op.variant_test_name)))
