"""Where the graph of a call lies below its member tensors: layers alone, what raises them, and what undoes the call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memberwise
from memberwise.engine import lowering
from memberwise.errors import EngineError
from tests.parity.loops import check, numbers


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test calls its functions for the first time."""
    monkeypatch.setattr(lowering, "raised", lowering.Raised())
    yield


Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return numbers(3, 4, 4), numbers(3, 4, 4, seed=1), numbers(3, 4, seed=2)


def hidden(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.relu(F.linear(x, weight, bias))


# -- layers alone


def test_a_call_of_layers_has_no_node_at_its_borders() -> None:
    stack = memberwise.stack([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)])
    out = stack(numbers(5, 4, grad=False).float())
    seen, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        seen.append(type(node).__name__)
        waiting += [one for one, _ in node.next_functions if one is not None]
    assert not [name for name in seen if name.startswith(("Enter", "Exit", "_Raise", "_Node"))]
    assert seen.count("AccumulateGrad") == 4


LAYERS: dict[str, Layer] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "of a vector": lambda x, w, b: F.linear(x[0], w, b),
    "linear without bias": lambda x, w, b: F.linear(F.relu(x), w),
    "linear twice": lambda x, w, b: hidden(hidden(x, w, b), w, b),
    "itself": lambda x, w, b: F.linear(x, x),
    "mse": lambda x, w, b: F.mse_loss(hidden(x, w, b), x),
    "summed mse": lambda x, w, b: F.mse_loss(hidden(x, w, b), x, reduction="sum"),
    "cross entropy": lambda x, w, b: F.cross_entropy(hidden(x, w, b), torch.tensor([0, 3, -100, 1])),
    "each cross entropy": lambda x, w, b: F.cross_entropy(x, torch.tensor([0, 3, 2, 1]), reduction="none"),
    "smooth cross entropy": lambda x, w, b: F.cross_entropy(x, torch.tensor([0, 3, 2, 1]), label_smoothing=0.1),
    "layer norm": lambda x, w, b: F.layer_norm(hidden(x, w, b), (4,), w[0], b),
    "unused": lambda x, w, b: F.relu(x),
    "given back": lambda x, w, b: (x, F.relu(w), b),
    "several": lambda x, w, b: {"one": F.relu(x), "two": [hidden(x, w, b), None, 3]},
}
SHARED = {
    "none": (0, 0, 0),
    "x": (None, 0, 0),
    "weight": (0, None, 0),
    "bias": (0, 0, None),
    "x, weight": (None, None, 0),
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str, shared: str) -> None:
    args = [t if dim == 0 else t[0].detach().requires_grad_() for t, dim in zip(given(), SHARED[shared], strict=True)]
    check(LAYERS[layer], *args, in_dims=SHARED[shared])
    assert LAYERS[layer] not in lowering.raised


@pytest.mark.parametrize("tracked", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_argument_needs_a_gradient(tracked: tuple[bool, ...]) -> None:
    args = [t.detach().requires_grad_(needs) for t, needs in zip(given(), tracked, strict=True)]
    check(lambda x, w, b: F.linear(x, w, b), *args)


def test_dropout_draws_as_alone() -> None:
    check(lambda x: F.dropout(F.relu(x), 0.4), numbers(3, 4, 5), seeds=[3, 4, 5])


@pytest.mark.parametrize("layer", ["linear twice", "mse", "cross entropy", "layer norm"])
def test_second_derivatives_outside(layer: str) -> None:
    """The graph of a call is torch's own there, or knows its second derivative."""

    def penalty(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, call: Callable[..., torch.Tensor]) -> Any:
        out = call(x, w, b).sum()
        grads = torch.autograd.grad(out, (x, w, b), create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads if g is not None), (x, w), allow_unused=True)

    ours = penalty(*given(), memberwise.vmap(LAYERS[layer]))
    for i in range(3):
        own = [t[i].detach().requires_grad_() for t in given()]
        for mine, theirs in zip(ours, penalty(*own, LAYERS[layer]), strict=True):
            torch.testing.assert_close(mine[i], torch.zeros_like(mine[i]) if theirs is None else theirs)


# -- what raises


RAISING: dict[str, Layer] = {
    "an operation after": lambda x, w, b: hidden(x, w, b).sin(),
    "an operation before": lambda x, w, b: hidden(x.sin(), w, b),
    "beside": lambda x, w, b: hidden(x, w, b) + x + w,
    "a sum of both ways": lambda x, w, b: (h := hidden(x, w, b)).exp() + F.linear(h, w) * w,
    "twice the same": lambda x, w, b: (h := F.relu(x)) * h,
    "a list": lambda x, w, b: torch.cat([F.relu(x), hidden(x, w, b), w]),
    "by keyword": lambda x, w, b: torch.add(F.relu(x), other=F.relu(w)),
    "a view": lambda x, w, b: F.relu(x).view(-1)[::2] * 2,
    "a property": lambda x, w, b: F.relu(x).T @ w.mT,
    "in place": lambda x, w, b: F.linear(x, w, b).mul_(w).add_(1),
    "through a view": lambda x, w, b: (h := F.linear(x, w))[0].zero_() * 0 + h,
    "a function of Python": lambda x, w, b: F.normalize(F.relu(x) + 1) + F.gumbel_softmax(w, dim=0).detach() * 0,
    "by einsum": lambda x, w, b: torch.einsum("ij,kj->ik", F.relu(x), w),
    "a type": lambda x, w, b: F.relu(x).float().double() + w.to(torch.float64),
    "a part": lambda x, w, b: F.relu(x)[1:] + b,
    "detached": lambda x, w, b: F.relu(x) * F.relu(x).detach(),
    "a number less": lambda x, w, b: 1 - F.relu(x),
}


@pytest.mark.parametrize("name", RAISING)
def test_operations_raise(name: str) -> None:
    check(RAISING[name], *given(), randomness="different")
    assert RAISING[name] not in lowering.raised


def test_a_shape_is_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(lowering, "raise_", raised.append)

    def look(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = F.relu(x)
        assert h.shape == (4, 4) == tuple(h.size()) and h.dim() == h.ndim == len(w.shape) and len(h) == 4
        assert h.dtype is torch.float64 and h.device.type == "cpu" and h.is_floating_point() and h.is_contiguous()
        assert h.requires_grad and x.requires_grad and w.stride() == (4, 1) and torch.is_floating_point(h)
        return F.linear(h, w, b)

    check(look, *given())
    assert not raised


def test_without_gradients_values_are_read() -> None:
    def watched(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        out = hidden(x, w, b)
        with torch.no_grad():
            norm = (w * w).sum() + out.max()
            again = F.linear(out, w)
        return out, norm, again

    check(watched, *given())
    assert watched not in lowering.raised


def test_written_without_gradients() -> None:
    def decayed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            w.mul_(0.9)
        return F.linear(x, w)

    x, w = numbers(3, 4, 4, grad=False), numbers(3, 4, 4, seed=1)
    before = w.detach().clone()
    out = memberwise.vmap(decayed)(x, w)
    torch.testing.assert_close(w.detach(), before * 0.9)
    out.sum().backward()
    torch.testing.assert_close(w.grad, torch.ones(3, 4, 4, dtype=torch.float64) @ x)


def test_a_layer_notices_what_is_written_to_its_argument() -> None:
    def spoilt(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.relu(x)
        out = F.linear(h, w)
        h.mul_(2)
        return out

    x, w = numbers(3, 4, 4), numbers(3, 4, 4, seed=1)
    for out in (spoilt(x[0], w[0]), memberwise.vmap(spoilt)(x, w)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# -- what undoes the call


def hook(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = hidden(x, w, b)
    out = F.linear(h, w)
    h.register_hook(lambda grad: grad * 2)
    return out


def hook_of_a_leaf(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    w.register_hook(lambda grad: grad * 2)
    return hidden(x, w, b)


def inner_grad(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = hidden(x, w, b).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    return grad.square().sum() + out


def inner_grad_of_raised(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = hidden(x, w, b)
    later = F.linear(h, w).sin() + h.cos()
    (grad,) = torch.autograd.grad(later.sum(), h, create_graph=True, allow_unused=True)
    return grad * h


def node(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = hidden(x, w, b)
    assert h.grad_fn is not None and not h.is_leaf
    return h


def transform(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = hidden(x, w, b)
    return torch.func.grad(lambda own: (own * h).sin().sum())(w) + h


def unseen(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h = hidden(x, w, b)
    with torch._C.DisableTorchFunctionSubclass():
        return h * w


def nested(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return memberwise.vmap(lambda row, own: F.relu(F.linear(row, w)) * own)(F.relu(x), w)


def nested_in_torch(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row, own: F.relu(F.linear(row, w)) * own)(F.relu(x), w)


UNDOING: list[Layer] = [
    hook, hook_of_a_leaf, inner_grad, inner_grad_of_raised, node, transform, unseen, nested, nested_in_torch
]  # fmt: skip


@pytest.mark.parametrize("func", UNDOING)
def test_graphs_inside_are_those_of_a_lone_run(func: Layer) -> None:
    check(func, *given())
    check(func, *given())  # as it is remembered


def test_it_is_remembered_for_the_function_alone() -> None:
    stack = memberwise.stack([nn.Linear(4, 4) for _ in range(3)])
    x = numbers(5, 4, grad=False).float()
    calls = []

    def watching(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = model(x)
        out.register_hook(lambda grad: grad)
        return out

    for _ in range(2):
        memberwise.vmap(watching, in_dims=(0, None))(stack, x).sum().backward()
    assert len(calls) == 3  # twice the first time
    assert watching in stack._slots.raised
    assert "_Below" in type(stack(x).grad_fn).__name__


def test_buffers_and_streams_are_put_back_first() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            out = F.dropout(self.layer(x), 0.5)
            out.retain_grad()
            return out

    torch.manual_seed(0)
    models = [Noisy() for _ in range(3)]
    stack = memberwise.stack(models)
    x = numbers(5, 4, grad=False).float()
    stack.generators = [torch.Generator().manual_seed(i) for i in range(3)]
    out = stack(x)
    out.sum().backward()
    for i, model in enumerate(models):
        torch.manual_seed(i)
        alone = model(x)
        alone.sum().backward()
        torch.testing.assert_close(out[i], alone)
        torch.testing.assert_close(stack[i].layer.weight.grad, model.layer.weight.grad)
    assert stack.state_dict()["count"].tolist() == [1.0, 1.0, 1.0]


def test_backward_inside() -> None:
    stack = memberwise.stack([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    x = numbers(5, 4, grad=False).float()

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss = F.mse_loss(model(x), x)
        loss.backward()
        return loss.detach()

    losses = memberwise.vmap(step, in_dims=(0, None))(stack, x)
    grads = [p.grad for p in stack.parameters()]
    assert all(type(grad) is torch.Tensor for grad in grads)
    for i, model in enumerate(stack.unstack()):
        loss = F.mse_loss(model(x), x)
        torch.testing.assert_close(losses[i], loss.detach())
        for grad, own in zip(grads, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            torch.testing.assert_close(grad[i], own)


class Same(torch.autograd.Function):
    """Hands on what it is given; its gradient is doubled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class Product(torch.autograd.Function):
    """Runs a layer without gradients, and gives the gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w, grad.mT @ x


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("function", [Same, Product])
def test_functions(function: Any, noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's Function raises its arguments; what torch's own does with them is seen, and undone."""
    if not noted:
        monkeypatch.setattr("memberwise.engine.again.users_functions", lambda: False)

    def func(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = hidden(x, w, b)
        return F.relu(function.apply(h) if function is Same else function.apply(h, w))

    check(func, *given())
    assert (func in lowering.raised) is not noted


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_raise_what_they_keep(reentrant: bool) -> None:
    def func(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.relu(checkpoint(hidden, F.relu(x), w, b, use_reentrant=reentrant))

    check(func, *given())
    assert func not in lowering.raised


def test_full_backward_hooks() -> None:
    seen = []
    stack = memberwise.stack([nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)])
    stack._template[2].register_full_backward_hook(lambda module, inside, outside: seen.append(outside[0].shape))
    x = numbers(5, 4, grad=False).float()
    stack(x).square().sum().backward()
    assert seen == [(5, 2)]
    for i, model in enumerate(stack.unstack()):
        model.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(stack[i][0].weight.grad, model[0].weight.grad)


# -- what goes wrong


def test_errors_are_the_lone_ones_and_not_remembered() -> None:
    def wrong(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        hidden(x, w, b)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        memberwise.vmap(wrong)(*given())
    assert wrong not in lowering.raised


def test_what_is_kept_from_a_call_tells_so() -> None:
    kept = []

    def leaky(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kept.append(hidden(x, w, b))
        return F.relu(kept[-1])

    memberwise.vmap(leaky)(*given())
    with pytest.raises(EngineError, match="MW208"):
        kept[0].register_hook(print)
    assert kept[0].sin().requires_grad


def test_no_graph_stays() -> None:
    memberwise.vmap(RAISING["beside"])(*given()).sum().backward()
    gc.collect()
    before = len([one for one in gc.get_objects() if type(one).__name__ == "_RaiseBackward"])
    for _ in range(3):
        memberwise.vmap(RAISING["beside"])(*given())
    assert len([one for one in gc.get_objects() if type(one).__name__ == "_RaiseBackward"]) == before


def test_a_second_derivative_notices_what_was_written() -> None:
    """The first does not need the input of cross entropy, and runs; for the second the layer is run again."""
    labels = torch.tensor([0, 3, 2, 1])

    def func(x: torch.Tensor) -> Any:
        own = x * 1
        loss = F.cross_entropy(own, labels)
        own.zero_()
        return loss

    check(func, numbers(3, 4, 5))
    x = numbers(3, 4, 5)
    with pytest.raises(EngineError, match="argument 0 has been modified by an inplace operation"):
        torch.autograd.grad(memberwise.vmap(func)(x).sum(), x, create_graph=True)
