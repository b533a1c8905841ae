"""Random programs for one member: straight lines of instructions over a pool of tensors, with views and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """One instruction: its name, and which tensors of the pool it takes (modulo the pool's size)."""

    name: str
    first: int
    second: int


def conditional(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * 2 if bool(a.detach().sum() > b.detach().sum()) else a.sin() - b.mean()


def inner_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad((a.sin() * b.sum()).sum(), a, create_graph=True)
    return grad


def functional_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda v: (v.cos() * b.detach().mean()).sum())(a)


def out_argument(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise RuntimeError("out= would resize, which torch warns of")
    with torch.no_grad():
        torch.add(b, 1.0, out=a)


def transposed_write(a: torch.Tensor, b: torch.Tensor) -> None:
    a.transpose(0, -1)[0].add_(b.detach().mean())


LARGEST = 300
"""Elements; a program of expansions would grow without end."""


def hooked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`grad_fn` is read first: torch 2.13 crashes on a hook on a view that was written with gradients off (`x[0]`)."""
    if a.requires_grad:
        _ = a.grad_fn
        a.register_hook(lambda grad: grad * 1.5)
    return F.relu(a)


VALUES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sin": lambda a, b: a.sin(),
    "relu": lambda a, b: F.relu(a),
    "sigmoid": lambda a, b: a.sigmoid(),
    "softmax": lambda a, b: a.softmax(-1),
    "layer_norm": lambda a, b: F.layer_norm(a, a.shape[-1:]),
    "cumsum": lambda a, b: a.cumsum(0) * 0.3,
    "sort": lambda a, b: a.sort(-1).values,
    "flip": lambda a, b: a.flip(0),
    "sum": lambda a, b: a.sum(0),
    "mean": lambda a, b: a.mean(-1, keepdim=True),
    "amax": lambda a, b: a.amax(),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: (a * b).tanh(),
    "matmul": lambda a, b: (a @ b).tanh(),
    "linear": lambda a, b: F.linear(a, b, b[:, 0]).tanh(),
    "bare linear": lambda a, b: F.linear(a, b),
    "layers": lambda a, b: F.relu(F.linear(F.relu(a), b)),
    "mse": lambda a, b: F.mse_loss(a, b),
    "cross entropy": lambda a, b: F.cross_entropy(a, b.detach().argmax(-1)),
    "needs a gradient": lambda a, b: a * (2 if b.requires_grad else 3),
    "hook": hooked,
    "bmm": lambda a, b: torch.einsum("ij,kj->ki", a, b).tanh(),
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b], -1),
    "conv": lambda a, b: F.conv1d(a[None], b[:2, :2, None].expand(2, a.shape[0], 1)).tanh()[0],
    "index": lambda a, b: a[torch.tensor([0, -1, 0])],
    "index by member": lambda a, b: a[b.detach().argmax() % a.shape[0]],
    "gather": lambda a, b: a.gather(0, a.detach().argsort(0)),
    "embedding": lambda a, b: F.embedding(torch.tensor([[0, 1], [1, 1]]), a),
    "clone": lambda a, b: a.clone(),
    "contiguous": lambda a, b: a.contiguous(),
    "detach": lambda a, b: a.detach(),
    "no_grad": lambda a, b: torch.no_grad()(lambda: a * b + 1)(),
    "float32": lambda a, b: a.float().double(),
    "transpose": lambda a, b: a.transpose(0, -1),
    "view": lambda a, b: a.view(-1),
    "reshape": lambda a, b: a.reshape(-1),
    "reshape to two": lambda a, b: a.reshape(2, -1),
    "select": lambda a, b: a[-1],
    "slice": lambda a, b: a[..., 1:],
    "stride": lambda a, b: a[..., ::2],
    "unsqueeze": lambda a, b: a[None],
    "squeeze": lambda a, b: a.squeeze(),
    "expand": lambda a, b: a.expand(2, *a.shape),
    "diagonal": lambda a, b: a.diagonal(),
    "unbind": lambda a, b: a.unbind(0)[0],
    "zeros": lambda a, b: torch.zeros(2, 3, dtype=a.dtype),
    "ones_like": lambda a, b: torch.ones_like(a),
    "arange": lambda a, b: torch.arange(6, dtype=a.dtype).view(2, 3),
    "empty written": lambda a, b: torch.empty_like(a).copy_(b),
    "rand": lambda a, b: torch.rand(2, 3, dtype=a.dtype),
    "randn_like": lambda a, b: a + torch.randn_like(a),
    "dropout": lambda a, b: F.dropout(a, 0.3),
    "agreeing read": lambda a, b: a * (1 + (b.detach() * 0).sum().item()),
    "read": lambda a, b: a * b.detach().mean().item(),
    "conditional": conditional,
    "inner gradient": inner_gradient,
    "functional gradient": functional_gradient,
}
WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(0.7),
    "copy_": lambda a, b: a.copy_(b),
    "relu_": lambda a, b: F.leaky_relu_(a, 0.5),
    "zero_": lambda a, b: a.zero_(),
    "fill_": lambda a, b: a.fill_(b.detach().mean()),
    "set first": lambda a, b: a.__setitem__(0, b.detach().mean() * 2),
    "set last": lambda a, b: a.__setitem__((..., -1), 0.25),
    "set slice": lambda a, b: a[..., 1:].mul_(b.detach().amax()),
    "through reshape": lambda a, b: a.reshape(-1)[0].add_(1.0),
    "through view": lambda a, b: a.view(-1)[-1].sub_(b.detach().mean()),
    "through transpose": transposed_write,
    "index_add_": lambda a, b: a.index_add_(0, torch.tensor([0]), a.detach()[-1:].clone()),
    "masked_fill_": lambda a, b: a.masked_fill_(a.detach() > 0.5, 0.5),
    "clamp_": lambda a, b: a.clamp_(-0.9, 0.9),
    "uniform_": lambda a, b: a.uniform_(),
    "out": out_argument,
}


def execute(steps: list[Step], pool: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run the steps on a pool, which grows."""
    pool = list(pool)
    for step in steps:
        a, b = pool[step.first % len(pool)], pool[step.second % len(pool)]
        if step.name in VALUES:
            pool.append(VALUES[step.name](a, b))
        else:
            WRITES[step.name](a, b)
    return pool


def runnable(steps: list[Step], make_pool: Callable[[], list[torch.Tensor]]) -> list[Step]:
    """The steps that a lone run can take, backward included; found by leaving out what raises."""
    while True:
        kept, pool = forward(steps, make_pool())
        try:
            outs = [t for t in pool if t.requires_grad]
            torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
            return kept
        except RuntimeError:
            written = [k for k, step in enumerate(kept) if step.name in WRITES]
            if not written:
                return []
            steps = kept[: written[-1]] + kept[written[-1] + 1 :]


def forward(steps: list[Step], pool: list[torch.Tensor]) -> tuple[list[Step], list[torch.Tensor]]:
    """The steps that do not raise, and the pool they leave."""
    kept: list[Step] = []
    for step in steps:
        try:
            after = execute([step], pool)
        except (RuntimeError, IndexError, ValueError):
            continue
        if after[-1].numel() <= LARGEST:
            kept.append(step)
            pool = after
    return kept, pool


steps = st.builds(Step, st.sampled_from([*VALUES, *WRITES]), st.integers(0, 12), st.integers(0, 12))
