"""What a random program is made of: tables of instructions, each a function of two tensors.

A value gives a new tensor; a write changes its first tensor. None knows of stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Write = Callable[[torch.Tensor, torch.Tensor], Any]

CLEAR = 1e-6
"""A decision is taken on what is larger than this: a difference in rounding does not turn it."""


class Unfit(Exception):
    """The instruction is not for these tensors."""


def larger(a: torch.Tensor, b: torch.Tensor | float) -> bool:
    """A read in which members may differ."""
    return bool(a.detach().sum() - (b.detach().sum() if isinstance(b, torch.Tensor) else b) > CLEAR)


# -- reads on the host


def conditional(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * 2 if larger(a, b) else a.sin() - b.mean()


def repeated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A loop that ends when a value says so."""
    out, rounds = a, 0
    while rounds < 3 and larger(out.abs().mean(), 0.3):
        out, rounds = out * 0.5, rounds + 1
    return out + rounds


def written_then_read(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What a half-done run wrote is undone."""
    with torch.no_grad():
        b.mul_(0.5)
    return a * 2 if larger(a, 0.0) else a * b.mean()


def listed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    values = b.detach().flatten()[:2].tolist()
    return a * sum(values)


def chosen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A mask; how many it picks may differ, and the sum is of one shape."""
    return a[a.detach() > 0.1].sum() * b


def found(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.sum() * len((b.detach() > 0.2).nonzero())


def caught(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A member's own error, and its own handling of it."""
    try:
        if larger(a, b):
            raise KeyError("larger")
    except KeyError:
        return a * 0.3
    return a * 0.7


# -- derivatives, Functions and hooks inside


def inner_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad((a.sin() * b.sum()).sum(), a, create_graph=True)
    return grad


def inner_backward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    leaf = a.detach().clone().requires_grad_()
    with torch.enable_grad():
        (leaf * b.detach().mean()).sin().sum().backward()
    assert leaf.grad is not None
    return a + leaf.grad


def functional_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda v: (v.cos() * b.detach().mean()).sum())(a)


def functional_jacobian(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _small(a)
    return torch.func.jacrev(lambda v: (v.sin() * b.detach().mean()).sum(-1))(a).sum(0)


def inner_vmap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row.sin() * b.detach().sum())(a)


class Scaled(torch.autograd.Function):
    """Saves what it needs; its backward computes, and makes tensors."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a * b.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b = ctx.saved_tensors
        own = torch.full_like(b, 1.0 / b.numel()) * (grads[0] * a).sum()
        return grads[0] * b.mean(), own


class Dirty(torch.autograd.Function):
    """Writes its argument, and says so."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(a)
        return a.mul_(0.5)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5


class Several(torch.autograd.Function):
    """Two results, one of them without a gradient; gradients that may be None."""

    @staticmethod
    def forward(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return a.exp().clamp(max=2.0), a.detach().argsort(-1), a * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first = 0.0 if grads[0] is None else grads[0] * 3
        last = 0.0 if grads[2] is None else grads[2] * 2
        return None if grads[0] is None and grads[2] is None else first + last


def hooked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """On a tensor of its own: one that was given keeps its hooks from call to call."""
    a = a.view_as(a)
    if a.requires_grad:
        a.register_hook(lambda grad: grad * 1.5)
    return F.relu(a)


def node_hooked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a * 1.0
    if out.grad_fn is not None:
        out.grad_fn.register_hook(lambda inputs, outputs: tuple(g if g is None else g * 2 for g in inputs))
    return out


def retained(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a * b.mean()
    if out.requires_grad:
        out.retain_grad()
    return out


# -- shapes, layouts and draws


def strided(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What code that looks at memory sees."""
    return a * (1.0 + sum(a.stride()) * 0.1) + float(a.is_contiguous())


def rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(row * (k + 1) for k, row in enumerate(a))  # type: ignore[return-value] # a tensor, if there is a row


def permuted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[torch.randperm(a.shape[0])]


def drawn_index(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[int(torch.randint(a.shape[0], ()))]


def _small(a: torch.Tensor) -> None:
    if a.numel() > 9:
        raise Unfit


VALUES: dict[str, Value] = {
    # one by one
    "sin": lambda a, b: a.sin(),
    "relu": lambda a, b: F.relu(a),
    "sigmoid": lambda a, b: a.sigmoid(),
    "gelu": lambda a, b: F.gelu(a),
    "silu": lambda a, b: F.silu(a),
    "elu": lambda a, b: F.elu(a),
    "hardtanh": lambda a, b: F.hardtanh(a, -0.5, 0.5),
    "softplus": lambda a, b: F.softplus(a),
    "abs": lambda a, b: a.abs(),
    "sqrt": lambda a, b: (a * a + 0.1).sqrt(),
    "pow": lambda a, b: a.clamp(-1.5, 1.5) ** 3,
    "reciprocal": lambda a, b: 1 / (a.abs() + 0.5),
    "clamp": lambda a, b: a.clamp(-0.3, 0.8),
    "round": lambda a, b: a + a.detach().round() * 0.1,
    "sign": lambda a, b: a * a.detach().sign(),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "rsub": lambda a, b: 1.0 - a,
    "mul": lambda a, b: (a * b).tanh(),
    "div": lambda a, b: a / (b.abs() + 0.5),
    "maximum": lambda a, b: torch.maximum(a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5).tanh(),
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "masked fill": lambda a, b: a.masked_fill(b > 0.3, 0.2),
    "compare": lambda a, b: (a.detach() > b.detach()).to(a.dtype) * 0.5,
    "number and tensor": lambda a, b: a * b.sum(),
    "whole numbers": lambda a, b: a * torch.arange(a.shape[-1]),
    # along a dimension
    "softmax": lambda a, b: a.softmax(-1),
    "log_softmax": lambda a, b: a.log_softmax(0) * 0.3,
    "logsumexp": lambda a, b: a.logsumexp(-1),
    "layer_norm": lambda a, b: F.layer_norm(a, a.shape[-1:], eps=0.1),
    "rms norm": lambda a, b: F.rms_norm(a, a.shape[-1:], eps=0.1),
    "normalize": lambda a, b: F.normalize(a, dim=-1, eps=0.1),
    "cumsum": lambda a, b: a.cumsum(0) * 0.3,
    "cumprod": lambda a, b: a.cumprod(-1),
    "prod": lambda a, b: a.prod(-1),
    "prod of zeros": lambda a, b: (a * (a.detach() > 0)).prod(-1),
    "sort": lambda a, b: a.sort(-1).values,
    "topk": lambda a, b: a.topk(1, -1).values,
    "argmax": lambda a, b: a * a.detach().argmax(-1, keepdim=True),
    "flip": lambda a, b: a.flip(0),
    "roll": lambda a, b: a.roll(1, -1),
    "sum": lambda a, b: a.sum(0),
    "sum of all": lambda a, b: a.sum(),
    "mean": lambda a, b: a.mean(-1, keepdim=True),
    "amax": lambda a, b: a.amax(),
    "max": lambda a, b: a.max(-1).values,
    "min of all": lambda a, b: a.min(),
    "var": lambda a, b: a.var(-1, unbiased=False),
    "std": lambda a, b: (a + torch.arange(a.shape[-1]) * 3).std(-1),
    "norm": lambda a, b: (a + 0.3).norm(dim=-1),
    "norm of zeros": lambda a, b: (a * 0).norm(dim=0) + a.sum(0),
    "median": lambda a, b: a.median(-1).values,
    # products and layers
    "matmul": lambda a, b: (a @ b).tanh(),
    "linear": lambda a, b: F.linear(a, b, b[:, 0]).tanh(),
    "bare linear": lambda a, b: F.linear(a, b),
    "layers": lambda a, b: F.relu(F.linear(F.relu(a), b)),
    "bmm": lambda a, b: torch.einsum("ij,kj->ki", a, b).tanh(),
    "outer": lambda a, b: torch.outer(a, b),
    "addmm": lambda a, b: torch.addmm(a, a, b).tanh(),
    "baddbmm": lambda a, b: torch.bmm(a[None].expand(2, *a.shape), b[None].expand(2, *b.shape)).tanh(),
    "conv": lambda a, b: F.conv1d(a[None], b[:2, :2, None].expand(2, a.shape[0], 1)).tanh()[0],
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None])[0],
    "pool": lambda a, b: F.avg_pool1d(a[None], 2)[0],
    "max pool": lambda a, b: F.max_pool1d(a[None], 2)[0],
    "pad": lambda a, b: F.pad(a, (1, 0), value=0.5),
    "interpolate": lambda a, b: F.interpolate(a[None], scale_factor=2)[0],
    "embedding": lambda a, b: F.embedding(torch.tensor([[0, 1], [1, 1]]), a),
    "embedding by value": lambda a, b: F.embedding((b.detach() > 0).long(), a),
    "mse": lambda a, b: F.mse_loss(a, b),
    "smooth l1": lambda a, b: F.smooth_l1_loss(a, b, reduction="none"),
    "cross entropy": lambda a, b: F.cross_entropy(a, b.detach().argmax(-1)),
    "one hot": lambda a, b: a * F.one_hot(torch.tensor([0, 2, 1])[: a.shape[0]], a.shape[-1]),
    "solve": lambda a, b: torch.linalg.solve(a + 5 * torch.eye(a.shape[0], dtype=a.dtype), b),
    "det": lambda a, b: torch.linalg.det(a + 2 * torch.eye(a.shape[0], dtype=a.dtype)),
    "inverse": lambda a, b: torch.linalg.inv(a @ a.mT + torch.eye(a.shape[0], dtype=a.dtype)),
    "cholesky": lambda a, b: torch.linalg.cholesky(a @ a.mT + torch.eye(a.shape[0], dtype=a.dtype)),
    "fft": lambda a, b: torch.fft.rfft(a).real,
    "complex": lambda a, b: (torch.complex(a, a * 0.5).conj() * 2).imag,
    # memory
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b], -1),
    "index": lambda a, b: a[torch.tensor([0, -1, 0])],
    "index by member": lambda a, b: a[b.detach().argmax() % a.shape[0]],
    "index select": lambda a, b: a.index_select(0, torch.tensor([1, 0])),
    "gather": lambda a, b: a.gather(0, a.detach().argsort(0)),
    "scatter": lambda a, b: a.scatter(0, torch.zeros_like(a, dtype=torch.long), b),
    "scatter add": lambda a, b: a.scatter_add(-1, torch.zeros_like(a, dtype=torch.long), a),
    "index put": lambda a, b: a.index_put((torch.tensor([0]),), b.detach().mean(), accumulate=True),
    "take": lambda a, b: a.take(torch.tensor([0, 1])),
    "clone": lambda a, b: a.clone(),
    "contiguous": lambda a, b: a.contiguous(),
    "detach": lambda a, b: a.detach(),
    "float32": lambda a, b: a.float().to(a.dtype),
    "strides": strided,
    "rows": rows,
    "tril": lambda a, b: a.tril(),
    "kron": lambda a, b: (_small(a), torch.kron(a.clone(), b[:1].clone()))[1],  # it keeps memory uncounted
    # views
    "transpose": lambda a, b: a.transpose(0, -1),
    "permute": lambda a, b: a.permute(*reversed(range(a.ndim))),
    "view": lambda a, b: a.view(-1),
    "reshape": lambda a, b: a.reshape(-1),
    "reshape to two": lambda a, b: a.reshape(2, -1),
    "flatten": lambda a, b: a.flatten(),
    "select": lambda a, b: a[-1],
    "slice": lambda a, b: a[..., 1:],
    "stride": lambda a, b: a[..., ::2],
    "narrow": lambda a, b: a.narrow(-1, 0, 2),
    "unsqueeze": lambda a, b: a[None],
    "squeeze": lambda a, b: a.squeeze(),
    "expand": lambda a, b: a.expand(2, *a.shape),
    "diagonal": lambda a, b: a.diagonal(),
    "unbind": lambda a, b: a.unbind(0)[0],
    "split": lambda a, b: a.split(2, -1)[0],
    "chunk": lambda a, b: a.chunk(2)[-1],
    "unfold": lambda a, b: a.unfold(-1, 2, 1),
    "as_strided": lambda a, b: a.as_strided((2,), (1,)),
    "view as real": lambda a, b: torch.view_as_real(torch.complex(a, a)),
    "alias": lambda a, b: a.view_as(a),
    "t_": lambda a, b: (a * 1).t_(),
    "detach_": lambda a, b: (a * 1).detach_(),
    "requires_grad_": lambda a, b: a.detach().clone().requires_grad_(),
    "unsqueeze_": lambda a, b: (a * 1).unsqueeze_(0),
    # made inside, and drawn
    "zeros": lambda a, b: torch.zeros(2, 3, dtype=a.dtype),
    "ones_like": lambda a, b: torch.ones_like(a),
    "full": lambda a, b: torch.full((3,), 0.5, dtype=a.dtype),
    "arange": lambda a, b: torch.arange(6, dtype=a.dtype).view(2, 3),
    "new": lambda a, b: a.new_ones(2, 3),
    "tensor": lambda a, b: torch.tensor([[1.0, 2.0, 3.0]], dtype=a.dtype),
    "empty written": lambda a, b: torch.empty_like(a).copy_(b),
    "leaf": lambda a, b: torch.ones(3, dtype=a.dtype, requires_grad=True) * a,
    "rand": lambda a, b: torch.rand(2, 3, dtype=a.dtype),
    "randn_like": lambda a, b: a + torch.randn_like(a),
    "bernoulli": lambda a, b: torch.bernoulli(a.detach().sigmoid()) * 0.5,
    "normal": lambda a, b: torch.normal(a.detach(), 0.5),
    "exponential": lambda a, b: torch.empty_like(a).exponential_(),
    "randperm": permuted,
    "randint": drawn_index,
    "dropout": lambda a, b: F.dropout(a, 0.3),
    "alpha dropout": lambda a, b: F.alpha_dropout(a, 0.3, training=True),
    "rrelu": lambda a, b: F.rrelu(a, training=True).sin(),  # not the end: there a checkpoint saves noise not yet drawn
    "gumbel": lambda a, b: F.gumbel_softmax(a, dim=-1),
    # looks and reads
    "needs a gradient": lambda a, b: a * (2 if b.requires_grad else 3),
    "has a graph": lambda a, b: (a * 1.5) * (2 if (a * 1.5).grad_fn is None else 3),
    "agreeing read": lambda a, b: a * (1 + (b.detach() * 0).sum().item()),
    "read": lambda a, b: a * b.detach().mean().item(),
    "formatted": lambda a, b: a * float(f"{b.detach().mean():.3f}"),
    "conditional": conditional,
    "repeated": repeated,
    "written then read": written_then_read,
    "listed": listed,
    "chosen by a mask": chosen,
    "counted": found,
    "caught": caught,
    # derivatives, Functions, hooks
    "inner gradient": inner_gradient,
    "inner backward": inner_backward,
    "functional gradient": functional_gradient,
    "functional jacobian": functional_jacobian,
    "inner vmap": inner_vmap,
    "Function": Scaled.apply,  # type: ignore[dict-item] # a tensor of two tensors
    "Function of several": lambda a, b: Several.apply(a)[0],  # type: ignore[index] # three tensors
    "Function of several, last": lambda a, b: Several.apply(a)[2],  # type: ignore[index] # three tensors
    "hook": hooked,
    "node hook": node_hooked,
    "retain_grad": retained,
}


def out_argument(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise Unfit  # out= would resize, which torch warns of
    with torch.no_grad():
        torch.add(b, 1.0, out=a)


def transposed_write(a: torch.Tensor, b: torch.Tensor) -> None:
    a.transpose(0, -1)[0].add_(b.detach().mean())


WRITES: dict[str, Write] = {
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(0.7),
    "div_": lambda a, b: a.div_(b.abs() + 1.0),
    "copy_": lambda a, b: a.copy_(b),
    "relu_": lambda a, b: F.leaky_relu_(a, 0.5),
    "tanh_": lambda a, b: a.tanh_(),
    "zero_": lambda a, b: a.zero_(),
    "fill_": lambda a, b: a.fill_(b.detach().mean()),
    "set first": lambda a, b: a.__setitem__(0, b.detach().mean() * 2),
    "set last": lambda a, b: a.__setitem__((..., -1), 0.25),
    "set by mask": lambda a, b: a.__setitem__(a.detach() > 0.5, 0.1),
    "set slice": lambda a, b: a[..., 1:].mul_(b.detach().amax()),
    "through reshape": lambda a, b: a.reshape(-1)[0].add_(1.0),
    "through view": lambda a, b: a.view(-1)[-1].sub_(b.detach().mean()),
    "through transpose": transposed_write,
    "through detach": lambda a, b: a.detach().mul_(0.9),
    "through unbind": lambda a, b: a.detach().unbind(0)[0].fill_(0.3),
    "index_add_": lambda a, b: a.index_add_(0, torch.tensor([0]), a.detach()[-1:].clone()),
    "index_copy_": lambda a, b: a.index_copy_(0, torch.tensor([0]), b[:1]),
    "index_put_": lambda a, b: a.index_put_((torch.tensor([0, 0]),), b.detach().mean(), accumulate=True),
    "scatter_": lambda a, b: a.scatter_(0, torch.zeros_like(a, dtype=torch.long), 0.5),
    "masked_fill_": lambda a, b: a.masked_fill_(a.detach() > 0.5, 0.5),
    "masked_scatter_": lambda a, b: a.masked_scatter_(a.detach() > 0.0, b.detach().expand_as(a).clone()),
    "clamp_": lambda a, b: a.clamp_(-0.9, 0.9),
    "lerp_": lambda a, b: a.lerp_(b, 0.4),
    "swap": lambda a, b: a.copy_(a.detach().flip(0).clone()),
    "uniform_": lambda a, b: a.uniform_(),
    "normal_": lambda a, b: a.normal_(),
    "bernoulli_": lambda a, b: a.bernoulli_(0.5),
    "dropout in place": lambda a, b: F.dropout(a, 0.3, inplace=True),
    "Function that writes": lambda a, b: Dirty.apply(a),
    "out": out_argument,
    "foreach": lambda a, b: torch._foreach_mul_([a], 0.5),
}
