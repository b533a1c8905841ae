"""Operations whose gradient has as many rows as an argument's values say: the places of a mask, the different indices.

In backward members with different counts would part ways, and there is no way back then. So they do before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from memberwise.engine.signals import part_ways

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region


def _places(values: Any, dims: Any) -> Iterator[torch.Tensor]:
    for index, dim in zip(values[1], dims[1], strict=True):
        if dim == 0 and index.dtype in (torch.bool, torch.uint8):
            yield index.flatten(1).count_nonzero(1)


def _different(values: Any, dims: Any) -> Iterator[torch.Tensor]:
    if dims[2] == 0:
        ordered = values[2].flatten(1).sort(1).values
        yield ordered.diff(dim=1).count_nonzero(1)


COUNTED: dict[str, tuple[int, Callable[[Any, Any], Iterator[torch.Tensor]]]] = {
    "aten::index_put": (2, _places),
    "aten::index_put_": (2, _places),
    "aten::index_fill": (3, _different),
    "aten::index_fill_": (3, _different),
}
"""Operation -> the argument whose gradient it is, and the members' counts `(M,)`."""


def look(name: str, region: Region, args: Any, values: Any, dims: Any) -> None:
    """Part ways before an operation whose backward the members could not run together."""
    place, counts = COUNTED[name]
    given = args[place] if len(args) > place else None
    if not isinstance(given, torch.Tensor) or not (torch.is_grad_enabled() and given.requires_grad):
        return
    if any(bool((count != count[:1]).any()) for count in counts(values, dims)):
        part_ways(region, f"the gradient of {name} has another number of rows for one member than for another")
