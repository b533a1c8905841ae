"""Members among the batch, or among the channels: one call of an operation that is already batched serves all."""

from __future__ import annotations

from collections.abc import Callable

import torch


def into_batch(x: torch.Tensor) -> torch.Tensor:
    """`(M, B, *s)` as `(M * B, *s)`."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def out_of_batch(x: torch.Tensor, size: int) -> torch.Tensor:
    """`(M * B, *s)` as `(M, B, *s)`."""
    return x.unflatten(0, (size, x.shape[0] // size))


def into_channels(x: torch.Tensor) -> torch.Tensor:
    """`(M, B, C, *s)` as `(B, M * C, *s)`: no copy, where it came `out_of_channels`."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


def out_of_channels(x: torch.Tensor, size: int) -> torch.Tensor:
    """`(B, M * C, *s)` as `(M, B, C, *s)`. A member's part has gaps between its samples, and no copy is made."""
    return x.unflatten(1, (size, x.shape[1] // size)).transpose(0, 1)


def is_among_channels(x: torch.Tensor) -> bool:
    """Whether `into_channels` of an `(M, B, C, *s)` tensor is a view."""
    return not x.is_contiguous() and x.ndim > 2 and x.transpose(0, 1).is_contiguous()


def as_it_lies(x: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., torch.Tensor]]:
    """The way in and the way out that copy nothing of `x`: by the channels, where members lie there, else the batch."""
    return (into_channels, out_of_channels) if is_among_channels(x) else (into_batch, out_of_batch)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the members' parts, `(B, C, H, W)` or `(B, C, D, H, W)`, lie with their channels innermost."""
    return x.ndim >= 5 and x.stride(2) == 1 and x.shape[2] > 1 and x.stride(-1) >= x.shape[2] and x.shape[-1] > 1


def joined(value: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    """A value a channel, `(M, C)` or shared `(C)`, as `(M * C)`."""
    if value is None:
        return None
    return value.reshape(-1) if dim == 0 else value.repeat(size)


def split(value: torch.Tensor, size: int) -> torch.Tensor:
    """`(M * C)` as `(M, C)`."""
    return value.view(size, value.numel() // size)
