"""`select`: the chosen members go on as their lone runs would, with all that belongs to them."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any, Self

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from memberwise import optim
from memberwise.errors import ArgumentError
from memberwise.members import Memo, positions, select, take, take_streams
from memberwise.testing.tolerance import assert_equal
from tests.parity.lone_steps import ADAM, MEMBERS, SGD, SHAPES, backward_together, leaves, loss, own, starts

KINDS = {
    "SGD": (optim.SGD, torch.optim.SGD, SGD),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {**ADAM, "amsgrad": True}),
}


class Model:
    """A class that takes part: parameters, a buffer, and a random stream a member."""

    def __init__(
        self, params: dict[str, torch.Tensor], buffer: torch.Tensor, generators: list[torch.Generator]
    ) -> None:
        self.params, self.buffer, self.generators = params, buffer, generators

    def __len__(self) -> int:
        return len(self.buffer)

    def __select_members__(self, indices: torch.Tensor, memo: Memo) -> Self:
        params = {name: take(value, indices, memo) for name, value in self.params.items()}
        streams = take_streams(self.generators, indices, memo)
        return type(self)(params, take(self.buffer, indices, memo), streams)


def model(members: int = MEMBERS) -> Model:
    streams = [torch.Generator().manual_seed(i) for i in range(members)]
    return Model(leaves(starts(members)), torch.arange(members), streams)


# -- members go on as alone


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("keep", [[0, 2, 2], [4, 3, 2, 1, 0], [1], [-1, 0]])
@pytest.mark.parametrize("name", KINDS)
def test_chosen_members_go_on_as_their_lone_runs(name: str, keep: list[int], fused: bool | None) -> None:
    kind, lone, hyper = KINDS[name]
    net = model()
    optimizer = kind(list(net.params.values()), **hyper, fused=fused)
    scheduler = schedules.ExponentialLR(optimizer, 0.9)
    for step in range(4):
        train_together(net, optimizer, scheduler, step)
    net, optimizer, scheduler = select((net, optimizer, scheduler), keep)
    for step in range(4, 8):
        train_together(net, optimizer, scheduler, step)
    for place, member in enumerate(keep):
        alone = train_alone(lone, hyper, member % MEMBERS, 8)
        for key in SHAPES:
            assert_equal(net.params[key].detach()[place], alone[key].detach(), key)


def train_together(net: Model, optimizer: Any, scheduler: Any, step: int) -> None:
    optimizer.zero_grad()
    backward_together(net.params, step)
    optimizer.step()
    scheduler.step()


def train_alone(lone: Any, hyper: dict[str, Any], member: int, steps: int) -> dict[str, torch.Tensor]:
    params = leaves({key: value[member] for key, value in starts().items()})
    optimizer = lone(params.values(), **own(hyper, member))
    scheduler = schedules.ExponentialLR(optimizer, 0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss(params, step).backward()
        optimizer.step()
        scheduler.step()
    return params


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_new_optimizer_steps_the_new_parameters_in_whichever_order(order: tuple[int, int]) -> None:
    net = model()
    parts = (net, optim.AdamW(list(net.params.values()), lr=ADAM["lr"]))
    chosen = select([parts[i] for i in order], [0, 2])
    new, optimizer = chosen[order.index(0)], chosen[order.index(1)]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in new.params.values()]
    assert optimizer.members == 2
    for parameter in new.params.values():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.detach().clone() for key, value in net.params.items()}
    optimizer.step()
    for key, value in net.params.items():
        assert torch.equal(value.detach(), before[key])
        assert not torch.equal(new.params[key].detach(), before[key][[0, 2]])


def test_everything_an_optimizer_has_is_selected() -> None:
    weight, named = torch.zeros(3, 2, requires_grad=True), torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.AdamW(
        [{"params": [("weight", weight)], "betas": ([0.1, 0.2, 0.3], 0.9)}, {"params": [("b", named)], "eps": 0.5}],
        lr=[1.0, 2.0, 3.0],
        weight_decay=0.25,
    )
    weight.grad, named.grad = torch.ones_like(weight), torch.ones_like(named)
    optimizer.step()
    optimizer.state[weight]["step"][1] = 5
    schedules.ExponentialLR(optimizer, 0.5)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    new = select(optimizer, [2, 1])
    first, second = new.param_groups
    assert first["lr"].tolist() == [3.0, 2.0] and first["param_names"] == ["weight"]
    assert first["betas"][0].tolist() == [0.3, 0.2] and first["initial_lr"].tolist() == [3.0, 2.0]
    assert second["eps"] == 0.5 and second["weight_decay"] == 0.25
    assert new.state[first["params"][0]]["step"].tolist() == [1.0, 5.0]
    assert type(second["params"][0]) is torch.nn.Parameter
    assert new.defaults["lr"].tolist() == [3.0, 2.0] and new.members == 2
    new.add_param_group({"params": [("c", torch.zeros(2, requires_grad=True))]})
    assert new.param_groups[2]["lr"].tolist() == [3.0, 2.0]
    new.step()
    assert calls == ["post"]
    assert optimizer.members == 3 and optimizer.param_groups[0]["lr"].tolist() == [1.0, 2.0, 3.0]


def test_shared_parameters_stay_whole() -> None:
    shared = torch.nn.Parameter(torch.arange(4.0))
    shared._memberwise_shared = True
    own_ = torch.nn.Parameter(torch.arange(3.0))
    optimizer = optim.SGD([shared, own_], lr=0.1, momentum=0.9)
    shared.grad, own_.grad = torch.ones(4), torch.ones(3)
    optimizer.step()
    new = select(optimizer, [2, 0])
    trunk, rows = new.param_groups[0]["params"]
    assert torch.equal(trunk.detach(), shared.detach()) and trunk is not shared and trunk._memberwise_shared
    assert torch.equal(rows.detach(), own_.detach()[[2, 0]])
    assert torch.equal(new.state[trunk]["momentum_buffer"], torch.ones(4))
    before = shared.detach().clone()
    trunk.grad, rows.grad = torch.ones(4), torch.ones(2)
    new.step()
    assert torch.equal(shared.detach(), before) and not torch.equal(trunk.detach(), before)
    assert new.state[trunk]["step"].item() == 2 and optimizer.state[shared]["step"].item() == 1


# -- random streams


def test_streams_go_on_from_where_they_stand() -> None:
    streams = [torch.Generator().manual_seed(i) for i in range(3)]
    for stream in streams:
        torch.rand(2, generator=stream)
    state = {"streams": streams, "tuple": tuple(streams), "x": torch.zeros(3)}
    new = select(state, [1, 1, 0])
    draws = [torch.rand(3, generator=stream) for stream in new["streams"]]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], torch.rand(3, generator=streams[1]))
    assert isinstance(new["tuple"], tuple)
    assert all(a is b for a, b in zip(new["streams"], new["tuple"], strict=True))
    assert len({id(stream) for stream in new["streams"]}) == 3


def test_a_stream_held_twice_stays_one_stream() -> None:
    net = model()
    new, streams = select((net, net.generators), [3, 3])
    assert all(a is b for a, b in zip(new.generators, streams, strict=True))


# -- structures


@dataclasses.dataclass(frozen=True)
class Run:
    losses: torch.Tensor
    name: str
    parts: Any = dataclasses.field(default=None, init=False)


Pair = namedtuple("Pair", ["first", "second"])


def test_structures_keep_their_kind() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0])
    state = {
        "pair": Pair(scores, [scores]),
        "run": Run(scores, "digits"),
        "ordered": OrderedDict(b=scores, a=1),
        "default": defaultdict(list, x=[scores]),
        1: (None, True, 2, 0.5, "text", torch.float32, torch.tensor(7.0), len, torch.nn.ReLU),
    }
    new = select(state, [2, 0])
    picked = torch.tensor([3.0, 1.0])
    assert type(new["pair"]) is Pair and torch.equal(new["pair"].first, picked)
    assert new["pair"].first is new["pair"].second[0]  # one object stays one object
    assert type(new["run"]) is Run and torch.equal(new["run"].losses, picked) and new["run"].name == "digits"
    assert list(new["ordered"]) == ["b", "a"] and type(new["ordered"]) is OrderedDict
    assert new["default"]["missing"] == [] and torch.equal(new["default"]["x"][0], picked)
    assert new[1] == state[1] and new is not state
    assert scores.tolist() == [1.0, 2.0, 3.0]


def test_nothing_is_shared_with_the_old_state() -> None:
    net = model(3)
    net.params["w1"].grad = torch.ones_like(net.params["w1"])
    new = select(net, [0, 1, 2])
    for key, value in new.params.items():
        assert value.untyped_storage().data_ptr() != net.params[key].untyped_storage().data_ptr()
        assert value.is_leaf and value.requires_grad and torch.equal(value, net.params[key])
    new.params["w1"].grad.zero_()
    assert net.params["w1"].grad.all()


def test_gradients_travel_with_their_members() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    weight.note = "kept"
    new = select(weight, [2, 2, 0])
    assert new.grad.tolist() == [[3.0, 3.0], [3.0, 3.0], [1.0, 1.0]] and new.note == "kept"
    frozen = select(torch.nn.Parameter(torch.zeros(3), requires_grad=False), [0])
    assert type(frozen) is torch.nn.Parameter and not frozen.requires_grad


def test_a_tensor_with_a_history_keeps_it() -> None:
    """Losses that are selected before backward must not lose their gradient."""
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    losses = select({"losses": weight * weight}, [0, 2, 2])["losses"]
    losses.sum().backward()
    assert weight.grad.tolist() == [2.0, 0.0, 12.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1]).to(dtype)
    assert torch.equal(select(values, [1, 0]), torch.tensor([1, 0]).to(dtype))


# -- indices


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 2, 2], [0, 2, 2]),
        ((-1, 0), [3, 0]),
        (range(1, 3), [1, 2]),
        (iter([3]), [3]),
        (slice(None, None, 2), [0, 2]),
        (slice(1, None), [1, 2, 3]),
        (torch.tensor([1, -1]), [1, 3]),
        (torch.tensor([2], dtype=torch.int32), [2]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([False, True, False, False]), [1]),
        (torch.tensor([0.1, 0.9, 0.5, 0.7]).argsort(descending=True)[:2], [1, 3]),
    ],
)
def test_what_indices_may_be(indices: Any, expected: list[int]) -> None:
    assert select(torch.arange(4), indices).tolist() == expected


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 4, -5], r"expected members from 0 to 3, found \[4, -5\]"),
        ([], "expected at least one member, found none"),
        (slice(4, None), "expected at least one member"),
        ([False] * 4, "expected at least one member"),
        ([True, False], r"expected ints, or 4 bools, found \[True, False\]"),
        ([0.5], "expected ints, or 4 bools"),
        ([[0, 1]], "expected ints, or 4 bools"),
        (torch.tensor(2), "expected ints, or 4 bools"),
        (2, "expected ints, or 4 bools, found 2"),
        (["a"], "expected ints, or 4 bools"),
        (None, "expected ints, or 4 bools, found None"),
    ],
)
def test_indices_that_name_no_member(indices: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message + r".*\[MW410\]"):
        select(torch.arange(4), indices)


def test_positions_are_long_and_not_negative() -> None:
    assert positions([-1, 0], 3).dtype == torch.int64
    assert positions([-3, -1], 3).tolist() == [0, 2]


# -- what cannot be selected


def test_parts_of_another_size_are_listed_with_their_paths() -> None:
    net = model(3)
    state = {
        "net": net,
        "x": torch.zeros(64, 2),
        "logs": [torch.zeros(3), torch.zeros(4)],
        "streams": net.generators[:2],
    }
    with pytest.raises(ArgumentError) as caught:
        select(state, [0])
    message = str(caught.value)
    assert "expected 3 members everywhere, as state['net'] has" in message and "[MW411]" in message
    for part in ("state['x'] has 64", "state['logs'][1] has 4", "state['streams'] has 2"):
        assert part in message


def test_a_schedulers_parts_are_named() -> None:
    optimizer = optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    scheduler = schedules.ExponentialLR(optimizer, 0.9)
    with pytest.raises(ArgumentError, match=r"as state\[1\].optimizer has, found: state\[0\] has 5"):
        select((torch.zeros(5), scheduler), [0])


@pytest.mark.parametrize("part", [object(), torch.nn.Linear(2, 2), {1, 2}, torch.optim.SGD([torch.zeros(3)])])
def test_a_class_that_takes_no_part_is_named(part: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"state\['part'\]: .*found {type(part).__name__}.*\[MW411\]"):
        select({"x": torch.zeros(3), "part": part}, [0])


def test_a_scheduler_of_torchs_own_optimizer_is_refused() -> None:
    """Else the answer's scheduler would drive the old optimizer."""
    scheduler = schedules.ExponentialLR(torch.optim.SGD([torch.zeros(3)], lr=0.1), 0.9)
    with pytest.raises(ArgumentError, match=r"state\[1\].optimizer: expected something that has members, found SGD"):
        select((torch.zeros(3), scheduler), [0])


def test_a_state_without_members_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"found nothing.*\[MW411\]"):
        select({"epoch": 3}, [0])


# -- schedulers


@pytest.mark.filterwarnings("ignore:Seems like")  # torch's, on a scheduler's second step with another optimizer
@pytest.mark.parametrize("given", ["one rate", "rates"])
def test_schedulers_of_schedulers_drive_the_new_optimizer(given: str) -> None:
    lr = 0.1 if given == "one rate" else [0.1, 0.2, 0.3]

    def make() -> tuple[Any, Any]:
        optimizer = optim.SGD([torch.zeros(3, 2, requires_grad=True)], lr=lr)
        parts = [schedules.LinearLR(optimizer, 0.1, 1.0, 2), schedules.LambdaLR(optimizer, lambda e: 0.5**e)]
        return optimizer, schedules.SequentialLR(optimizer, parts, [2])

    (optimizer, scheduler), (twin, its_scheduler) = make(), make()
    for each in (optimizer, scheduler, twin, its_scheduler):
        each.step()
    new, driver = select((optimizer, scheduler), [2, 0, 2])
    assert driver.optimizer is new and all(part.optimizer is new for part in driver._schedulers)
    before = torch.as_tensor(optimizer.param_groups[0]["lr"]).clone()
    for _ in range(4):
        for each in (new, driver, twin, its_scheduler):
            each.step()
        rates = torch.as_tensor(twin.param_groups[0]["lr"]).expand(3)[[2, 0, 2]]
        assert torch.allclose(torch.as_tensor(new.param_groups[0]["lr"]).expand(3), rates, rtol=1e-12)
    assert torch.equal(torch.as_tensor(optimizer.param_groups[0]["lr"]), before)


def test_a_selected_scheduler_does_not_warn() -> None:
    optimizer = optim.SGD([torch.zeros(3, requires_grad=True)], lr=[0.1, 0.2, 0.3])
    scheduler = schedules.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, scheduler = select((optimizer, scheduler), [0, 1])
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0].tolist() == pytest.approx([0.001, 0.002])
