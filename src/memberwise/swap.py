"""Other tensors in a module's places for a while, and the module's own back afterwards."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

import torch
from torch import nn

from memberwise._torch.recurrent import follow, kept_lists, put_back
from memberwise.errors import ArgumentError, KindError, StateError, fail
from memberwise.names import tied
from memberwise.places import ABSENT, Attribute, Entry, Tree
from memberwise.valueless import valueless

Tensors = dict[str, torch.Tensor]


class Swap:
    """A context manager that puts the tensors of `dicts` into the places of `module` that their keys name.

    On leaving, each place gets back what it held, and what the module put there meanwhile goes into the dict that
    the name came from. It can be entered again: it then puts what the last exit found, so that a recomputation
    starts from what the call has left, as it does in a lone module. An end by a `BaseException` that is no
    `Exception` (an interrupt, a retreat) changes no dict.

    Args:
        module, dicts, tie_weights, strict: as `functional_call` has them; `dicts` have no name in common.
    """

    def __init__(self, module: nn.Module, dicts: list[Tensors], tie_weights: bool = True, strict: bool = False) -> None:
        self._tree = tree = Tree(module)
        values = {name: tensor for one in dicts for name, tensor in one.items()}
        self._sources = [(one, name) for one in dicts for name in one]
        _check_tensors(values)
        if tie_weights:
            values = _with_ties(tree, values)
        if strict:
            _check_names(tree, values)
        self._entries: dict[str, Entry] = {}
        self._attributes: dict[str, Attribute] = {}
        for name in values:
            place = tree.place(name)
            if isinstance(place, Attribute):
                self._attributes[name] = place
            else:
                self._entries[name] = place
        if not all(map(_is_valueless, values.values())):
            values = {**values, **self._rest_on_meta(values)}
        self._values = values
        self._recurrent = [owner for owner in tree.owners.values() if isinstance(owner, nn.RNNBase)]
        self._entered: list[_Originals] = []

    def _rest_on_meta(self, values: dict[str, Any]) -> dict[str, Any]:
        """What has no values and was given none, in a form that does not join in unnoticed."""
        if len(self._entries) == len(self._tree.entries):
            return {}
        rest = {name: tensor for name, tensor in self._tree.tensors() if tensor.is_meta and name not in values}
        self._entries |= {name: self._tree.entries[name] for name in rest}
        return {name: valueless(tensor, name) for name, tensor in rest.items()}

    def __enter__(self) -> None:
        originals = _Originals(
            {name: table.get(key, ABSENT) for name, (table, key, _) in self._entries.items()},
            {name: attribute.read() for name, attribute in self._attributes.items()},
            [kept_lists(owner) for owner in self._recurrent],
        )
        _check_attributes(originals.attributes)
        self._entered.append(originals)
        try:
            values = self._values
            for name, (table, key, _) in self._entries.items():
                value = table[key] = values[name]
                if isinstance(originals.entries[name], nn.Parameter) and hasattr(value, "stands_for_members"):
                    value._is_param = True  # isinstance(weight, nn.Parameter) holds for a member as it does alone
            for name, attribute in self._attributes.items():
                attribute.write(values[name])
            if any(hasattr(value, "stands_for_members") for value in values.values()):
                for owner in self._recurrent:
                    follow(owner)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        found = {
            name: table[key] if key in table else vars(owner).get(key, ABSENT)
            for name, (table, key, owner) in self._entries.items()
        }
        for name, attribute in self._attributes.items():
            found[name] = attribute.read()
        self._restore()
        if kind is None or issubclass(kind, Exception):
            self._hand_back(found)

    def _restore(self) -> None:
        """Put the originals back, last first: two names may lead to one place."""
        originals = self._entered.pop()
        for name in reversed(originals.attributes):
            self._attributes[name].write(originals.attributes[name])
        for name, (table, key, owner) in reversed(self._entries.items()):
            if key not in table:
                vars(owner).pop(key, None)  # the module made an attribute of it, which would hide the entry
            table[key] = originals.entries[name]
        for owner, lists in zip(self._recurrent, originals.lists, strict=True):
            put_back(owner, lists)

    def _hand_back(self, found: dict[str, Any]) -> None:
        """Give what the module reassigned to the dicts, unless they have moved on since the call."""
        for one, name in self._sources:
            now, before = found[name], self._values[name]
            if now is not before and now is not ABSENT and one.get(name) is before:
                one[name] = now
        if not self._entered:
            self._values = {name: old if found[name] is ABSENT else found[name] for name, old in self._values.items()}


class _Originals(NamedTuple):
    """What one entry into a swap found: entries and attributes by name, the lists of recurrent modules."""

    entries: dict[str, Any]
    attributes: dict[str, Any]
    lists: list[dict[str, Any]]


def _is_valueless(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.is_meta


def _check_tensors(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, torch.Tensor):
            fail(KindError, "MW110", f"'{name}': {reprlib.repr(value)} is not an instance of torch.Tensor")


def _check_attributes(originals: dict[str, Any]) -> None:
    """Only what is a tensor, or nothing, can be swapped for a tensor."""
    for name, original in originals.items():
        if original is not None and original is not ABSENT and not isinstance(original, torch.Tensor):
            fail(KindError, "MW110", f"attribute `{name}`: {reprlib.repr(original)} is not an instance of torch.Tensor")


def _with_ties(tree: Tree, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with each also under the other names of its tensor."""
    out = dict(values)
    for names in dict.fromkeys(tree.ties.values()):
        given = [values[name] for name in names if name in values]
        if any(value is not given[0] for value in given):
            what = f"functional_call got multiple values for keys {sorted(names)}, which are tied"
            fail(ArgumentError, "MW110", what, do="Give one of them, or tie_weights=False")
        if given:
            out.update(dict.fromkeys(names, given[0]))
    for name, value in values.items():
        for other in tied(name):
            if other not in out and other in tree.entries:
                out[other] = value
    return out


def _check_names(tree: Tree, values: dict[str, Any]) -> None:
    known = {name for name, *_ in tree.tensors()}
    unexpected = sorted(map(repr, values.keys() - known))
    missing = sorted(map(repr, known - values.keys()))
    lines = [f"Unexpected key(s): {', '.join(unexpected)}."] if unexpected else []
    lines += [f"Missing key(s): {', '.join(missing)}."] if missing else []
    if lines:
        what = f"Error(s) in reparametrizing for {type(tree.owners['']).__name__}:\n  " + "\n  ".join(lines)
        fail(StateError, "MW110", what)
