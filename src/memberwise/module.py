"""Stack: M models of one class as one `nn.Module`."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, overload

import torch
from torch import nn

from memberwise._torch.dynamo import uncompiled
from memberwise._torch.recurrent import weights_stay
from memberwise.attributes import Attributes, filled
from memberwise.engine.arguments import called
from memberwise.engine.boundary import run
from memberwise.engine.slots import Place, Slots, on_the_tensors_of, put_in_mode, table_of
from memberwise.engine.values import for_member, for_members, is_own
from memberwise.errors import ArgumentError, MemberIndexError, StackAttributeError, build, fail
from memberwise.generators import make_generators
from memberwise.members import Memo, positions, take, take_streams
from memberwise.trees import tree_leaves
from memberwise.views import MemberView, make_live

_SHARED_WITH_TEMPLATE = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
)
"""What of a module is one object in a stack and in its template: so torch's own code works on both."""


class Stack(nn.Module):
    """M models of one class as one module: made by `stack(models)` or `build(factory, seeds=...)`.

    An ordinary `nn.Module`: `.to`, `.train`, `state_dict` (the member's own key names), optimizers, hooks, pickles,
    `copy.deepcopy`, nesting in another module and `torch.compile` work as for any other. Its parameters and buffers
    are plain tensors with the member axis M first, under the member's own names; what is declared shared has no
    member axis. So what works on shapes (`nn.init`, weight decay by `p.ndim`) must mind that axis, or go through
    `vmap(f)(stack)` or the members, `stack[i]`, whose parameters are views.

    Shapes: `stack(x)` gives every member the same `x` and returns `(M, ...)`; `stack(each(xs))` gives member i
    `xs[i]`. Each dtype is the member's own.

    Members draw from `generators`, one random stream a member, if the stack has them (from `build`, or set);
    otherwise from the global stream, each its own numbers.

    Args:
        template: a module of the members' class whose parameters and buffers are the stacked tensors.
        members: M.
        shared: the state-dict keys of its tensors that have no member axis.
        attributes: what members carried outside their tensors, for `unstack`.

    >>> import torch
    >>> import memberwise
    >>> stack = memberwise.stack([nn.Linear(3, 2) for _ in range(4)])
    >>> stack(torch.randn(5, 3)).shape, stack.weight.shape, len(stack)
    (torch.Size([4, 5, 2]), torch.Size([4, 2, 3]), 4)
    """

    _template: nn.Module
    _slots: Slots
    _attributes: Attributes | None

    def __init__(
        self,
        template: nn.Module,
        members: int,
        *,
        shared: Iterable[str] = (),
        attributes: Attributes | None = None,
    ) -> None:
        super().__init__()
        vars(self).update({name: vars(template)[name] for name in _SHARED_WITH_TEMPLATE})
        slots = Slots(template, frozenset(shared), members)
        vars(self).update(_template=template, _slots=slots, _attributes=attributes)
        vars(self)["_version"] = template._version
        self._load_state_dict_post_hooks.update(template._load_state_dict_post_hooks)
        self.register_load_state_dict_post_hook(_mark_again)
        self._mark_shared()

    # -- running

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all members: each sees the arguments, of those marked by `each()` its own entry; results get M first."""
        return run(_call, called(self._slots, args, kwargs), 0, "different")

    def __memberwise_slots__(self) -> Slots:
        return self._slots

    @property
    def generators(self) -> Sequence[torch.Generator] | None:
        """One random stream a member, which its calls advance; None: the global stream."""
        return self._slots.generators

    @generators.setter
    def generators(self, generators: Sequence[torch.Generator] | None) -> None:
        if generators is not None and len(generators) != len(self):
            what = f"expected one generator for each of {len(self)} members, got {len(generators)}"
            fail(ArgumentError, "MW303", what)
        self._slots.generators = generators

    # -- members

    def __len__(self) -> int:
        """M."""
        size = self._slots.size()
        assert size is not None
        return size

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[member] for member in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Stack: ...
    def __getitem__(self, index: SupportsIndex | slice) -> nn.Module | Stack:
        """A member as a live module of its own class; of a slice, a new Stack, as `select` gives.

        The member's parameters and buffers are views into the stack, and so are their gradients: training it trains
        the stack. What its forward leaves in plain attributes stays with it. Its `state_dict()` gives clones. After
        `stack.to(...)` a view is stale, and raises StateError [MW304].
        """
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        member = self._position(index)
        return make_live(self._member(member, lambda place, _: MemberView.of(place, member)))

    def select(self, indices: Iterable[int] | torch.Tensor | slice) -> Stack:
        """A new Stack of these members, with their gradients and streams; members named twice become clones.

        Copies: nothing is shared with this stack. `memberwise.select` takes an optimizer along.

        Raises:
            ArgumentError: indices name no member [MW410].
        """
        return self.__select_members__(positions(indices, len(self)), {})

    def __select_members__(self, indices: torch.Tensor, memo: Memo) -> Stack:
        successors = {id(tensor): take(tensor, indices, memo, shared=place.shared) for place, tensor in self._tensors()}
        successors |= self._carried(lambda leaf: leaf.detach().index_select(0, indices.to(leaf.device)))
        successors |= self._settings(lambda leaf: for_members(leaf, indices.tolist()))
        attributes = None if self._attributes is None else self._attributes.select(indices.tolist())
        template = filled(self._template, successors)
        out = Stack(template, len(indices), shared=self._slots.shared, attributes=attributes)
        twins = dict(zip(self._template.modules(), template.modules(), strict=True))
        slots, new = self._slots, out._slots
        new.carried = {(twins[module], name): vars(twins[module])[name] for module, name in slots.carried}
        new.retreats = {twins[module]: reason for module, reason in slots.retreats.items() if module in twins}
        new.settings = {(twins[module], name) for module, name in slots.settings}
        for (module, name), own in slots.variants.items():
            first, chosen = table_of(twins[module], name)[name], [own[i] for i in indices.tolist()]
            new.variants[twins[module], name] = [_variant(one, first, successors) for one in chosen]
        new.parted = slots.parted.moved(twins)
        new.apart = {k: slots.apart[i] for k, i in enumerate(indices.tolist()) if i in slots.apart}
        if slots.generators is not None:
            new.generators = take_streams(slots.generators, indices, memo)
        own = vars(self).keys() - {"_template", "_slots", "_attributes", *_SHARED_WITH_TEMPLATE}
        vars(out).update({name: copy.copy(vars(self)[name]) for name in own})  # hooks on the stack itself, and such
        return out

    def unstack(self) -> list[nn.Module]:
        """M independent modules of the members' own class, with copies of their parameters, buffers and gradients.

        Attributes in which members differed come back to each, unless they were set on the stack since. What is
        shared is one new object in all of them, as it was.
        """
        shared: dict[int, torch.Tensor] = {}

        def alone(place: Place, tensor: torch.Tensor, member: int) -> torch.Tensor:
            if place.shared:
                return shared.setdefault(id(tensor), _copy(tensor, lambda whole: whole))
            return _copy(tensor, lambda whole: whole[member])

        return [self._member(i, lambda place, tensor, i=i: alone(place, tensor, i)) for i in range(len(self))]

    def _member(self, member: int, own: Callable[[Place, torch.Tensor], torch.Tensor]) -> nn.Module:
        """Member `member` as a module of its class; `own` gives its part of a tensor."""
        parts = {place.key: own(place, tensor) for place, tensor in self._tensors()}
        swaps = {id(tensor): parts[place.key] for place, tensor in self._tensors()}
        swaps |= self._carried(lambda leaf: leaf.detach()[member].clone())
        swaps |= self._settings(lambda leaf: for_member(leaf, member))
        module = filled(self._template, swaps)
        if member in self._slots.apart:
            put_in_mode(module, self._slots.apart[member])
        if self._attributes is not None:
            self._attributes.give_back(module, member, self._template, parts)
        return module

    def _tensors(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """Each stacked or shared tensor once, at the first of its places."""
        seen: set[int] = set()
        for place in self._slots.places:
            tensor = place.owner[place.name]
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield place, tensor

    def _carried(self, part: Callable[[torch.Tensor], torch.Tensor]) -> dict[int, torch.Tensor]:
        """For `filled`: the parts of what former calls left in plain attributes."""
        carried = self._slots.carried.items()
        leaves = [
            leaf for (module, name), kept in carried if vars(module).get(name) is kept for leaf in tree_leaves(kept)
        ]
        return {id(leaf): part(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}

    def _settings(self, part: Callable[[Any], Any]) -> dict[int, Any]:
        """For `filled`: the parts of the plain values in which members differ."""
        kept = [vars(module).get(name) for module, name in self._slots.settings]
        return {id(leaf): part(leaf) for one in kept for leaf in tree_leaves(one) if is_own(leaf)}

    def _position(self, index: SupportsIndex) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            fail(MemberIndexError, "MW305", f"expected a member from 0 to {len(self) - 1}, got {position}")
        return position % len(self)

    # -- modes

    @property
    def training(self) -> bool:  # type: ignore[override] # an attribute in torch
        """The mode of all members that no `train(members=...)` has put in another."""
        return self._template.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_template" in vars(self):  # nn.Module.__init__ sets it before there is one
            self._template.training = mode

    def train(self, mode: bool = True, *, members: Iterable[int] | torch.Tensor | slice | None = None) -> Stack:
        """Put all members, or some only, in training mode (or evaluation mode); each as its class's `train` does.

        Members in different modes run as one call per mode. Modes set on a part of the stack (`stack.bn.eval()`)
        hold for the members that no `members=` has put in a mode of its own.
        """
        if members is None:
            self._slots.apart = {}
            self._template.train(mode)
            return self
        apart = self._slots.apart | dict.fromkeys(positions(members, len(self)).tolist(), mode)
        if len(apart) == len(self) and len({*apart.values()}) == 1:
            return self.train(mode)
        alike = {module.training for module in self._template.modules()}
        self._slots.apart = {i: own for i, own in sorted(apart.items()) if {own} != alike}
        return self

    def eval(self, *, members: Iterable[int] | torch.Tensor | slice | None = None) -> Stack:
        """Put all members, or some only, in evaluation mode; see `train`."""
        return self.train(False, members=members)

    # -- what nn.Module asks of a module's own class

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Stack:
        with weights_stay(self._template):
            self._template._apply(fn, recurse)
        self._mark_shared()
        self._move_streams()
        return self

    def _move_streams(self) -> None:
        """Where the stack is now each member draws from that device's stream, as after `torch.manual_seed` alone."""
        streams, place = self._slots.generators, next((tensor.device for _, tensor in self._tensors()), None)
        if streams and place is not None and place.type not in ("meta", streams[0].device.type):
            self._slots.generators = make_generators([stream.initial_seed() for stream in streams], place)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._template._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._template._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(dict(state))
        self._mark_shared()

    def _mark_shared(self) -> None:
        for place, tensor in self._tensors():
            if place.shared:
                tensor._memberwise_shared = True  # type: ignore[attr-defined] # copies and casts drop attributes

    def __getattr__(self, name: str) -> Any:
        """A tensor or submodule, or a plain attribute of the members' common structure."""
        template = vars(self).get("_template")
        if template is None or name in self._parameters or name in self._buffers or name in self._modules:
            return super().__getattr__(name)
        if name in vars(template):
            return vars(template)[name]
        found = inspect.getattr_static(type(template), name, self)
        if found is not self and not hasattr(type(found), "__get__"):
            return found  # a constant of the class
        what = f"a Stack of {type(template).__name__} has no attribute '{name}'"
        raise build(StackAttributeError, "MW306", what, do=_way_out(name, found) if found is not self else "")

    def __setattr__(self, name: str, value: Any) -> None:
        template = vars(self).get("_template")
        if template is None or name not in vars(template) or name in vars(self) or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(template, name, value)

    def __repr__(self) -> str:
        shared = f", shared: {', '.join(sorted(self._slots.shared))}" if self._slots.shared else ""
        return f"Stack of {len(self)} members{shared}: {self._template!r}"


def _copy(tensor: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A part of a stacked tensor as a tensor of its own, of the same kind, with its gradient."""
    values = part(tensor.detach()).clone()
    if not isinstance(tensor, nn.Parameter):
        return values
    out = nn.Parameter(values, tensor.requires_grad)
    out.grad = None if tensor.grad is None else part(tensor.grad.detach()).clone()
    return out


def _variant(variant: Any, first: Any, successors: dict[int, Any]) -> Any:
    """A submodule of another class, or other hooks, in a new stack."""
    if not isinstance(variant, nn.Module):
        return copy.copy(variant)
    return on_the_tensors_of(first, filled(variant, successors))


def _way_out(name: str, found: Any) -> str:
    if inspect.isroutine(found):
        call = f"vmap(lambda model, *args: model.{name}(*args), (0, None, ...))(stack, *args)"
    else:
        call = f"vmap(lambda model: model.{name})(stack)"
    return f"It is the members' own; run it for all: {call}"


def _mark_again(stack: Stack, incompatible_keys: Any) -> None:
    stack._mark_shared()  # load_state_dict(assign=True) brings other tensors


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
