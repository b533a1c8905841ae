"""One random stream a member: the stream a lone run has after `torch.manual_seed(seed)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import string_at

import torch


def make_generators(seeds: Iterable[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator a seed; member i draws what a lone run draws after `torch.manual_seed(seeds[i])` on CPU.

    >>> import torch
    >>> first, _ = make_generators([0, 1])
    >>> lone = torch.manual_seed(0)
    >>> torch.equal(torch.rand(3, generator=first), torch.rand(3))
    True
    """
    return [torch.Generator(device=device).manual_seed(int(seed)) for seed in seeds]


def default_generator(device: torch.device) -> torch.Generator:
    """The global generator of a device."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def global_generators() -> list[torch.Generator]:
    """The global generators that a call may draw from: the CPU's, and those of devices in use."""
    found = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.extend(torch.cuda.default_generators)
    return found


def state_of(generator: torch.Generator) -> bytes:
    """A generator's state as a value."""
    return state_as_value(generator.get_state())


def state_as_value(state: torch.Tensor) -> bytes:
    """The same of a state that was taken; read by no operation, which modes and transforms would see."""
    return string_at(state.data_ptr(), state.numel())


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let operations that take no generator draw from this one; the global stream is left as it was."""
    if generator is None:
        yield
        return
    default = default_generator(generator.device)
    before = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(default.get_state())
        default.set_state(before)


@contextmanager
def restoring(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Put the streams back to where they were at the start."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
