"""One entry of `param_groups`: a dict that takes M values wherever torch takes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from memberwise.errors import ArgumentError, fail
from memberwise.optim.runs import Layout, Split, split
from memberwise.optim.values import MemberValues, accept, numbers, plain, unaliased


def name_of(group: Mapping[str, Any], position: int) -> str:
    """How messages call the parameter at `position` of a group."""
    names = group.get("param_names")
    return f"parameter '{names[position]}'" if names else f"parameter {position}"


class Column(NamedTuple):
    """One hyperparameter as the update formulas name it: the key, and the place there, a group keeps it at.

    torch's constructors refuse values less than `least`, or not `below`.
    """

    key: str
    index: int | None = None
    least: float = 0.0
    below: float = float("inf")

    def read(self, group: Mapping[str, Any]) -> Any:
        """The value that `group` holds: a number, or `MemberValues`."""
        value = group[self.key]
        return value if self.index is None else value[self.index]

    def complaint(self, group: Mapping[str, Any]) -> str:
        """What torch's constructor would refuse about the value, member by member; empty if nothing."""
        listed = numbers(self.read(group), 1)
        bad = [f"{x} for member {i}" for i, x in enumerate(listed) if not self.least <= x < self.below]
        if not bad:
            return ""
        limit = f"at least {self.least:g}" + (f" and below {self.below:g}" if self.below < float("inf") else "")
        return f"{self}: expected {limit}, found {', '.join(bad[:10]) if len(listed) > 1 else listed[0]}"

    def __str__(self) -> str:
        return self.key if self.index is None else f"{self.key}[{self.index}]"


class Group(dict[str, Any]):
    """A parameter group of M members. Its values are checked and converted the moment they are set.

    `tensors` holds each hyperparameter as an (M,) tensor on the parameters' device, once `materialise` was
    called: what formulas and captured graphs read.
    """

    columns: Mapping[str, Column] = {}
    options: tuple[str, ...] = ()
    members: int | None = None
    shared: tuple[bool, ...] = ()

    def __init__(
        self,
        entries: Mapping[str, Any],
        columns: Mapping[str, Column],
        options: tuple[str, ...],
        members: int | None,
        shared: tuple[bool, ...],
    ) -> None:
        super().__init__()
        self.columns, self.options, self.members, self.shared = columns, options, members, shared
        self.tensors: dict[str, torch.Tensor] = {}
        self._watched: list[MemberValues] = []
        self._versions: list[int] = []
        self._splits: dict[tuple[float, ...], Split] = {}
        self._layout: Layout | None = None
        self.update(entries)

    # -- a dict that checks what is put into it

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self._accept(key, value))
        self._stale = True

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`, each value checked."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Group:  # type: ignore[override, misc]  # dict's overloads say Self
        self.update(other)
        return self

    def plain(self) -> dict[str, Any]:
        """The entries, with plain tensors for `MemberValues`: what a state dict holds."""
        return {key: plain(value) for key, value in self.items()}

    def unalias(self, storages: set[int]) -> None:
        """Copy values that lie in `storages`, and add the others: schedulers write into them, group by group."""
        for key in {column.key for column in self.columns.values()}:
            self[key] = unaliased(self[key], storages)

    def complaints(self) -> Iterator[str]:
        """What torch's constructor would refuse about the values."""
        return filter(None, (column.complaint(self) for column in self.columns.values()))

    def _accept(self, key: str, value: Any) -> Any:
        if key in self.options and isinstance(value, (torch.Tensor, list, tuple)):
            fail(ArgumentError, "MW403", f"{key}: expected one value for all members, found {value!r}")
        places = [column for column in self.columns.values() if column.key == key]
        if not places or places[0].index is None:
            return self._one(key, value) if places else value
        if not hasattr(value, "__len__") or len(value) != len(places):
            fail(ArgumentError, "MW401", f"{key}: expected {len(places)} entries, found {value!r}")
        return tuple(self._one(str(place), entry) for place, entry in zip(places, value, strict=True))

    def _one(self, name: str, value: Any) -> Any:
        accepted = accept(name, value, self.members)
        self._must_agree(name, accepted)
        return accepted

    def _must_agree(self, name: str, value: Any) -> None:
        if not (any(self.shared) and isinstance(value, MemberValues)):
            return
        listed = numbers(value, 1)
        if len(set(listed)) > 1:
            parameter = name_of(self, self.shared.index(True))
            fail(
                ArgumentError,
                "MW403",
                f"{name}: expected one value, as {parameter} is shared by all members, found {listed}",
                do="Put shared parameters into a group of their own",
            )

    # -- what is derived from the values

    def sync(self) -> None:
        """Bring all that is derived from the values up to date, in place, if a value was set or written."""
        if self._stale or self._versions != [value._version for value in self._watched]:
            self._refresh()

    @torch.inference_mode(False)  # tensors made in inference mode could not be refreshed outside
    def materialise(self, device: torch.device) -> list[torch.Tensor]:
        """The hyperparameters as (M,) tensors: made once, the same objects at every later call."""
        if not self.tensors or next(iter(self.tensors.values())).device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            size = self.members or 1
            self.tensors = {name: torch.zeros(size, dtype=dtype, device=device) for name in self.columns}
            self._stale = True
        self.sync()
        return list(self.tensors.values())

    def split(self, counts: tuple[float, ...]) -> Split:
        """The runs of members that fused kernels may take together, having taken `counts` steps.

        `counts` has one number if all members took as many.
        """
        self.sync()
        ragged = tuple(count - counts[0] for count in counts) if len(counts) > 1 else ()
        if ragged not in self._splits:
            values = {name: column.read(self) for name, column in self.columns.items()}
            differ = ragged or any(isinstance(value, MemberValues) and value.ndim for value in values.values())
            rows = self.members if differ and self.members else 1
            new = split({name: numbers(value, rows) for name, value in values.items()}, ragged)
            self._layout = self._layout if self._layout == new.layout else new.layout
            self._splits[ragged] = new._replace(layout=self._layout)
        return self._splits[ragged]

    def _refresh(self) -> None:
        values = {name: column.read(self) for name, column in self.columns.items()}
        for name, value in values.items():
            self._must_agree(str(self.columns[name]), value)
        for name, tensor in self.tensors.items():
            value = values[name]
            tensor.copy_(value) if isinstance(value, MemberValues) else tensor.fill_(value)
        self._watched = [value for value in values.values() if isinstance(value, MemberValues)]
        self._versions = [value._version for value in self._watched]
        self._splits = {}
        self._stale = False
