"""One vmapped call: its members, its streams, and the tensors and draws that are made inside it.

A `Region` is also the dispatch mode that is on while the call runs, so that it sees what no member tensor takes
part in: `torch.zeros(3)`, `torch.randn(3)`, a mask made of plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from memberwise._torch.backward import in_backward
from memberwise._torch.dispatch import DispatchMode
from memberwise._torch.versions import set_versions, version
from memberwise.engine.signals import part_ways
from memberwise.engine.streams import MOVED, GlobalStreams
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import EngineError, fail

_classes: list[type[MemberTensor]] = [MemberTensor]


def tensor_class(level: int) -> type[MemberTensor]:
    """The member class of a nesting level; each derives from the outer one, so dispatch picks the innermost."""
    while len(_classes) <= level:
        _classes.append(type(f"MemberTensor{len(_classes)}", (_classes[-1],), {}))
    return _classes[level]


@dataclass(slots=True)
class Before:
    """A tensor's values before a call wrote them, and how often the memory had been written."""

    tensor: torch.Tensor
    values: torch.Tensor
    counted: list[torch.Tensor]
    versions: list[int]


class Region(DispatchMode):
    """One call of `vmap` or of a `Stack`.

    Attributes:
        batch_size: M.
        randomness: "error", "different" or "same", as in `torch.vmap`.
        generators: one `torch.Generator` a member, or None.
        tensor_class: the member class of this nesting level.
        closures: tensors that the function was not given and that need gradients, as they were taken in.
        journal: what was overwritten of memory that outlives the call, for undo.
        written: the member tensors of memory that outlives the call which were written with gradients on.
        given: where generators that the function itself gives stood at the first member's draw, in a run by members.
        depth: how many modes lie below this one; tracers come in below, too.
        running: whether the call is still under way (its backward may come later).
        lowers: whether its tensors come in lowered, see `memberwise.engine.lowering`.
        looking: whether, gradients being off, operations read lowered tensors as they are.
        apart: the modules that run member by member in this call, and why.
        turn: the member that runs alone now, while such a module does.
    """

    def __init__(
        self,
        batch_size: int,
        level: int = 0,
        randomness: str = "error",
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.level = level
        self.randomness = randomness
        self.generators = generators
        self.tensor_class = tensor_class(level)
        self.journal: list[Before] = []
        self.touched: set[int] = set()
        self.written: list[MemberTensor] = []
        self.closures: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.running = False
        self.lowers = False
        self.looking = False
        self.apart: dict[Any, str] = {}
        self.turn: int | None = None
        self.depth = 0
        self.given: dict[torch.Generator, torch.Tensor] = {}
        self._reached: list[tuple[torch.Tensor, Any, Any]] = []
        self._streams: list[tuple[torch.Generator, torch.Tensor]] | None = None
        self._global: GlobalStreams | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the handler in a call of its own, 1 us an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MemberTensor._on_dispatch(func, args, kwargs, self)

    def keep(self, tensor: torch.Tensor, root: torch.Tensor | None = None) -> None:
        """Remember the values of memory that outlives the call, before the first write to it.

        `root`: what it is a view of; a write counts there too, and so do the undone ones not.
        """
        if id(tensor) not in self.touched and self.running:
            self.touched.add(id(tensor))
            counted = [tensor] if root is None else [tensor, root]
            with _mode_of(tensor):
                tensor = _without_repeats(tensor)
                values = tensor.detach().clone()
            self.journal.append(Before(tensor, values, counted, [version(t) for t in counted]))

    def put_back(self) -> None:
        """Undo the writes to memory that outlives the call, and what a backward inside has accumulated."""
        with torch.no_grad():
            for before in reversed(self.journal):
                with _mode_of(before.tensor):
                    before.tensor.copy_(before.values)
                set_versions(before.counted, before.versions)
            for tensor, grad, values in self._reached:
                tensor.grad = grad
                if values is not None:
                    grad.copy_(values)
            self._reached.clear()

    def start(self) -> None:
        """The run begins."""
        self.running = True
        if self.randomness != "error":
            self._global = GlobalStreams(self.generators is not None)

    def keep_streams(self, *, draws: bool = True) -> None:
        """Remember where the random streams stand, before the first draw."""
        if not self.running:
            return
        if draws:
            self.check_global_streams()
        if self._streams is None and self.generators is not None:
            if draws and in_backward():
                refuse_to_draw_again()
            self._streams = [(generator, generator.get_state()) for generator in self.generators]

    def check_global_streams(self, *, at_the_end: bool = False) -> None:
        """Part ways where the function has moved the global stream itself."""
        streams = self._global
        if streams is not None and (streams.moved_at_the_end() if at_the_end else streams.moved()):
            part_ways(self, MOVED)

    def drawn(self) -> None:
        """The call has drawn."""
        if self.running and self._global is not None:
            self._global.drawn()

    def rewind_streams(self) -> None:
        """Put the random streams back to where they stood before the first draw."""
        for generator, state in self._streams or ():
            generator.set_state(state)
        if self._global is not None:
            self._global.put_back()

    @contextmanager
    def streams_as_recorded(self) -> Iterator[None]:
        """Within the block a checkpoint of this call is recomputed, and sets the streams for it."""
        watched, self._global = self._global, None
        try:
            yield
        finally:
            self._global = watched

    def note_backward(self, leaves: Iterable[torch.Tensor]) -> None:
        """A backward inside the call reaches tensors outside of it, whose gradients it will add to."""
        for tensor in leaves:
            if not any(tensor is known for known, _, _ in self._reached):
                grad = tensor.grad
                self._reached.append((tensor, grad, None if grad is None else grad.detach().clone()))

    def release_gradients(self) -> None:
        """What autograd accumulated outside, while the mode was on, is plain."""
        for tensor, _, _ in self._reached:
            if isinstance(tensor.grad, MemberTensor):
                tensor.grad = tensor.grad._inner
        self._reached.clear()

    def end(self) -> None:
        """The run is over: there is nothing left to undo."""
        self.running = False
        if self._global is not None:
            self._global.close()
            self._global = None
        self.journal.clear()
        self.touched.clear()
        self.written.clear()
        self._streams = None


def _mode_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Inference mode for a tensor of inference mode, and none for others: its views are of the kind of the mode."""
    own = tensor.is_inference()
    return _NOTHING if own is torch.is_inference_mode_enabled() else torch.inference_mode(own)


_NOTHING = nullcontext()


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Each element of an expanded tensor once; torch writes to such tensors, and copies nothing into them."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and not stride:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def refuse_to_draw_again() -> NoReturn:
    """Refuse draws from members' own streams in a backward pass, where they would be other ones than in forward."""
    what = "a call with random streams of its own draws in a backward pass, as a checkpoint around it does"
    do = "torch restores the global stream alone; put the checkpoint into the members' forward, where theirs are too"
    fail(EngineError, "MW209", what, do=do)
