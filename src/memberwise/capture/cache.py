"""Compiled graphs, by what they compute: recordings that come out alike share one."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memberwise._torch.building import build_ahead
from memberwise._torch.entry import Entry
from memberwise._torch.folder import kept_at
from memberwise._torch.inductor import USUAL, How, Trial, begin_graph, compile_untried
from memberwise.capture.attended import SOFTMAX, attended
from memberwise.capture.ours import OURS, with_ours
from memberwise.capture.outline import by_regions
from memberwise.capture.regions import Uncut
from memberwise.capture.unfused import unfused
from memberwise.kernels.library import source

KERNELS = {SOFTMAX: "attention", **{operation: own.kernel for operation, own in OURS.items()}}
"""torch's operation -> the kernel that a recording with it may run by."""

ALIGNED = 16
"""Bytes that a kernel on a GPU may read at once, from an address that they divide."""


class Compiled:
    """The last `size` compiled graphs of one step."""

    def __init__(self, size: int, backend: str) -> None:
        self.size = size
        self.backend = backend
        self._entries: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    def begin(
        self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], trial: Trial | None, how: How = USUAL
    ) -> Callable[[], Callable[..., Any]]:
        """Begin to compile the `graph`: what is returned waits for it, and compilers work beside meanwhile. Nothing
        runs on `inputs`; if there is a `trial`, the compiled graph has run on what that gives."""
        key = structure(graph, inputs), how
        known = self._entries.get(key) or (graph.forward if self.backend == "fx" else None)
        end = None if known else _compiling(rewritten(graph, inputs), inputs, trial, how)

        def ended() -> Callable[..., Any]:
            self._entries[key] = run = end() if end else known
            self._entries.move_to_end(key)
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)
            return run

        return ended


def build_ahead_for(graph: fx.GraphModule) -> None:
    """Begin to build the kernels of ours that it may run by, where this machine has none yet."""
    build_ahead([*map(source, sorted({KERNELS[node.target] for node in graph.graph.nodes if node.target in KERNELS}))])


def rewritten(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A recording that computes the same, within rounding, in operations that are faster compiled."""
    return with_ours(attended(unfused(graph), inputs), inputs)


def _compiling(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], trial: Trial | None, how: How
) -> Callable[[], Callable[..., Any]]:
    """By regions, if it repeats itself; else whole."""
    if trial is None:
        return functools.partial(compile_untried, graph, inputs, how)
    begin = functools.partial(_begun, how=how)
    with contextlib.suppress(Uncut), torch.no_grad():
        return by_regions(graph, trial, begin)[0]
    return functools.partial(begin(graph, inputs), trial)


def _begun(graph: fx.GraphModule, inputs: Sequence[torch.Tensor], how: How) -> Callable[[Trial], Any]:
    """As `begin_graph` does; a program that another process has compiled is loaded from disk, without a compiler."""
    path = kept_at((structure(graph, inputs), how, torch.get_num_threads())).with_suffix(".program")
    known = Entry.kept(path)
    if known is not None:
        return lambda trial: known
    end = begin_graph(graph, inputs, how)

    def ended(trial: Trial) -> Any:
        run = end(trial)
        if isinstance(run, Entry):
            run.keep(path)
        return run

    return ended


def structure(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    """A value that is equal for graphs that compute the same from inputs of the same kind."""
    kinds = [(type(t), t.shape, t.stride(), t.dtype, t.device, _misaligned(t)) for t in inputs]
    constants = [(name, tensor.dtype, tensor.shape, _bytes(tensor)) for name, tensor in graph.named_buffers()]
    nodes = [(node.op, str(node.target), node.name, repr(node.args), repr(node.kwargs)) for node in graph.graph.nodes]
    return repr((kinds, constants, nodes))


def _misaligned(tensor: torch.Tensor) -> int:
    """By how many bytes; else it does not matter where in its storage a view begins."""
    return 0 if tensor.device.type == "cpu" else tensor.storage_offset() * tensor.element_size() % ALIGNED


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
