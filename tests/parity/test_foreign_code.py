"""What other people's architectures do, each at its smallest: found by `make check-third-party`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal

MEMBERS = 3


def members(make: Callable[[], nn.Module]) -> list[nn.Module]:
    models = []
    for i in range(MEMBERS):
        torch.manual_seed(i)
        models.append(make().double())
    return models


def check(make: Callable[[], nn.Module], x: torch.Tensor, run: Callable[..., Any] = lambda model, x: model(x)) -> None:
    """Two calls with their backward, of a stack and in a loop: outputs, gradients of parameters and inputs, buffers."""
    models = members(make)
    alone = copy.deepcopy(models)
    stack = memberwise.stack(models)
    for step in range(2):
        xs = (x + step).detach().requires_grad_()
        out = memberwise.vmap(run, (0, 0))(stack, xs)
        torch.cos(out).sum().backward()
        for i, model in enumerate(alone):
            own = (x[i] + step).detach().requires_grad_()
            theirs = run(model, own)
            torch.cos(theirs).sum().backward()
            assert_equal(out[i].detach(), theirs.detach(), f"member {i}, step {step}: output")
            assert_equal(xs.grad[i], own.grad, f"member {i}, step {step}: gradient of the input")
    for i, model in enumerate(alone):
        for name, parameter in model.named_parameters():
            assert_equal(stack.get_parameter(name).grad[i], parameter.grad, f"member {i}: gradient of {name}")
        for name, buffer in model.named_buffers():
            assert_equal(stack.get_buffer(name)[i], buffer, f"member {i}: {name}")


# -- Functions that keep a module for their backward, as adjoint methods do


class Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: nn.Module, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.net = net
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return net(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.net(x)
        return None, *torch.autograd.grad(out, (x, *parameters), grad)


class Implicit(nn.Module):
    """A net whose activations are computed anew in backward; `host`: members part ways in forward."""

    def __init__(self, host: bool = False, part: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.host, self.part = host, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = Adjoint.apply(self.net, x, *self.net.parameters())
        return out * 2 if self.host and out.sum().item() > 0 else out


@pytest.mark.parametrize("host", [False, True], ids=["together", "members part ways"])
def test_a_function_keeps_a_module_for_its_backward(host: bool) -> None:
    check(lambda: Implicit(host), torch.randn(MEMBERS, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("host", [False, True], ids=["together", "members part ways"])
def test_a_submodule_with_such_a_function(host: bool) -> None:
    check(lambda: nn.Sequential(nn.Linear(3, 3), Implicit(host)), torch.randn(MEMBERS, 2, 3, dtype=torch.float64))


def test_such_a_function_under_functional_call() -> None:
    models = members(Implicit)
    params, buffers = memberwise.stack_module_state(models)
    x = torch.randn(2, 3, dtype=torch.float64)

    def one(p: Any, b: Any, own: torch.Tensor) -> torch.Tensor:
        return memberwise.functional_call(models[0], (p, b), (own,))

    torch.cos(memberwise.vmap(one, (0, 0, None))(params, buffers, x)).sum().backward()
    for i, model in enumerate(models):
        model.zero_grad()
        torch.cos(model(x)).sum().backward()
        for name, parameter in model.named_parameters():
            assert_equal(params[name].grad[i], parameter.grad, f"member {i}: {name}")


# -- attributes


class Labelled(tuple[int, ...]):
    """Refuses to be measured, as e3nn's irreducible representations do."""

    def __len__(self) -> int:
        raise NotImplementedError


class WithLabel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.label = Labelled((1, 2))
        self.net = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_an_attribute_that_has_no_length() -> None:
    check(WithLabel, torch.randn(MEMBERS, 2, 3, dtype=torch.float64))


# -- objects that hold tensors: caches


class Cache:
    """As Hugging Face's: layers are made when they are written, and grow."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.seen = 0

    def update(self, number: int, keys: torch.Tensor) -> torch.Tensor:
        while len(self.layers) <= number:
            self.layers.append(Layer())
        return self.layers[number].update(keys)


class Layer:
    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], -2)
        return self.keys


class Attention(nn.Module):
    """One layer that writes into a cache, and parts ways if asked to."""

    def __init__(self, number: int, host: bool) -> None:
        super().__init__()
        self.number, self.host = number, host
        self.key, self.query = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cache: Cache, noted: list[torch.Tensor]) -> torch.Tensor:
        keys = cache.update(self.number, self.key(x))
        out = torch.softmax(self.query(x) @ keys.mT, -1) @ keys
        noted.append(out)
        return out * 2 if self.host and out.sum().item() > 0 else out


class Cached(nn.Module):
    def __init__(self, host: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(k, host and k == 0) for k in range(2))

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> Any:
        cache = cache or Cache()
        noted: list[torch.Tensor] = []
        for part in x.split(2, -2):
            for layer in self.layers:
                part = layer(part, cache, noted)
        return part, cache, noted


@pytest.mark.parametrize("way", ["together", "a layer parts ways", "all part ways", "in turns"])
def test_a_cache_comes_out(way: str) -> None:
    """Every tensor in it is stacked, and has its gradient, however the members ran."""
    models = members(lambda: Cached(way == "a layer parts ways"))
    x = torch.randn(MEMBERS, 3, 4, 4, dtype=torch.float64)
    stack = memberwise.stack(models)
    if way == "in turns":
        stack.train(False, members=[1])

    def run(model: Any, own: torch.Tensor) -> Any:
        out, cache, noted = model(own)
        return (out * 2 if way == "all part ways" and out.sum().item() > 0 else out), cache, noted

    out, cache, noted = memberwise.vmap(run, (0, 0))(stack, x)
    assert type(cache) is Cache
    results = [out, *noted, *(layer.keys for layer in cache.layers)]
    torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])
    for i, model in enumerate(models):
        own_out, own_cache, own_noted = run(model, x[i])
        own = [own_out, *own_noted, *(layer.keys for layer in own_cache.layers)]
        for ours, theirs in zip(results, own, strict=True):
            assert_equal(ours[i].detach(), theirs.detach(), f"member {i}")
        model.zero_grad()
        torch.autograd.backward(own, [torch.cos(result.detach()) for result in own])
        for name, parameter in model.named_parameters():
            assert_equal(stack.get_parameter(name).grad[i], parameter.grad, f"member {i}: gradient of {name}")


# -- memory


class Drops(nn.Module):
    """Draws in the order in which its input lies: channels last, as attention over an image leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.norm(x.mT.reshape(2, 4, 3, 5)), 0.5)


def test_group_norm_lies_as_alone() -> None:
    stack = memberwise.stack(members(Drops))
    stack.generators = [torch.Generator().manual_seed(i) for i in range(MEMBERS)]
    x = torch.randn(MEMBERS, 2, 15, 4, dtype=torch.float64)
    ours = stack(memberwise.each(x))
    for i, model in enumerate(stack.unstack()):
        torch.manual_seed(i)
        assert_equal(ours[i].detach(), model(x[i]).detach(), f"member {i}")


# -- state that is kept in lists and dicts


class Remembers(nn.Module):
    """As spiking networks do: the state of the last call is an entry of a dict, which is written in place."""

    def __init__(self, host: bool, memory: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.host = nn.Linear(3, 3), host
        self.memory = memory
        self.seen: list[torch.Tensor] = []
        self.calls = {"count": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory["state"] = self.memory["state"] * 0.5 + self.net(x)
        self.seen.append(self.memory["state"].detach())
        self.calls["count"] += 1
        out = self.memory["state"].clone()
        return out * 2 if self.host and out.sum().item() > 0 else out


class Pair(nn.Module):
    """Two layers with one memory."""

    def __init__(self, host: bool) -> None:
        super().__init__()
        memory = {"state": 0.0}
        self.one, self.two = Remembers(host, memory), Remembers(False, memory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)).sin()


@pytest.mark.parametrize("host", [False, True], ids=["together", "a layer parts ways"])
def test_state_in_lists_and_dicts(host: bool) -> None:
    """It is stacked between calls, each member has its own, a call that is undone leaves none, and objects stay."""
    models = members(lambda: Pair(host))
    stack = memberwise.stack(models)
    layer = stack.one
    memory, seen = layer.memory, layer.seen
    assert memory is stack.two.memory
    x = torch.randn(MEMBERS, 2, 3, dtype=torch.float64)
    for step in range(3):
        ours = memberwise.vmap(lambda model, own: model(own), (0, 0))(stack, x)
        for i, model in enumerate(models):
            assert_equal(ours[i].detach(), model(x[i]).detach(), f"member {i}, step {step}")
    if not host:
        assert layer.memory is memory and layer.seen is seen
    assert layer.memory["state"].shape == (MEMBERS, 2, 3) and layer.calls == {"count": 3}
    assert [entry.shape for entry in layer.seen] == [(MEMBERS, 2, 3)] * 3
    for i, model in enumerate(stack.unstack()):
        assert_equal(model.two.memory["state"].detach(), models[i].two.memory["state"].detach(), f"member {i}")
        assert_equal(model(x[i]).detach(), models[i](x[i]).detach(), f"member {i}, unstacked")


# -- memory that is replaced


class SetsItself(nn.Module):
    """As activation norms do: the first call sets parameters and a flag from its data."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.shift.data = -x.detach().mean(0)
            self.ready.data = torch.tensor(True)
        return x + self.shift


@pytest.mark.parametrize("inner", [False, True], ids=["alone", "a layer"])
def test_parameters_are_set_through_data(inner: bool) -> None:
    make = (lambda: nn.Sequential(nn.Linear(3, 3), SetsItself())) if inner else SetsItself
    check(make, torch.randn(MEMBERS, 4, 3, dtype=torch.float64))


# -- hooks that a forward registers


class Collects(nn.Module):
    """As Hugging Face's models do: the first call registers hooks, and notes in an attribute that it did."""

    def __init__(self, host: bool) -> None:
        super().__init__()
        self.gate, self.last, self.host = nn.Linear(3, 3), Implicit(host), host
        self.noted: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> Any:
        if not hasattr(self, "hooked"):
            self.hooked = True
            self.gate.register_forward_hook(lambda module, args, out: module.collected.append(out))
        self.gate.collected = []
        x = self.last(self.gate(x))
        return x + sum(self.gate.collected)


@pytest.mark.parametrize("way", ["a layer parts ways", "all part ways"])
def test_hooks_registered_in_a_call_that_is_undone(way: str) -> None:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        return out * 2 if way == "all part ways" and out.sum().item() > 0 else out

    check(lambda: Collects(way == "a layer parts ways"), torch.randn(MEMBERS, 2, 3, dtype=torch.float64), run)
