"""The recorder: watches one eager run of a step and writes down each operation, below autograd and below members.

Nothing is simulated. The step runs on the real tensors, once, and counts; the recorder only looks on. So a step that
turns out not to be recordable has lost nothing: it has run as it would have.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakTensorKeyDictionary

from memberwise._torch.dispatch import DispatchMode
from memberwise._torch.identity import is_plain, memory_key, stream_key
from memberwise._torch.inductor import without_onednn
from memberwise.capture.draws import Draw, Streams, state_of
from memberwise.capture.reads import HostReads
from memberwise.capture.refusals import Refusal, user_line
from memberwise.engine.operation import describe, has_mask, written_among
from memberwise.generators import default_generator

_aten = torch.ops.aten
_Tag = torch.Tag
_EXCHANGES = {_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset, _aten.set_.source_Tensor}
_BY_VALUE = {_Tag.data_dependent_output, _Tag.dynamic_output_shape}


class Recorder(DispatchMode):
    """A dispatch mode that records what runs under it.

    Attributes:
        graph: the operations so far; its placeholders are `inputs`, in order.
        inputs: what each placeholder stands for: a tensor that was there before, or a `Draw`.
        lines: the user's line that used each input first.
        kept: tensors that draws take as arguments and that are the same in each run, by `id`.
        constants: tensors made from Python numbers, by attribute name.
        written: storages of inputs that an operation wrote to.
        places: the tensors, by `id`, that a later call can look up.
        refusal: why the recording is of no use, or None.
    """

    records = True  # `_torch.tracing` asks: an optimizer then reads no value, and uses plain operators
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `engine.ambient`: torch need not wrap the handler

    def __init__(self, generators: Iterable[torch.Generator] = (), places: Iterable[int] = ()) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.inputs: list[torch.Tensor | Draw] = []
        self.lines: list[str] = []
        self.kept: dict[int, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.written: set[int] = set()
        self.refusal: Refusal | None = None
        self.places = frozenset(places)
        self.streams = Streams(generators)
        self.reads = HostReads(self.refuse)
        self._nodes: Any = WeakTensorKeyDictionary()
        self._input_ids: set[int] = set()
        self._fixed: set[int] = set()
        self._first: fx.Node | None = None

    def watch(self, step: Callable[[], Any]) -> Any:
        """Run `step` and return what it returns."""
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cached cast is a tensor that no operation shows
        try:
            with without_onednn(), self.reads, self:
                out = step()
        finally:
            torch.set_autocast_cache_enabled(cached)
        moved = self.streams.untold()
        if moved:
            self.refuse(Refusal("random-state", f"{moved} was moved otherwise than by draws"))
        return out

    def refuse(self, refusal: Refusal) -> None:
        """Give the recording up; the first reason counts. The step runs on."""
        if self.refusal is None:
            self.refusal = refusal

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor that the step made or read, else None."""
        return self._nodes.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.refusal is not None:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        if not all(map(is_plain, tensors)):
            return NotImplemented
        foreign = _foreign(func, tensors)
        if foreign is not None:
            self.refuse(foreign)
            return func(*args, **kwargs)
        if _Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs, tensors)
        self._refuse_read(func, tensors)
        out = func(*args, **kwargs)
        if self.refusal is None:
            try:
                self._record(func, args, kwargs, tensors, out)
            except Exception as error:  # the step must not fail for being watched
                self.refuse(Refusal("internal", f"{func}: {error!r}", user_line()))
        return out

    def _refuse_read(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """Refuse results that depend on values, unless these are the same in each run."""
        if self._all_fixed(tensors) and func not in _EXCHANGES:
            return
        if _Tag.data_dependent_output in func.tags:
            self.refuse(Refusal("host-read", _called(self.reads, func), user_line()))
        elif _Tag.dynamic_output_shape in func.tags and not _is_by_numbers(func, tensors):
            self.refuse(Refusal("dynamic-shape", _called(self.reads, func), user_line()))
        elif _Tag.inplace_view in func.tags and (self.is_input(tensors[0]) or func in _EXCHANGES):
            self.refuse(Refusal("memory", f"{func} changes the shape of a tensor in place", user_line()))

    def is_input(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was there before the step."""
        return self.node(tensor) is None or id(tensor) in self._input_ids

    def _all_fixed(self, tensors: list[torch.Tensor]) -> bool:
        return not tensors or (bool(self._fixed) and all(memory_key(tensor) in self._fixed for tensor in tensors))

    def _record(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], out: Any) -> None:
        made = _tensors(out)
        written = written_among(func, args, kwargs)
        if not made and not written:
            return
        fixed = self._all_fixed(tensors)
        if func is _aten.lift_fresh.default or (fixed and _BY_VALUE & set(func.tags)):
            self._constants(made)
            return
        args, kwargs = map_aggregate((args, kwargs), self._argument)
        self._name_results(self._append(func, args, kwargs), out)
        self._note(made, written, fixed)

    def _note(self, made: list[torch.Tensor], written: list[torch.Tensor], fixed: bool) -> None:
        """Remember what was written to, and whose values are the same in each run."""
        self.written |= {memory_key(tensor) for tensor in written}
        touched = {memory_key(tensor) for tensor in (*made, *written)}
        if fixed:
            self._fixed |= touched
        else:
            self._fixed -= touched

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            node = self.node(leaf)
            return self.input(leaf) if node is None else node
        return tuple(leaf) if isinstance(leaf, torch.Size) else leaf

    def _append(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(func, args, kwargs)
        self._first = self._first or node
        return node

    def _name_results(self, node: fx.Node, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self._nodes[out] = node
            note(node, out)
            return
        for index, made in enumerate(out or ()):
            if isinstance(made, torch.Tensor):
                own = self._nodes[made] = self._append(operator.getitem, (node, index), {})
                note(own, made)
            elif not isinstance(made, int | None):
                raise TypeError(f"a result of type {type(made).__name__}")

    def input(self, value: torch.Tensor | Draw) -> fx.Node:
        """A new input of the graph."""
        with self.graph.inserting_before(self._first) if self._first else nullcontext():
            node = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append(value)
        self.lines.append(user_line())
        if isinstance(value, torch.Tensor):
            self._nodes[value] = node
            self._input_ids.add(id(value))
        return node

    def _constants(self, tensors: list[torch.Tensor]) -> None:
        """Tensors made from Python numbers, which the guards watch."""
        source = self.reads.made_from()
        if source:
            self.refuse(Refusal("host-data", source, user_line()))
            return
        for tensor in tensors:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor.clone()
            attribute = self.graph.get_attr(name)
            self._first = self._first or attribute
            self._nodes[tensor] = self._append(_aten.lift_fresh_copy.default, (attribute,), {})
            self._fixed.add(memory_key(tensor))

    def _draw(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """Let a random operation happen, and make its result an input."""
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        generator = kwargs.get("generator") or default_generator(device)
        self.streams.know(generator)
        before = state_of(generator)
        out = func(*args, **kwargs)
        try:
            self._record_draw(func, args, kwargs, out, generator, before)
        except Exception as error:  # the step must not fail for being watched
            self.refuse(Refusal("internal", f"{func}: {error!r}", user_line()))
        return out

    def _record_draw(
        self, func: Any, args: Any, kwargs: Any, out: Any, generator: torch.Generator, before: bytes
    ) -> None:
        after = state_of(generator)
        if after == before and not (isinstance(out, torch.Tensor) and out.numel() == 0):
            self._record(func, args, kwargs, _tensors(args, kwargs), out)  # this call draws nothing
            return
        fills = bool(describe(func).written)
        shaped = fills or func._schema.name.endswith("_like")
        rest = args[1:] if shaped else args
        if not isinstance(out, torch.Tensor) or not all(map(self._is_known, _tensors(rest, kwargs))):
            self.refuse(Refusal("random-values", _called(self.reads, func), user_line()))
            return
        own_args, own_kwargs = map_aggregate((rest, kwargs), self._kept)
        drawn = self._drawn(Draw(func, own_args, own_kwargs, out, shaped=shaped), generator, before, after)
        if drawn is None:
            self.refuse(Refusal("random-state", "a stream was set inside the step", user_line()))
        elif fills:
            self._nodes[out] = self._append(_aten.copy_.default, (self._argument(args[0]), drawn), {})
            self._note([out], [out], fixed=False)
        else:
            self._nodes[out] = self._append(_aten.clone.default, (drawn,), {})
            self._note([out], [], fixed=False)

    def _drawn(self, draw: Draw, generator: torch.Generator, before: bytes, after: bytes) -> fx.Node | None:
        """The input that a draw fills: a new one, or that of the same draw made before; None if out of turn."""
        key = (draw.kind(), stream_key(generator), before)
        stream = self.streams.in_turn(generator, before)
        if stream is None:
            return self.streams.earlier(key)
        draw.stands_for = None if stream_key(stream) == stream_key(generator) else stream
        node = self.input(draw)
        self.streams.moved(stream, after)
        self.streams.remember(key, node)
        return node

    def _is_known(self, value: torch.Tensor) -> bool:
        """Whether a draw's argument is what it is before the step runs."""
        if self._is_fixed(value):
            return True
        return self.is_input(value) and memory_key(value) not in self.written and id(value) in self.places

    def _kept(self, value: Any) -> Any:
        """An argument for a draw to use: of a tensor that is the same in each run, a copy."""
        if not self._is_fixed(value):
            return value
        copy = value.clone()
        self.kept[id(copy)] = copy
        return copy

    def _is_fixed(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and memory_key(value) in self._fixed


def _tensors(*values: Any) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results, however deep."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


def _foreign(func: Any, tensors: list[torch.Tensor]) -> Refusal | None:
    """Why an operation cannot be written down at all, or None."""
    if not hasattr(func, "_schema"):
        return Refusal("higher-order", str(func), user_line())
    if any(tensor.layout != torch.strided for tensor in tensors):
        return Refusal("layout", str(func), user_line())
    return None


def note(node: fx.Node, value: torch.Tensor) -> None:
    """How what a node makes lies, and in which dtype it is."""
    node.meta |= {"kind": (value.shape, value.stride()), "dtype": value.dtype}


def shapes(graph: fx.Graph, inputs: Iterable[torch.Tensor]) -> dict[fx.Node, tuple[int, ...]]:
    """Of each node of a recording that is one tensor: its inputs', and those that were seen."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    seen = {node: tuple(node.meta["kind"][0]) for node in graph.nodes if "kind" in node.meta}
    return seen | {node: tuple(value.shape) for node, value in zip(placeholders, inputs, strict=True)}


def is_write(node: fx.Node) -> bool:
    """Whether a node must stay though nothing reads its result."""
    if node.op != "call_function":
        return node.op != "get_attr"
    return hasattr(node.target, "_schema") and bool(describe(node.target).written)


def _is_by_numbers(func: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether this is an indexing whose result has a shape that is known."""
    return func is _aten.index.Tensor and not has_mask(tensors[1:])


def _called(reads: HostReads, func: Any) -> str:
    return f"Tensor.{reads.call[0]}" if reads.call is not None else str(func)
