"""Draws: each member from its own stream, as much as its lone run draws, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from memberwise._torch import bernoulli
from memberwise._torch.tracing import watched
from memberwise.engine.slices import member_slice, stack_results
from memberwise.errors import ArgumentError, fail
from memberwise.generators import drawing_from, global_generators, restoring

if TYPE_CHECKING:
    from memberwise.engine.ambient import Region
    from memberwise.engine.operation import Operation

_aten = torch.ops.aten


_DRAWS_ONLY_IF: dict[str, Callable[[Any, Any], bool]] = {
    "aten::native_dropout": lambda values, kwargs: values[2] is not False,
    "aten::rrelu_with_noise": lambda values, kwargs: len(values) > 4 and bool(values[4]),
    "aten::rrelu_with_noise_": lambda values, kwargs: len(values) > 4 and bool(values[4]),
    "aten::rrelu_with_noise_functional": lambda values, kwargs: len(values) > 4 and bool(values[4]),
    "aten::_scaled_dot_product_flash_attention": lambda values, kwargs: len(values) > 3 and values[3] > 0,
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda values, kwargs: len(values) > 3 and values[3] > 0,
    "aten::_scaled_dot_product_efficient_attention": lambda values, kwargs: len(values) > 5 and values[5] > 0,
    "aten::_scaled_dot_product_cudnn_attention": lambda values, kwargs: len(values) > 5 and values[5] > 0,
    "aten::_scaled_dot_product_attention_math": lambda values, kwargs: len(values) > 4 and values[4] > 0,
    "aten::_cudnn_rnn": lambda values, kwargs: values[11] > 0 and values[12],
    "aten::_scaled_dot_product_flash_attention_backward": lambda values, kwargs: False,  # they redo a draw
    "aten::_scaled_dot_product_efficient_attention_backward": lambda values, kwargs: False,
    "aten::_scaled_dot_product_cudnn_attention_backward": lambda values, kwargs: False,
}
"""Operations tagged as random that draw in some calls only."""


def draws(op: Operation, values: Any, kwargs: Any) -> bool:
    """Whether this call takes numbers from a stream; what has no values takes none."""
    filled = values[0] if values else None
    if str(kwargs.get("device")) == "meta" or (isinstance(filled, torch.Tensor) and filled.is_meta):
        return False
    condition = _DRAWS_ONLY_IF.get(op.name)
    return True if condition is None else condition(values, kwargs)


def draw(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """`(out, 0)` of a random operation, or None where torch's batching draws right."""
    if region.randomness == "same":
        return _alike(op, region, values, dims, kwargs)
    if region.generators is not None:
        return _by_stream(op, region, values, dims, kwargs, region.generators)
    if op.returned == (0,) and dims[0] == 0 and not any(_stacked(dim) for dim in dims[1:]):
        return op.func(*values, **kwargs), 0
    return None


def _alike(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any) -> tuple[Any, Any]:
    """randomness="same": every member draws from the same point of the global stream, or of the one it is given."""
    given = kwargs.get("generator")
    drawn_from = global_generators() if given is None else [given]
    outs = []
    for i in range(region.batch_size):
        own = [member_slice(value, dim, i) for value, dim in zip(values, dims, strict=True)]
        with restoring(drawn_from if i < region.batch_size - 1 else []):
            outs.append(op.func(*own, **kwargs))
    return stack_results(outs, op, region), 0


def _stacked(dim: Any) -> bool:
    return dim is not None if not isinstance(dim, list) else any(_stacked(entry) for entry in dim)


def _by_stream(op: Operation, region: Region, values: Any, dims: Any, kwargs: Any, generators: Any) -> tuple[Any, Any]:
    takes_generator = any(arg.name == "generator" for arg in op.func._schema.arguments)
    filler = _FILLERS.get(op.func) if _fills(op, values) else None
    _check_place(op, values, kwargs, generators[0].device)
    if op.func is _aten.bernoulli_.float and dims[0] == 0 and values[0].is_contiguous() and not kwargs:
        return fill_masks(values[0], *values[1:], generators=generators), 0
    outs = []
    for i in range(region.batch_size):
        own = [member_slice(value, dim, i) for value, dim in zip(values, dims, strict=True)]
        if kwargs.get("generator") is not None or not (takes_generator or filler):
            with drawing_from(generators[i]):
                outs.append(op.func(*own, **kwargs))
        elif filler is not None:
            outs.append(filler(generators[i], *own, **kwargs))
        else:
            outs.append(op.func(*own, **{**kwargs, "generator": generators[i]}))
    return stack_results(outs, op, region), 0


def fill_masks(masks: torch.Tensor, p: float = 0.5, *, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """`(M, *s)`, contiguous, with each member's part drawn from its stream: 1 with probability `p`, else 0."""
    members = masks.unbind(0)
    if not watched() and bernoulli.can_draw(members, p, generators, build=False):
        bernoulli.draw(members, p, generators)
        if not masks.is_inference():
            increment_version(masks)
        return masks
    for own, generator in zip(members, generators, strict=True):
        own.bernoulli_(p, generator=generator)
    return masks


def _check_place(op: Operation, values: Any, kwargs: Any, streams: torch.device) -> None:
    """A stream draws on its own device only; another's global stream is not the members'."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    place = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    if place.type != streams.type:
        what = f"{op.name} draws on {place}, and the members' random streams are on {streams}"
        fail(ArgumentError, "MW303", what, do=f"Give generators on {place.type}: torch.Generator('{place.type}')")


def _fills(op: Operation, values: Any) -> bool:
    """Whether the operation draws as its filler does; a GPU's dropout takes numbers in an order of its own."""
    return op.func is not _aten.native_dropout.default or values[0].device.type == "cpu"


def _filled(make: Any, fill: str) -> Callable[..., torch.Tensor]:
    """A factory drawn into an empty tensor: what torch does itself, with a generator to choose."""

    def factory(generator: torch.Generator, *args: Any, **kwargs: Any) -> torch.Tensor:
        return getattr(make(*args, **kwargs), fill)(generator=generator)

    return factory


def _randint(generator: torch.Generator, *args: Any, **kwargs: Any) -> torch.Tensor:
    low, high, size = args if len(args) == 3 else (0, *args)
    kwargs["dtype"] = kwargs.get("dtype") or torch.int64
    return torch.empty(size, **_known(kwargs)).random_(low, high, generator=generator)


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in ("dtype", "device", "layout") and value}


def _randperm(generator: torch.Generator, n: int, **kwargs: Any) -> torch.Tensor:
    return torch.randperm(n, generator=generator, **_known(kwargs))


def _dropout(generator: torch.Generator, x: torch.Tensor, p: float, train: Any) -> Any:
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


_FILLERS: dict[Any, Callable[..., Any]] = {
    _aten.rand.default: _filled(_aten.empty.memory_format, "uniform_"),
    _aten.randn.default: _filled(_aten.empty.memory_format, "normal_"),
    _aten.rand_like.default: _filled(_aten.empty_like.default, "uniform_"),
    _aten.randn_like.default: _filled(_aten.empty_like.default, "normal_"),
    _aten.randint.default: _randint,
    _aten.randint.low: _randint,
    _aten.randperm.default: _randperm,
    _aten.native_dropout.default: _dropout,
}
"""Random operations without a generator argument: the same draw, from a generator to choose."""
