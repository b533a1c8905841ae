"""One hyperparameter: a number for all members, or M numbers, one a member."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from memberwise._torch.subclass import plain_results
from memberwise.errors import ArgumentError, fail

#: One number for all members, or M numbers, one a member.
Hyper = float | Sequence[float] | torch.Tensor


class MemberValues(torch.Tensor):
    """The values of one hyperparameter, one a member, as `param_groups[i]["lr"]` holds them. Shape (M,).

    A tensor as any other, whose results are plain tensors, and which may be written in place. It differs in
    `fill_`, through which torch's schedulers write a new rate: it takes M values too.

    >>> rates = torch.tensor([0.5, 2.0]).as_subclass(MemberValues)
    >>> rates.fill_(rates / 4)
    MemberValues([0.1250, 0.5000])
    """

    __torch_function__ = plain_results

    def fill_(self, value: Any) -> torch.Tensor:  # type: ignore[override]  # wider than torch's: M values too
        """Write one number, or one a member. Raises ArgumentError (MW401) for another number of values."""
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return super().fill_(value)
        if value.shape != self.shape:
            fail(ArgumentError, "MW401", f"expected {_expected(self.shape.numel())}, found {_found(value)}")
        return self.copy_(value)

    def __float__(self) -> float:
        if self.numel() == 1:
            return super().__float__()
        fail(
            ArgumentError,
            "MW409",
            f"expected one number, found {self.numel()}, one a member",
            do="Use a schedule that computes with tensors (all of torch's but ReduceLROnPlateau do)",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> MemberValues:
        return memo.setdefault(id(self), self.clone().as_subclass(MemberValues))


@torch.inference_mode(False)  # an inference tensor cannot tell that it was written to
def accept(name: str, value: Any, members: int | None) -> Any:
    """`value` as a group holds it: a number as it is, anything with one value a member as `MemberValues`.

    Tensors keep their storage, so that writing into them later is seen, as it is in torch.
    Raises ArgumentError (MW401) if the number of values is neither one nor `members`.

    >>> accept("lr", 0.1, 3), accept("lr", [1.0, 2.0, 3.0], 3).tolist()
    (0.1, [1.0, 2.0, 3.0])
    """
    if isinstance(value, (int, float)):
        return value
    listed = None if isinstance(value, torch.Tensor) else _listed(name, value)
    if isinstance(listed, float):
        return listed
    values = _watchable(value) if listed is None else torch.tensor(listed, dtype=torch.float64)
    if values.ndim and values.shape != (members,):
        fail(
            ArgumentError,
            "MW401",
            f"{name}: expected {_expected(members)}, found {_found(values)}",
            do="Give one number, or one a member",
        )
    return values.as_subclass(MemberValues)


def numbers(value: Any, members: int) -> list[float]:
    """The M numbers of a hyperparameter as a group holds it."""
    listed = value.tolist() if isinstance(value, torch.Tensor) else value
    return listed if isinstance(listed, list) else [listed] * members


def _listed(name: str, value: Any) -> float | list[float]:
    try:
        if not isinstance(value, str):
            return [float(item) for item in value] if isinstance(value, Iterable) else float(value)
    except (TypeError, ValueError):
        pass
    fail(ArgumentError, "MW401", f"{name}: expected numbers, found {value!r}")


def _watchable(values: torch.Tensor) -> torch.Tensor:
    return values.clone() if values.is_inference() else values.detach()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _expected(members: int | None) -> str:
    return "one value (no parameter has a member axis)" if members is None else f"1 or {members} values"


def _found(values: torch.Tensor) -> str:
    return str(len(values)) if values.ndim == 1 else f"a tensor of shape {tuple(values.shape)}"


def plain(value: Any) -> Any:
    """A hyperparameter (or a tuple of them) without a class of ours."""
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value.as_subclass(torch.Tensor) if isinstance(value, MemberValues) else value


def unaliased(value: Any, storages: set[int]) -> Any:
    """`value`, or a copy if it lies in one of `storages`, which grows by where it lies."""
    if isinstance(value, tuple):
        return tuple(unaliased(item, storages) for item in value)
    if not isinstance(value, MemberValues):
        return value
    value = value.clone().as_subclass(MemberValues) if _address(value) in storages else value
    storages.add(_address(value))
    return value


def selected(entries: dict[str, Any], indices: torch.Tensor, members: int) -> dict[str, Any]:
    """Entries of a group with the values of members `indices`, wherever there is one a member."""

    def of_members(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(of_members(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        return value[indices.to(value.device)] if value.shape == (members,) else value.clone()

    return {key: value if key == "params" else of_members(value) for key, value in entries.items()}
