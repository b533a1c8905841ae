"""What looks into autograd: hooks, checkpoints, Functions, transforms, gradients taken inside."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.parity.tools_table import BY_MEMBERS, WORKS, Section, Using

TABLE = row = Section("Gradients, hooks and transforms")


def block(self: Using) -> Any:
    return lambda x: F.dropout(self.hidden(x), 0.3).sin()


def keeps_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    return create_selective_checkpoint_contexts(keeps_products)


row.add("`checkpoint`", WORKS, lambda self, x: self.last(checkpoint(block(self), x, use_reentrant=False)))
row.add("`checkpoint`, reentrant", WORKS, lambda self, x: self.last(checkpoint(block(self), x, use_reentrant=True)))
row.add(
    "`checkpoint`, selective (`context_fn=`)",
    WORKS,
    lambda self, x: self.last(checkpoint(block(self), x, use_reentrant=False, context_fn=selective)),
)
row.add(
    "`checkpoint_sequential`",
    WORKS,
    lambda self, x: self.last(checkpoint_sequential([self.first, torch.nn.Tanh()], 2, x, use_reentrant=False)),
)


@row("`saved_tensors_hooks`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        return self.last(self.hidden(x))


@row("`saved_tensors_hooks` that leave torch (numpy, files)", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    def pack(t: torch.Tensor) -> io.BytesIO:
        torch.save(t, file := io.BytesIO())
        return file

    def unpack(file: io.BytesIO) -> torch.Tensor:
        file.seek(0)
        return torch.load(file)

    with saved_tensors_hooks(pack, unpack):
        return self.last(self.hidden(x))


@row("`save_on_cpu`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with save_on_cpu():
        return self.last(self.hidden(x))


def with_hooks(model: Using) -> None:
    model.first.register_forward_pre_hook(lambda m, args: (args[0] + 1,), prepend=True)
    model.first.register_forward_hook(lambda m, args, kwargs, out: out * 2, with_kwargs=True, always_call=True)
    model.first.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 2,))
    model.first.register_full_backward_hook(lambda m, ins, outs: (ins[0] * 3,))
    model.register_full_backward_hook(lambda m, ins, outs: None)


row.add("modules' hooks, forward and backward", WORKS, make=with_hooks)
row.add(
    "a hook on a parameter",
    "MW113",
    make=lambda model: model.first.weight.register_hook(lambda grad: grad * 2),
    note="registered on the stack's parameter it works, and gets `(M, *s)`",
)
row.add(
    "`register_post_accumulate_grad_hook`",
    "MW113",
    make=lambda model: model.first.weight.register_post_accumulate_grad_hook(lambda p: None),
    note="likewise",
)


@row("hooks on tensors and nodes", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    hidden.register_hook(lambda grad: grad * 2)
    hidden.grad_fn.register_hook(lambda ins, outs: (ins[0] * 2,))
    hidden.grad_fn.register_prehook(lambda outs: (outs[0] * 2,))
    torch.autograd.graph.register_multi_grad_hook([hidden], lambda grads: None)
    hidden.retain_grad()
    return self.last(hidden)


@row("`torch.autograd.grad`, `GradientEdge`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    out = self.last(hidden.sin())
    (found,) = torch.autograd.grad(out.sum(), [torch.autograd.graph.get_gradient_edge(hidden)], create_graph=True)
    return out * found.sum()


class Scaling(torch.autograd.Function):
    """A Function of the old style."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


class Separate(torch.autograd.Function):
    """A Function of the new style; its `vmap` is for `torch.vmap` alone."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = Scaling.backward

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise AssertionError("no transform of torch.func is on")


class Sorted(torch.autograd.Function):
    """A Function that leaves torch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        order = np.argsort(x.detach().numpy(), axis=-1)
        ctx.order = torch.from_numpy(order)
        return torch.from_numpy(np.take_along_axis(x.detach().numpy(), order, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(grad).scatter(-1, ctx.order, grad)


class Sine(torch.autograd.Function):
    """A Function with a formula for forward mode."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return tangent * ctx.saved_tensors[0].cos()


row.add("`autograd.Function`", WORKS, lambda self, x: self.last(Scaling.apply(x, self.first.weight)))
row.add(
    "`autograd.Function` with `setup_context`, `vmap`",
    WORKS,
    lambda self, x: self.last(Separate.apply(x, self.first.weight)),
)
row.add("`autograd.Function` in numpy", BY_MEMBERS, lambda self, x: self.last(Sorted.apply(self.hidden(x))))
row.add(
    "`autograd.Function` with `jvp`",
    WORKS,
    lambda self, x: self.last(jvp(lambda t: Sine.apply(t), (self.hidden(x),), (x,))[1]),
)
row.add("`torch.func.grad`", WORKS, lambda self, x: self.last(grad(lambda t: self.hidden(t).sum())(x)))
row.add("`torch.vmap`", WORKS, lambda self, x: self.last(vmap(self.hidden)(x)))
row.add("`torch.func.jvp`", WORKS, lambda self, x: self.last(jvp(self.hidden, (x,), (x,))[1]))
row.add("`torch.func.jacrev`", WORKS, lambda self, x: self.last(vmap(jacrev(self.hidden))(x).sum(-1)))
row.add(
    "`torch.func.hessian`",
    WORKS,
    lambda self, x: self.last(vmap(hessian(lambda t: self.hidden(t).sum()))(x).sum(-1)),
)
row.add("`torch.func.linearize`", BY_MEMBERS, lambda self, x: self.last(linearize(torch.tanh, x)[1](x)))
row.add(
    "`torch.func.functional_call`",
    WORKS,
    lambda self, x: self.last(
        functional_call(self.first, {name: 2 * p for name, p in self.first.named_parameters()}, (x,))
    ),
)


@row("forward mode (`dual_level`)", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        out = self.hidden(forward_ad.make_dual(x, torch.ones_like(x)))
        return self.last(forward_ad.unpack_dual(out).tangent)


def own_gradient(self: Using, x: torch.Tensor) -> torch.Tensor:
    self.hidden(x.detach()).sum().backward()
    return self.first.weight.grad.detach().clone()


@row("`backward()` inside, and the parameters' `.grad`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    found = own_gradient(self, x)
    self.first.zero_grad()
    return self.last(self.hidden(x) * found.sum(0))


@row("the same, and the members part ways", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    found = own_gradient(self, x)
    return self.last(self.hidden(x) * found.sum(0) * float(found.sum()))


@row("an optimizer over the model's own parameters, inside", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(self.first.parameters(), 0.1)
    own_gradient(self, x)
    optimizer.step()
    optimizer.zero_grad()
    return self.last(self.hidden(x))


@row("the same, and the members part ways (SGD)", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(self.first.parameters(), 0.1)
    scale = float(own_gradient(self, x).sum())
    optimizer.step()
    optimizer.zero_grad()
    return self.last(self.hidden(x) * scale)


@row("`copy.deepcopy` of a module, trained inside (MAML)", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    fast = copy.deepcopy(self.first)
    optimizer = torch.optim.Adam(fast.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        fast(x.detach()).tanh().sum().backward()
        optimizer.step()
    return self.last(fast(x) + self.hidden(x))


@row("`copy.deepcopy` where members part ways", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(copy.deepcopy(self.first)(x) + self.hidden(x) * float(self.first.weight.sum()))


@row("a parameter put into another module", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    other = torch.nn.Linear(4, 4, bias=False, device="meta")
    other.weight = self.first.weight
    assert other.weight.is_leaf and other.weight.grad_fn is None
    return self.last(other(x).tanh())


@row("`pickle`, `torch.save`", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    kept = pickle.loads(pickle.dumps([self.hidden(x).detach(), self.first.weight]))
    torch.save(self.state_dict(), file := io.BytesIO())
    file.seek(0)
    return self.last(self.hidden(x) + kept[0] + kept[1].sum()) + torch.load(file)["last.bias"]
