"""Members that do not run in one call take turns, and what their runs leave behind is put together again.

Turns come from three sides: `chunk_size`, members in different modes, and a function that must run member by member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from memberwise._torch.checkpoint import StopRecomputation
from memberwise._torch.recurrent import LISTS, follow
from memberwise._torch.versions import set_versions, version
from memberwise.engine import values
from memberwise.engine.holders import copied, is_small, refilled
from memberwise.engine.rows import Rows
from memberwise.engine.slots import MODULE_ATTRIBUTES, Slots, table_of, take_back
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import EngineError, build
from memberwise.trees import tree_leaves, tree_transpose_map

_NOT_LEFT = MODULE_ATTRIBUTES.union(LISTS)
"""Attributes that hold no values of a turn."""

Cut = Callable[[torch.Tensor], Sequence[torch.Tensor]]
Join = Callable[[list[torch.Tensor]], torch.Tensor]


class Split:
    """Which members each turn has: cuts stacked tensors so, and joins the turns' tensors in the members' order.

    >>> split = Split([[0, 2], [1]])
    >>> [piece.tolist() for piece in split.cut(torch.arange(3))]
    [[0, 2], [1]]
    >>> split.join(split.cut(torch.arange(3))).tolist()
    [0, 1, 2]
    """

    def __init__(self, turns: Sequence[Sequence[int]]) -> None:
        self.turns = turns
        self.order = [member for turn in turns for member in turn]
        self.sizes = [len(turn) for turn in turns]
        self.in_order = self.order == sorted(self.order)

    def cut(self, tensor: torch.Tensor, dim: int = 0) -> Sequence[torch.Tensor]:
        """One piece a turn: views, unless the members are not in order."""
        return self._reordered(tensor, self.order, dim).split(self.sizes, dim)

    def join(self, pieces: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The whole from one piece a turn."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._reordered(torch.cat(pieces, dim), back, dim)

    def write_back(self, tensor: torch.Tensor, pieces: Sequence[torch.Tensor], dim: int = 0) -> None:
        """Bring into `tensor` what was written to pieces that are copies of it."""
        if self.in_order:
            return
        before, now = tensor.detach(), torch.cat([piece.detach() for piece in pieces], dim)
        if not torch.equal(self._reordered(before, self.order, dim), now):  # versions do not tell, below autograd
            with torch.no_grad():
                tensor.index_copy_(dim, torch.tensor(self.order, device=tensor.device), now)

    def _reordered(self, tensor: torch.Tensor, order: list[int], dim: int) -> torch.Tensor:
        if self.in_order:
            return tensor
        return tensor.index_select(dim, torch.tensor(order, device=tensor.device))


class Showing:
    """A template that shows the members of one turn at a time.

    Args:
        slots: whose template.
        turns: which members each has.
        cut, join: a stacked tensor as one piece a turn, and back.
        alone: whether a turn is one member, run without a member axis.
        region: the stacked run that this goes on inside of, if it does.
    """

    def __init__(
        self, slots: Slots, turns: Sequence[Sequence[int]], cut: Cut, join: Join, alone: bool, region: Any = None
    ) -> None:
        self.slots = slots
        self._turns = turns
        self._region = region
        self.places = slots.places
        self.originals = [place.owner[place.name] for place in self.places]
        self.before = [(module, dict(module.__dict__)) for module in slots.template.modules()]
        self._hooks = [
            (hooks, len(hooks))
            for module, _ in self.before
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._carried = dict(slots.carried)
        self._cut, self._join, self._alone = cut, join, alone
        pieces = {
            id(tensor): cut(tensor) if held else [tensor] * len(turns)
            for tensor, held in slots.tensors()
            if tensor is not None
        }
        self.pieces: list[Any] = [[None] * len(turns) if one is None else pieces[id(one)] for one in self.originals]
        self._variants = {place: (table_of(*place)[place[1]], own) for place, own in slots.variants.items()}
        self._memory = [[*map(_memory, own)] for own in self.pieces] if alone else []
        self._own = self._own_attributes(pieces)
        self._left: dict[int, tuple[list[Any], dict[tuple[nn.Module, str], Any]]] = {}
        self._over = False

    def _own_attributes(self, pieces: dict[int, Any]) -> dict[tuple[nn.Module, str], list[Any]]:
        """What each turn sees in attributes that lead to parameters, or that former calls have left."""
        shown = {key: vars(key[0]).get(key[1]) for key in self.slots.aliases}
        shown |= {key: kept for key, kept in self._carried.items() if vars(key[0]).get(key[1]) is kept}
        held = ((key, vars(key[0]).get(key[1])) for key in self.slots.holders)
        shown |= {key: value for key, value in held if is_small(value)}
        leaves = [leaf for value in shown.values() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        own = {id(leaf): self._cut(leaf) for leaf in leaves if id(leaf) not in pieces and _is_stacked(leaf)}
        self._written = [(leaf, own[id(leaf)]) for leaf in leaves if id(leaf) in own]
        own |= pieces

        def of_turn(turn: int) -> Callable[[Any], Any]:
            return lambda leaf: own[id(leaf)][turn] if id(leaf) in own else leaf

        copies: list[dict[int, Any]] = [{} for _ in self._turns]
        found = {
            key: [copied(one, of_turn(turn), memo) for turn, memo in enumerate(copies)] for key, one in shown.items()
        }
        self._leaves = {key: [*map(tree_leaves, pieces)] for key, pieces in found.items()}
        for module, name in self.slots.settings:
            kept = found.get((module, name), [vars(module).get(name)] * len(self._turns))
            found[module, name] = [*map(self._settings_of, kept, self._turns)]
        return found

    def _settings_of(self, kept: Any, members: Sequence[int]) -> Any:
        return values.for_member(kept, members[0]) if self._alone else values.for_members(kept, members)

    def show(self, turn: int) -> None:
        """Put the members of a turn in place, each with what it alone carries in attributes."""
        for place, pieces in zip(self.places, self.pieces, strict=True):
            piece = place.owner[place.name] = pieces[turn]
            if place.is_parameter and piece is not None:
                piece._is_param = True  # isinstance(w, nn.Parameter) holds, as alone
        self._turn = turn
        self.reset()
        for module, _ in self.before:
            if isinstance(module, nn.RNNBase):
                follow(module)
        for (module, name), own in self._own.items():
            module.__dict__[name] = own[turn]
            if (module, name) in self._carried:
                self.slots.carried[module, name] = own[turn]
        for place, (first, own) in self._variants.items():
            members = self._turns[turn]
            if not self._alone:
                self.slots.variants[place] = [own[member] for member in members]
                continue
            table_of(*place)[place[1]] = shown = own[members[0]]
            if isinstance(shown, nn.Module):
                shown.train(first.training)

    @contextmanager
    def again(self, turn: int, stack: Slots | None = None) -> Iterator[None]:
        """One member in place once more, as all stands now, while a checkpoint made in its run is recomputed: what that
        writes and leaves is this member's. `stack`: what holds plain stacked tensors, once the call is over."""
        if not self._over:
            yield
            return
        if stack is None or (self._region is not None and self._region.running):
            self.slots.find_members()  # what a later run has left, too
            now = one_by_one(self.slots, len(self._turns), self._cut, self._join, self._region)
        else:
            now = one_by_one(stack, len(self._turns), Rows().of, torch.stack)
        with now as shown:
            shown._take_pieces_of(self)
            shown.show(turn)
            yield
            shown.collect()

    def _take_pieces_of(self, former: Showing) -> None:
        """Of what nobody has replaced since, the very tensors of the former run: its graph leads to these."""
        there = {(id(place.owner), place.name): k for k, place in enumerate(former.places)}
        for k, (place, original) in enumerate(zip(self.places, self.originals, strict=True)):
            then = there.get((id(place.owner), place.name))
            if then is not None and _is_one_memory(former.originals[then], original):
                self.pieces[k] = former.pieces[then]
                self._memory[k] = [*map(_memory, self.pieces[k])]

    def collect(self) -> None:
        """Note what the run of the turn that is shown has left."""
        carried = self.slots.carried
        attributes = {
            (module, name): (value, carried.get((module, name)) is value)
            for module, before in self.before
            for name, value in module.__dict__.items()
            if name not in _NOT_LEFT and self._is_left(value, before.get(name, self), (module, name))
        }
        self._left[self._turn] = [place.owner.get(place.name) for place in self.places], attributes

    def leave_anything(self) -> bool:
        """Whether a turn that has been collected left something else in a place or an attribute than it found."""
        return any(
            attributes or not _same(places, [pieces[turn] for pieces in self.pieces])
            for turn, (places, attributes) in self._left.items()
        )

    def _is_left(self, value: Any, before: Any, key: tuple[nn.Module, str]) -> bool:
        if key in self._own and value is self._own[key][self._turn]:
            return key in self._leaves and not _same(tree_leaves(value), self._leaves[key][self._turn])
        return value is not before

    def restore(self) -> None:
        """Show the whole stack again, as it was."""
        self._over = True
        for place, original in zip(self.places, self.originals, strict=True):
            place.owner[place.name] = original
        self._reset_attributes()
        self.slots.carried.clear()
        self.slots.carried.update(self._carried)
        for place, (first, own) in self._variants.items():
            table_of(*place)[place[1]] = first
            self.slots.variants[place] = own

    def reset(self) -> None:
        """Attributes and hooks as they were before the first turn."""
        self._reset_attributes()
        take_back(self._hooks)

    def _reset_attributes(self) -> None:
        for module, before in self.before:
            module.__dict__.clear()
            module.__dict__.update(before)

    def finish(self, write_back: Callable[[torch.Tensor, Sequence[torch.Tensor]], None]) -> None:
        """Put together what all turns have left; one that has not run leaves what it would have found."""
        for k, (place, original, pieces) in enumerate(zip(self.places, self.originals, self.pieces, strict=True)):
            left = [self._left[turn][0][k] if turn in self._left else piece for turn, piece in enumerate(pieces)]
            if not _same(left, pieces):
                place.owner[place.name] = self._join(left)
            elif self._alone and [*map(_memory, pieces)] != self._memory[k]:
                _overwrite(original, self._join(left))
            elif original is not None and not place.shared:
                write_back(original, pieces)
        for original, pieces in self._written:
            write_back(original, pieces)
        for key in dict.fromkeys(key for _, attributes in self._left.values() for key in attributes):
            self._put_together(*key, self._left_by_turn(key))

    def _left_by_turn(self, key: tuple[nn.Module, str]) -> list[Any]:
        """What the turns leave in an attribute; of a plain one that a turn left alone, what it found there."""
        module, name = key
        found = self._own.get(key)
        if found is None and isinstance(vars(module).get(name), _PLAIN):
            found = [vars(module)[name]] * len(self._turns)
        left = {turn: attributes[key][0] for turn, (_, attributes) in self._left.items() if key in attributes}
        return [*left.values()] if found is None else [left.get(turn, own) for turn, own in enumerate(found)]

    def _put_together(self, module: nn.Module, name: str, left: list[Any]) -> None:
        """One attribute from one value a turn: members' tensors are joined; of others the last stays, as in a loop."""
        rows = [tree_leaves(value) for value in left]
        holds_tensors = any(isinstance(leaf, torch.Tensor) for leaf in rows[0])
        apart = holds_tensors and (left[0] is not left[-1] or len(self._turns) == 1)
        if not apart or not (self._alone or self._is_carried(module, name)):
            module.__dict__[name] = self._same_object(module, name, left, self._value_of_all(module, name, left))
            return
        try:
            whole = tree_transpose_map(self._join_row, left)
        except (RuntimeError, ValueError, IndexError) as error:
            what = f"members leave values of different shapes in the attribute '{name}' of {type(module).__name__}"
            raise build(EngineError, "MW203", what, do="Pad them to one shape, or keep them elsewhere") from error
        module.__dict__[name] = self.slots.carried[module, name] = self._same_object(module, name, left, whole)

    def _same_object(self, module: nn.Module, name: str, left: list[Any], whole: Any) -> Any:
        """The list or dict that was there, holding what `whole` holds, if the turns have written to it."""
        found = self._own.get((module, name), [])
        return refilled(vars(module).get(name), whole) if _same(left, found) else whole

    def _value_of_all(self, module: nn.Module, name: str, left: list[Any]) -> Any:
        """Plain values in which members differ stay each one's own; of others the last stays, as in a loop."""
        if len(left) < len(self._turns) or not all(values.is_own(value) or isinstance(value, _PLAIN) for value in left):
            return left[-1]
        of_member = {
            member: value._values[place] if values.is_own(value) else value
            for members, value in zip(self._turns, left, strict=True)
            for place, member in enumerate(members)
        }
        whole = values.own([of_member[member] for member in sorted(of_member)], self._region)
        if values.is_own(whole):
            self.slots.settings.add((module, name))
        return whole

    def _is_carried(self, module: nn.Module, name: str) -> bool:
        return all(attributes[module, name][1] for _, attributes in self._left.values() if (module, name) in attributes)

    def _join_row(self, row: list[Any]) -> Any:
        return self._join(row) if isinstance(row[0], torch.Tensor) else row[-1]


def _memory(piece: Any) -> int:
    """Where a member's tensor lies: it moves with `w.data = other`."""
    if not isinstance(piece, torch.Tensor) or isinstance(piece, MemberTensor) or piece.layout is not torch.strided:
        return 0
    return piece.data_ptr()


def _is_one_memory(one: Any, other: Any) -> bool:
    """Whether two stacked tensors, or member tensors of them, are the same numbers."""
    one, other = (value._inner if isinstance(value, MemberTensor) else value for value in (one, other))
    if one is None or other is None:
        return False
    return one is other or (_memory(one) == _memory(other) != 0 and one.stride() == other.stride())


def _overwrite(original: torch.Tensor, joined: torch.Tensor) -> None:
    """What members have set by `w.data = other`, which autograd counts as no write."""
    before = version(original)
    with torch.no_grad():
        original.copy_(joined)
    set_versions([original], [before])


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


_PLAIN = (bool, int, float, complex, str, bytes)


@contextmanager
def in_turns(slots: Slots, split: Split) -> Iterator[Showing]:
    """Within the block `show(turn)` puts a turn's members in place; afterwards the stack is whole again."""
    yield from _showing(Showing(slots, split.turns, split.cut, split.join, alone=False), split.write_back)


@contextmanager
def one_by_one(slots: Slots, members: int, cut: Cut, join: Join, region: Any = None) -> Iterator[Showing]:
    """Within the block `show(i)` puts member i in place, without a member axis; then the stack is whole again."""
    yield from _showing(
        Showing(slots, [[member] for member in range(members)], cut, join, True, region), lambda *_: None
    )


def _showing(shown: Showing, write_back: Any) -> Iterator[Showing]:
    try:
        yield shown
    except StopRecomputation:  # a checkpoint around this run has what it needs: what was written stays, as alone
        shown.collect()
        shown.restore()
        shown.finish(write_back)
        raise
    except BaseException:
        shown.restore()
        shown.reset()
        raise
    shown.restore()
    shown.finish(write_back)


def _is_stacked(leaf: Any) -> bool:
    return isinstance(leaf, MemberTensor) or (isinstance(leaf, torch.Tensor) and leaf.ndim > 0)
