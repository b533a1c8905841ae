"""Random draws: taken before each replay, in the recorded order, each from its own stream.

A recorded program draws nothing itself. Where the step drew, it has an input, and a `Draw` fills that input as the
step's own operation would: same operation, same memory order, same generator. So a replay takes from each stream
what the eager step takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from memberwise._torch import bernoulli
from memberwise._torch.identity import stream_key
from memberwise.generators import default_generator, drawing_from, state_of

_aten = torch.ops.aten


class Draw:
    """How one draw is taken again.

    Attributes:
        func, args, kwargs: the random operation and its arguments; a tensor among them is live memory.
        example: a tensor like the drawn one; where the operation fills a tensor, or asks one for its kind, it is this.
        stands_for: the member's stream that the global one stands for, or None.
        given: `(argument, value)`: arguments that are values of the program, looked up at each draw.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, drawn: torch.Tensor, *, shaped: bool) -> None:
        self.example = torch.empty_strided(drawn.shape, drawn.stride(), dtype=drawn.dtype, device=drawn.device)
        self.func = func
        self.args: Sequence[Any] = (self.example, *args) if shaped else tuple(args)
        self.kwargs = kwargs
        self.stands_for: torch.Generator | None = None
        self.given: list[tuple[int, int]] = []

    def kind(self) -> Any:
        """A value that is equal for draws that take the same from the same state."""
        example, others = self.example, (arg for arg in self.args if arg is not self.example)
        rest = [id(arg) if isinstance(arg, torch.Tensor) else repr(arg) for arg in others]
        return self.func, example.shape, example.stride(), example.dtype, example.device, tuple(rest)

    def into(self, target: torch.Tensor) -> None:
        """Fill `target` from here on."""
        self.args = (target, *self.args[1:])
        self.example = target

    def bind(self, position: Callable[[torch.Tensor], int], fixed: Collection[int]) -> None:
        """Look up the tensors among the arguments at each draw, but those in `fixed`, by `id`."""
        for k, arg in enumerate(self.args):
            if isinstance(arg, torch.Tensor) and arg is not self.example and id(arg) not in fixed:
                self.given.append((k, position(arg)))

    @property
    def stream(self) -> torch.Generator | None:
        """The stream that it takes from, if that is not the global one."""
        return self.stands_for or self.kwargs.get("generator")

    @property
    def is_ahead(self) -> bool:
        """Whether it may be taken before the steps that come before it: it reads nothing that they write."""
        return not any(isinstance(arg, torch.Tensor) and arg is not self.example for arg in self.args)

    def take(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Draw, with these values of the program."""
        args = self.args
        if self.given:
            args = [*args]
            for k, index in self.given:
                args[k] = values[index]
        if self.stands_for is None:
            return self.func(*args, **self.kwargs)
        with drawing_from(self.stands_for):
            return self.func(*args, **self.kwargs)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its numbers lie side by side, in whatever order."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride() == tensor.stride()


class MemberDraws(Draw):
    """M draws of one memory order, dense, each into its slice of one tensor.

    Attributes:
        example: the tensor, `(M, *s)`, filled anew each time.
        draws: one a member.
    """

    def __init__(self, draws: list[Draw]) -> None:
        first = draws[0].example
        shape, strides = (len(draws), *first.shape), (first.numel(), *first.stride())
        self.example = torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)
        self.draws = draws
        for draw, part in zip(draws, self.example, strict=True):
            draw.into(part)

    def bind(self, position: Callable[[torch.Tensor], int], fixed: Collection[int]) -> None:
        """Look up the tensors among the arguments at each draw."""
        for draw in self.draws:
            draw.bind(position, fixed)

    @property
    def is_ahead(self) -> bool:
        """Whether all of them may be."""
        return all(draw.is_ahead for draw in self.draws)

    def take(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Draw for each member."""
        if self.at_once:
            bernoulli.draw([draw.example for draw in self.draws], _probability(self.draws[0]), self.at_once)
            return self.example
        for draw in self.draws:
            draw.take(values)
        return self.example

    @functools.cached_property
    def at_once(self) -> list[torch.Generator]:
        """The members' streams, if all can be drawn from at once; else none."""
        first, streams = self.draws[0], [draw.stream for draw in self.draws if draw.stream is not None]
        alike = len({draw.kind() for draw in self.draws}) == 1 and len(streams) == len(self.draws)
        if first.func is not _aten.bernoulli_.float or not alike:
            return []
        can = bernoulli.can_draw([draw.example for draw in self.draws], _probability(first), streams)
        return streams if can else []


def _probability(draw: Draw) -> float:
    """Of a `bernoulli_`; the dispatcher leaves its default out."""
    return draw.args[1] if len(draw.args) > 1 else draw.kwargs.get("p", 0.5)


class Streams:
    """The random streams during a recording: in what state each draw found its stream, and left it.

    A stream's state after one draw must be its state before the next; else somebody set it, and a replay would not.
    One case of that is repeatable: a state set back to draw the same again, as checkpointing does. It is answered
    with the earlier draw.
    """

    def __init__(self, generators: Iterable[torch.Generator]) -> None:
        self._expected: dict[int, bytes] = {}
        self._known: dict[int, torch.Generator] = {}
        self._earlier: dict[Any, Any] = {}
        for generator in (default_generator(torch.device("cpu")), *generators):
            self.know(generator)

    def know(self, generator: torch.Generator) -> None:
        """Watch a stream from here on."""
        if stream_key(generator) not in self._known:
            self._known[stream_key(generator)] = generator
            self._expected[stream_key(generator)] = state_of(generator)

    def in_turn(self, generator: torch.Generator, before: bytes) -> torch.Generator | None:
        """The stream that the recorded draws left in this state: `generator`, or one that it stands for."""
        if self._expected[stream_key(generator)] == before:
            return generator
        return next((known for key, known in self._known.items() if self._expected[key] == before), None)

    def moved(self, generator: torch.Generator, after: bytes) -> None:
        """Note the state that a draw left its stream in."""
        self._expected[stream_key(generator)] = after

    def earlier(self, key: Any) -> Any:
        """What was remembered of an earlier draw, or None."""
        return self._earlier.get(key)

    def remember(self, key: Any, drawn: Any) -> None:
        """Remember a draw by its operation, its stream and the state it found."""
        self._earlier[key] = drawn

    def untold(self) -> str:
        """Which stream is not where the recorded draws left it; "" if all are."""
        for key, generator in self._known.items():
            if state_of(generator) != self._expected[key]:
                is_global = key == stream_key(default_generator(generator.device))
                return "the global stream" if is_global else "a member's stream or another generator"
        return ""


def host_states(streams: Iterable[Any]) -> list[str]:
    """The states of random streams of Python and NumPy, as values."""
    return [repr(_host_state(stream)) for stream in streams]


def _host_state(stream: Any) -> Any:
    for name in ("getstate", "get_state"):
        if hasattr(stream, name):
            return getattr(stream, name)()
    return stream.bit_generator.state
