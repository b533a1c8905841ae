"""One random history of a stack: what modules go through, next to a list of models that goes through the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import torch
from torch import nn

import memberwise
from memberwise import each
from memberwise.testing.tolerance import assert_equal

RIGHT, WRONG = "right", "wrong"
Pair = tuple[memberwise.Stack, list[Any]]


@dataclass(frozen=True)
class History:
    """What a stack goes through.

    Attributes:
        size: how many members there are at first.
        actions: names of `ACTIONS`, each with a number from which it takes its choices.
        parts: whether the members' forward has a read in which they may differ.
    """

    size: int
    actions: tuple[tuple[str, int], ...]
    parts: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> History:
        return History(**{**document, "actions": tuple(map(tuple, document["actions"]))})


def drawn(random: Random, longest: int = 10) -> History:
    """A history; any order of actions is one."""
    names = [*ACTIONS]
    actions = [(random.choice(names), random.randint(0, 63)) for _ in range(random.randint(1, longest))]
    return History(random.randint(1, 4), tuple(actions), random.random() < 0.3)


class Model(nn.Module):
    """Parameters, statistics, a buffer that is assigned, an attribute that is carried, a child put in a list."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        first = nn.Linear(2, 3, bias=False)  # before a norm, a bias has a gradient that is nothing but rounding
        self.layers = nn.ModuleList([first, nn.Linear(3, 2)])
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.kept: Any = None
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.layers[0](x)).tanh()
        self.calls = self.calls + 1
        self.kept = hidden.detach() if self.kept is None else 0.5 * self.kept.to(x.dtype) + hidden.detach()
        if self.parts and self.layers[0].weight.detach().sum() > 0:
            hidden = hidden * 0.5
        return self.layers[1](hidden + self.kept)


def made(count: int, parts: bool) -> list[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(count)
        return [Model(parts).double() for _ in range(count)]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dtype_of(models: list[Any]) -> torch.dtype:
    return models[0].layers[0].weight.dtype


# -- what may happen to both


def call(pair: Pair, seed: int) -> Pair:
    """Forward and backward on a shared input."""
    stack, models = pair
    x = numbers(seed, 4, 2).to(dtype_of(models))
    out = stack(x)
    out.square().sum().backward()
    for i, model in enumerate(models):
        own = model(x)
        own.square().sum().backward()
        assert_equal(out[i].detach(), own.detach(), "output")
    return pair


def call_each(pair: Pair, seed: int) -> Pair:
    """Forward alone, on an input of each member's own."""
    stack, models = pair
    x = numbers(seed, len(models), 4, 2).to(dtype_of(models))
    with torch.no_grad():
        out = stack(each(x))
        for i, model in enumerate(models):
            assert_equal(out[i], model(x[i]), "output")
    return pair


def step(pair: Pair, seed: int) -> Pair:
    """A step along the gradients."""
    stack, models = pair
    for module in (stack, *models):
        torch.optim.SGD(module.parameters(), lr=0.01).step()
    return pair


def trained(pair: Pair, seed: int) -> Pair:
    """Two steps of training by one optimizer, which begins and ends here."""
    stack, models = pair
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9) for module in (stack, *models)]
    for k in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        call(pair, seed + k)
        for optimizer in optimizers:
            optimizer.step()
    return pair


def clear(pair: Pair, seed: int) -> Pair:
    stack, models = pair
    for module in (stack, *models):
        module.zero_grad()
    return pair


def select(pair: Pair, seed: int) -> Pair:
    """Some members, some of them twice."""
    stack, models = pair
    chosen = torch.randint(len(models), (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return stack.select(chosen), _twins(models, chosen)


def sliced(pair: Pair, seed: int) -> Pair:
    """All but the first, where there are several; every second one; or all of them."""
    stack, models = pair
    part = (slice(1, None), slice(None, None, 2), slice(None))[seed % 3] if len(models) > 1 else slice(None)
    return stack[part], _twins(models, [*range(len(models))][part])


def _twins(models: list[Any], chosen: list[int]) -> list[Any]:
    twins = []
    for i in chosen:
        twins.append(copy.deepcopy(models[i]))
        for p, q in zip(twins[-1].parameters(), models[i].parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
    return twins


def modes(pair: Pair, seed: int) -> Pair:
    """Training or evaluation mode of all members, or of some."""
    stack, models = pair
    mode, some = bool(seed & 1), [i for i in range(len(models)) if seed >> (i + 2) & 1]
    if seed & 2 or not some:
        stack.train(mode)
        some = [*range(len(models))]
    else:
        stack.train(mode, members=some)
    for i in some:
        models[i].train(mode)
    return pair


def frozen(pair: Pair, seed: int) -> Pair:
    """The first layer does not learn, or does again."""
    stack, models = pair
    for module in (stack, *models):
        module.layers[0].requires_grad_(bool(seed & 1))
    return pair


def cast(pair: Pair, seed: int) -> Pair:
    """To float32, and never back: what was rounded would be compared as if it were exact."""
    stack, models = pair
    for module in (stack, *models):
        module.to(torch.float32 if seed & 1 else dtype_of(models))
    return pair


def load(pair: Pair, seed: int) -> Pair:
    """The state of other members, by load_state_dict: copied, or taken over as it is."""
    stack, models = pair
    others = made(len(models), models[0].parts)
    for other in others:
        other.to(dtype_of(models))
    assign = bool(seed & 1)
    stack.load_state_dict(memberwise.stack(others).state_dict(), assign=assign)
    for model, other in zip(models, others, strict=True):
        model.load_state_dict(other.state_dict(), assign=assign)
    return clear(pair, seed) if assign else pair  # a new parameter has no gradient


def loaded_back(pair: Pair, seed: int) -> Pair:
    """What was saved, after a step away from it."""
    stack, models = pair
    saved = [copy.deepcopy(module.state_dict()) for module in (stack, *models)]
    trained(pair, seed)
    for module, state in zip((stack, *models), saved, strict=True):
        module.load_state_dict(state)
    return pair


def copied(pair: Pair, seed: int) -> Pair:
    """A deep copy (in which gradients are not), or a pickle (in which they are not either)."""
    stack, models = pair
    clear(pair, seed)
    return (copy.deepcopy(stack) if seed & 1 else pickle.loads(pickle.dumps(stack))), models


def restacked(pair: Pair, seed: int) -> Pair:
    """Taken apart and stacked again; members in different modes cannot be."""
    stack, models = pair
    if len({model.training for model in models}) > 1:
        return pair
    clear(pair, seed)
    return memberwise.stack(stack.unstack()), models


def member_call(pair: Pair, seed: int) -> Pair:
    """One live member runs, and is changed; it forgets what it leaves in attributes."""
    stack, models = pair
    i, x = seed % len(models), numbers(seed, 4, 2).to(dtype_of(models))
    kept = models[i].kept
    stack[i](x).square().sum().backward()
    models[i](x).square().sum().backward()
    models[i].kept = kept
    return pair


ACTIONS: dict[str, Callable[[Pair, int], Pair]] = {
    "call": call,
    "call each": call_each,
    "step": step,
    "train two steps": trained,
    "zero_grad": clear,
    "select": select,
    "slice": sliced,
    "train or eval": modes,
    "requires_grad_": frozen,
    "to": cast,
    "load_state_dict": load,
    "save, train, load": loaded_back,
    "deepcopy or pickle": copied,
    "unstack and stack": restacked,
    "call a member": member_call,
}


# -- the comparison


def same(pair: Pair) -> None:
    """Parameters, gradients, buffers, modes and carried attributes are the models'."""
    stack, models = pair
    assert len(stack) == len(models), "the number of members"
    for name, p in stack.named_parameters():
        own = [model.get_parameter(name) for model in models]
        assert [p.requires_grad] * len(own) == [q.requires_grad for q in own], f"{name} requires a gradient, or not"
        assert_equal(p.detach(), torch.stack([q.detach() for q in own]), name)
        grads = [torch.zeros_like(q) if q.grad is None else q.grad for q in own]
        assert_equal(torch.zeros_like(p) if p.grad is None else p.grad, torch.stack(grads), f"gradient of {name}")
    for name, buffer in stack.named_buffers():
        assert_equal(buffer, torch.stack([model.get_buffer(name) for model in models]), name)
    assert [member.training for member in stack] == [model.training for model in models], "the modes"
    if models[0].kept is not None:
        assert_equal(stack.kept, torch.stack([model.kept for model in models]), "attribute")


def check(history: History) -> None:
    """Go through it with both, and raise where they come apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memberwise.errors.StackWarning)
        models = made(history.size, history.parts)
        pair: Pair = memberwise.stack(models), models
        same(pair)
        for name, seed in history.actions:
            pair = ACTIONS[name](pair, seed)
            same(pair)
        same(call(pair, 1))
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pair[0].parameters()), "no gradient at all"


def compared(history: History) -> tuple[str, str]:
    """Whether it is right, and what is wrong; no action may be refused."""
    try:
        check(history)
    except Exception as error:
        return WRONG, f"{type(error).__name__}: {error}".split("\n\n")[0]
    return RIGHT, ""


def smaller(history: History) -> Iterator[History]:
    """Each a little less."""
    actions = history.actions
    for k in range(len(actions)):
        yield replace(history, actions=actions[:k] + actions[k + 1 :])
    for size in range(1, history.size):
        yield replace(history, size=size)
    if history.parts:
        yield replace(history, parts=False)
    for k, (name, seed) in enumerate(actions):
        for plainer in {0, 1, seed & 7}:
            if plainer < seed:
                yield replace(history, actions=(*actions[:k], (name, plainer), *actions[k + 1 :]))
