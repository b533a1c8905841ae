"""From a watched run to a program: which input stands where, what the step left behind, what it returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memberwise._torch.graphmodule import graph_module
from memberwise._torch.identity import memory_key
from memberwise.capture.arguments import Arguments
from memberwise.capture.draws import Draw
from memberwise.capture.guards import Change, Guards
from memberwise.capture.merging import merge_draws
from memberwise.capture.places import Place
from memberwise.capture.program import Input, Like, Output, Program, Setting, hooks_on
from memberwise.capture.reach import PLAIN, Reach
from memberwise.capture.record import Recorder, is_write
from memberwise.capture.refusals import Refusal
from memberwise.trees import tree_map


class Refused(Exception):
    """No program can be made of this run; carries the `Refusal`."""

    def __init__(self, reason: str, found: str, where: str = "") -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, found, where)


class Before:
    """What a recording has to know of the moment before the step runs."""

    def __init__(self, reach: Reach, arguments: Arguments) -> None:
        self.reach = reach
        self.arguments = arguments
        self.setting = Setting.now()
        self.guards = Guards(reach.rows)
        self.tensors = list({id(tensor): tensor for tensor in (*arguments.tensors, *reach.tensors)}.values())
        self.required = [tensor.requires_grad for tensor in self.tensors]
        self.leaves = [tensor for tensor in self.tensors if tensor.is_leaf and _may_have_a_gradient(tensor)]
        self.hooks = hooks_on(self.leaves)
        self.grads = [leaf.grad for leaf in self.leaves]


class Assembly:
    """The making of one program."""

    def __init__(self, before: Before, recorder: Recorder) -> None:
        self.before = before
        self.recorder = recorder
        self.outputs: list[fx.Node] = []
        self.kinds: list[Like] = []
        self.values: list[torch.Tensor] = []
        self.given: list[tuple[int, int]] = []
        self.moving: list[tuple[int, Place]] = []
        self.draws: list[tuple[int, Draw]] = []
        self.pinned: dict[int, tuple[int, list[Place]]] = {}
        self.stores: list[tuple[Place, int]] = []
        self.grads_in: list[tuple[int, torch.Tensor]] = []
        self.grads_out: list[tuple[torch.Tensor, int | None]] = []
        self._filled_anew: dict[int, Place] = {}
        self._index: dict[int, int] = {}
        self._positions = {id(t): k for k, t in reversed(list(enumerate(before.arguments.tensors)))}
        pairs = zip(before.leaves, before.grads, strict=True)
        self._owners = {id(grad): leaf for leaf, grad in pairs if grad is not None}

    def program(self, out: Any) -> Program:
        """The program of a step that returned `out`; raises `Refused`."""
        if self.recorder.refusal is not None:
            raise Refused(*self.recorder.refusal)
        self._check_aliases()
        self._check_places()
        self._store_changes()
        self._store_grads()
        result = tree_map(self._returned, out)
        graph = self.recorder.graph
        graph.output(tuple(self.outputs))
        graph.eliminate_dead_code(is_write)
        for value in merge_draws(graph, self.recorder.inputs):
            self._add(value)
        count = len(self.values)
        for tensor in self.before.tensors:
            self._value(tensor)
        for _, draw in self.draws:
            draw.bind(self._value, self.recorder.kept)
        result = tree_map(lambda leaf: Input(self._value(leaf)) if isinstance(leaf, torch.Tensor) else leaf, result)
        return self._finished(graph_module(self.recorder.constants, graph), result, count)

    def _finished(self, graph: fx.GraphModule, result: Any, count: int) -> Program:
        before = self.before
        stored = [place for place, _ in self.stores]
        grads_out = [(self._value(leaf), output) for leaf, output in self.grads_out]
        positions = {position for _, position in self.given}
        firsts = before.arguments.firsts or range(len(before.arguments.tensors))
        held = [(k, t) for k, t in enumerate(before.arguments.tensors) if firsts[k] not in positions]
        program = Program(
            graph=graph,
            values=self.values,
            given=self.given,
            held=held,
            moving=self.moving,
            draws=self.draws,
            stores=self.stores,
            outputs=self.kinds,
            result=result,
            guards=before.guards.without(stored),
            pinned=self.pinned,
            optimizers=before.reach.optimizers,
            leaves=[self._value(leaf) for leaf in before.leaves],
            grads_in=[(index, self._value(leaf)) for index, leaf in self.grads_in],
            grads_out=grads_out,
            filled=[grad is not None for grad in before.grads],
            hooks=before.hooks,
            arguments=before.arguments,
            written={k for k, value in enumerate(self.values[:count]) if memory_key(value) in self.recorder.written},
            setting=before.setting,
            stacks=before.reach.stacks,
            stacked=before.reach.stacked,
            generators=[torch.default_generator, *before.reach.generators],
            count=count,
        )
        program.prepare()
        before.arguments.forget()
        return program

    def _check_aliases(self) -> None:
        """Two inputs on one memory that is written to: a compiled program may reorder the accesses."""
        storages: dict[int, int] = {}
        for index, value in enumerate(self.recorder.inputs):
            if not isinstance(value, torch.Tensor):
                continue
            storage = memory_key(value)
            if storage in storages and storage in self.recorder.written:
                raise Refused(
                    "aliased", f"first used at {self.recorder.lines[storages[storage]]}", self.recorder.lines[index]
                )
            storages[storage] = index

    def _check_places(self) -> None:
        """Each input must be a tensor that a later call can look up."""
        for value, line in zip(self.recorder.inputs, self.recorder.lines, strict=True):
            if isinstance(value, torch.Tensor) and not self._is_placed(value):
                raise Refused("unknown-tensor", f"one of shape {tuple(value.shape)}", line)

    def _is_placed(self, tensor: torch.Tensor) -> bool:
        key = id(tensor)
        return key in self.before.reach.places or key in self._positions or key in self._owners

    def _add(self, value: torch.Tensor | Draw) -> None:
        if isinstance(value, Draw):
            self.draws.append((len(self.values), value))
            self.values.append(value.example)
        else:
            self._value(value)

    def _value(self, tensor: torch.Tensor) -> int:
        """The position among the values of a tensor that was there before the step."""
        key = id(tensor)
        if key in self._index:
            return self._index[key]
        index = self._index[key] = len(self.values)
        self.values.append(_plain(tensor))
        places = self.before.reach.places.get(key)
        if key in self._filled_anew:
            self.moving.append((index, self._filled_anew[key]))
        elif places is not None:
            self.pinned[key] = index, places
        elif key in self._positions:
            self.given.append((index, self._positions[key]))
        else:
            self.grads_in.append((index, self._owners[key]))
        return index

    def _output(self, tensor: torch.Tensor, what: str) -> int:
        """The position of a tensor that the step made among the graph's outputs."""
        node = self.recorder.node(tensor)
        if node is None:
            raise Refused("unknown-tensor", f"{what}, of shape {tuple(tensor.shape)}")
        if tensor.requires_grad and not _is_spent(tensor):
            raise Refused("needs-graph", what)
        if node not in self.outputs:
            self.outputs.append(node)
            self.kinds.append(Like.of(tensor))
        return self.outputs.index(node)

    def _store_changes(self) -> None:
        for change in self.before.guards.changes():
            now = change.now
            if change.place is None or not isinstance(now, torch.Tensor) or self.recorder.is_input(now):
                raise Refused("python-state", change.what)
            if isinstance(now, torch.nn.Parameter):
                raise Refused("python-state", f"{change.place.label} is a new parameter")
            self.stores.append((change.place, self._output(now, change.place.label)))
            self._note_moving(change.place, change)

    def _note_moving(self, place: Place, change: Change) -> None:
        """What stands in a place that the step fills anew was put there by the step before."""
        places = self.before.reach.places.get(id(change.before), [])
        if len(places) > 1:
            raise Refused("python-state", f"{place.label} is filled anew and also held by {places[-1].label}")
        self._filled_anew[id(change.before)] = place

    def _store_grads(self) -> None:
        before = self.before
        if hooks_on(before.leaves) != before.hooks:
            raise Refused("python-state", "a hook was put on a tensor")
        if [tensor.requires_grad for tensor in before.tensors] != before.required:
            raise Refused("python-state", "requires_grad of a tensor was changed")
        for leaf, grad in zip(before.leaves, before.grads, strict=True):
            if leaf.grad is None and grad is not None:
                self.grads_out.append((leaf, None))
            elif leaf.grad is not grad and leaf.grad is not None:
                if self.recorder.is_input(leaf.grad):
                    raise Refused("unknown-tensor", f"the gradient of a leaf, of shape {tuple(leaf.shape)}")
                output = self._output(leaf.grad, f"the gradient of a leaf, of shape {tuple(leaf.shape)}")
                self.grads_out.append((leaf, output))

    def _returned(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if self.recorder.node(leaf) is not None and not self.recorder.is_input(leaf):
                return Output(self._output(leaf, "the returned tensor"))
            if not self._is_placed(leaf):
                raise Refused("unknown-tensor", f"the returned one, of shape {tuple(leaf.shape)}")
            return leaf
        if not isinstance(leaf, PLAIN):
            raise Refused("returned-object", f"a {type(leaf).__name__}")
        return leaf


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a subclass that the compiler does not know."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    if tensor.requires_grad:
        raise Refused("internal", f"a {type(tensor).__name__} that requires grad")
    return tensor.as_subclass(torch.Tensor)


def _may_have_a_gradient(tensor: torch.Tensor) -> bool:
    """A frozen parameter may hold one of former steps, which `zero_grad` takes away."""
    return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter) or tensor.grad is not None


def _is_spent(tensor: torch.Tensor) -> bool:
    """Whether a backward inside the step has used up the graph of this tensor."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _has_freed(node):
            return True
        pending.extend(function for function, _ in node.next_functions)
    return False


def _has_freed(node: Any) -> bool:
    """Whether a graph node's saved tensors are gone."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    try:
        for name in (*names, "saved_tensors"):
            getattr(node, name, None)
    except RuntimeError:
        return True
    return False
