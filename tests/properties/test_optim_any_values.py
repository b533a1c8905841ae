"""Any hyperparameters, any grouping of members, any order of events: each member as its lone run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memberwise import optim
from memberwise.members import select
from memberwise.optim.runs import split
from memberwise.testing.tolerance import assert_equal

RATES = st.sampled_from([0.0, 0.01, 0.1])
BETAS = st.sampled_from([0.5, 0.9])
MOMENTA = st.sampled_from([0.0, 0.5, 0.9])


def values(one: st.SearchStrategy[float], members: int) -> st.SearchStrategy[Any]:
    """One value, or one a member."""
    return st.one_of(one, st.lists(one, min_size=members, max_size=members))


@st.composite
def adams(draw: st.DrawFn, members: int) -> dict[str, Any]:
    return {
        "lr": draw(values(RATES, members)),
        "betas": (draw(values(BETAS, members)), draw(values(BETAS, members))),
        "eps": draw(values(st.sampled_from([1e-8, 1e-3]), members)),
        "weight_decay": draw(values(RATES, members)),
    }


@st.composite
def sgds(draw: st.DrawFn, members: int) -> dict[str, Any]:
    return {
        "lr": draw(values(RATES, members)),
        "momentum": draw(values(MOMENTA, members)),
        "dampening": draw(values(MOMENTA, members)),
        "weight_decay": draw(values(RATES, members)),
    }


def of(value: Any, member: int) -> Any:
    if isinstance(value, tuple):
        return tuple(of(item, member) for item in value)
    return value[member] if isinstance(value, list) else value


PAIRS = [
    (optim.AdamW, torch.optim.AdamW, adams),
    (optim.Adam, torch.optim.Adam, adams),
    (optim.SGD, torch.optim.SGD, sgds),
]


@st.composite
def stories(draw: st.DrawFn) -> tuple[Any, ...]:
    """An optimizer, and what happens to it: steps, values set, members selected."""
    kind, lone, hypers = draw(st.sampled_from(PAIRS))
    members = draw(st.integers(1, 4))
    hyper = draw(hypers(members))
    events: list[tuple[str, Any]] = []
    count = members
    for _ in range(draw(st.integers(2, 7))):
        event = draw(st.sampled_from(["step", "step", "partial", "set", "select", "load"]))
        if event == "set":
            events.append((event, draw(hypers(count))))
        elif event == "select":
            chosen = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
            events.append((event, chosen))
            count = len(chosen)
        else:
            events.append((event, draw(st.integers(0, 1000))))
    return kind, lone, members, hyper, events, draw(st.sampled_from([None, False]))


@settings(max_examples=60, deadline=None)
@given(stories())
def test_whatever_happens_each_member_is_as_its_lone_run(story: tuple[Any, ...]) -> None:
    kind, lone, members, hyper, events, fused = story
    start = torch.linspace(-1, 1, members * 3, dtype=torch.float64).view(members, 3)
    stacked = [start.clone().requires_grad_(), start.clone().requires_grad_()]
    optimizer = kind(stacked, **hyper, fused=fused)
    alone = [[row.clone().requires_grad_(), row.clone().requires_grad_()] for row in start]
    loops = [lone(params, **{name: of(value, i) for name, value in hyper.items()}) for i, params in enumerate(alone)]
    for event, value in events:
        if event in ("step", "partial"):
            step(stacked, optimizer, alone, loops, value, only_first=event == "partial")
        elif event == "set":
            optimizer.param_groups[0].update(value)
            for i, loop in enumerate(loops):
                loop.param_groups[0].update({name: of(x, i) for name, x in value.items()})
        elif event == "select":
            optimizer = select(optimizer, value)
            stacked = optimizer.param_groups[0]["params"]
            alone, loops = copies(lone, alone, loops, value)
        else:
            saved = optimizer.state_dict()
            optimizer = kind(stacked, lr=5.0, fused=fused)
            optimizer.load_state_dict(saved)
        for place in (0, 1):
            expected = torch.stack([params[place].detach() for params in alone])
            assert_equal(stacked[place].detach(), expected, f"{event} {value}")


def step(stacked: Any, optimizer: Any, alone: Any, loops: Any, seed: int, only_first: bool) -> None:
    """Both take a step; `only_first` leaves the second parameter without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for place, parameter in enumerate(stacked):
        grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        without = only_first and place == 1
        parameter.grad = None if without else grad
        for params, row in zip(alone, grad, strict=True):
            params[place].grad = None if without else row.clone()
    for each in (optimizer, *loops):
        each.step()


def copies(lone: Any, alone: Any, loops: Any, chosen: list[int]) -> tuple[Any, Any]:
    """Lone runs that go on from the chosen ones."""
    new_alone, new_loops = [], []
    for member in chosen:
        params = [parameter.detach().clone().requires_grad_() for parameter in alone[member]]
        loop = lone(params, lr=1.0)
        loop.load_state_dict(copy.deepcopy(loops[member].state_dict()))  # torch would share its tensors
        new_alone.append(params)
        new_loops.append(loop)
    return new_alone, new_loops


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([0.0, 0.9])), min_size=1, max_size=8))
def test_runs_deal_every_member_to_the_call_with_its_values(rows: list[tuple[float, float]]) -> None:
    layout, calls = split({"lr": [row[0] for row in rows], "momentum": [row[1] for row in rows]})
    members = torch.arange(len(rows))
    hands = layout.deal([layout.cut(members)], len(calls))
    dealt = [torch.cat(hand).tolist() for hand in hands]
    assert sorted(member for hand in dealt for member in hand) == members.tolist()
    for call, hand in zip(calls, dealt, strict=True):
        assert call.first == hand[0]
        assert all(rows[member] == (call.values["lr"], call.values["momentum"]) for member in hand)
    assert len(calls) == len(set(rows))


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    st.floats(1e-2, 10.0),
    st.sampled_from([1.0, 2.0, float("inf")]),
)
def test_no_member_exceeds_its_limit_and_none_is_turned(sizes: list[float], limit: float, norm_type: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(len(sizes), *shape, generator=generator, dtype=torch.float64)
        * torch.tensor(sizes, dtype=torch.float64).view(-1, *[1] * len(shape))
        for shape in [(3,), (2, 2), ()]
    ]
    parameters = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    norms = optim.clip_grad_norm_(parameters, limit, norm_type)
    for i in range(len(sizes)):
        before = torch.cat([grad[i].flatten() for grad in grads])
        after = torch.cat([parameter.grad[i].flatten() for parameter in parameters])
        assert after.norm(norm_type) <= limit * (1 + 1e-9) or torch.equal(after, before)
        factor = (after @ before) / (before @ before)
        assert_equal(after, before * factor)
        assert_equal(norms[i], before.norm(norm_type))
