"""The loop that everything is compared with: each member alone, one after another, in plain PyTorch.

`alone` runs a function written for one member on each member's own copies of the inputs, forward and backward,
before the next member starts, as M separate scripts would. `check` runs the same function through
`memberwise.vmap` and compares outputs, gradients, inputs after the call, and where the random streams stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import memberwise
from memberwise.testing.tolerance import assert_equal


@dataclass
class Outcome:
    """What a run left behind; every list holds stacked tensors, M first (shared inputs: their own shape)."""

    outs: list[Any] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor | None] = field(default_factory=list)
    streams: list[torch.Tensor] = field(default_factory=list)


def leaves(value: Any) -> list[Any]:
    """The entries of nested dicts, lists and tuples, in order."""
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [value]


def rebuilt(value: Any, own: Iterator[Any]) -> Any:
    """A structure like `value` with its entries taken from `own`."""
    if isinstance(value, dict):
        return {key: rebuilt(entry, own) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(entry, own) for entry in value)
    return next(own)


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is a leaf of its own."""
    copy = tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad)


def cotangent(out: torch.Tensor, place: int) -> torch.Tensor:
    """A fixed gradient for the stacked output number `place`."""
    generator = torch.Generator().manual_seed(1000 + place)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def member_dims(args: Sequence[Any], in_dims: Any) -> list[int | None]:
    """Where each tensor's member axis is; `in_dims` is an int, or one entry (int or None) an argument."""
    dims = [in_dims] * len(args) if isinstance(in_dims, int) else list(in_dims)
    return [dim for arg, dim in zip(args, dims, strict=True) for _ in leaves(arg)]


def alone(
    func: Callable[..., Any], args: Sequence[Any], in_dims: Any = 0, seeds: Sequence[int] | None = None
) -> Outcome:
    """Each member alone: forward, then backward, on copies of its own; the global generator seeded for each."""
    given, dims = leaves(args), member_dims(args, in_dims)
    size = next(t.shape[d] for t, d in zip(given, dims, strict=True) if d is not None)
    shared = [fresh(t) if d is None and isinstance(t, torch.Tensor) else t for t, d in zip(given, dims, strict=True)]
    runs, own_inputs, streams = [], [], []
    with torch.random.fork_rng(devices=[]):
        for i in range(size):
            if seeds is not None:
                torch.manual_seed(seeds[i])
            own = [
                t if d is None else fresh(t.select(d, i)).requires_grad_(t.requires_grad)
                for t, d in zip(shared, dims, strict=True)
            ]
            outs = leaves(func(*rebuilt(list(args), iter(own))))
            backward_alone(outs, i, size)
            runs.append(outs)
            own_inputs.append(own)
            streams.append(torch.get_rng_state())
    inputs, grads = [], []
    for k, dim in enumerate(dims):
        if not isinstance(shared[k], torch.Tensor):
            continue
        column = [own[k] for own in own_inputs]
        inputs.append(shared[k].detach() if dim is None else torch.stack([t.detach() for t in column], dim))
        grads.append(shared[k].grad if dim is None else joined([t.grad for t in column], column, dim))
    outs = [stacked([run[k] for run in runs]) for k in range(len(runs[0]))]
    return Outcome(outs, inputs, grads, streams if seeds is not None else [])


def backward_alone(outs: Sequence[Any], member: int, size: int) -> None:
    """Backward from all of one member's outputs, each with a copy of this member's part of a fixed gradient."""
    wanted = [(k, out) for k, out in enumerate(outs) if isinstance(out, torch.Tensor) and out.requires_grad]
    if wanted:
        whole = [cotangent(out.new_empty((size, *out.shape)), k) for k, out in wanted]
        torch.autograd.backward([out for _, out in wanted], [w[member].clone() for w in whole])


def stacked(column: list[Any]) -> Any:
    """M members' tensors as one; of other values the list."""
    return torch.stack([t.detach() for t in column]) if isinstance(column[0], torch.Tensor) else column


def joined(column: list[torch.Tensor | None], owners: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    """M members' gradients as one; a member without one counts as zeros, unless no member has one."""
    if all(grad is None for grad in column):
        return None
    pairs = zip(column, owners, strict=True)
    return torch.stack([torch.zeros_like(owner) if grad is None else grad for grad, owner in pairs], dim)


def together(
    func: Callable[..., Any],
    args: Sequence[Any],
    in_dims: Any = 0,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Outcome:
    """The same through `memberwise.vmap`, forward and one backward for all."""
    own = [fresh(t) if isinstance(t, torch.Tensor) else t for t in leaves(args)]
    generators = None
    if seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options["generators"] = generators
    before = torch.get_rng_state()
    vmapped = memberwise.vmap(func, in_dims if isinstance(in_dims, int) else tuple(in_dims), **options)
    outs = leaves(vmapped(*rebuilt(list(args), iter(own))))
    wanted = [(k, out) for k, out in enumerate(outs) if isinstance(out, torch.Tensor) and out.requires_grad]
    if wanted:
        torch.autograd.backward([out for _, out in wanted], [cotangent(out, k) for k, out in wanted])
    if generators is not None:
        assert torch.equal(before, torch.get_rng_state()), "a seeded call moved the global generator"
    tensors = [t for t in own if isinstance(t, torch.Tensor)]
    return Outcome(
        [out.detach() if isinstance(out, torch.Tensor) else out for out in outs],
        [t.detach() for t in tensors],
        [t.grad for t in tensors],
        [generator.get_state() for generator in generators or []],
    )


def compare(ours: Outcome, loop: Outcome) -> None:
    """Outputs, inputs after the call, gradients and streams are the loop's."""
    assert len(ours.outs) == len(loop.outs), "another number of outputs"
    for k, (mine, theirs) in enumerate(zip(ours.outs, loop.outs, strict=True)):
        if isinstance(theirs, torch.Tensor):
            assert_equal(mine, theirs, f"output {k}")
        else:
            assert all(mine == value and type(mine) is type(value) for value in theirs), f"output {k}: {mine}, {theirs}"
    for k, (mine, theirs) in enumerate(zip(ours.inputs, loop.inputs, strict=True)):
        assert_equal(mine, theirs, f"input {k} after the call")
    for k, (mine, theirs) in enumerate(zip(ours.grads, loop.grads, strict=True)):
        assert (mine is None) == (theirs is None), f"gradient of input {k}: {mine}, in the loop {theirs}"
        if theirs is not None:
            assert_equal(mine, theirs, f"gradient of input {k}")
    for i, (mine, theirs) in enumerate(zip(ours.streams, loop.streams, strict=True)):
        assert torch.equal(mine, theirs), f"member {i}'s stream stands elsewhere than its lone run's"


def check(
    func: Callable[..., Any],
    *args: Any,
    in_dims: Any = 0,
    seeds: Sequence[int] | None = None,
    gradients: bool = True,
    **options: Any,
) -> Outcome:
    """Compare `func` run by the loop with the same through `memberwise.vmap`; answers the loop's outcome.

    With `gradients`, at least one input must get a gradient that is not all zeros, else the check proves nothing.
    """
    loop = alone(func, args, in_dims, seeds)
    if gradients:
        assert any(grad is not None and bool(grad.ne(0).any()) for grad in loop.grads), "the loop has no gradient"
    compare(together(func, args, in_dims, seeds, **options), loop)
    return loop


def numbers(*shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Reproducible normal numbers."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)
