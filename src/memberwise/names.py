"""Names of stacked tensors, which are plain strings except where a member's state dict needs more than the name.

Two things about a member cannot be read off a dict of tensors: that a tensor is known by a second name (tied
weights are stored once), and that a buffer is left out of state dicts (it is not persistent). The key carries
them. Keys survive what dicts go through: `dict(params)`, `{k: f(v) for k, v in params.items()}`, `vmap`, `grad`,
`torch.compile`, copies, pickles and `torch.save`. They do not survive JSON or safetensors.
"""

from __future__ import annotations

from typing import Any

import torch


class Name(str):
    """A state-dict name that knows the other names of its tensor, and under which a state dict has it.

    Equal to, and hashed like, the plain string.

    >>> name = Name("encoder.weight", tied=("decoder.weight",), saved=("encoder.weight", "decoder.weight"))
    >>> {name: 1}["encoder.weight"]
    1
    """

    tied: tuple[str, ...]
    saved: tuple[str, ...]

    def __new__(cls, name: str, tied: tuple[str, ...], saved: tuple[str, ...]) -> Name:
        self = super().__new__(cls, name)
        self.tied, self.saved = tied, saved
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Name, (str(self), self.tied, self.saved)


torch.serialization.add_safe_globals([Name])  # else torch.load(weights_only=True) refuses our dicts


def named(name: str, tied: tuple[str, ...] = (), saved: tuple[str, ...] | None = None) -> str:
    """`name` itself if there is nothing to say beyond it, else a `Name`.

    >>> isinstance(named("weight"), Name), isinstance(named("cache", saved=()), Name)
    (False, True)
    """
    if saved is None:
        saved = (name, *tied)
    return str(name) if not tied and saved == (name,) else Name(name, tied, saved)


def tied(name: str) -> tuple[str, ...]:
    """The other names of this name's tensor, as far as the name knows."""
    return name.tied if isinstance(name, Name) else ()


def saved(name: str) -> tuple[str, ...]:
    """The names under which a member's state dict has this name's tensor.

    >>> saved("weight"), saved(named("cache", saved=()))
    (('weight',), ())
    """
    return name.saved if isinstance(name, Name) else (str(name),)
