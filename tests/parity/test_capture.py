"""A captured training step is the eager one: 50 steps of each kind of model, with what users change on the way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise import optim
from memberwise.construction import build
from tests.parity import models
from tests.parity.twins import Twins

CLASSES = models.CLASSES


class CNN(nn.Module):
    """Convolution, BatchNorm, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, 1))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.features(x).flatten(1)))


class LSTM(nn.Module):
    """A recurrent classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


INPUTS: dict[str, tuple[type[nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp": (models.MLP, lambda: torch.randn(6, 7, dtype=torch.float64)),
    "cnn": (CNN, lambda: torch.randn(4, 2, 4, 4, dtype=torch.float64)),
    "transformer": (models.Transformer, lambda: torch.randint(0, CLASSES, (2, models.STEPS))),
    "lstm": (LSTM, lambda: torch.randn(4, 4, 3, dtype=torch.float64)),
}
KINDS = [pytest.param(kind, marks=pytest.mark.long) if kind == "transformer" else kind for kind in INPUTS]
"""For tests of ways to run a step: of a transformer, fifty steps and chunks are looked at in any case."""


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Cross entropy against labels made of the inputs."""
    out = model(x)
    labels = torch.arange(out[..., 0].numel()) % CLASSES
    return nn.functional.cross_entropy(out.reshape(-1, CLASSES), labels)


def training(kind: str, optimizer: str, *, members: int = 3, seeded: bool = True) -> SimpleNamespace:
    """A world that trains a stack: zero_grad, forward, backward, clipping, optimizer."""
    stack = build(INPUTS[kind][0], seeds=range(members), dtype=torch.float64)
    if not seeded:
        stack.generators = None
    lr = [0.01 / (1 + member) for member in range(members)]
    opt = {
        "adamw": lambda: optim.AdamW(stack.parameters(), lr=lr, weight_decay=0.01),
        "adam": lambda: optim.Adam(stack.parameters(), lr=lr, amsgrad=True),
        "sgd": lambda: optim.SGD(stack.parameters(), lr=lr, momentum=0.9, nesterov=True),
        "plain sgd": lambda: optim.SGD(stack.parameters(), lr=lr),
    }[optimizer]()
    scale = 1.0

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        opt.zero_grad()
        losses = memberwise.vmap(loss_fn, (0, None), randomness="different")(stack, x) * scale
        losses.sum().backward()
        norms = optim.clip_grad_norm_(stack.parameters(), 0.5)
        opt.step()
        return {"losses": losses, "norms": norms}

    def rescale(value: float) -> None:
        nonlocal scale
        scale = value

    return SimpleNamespace(step=step, stack=stack, opt=opt, rescale=rescale)


def check(kind: str, world: Callable[[], SimpleNamespace], steps: int = 50, backend: str = "fx") -> Twins:
    """Train both worlds and compare after each step; all but the first calls are replays."""
    twins = Twins(world, exact=False, backend=backend)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        torch.manual_seed(int(torch.randint(0, 10**6, (1,), generator=generator)))
        twins.call(INPUTS[kind][1]())
    assert twins.captured.replayed >= steps - 2, [refusal.sentence() for refusal in twins.captured.refusals]
    return twins


@pytest.mark.parametrize("kind", INPUTS)
def test_fifty_steps(kind: str) -> None:
    check(kind, lambda: training(kind, "adamw"))


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "plain sgd"])
def test_each_optimizer(optimizer: str) -> None:
    check("mlp", lambda: training("mlp", optimizer), steps=10)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_without_seeds(kind: str) -> None:
    check(kind, lambda: training(kind, "sgd", seeded=False), steps=10)


def _set_lr(value: Any) -> Callable[[SimpleNamespace], None]:
    return lambda world: world.opt.param_groups[0].update(lr=value)


CHANGES: dict[str, tuple[Callable[[SimpleNamespace], Any], bool]] = {
    "lr": (_set_lr(0.05), True),
    "lr of each": (_set_lr([0.0, 0.1, 0.02]), True),
    "weight decay": (lambda world: world.opt.param_groups[0].update(weight_decay=0.3), True),
    "betas": (lambda world: world.opt.param_groups[0].update(betas=(0.5, 0.6)), True),
    "lr in place": (lambda world: world.opt.param_groups[0]["lr"].mul_(3), True),
    "maximize": (lambda world: world.opt.param_groups[0].update(maximize=True), False),
    "closure scalar": (lambda world: world.rescale(-2.0), False),
    "dropout rate": (lambda world: setattr(world.stack.layers[2], "p", 0.9), False),
    "eval": (lambda world: world.stack.eval(), False),
    "eval of one": (lambda world: world.stack.eval(members=[1]), False),
    "frozen": (lambda world: world.stack.layers[0].weight.requires_grad_(False), False),
    "weights loaded": (lambda world: world.stack.load_state_dict(_zeros(world.stack)), True),
    "state loaded": (lambda world: world.opt.load_state_dict(world.opt.state_dict()), False),
    "a member's weights": (lambda world: nn.init.ones_(world.stack[1].layers[0].weight), True),
    "streams": (lambda world: [generator.manual_seed(9) for generator in world.stack.generators], True),
    "other streams": (lambda world: setattr(world.stack, "generators", None), False),
}


def _zeros(stack: nn.Module) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in stack.state_dict().items()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_training_counts_in_the_next_step(name: str) -> None:
    change, replays = CHANGES[name]
    twins = check("mlp", lambda: training("mlp", "adamw"), steps=4)
    x = INPUTS["mlp"][1]()
    twins.call(x)
    before = twins.captured.replayed
    twins.both(change)
    twins.call(x)
    assert (twins.captured.replayed > before) == replays
    if name != "eval of one":  # members in different modes: the engine compares values on the host, and stays eager
        twins.settle(x)


def test_another_dtype_and_back() -> None:
    twins = check("mlp", lambda: training("mlp", "plain sgd"), steps=4)
    x = INPUTS["mlp"][1]()
    for cast in ("float", "double"):
        twins.both(lambda world, cast=cast: getattr(world.stack, cast)().load_state_dict(_zeros(world.stack)))
        for _ in range(3):
            twins.call(getattr(x, cast)())


def test_the_compiler_computes_what_the_recording_says() -> None:
    """The one compilation of the quick suite; all kinds of models are compiled by `check_capture.py`."""

    def make() -> SimpleNamespace:
        net = lambda: nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))  # noqa: E731 # a factory
        stack = build(net, seeds=range(3), dtype=torch.float64)
        opt = optim.SGD(stack.parameters(), lr=[0.1, 0.2, 0.3])

        def step(x: torch.Tensor) -> torch.Tensor:
            opt.zero_grad()
            losses = stack(x).pow(2).mean((1, 2))
            losses.sum().backward()
            opt.step()
            return losses

        return SimpleNamespace(step=step, stack=stack, opt=opt)

    twins = check("mlp", make, steps=8, backend="inductor")
    twins.both(_set_lr(0.01))
    twins.call(INPUTS["mlp"][1]())
    assert twins.captured.plans[0].startswith("all at once")


def test_a_schedule_records_nothing_anew() -> None:
    def make() -> SimpleNamespace:
        world = training("mlp", "sgd")
        world.schedule = torch.optim.lr_scheduler.OneCycleLR(world.opt, max_lr=0.1, total_steps=20)
        return world

    twins = Twins(make, exact=False)
    for _ in range(12):
        twins.call(INPUTS["mlp"][1]())
        twins.both(lambda world: world.schedule.step())
    assert twins.captured.recorded <= 3
    assert twins.captured.replayed >= 9


def test_other_members() -> None:
    """Members chosen anew: another stack and optimizer, and another M; each is recorded, none is confused."""
    world = training("mlp", "adamw", members=4)
    stacks = {4: (world.stack, world.opt)}

    def step(stack: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        losses = memberwise.vmap(loss_fn, (0, None))(stack, x)
        losses.sum().backward()
        opt.step()
        return losses

    from memberwise.capture import compile

    captured = compile(step, backend="fx")
    from memberwise.members import select

    for members in (4, 4, 4, 2, 2, 2, 4, 2):
        if members not in stacks:
            stacks[members] = select((world.stack, world.opt), [3, 1])
        stack, opt = stacks[members]
        twin_stack, twin_opt = select((stack, opt), range(members))
        x = INPUTS["mlp"][1]()
        ours, theirs = captured(stack, opt, x), step(twin_stack, twin_opt, x)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)
        for a, b in zip(stack.parameters(), twin_stack.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert captured.captured.replayed >= 4


def test_evaluation_is_a_step_too() -> None:
    def make() -> SimpleNamespace:
        world = training("cnn", "sgd")
        world.stack.eval()
        train = world.step

        def step(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return world.stack(x).softmax(-1).mean(0)

        return SimpleNamespace(step=step, stack=world.stack, train=train)

    twins = Twins(make, exact=False)
    for k in range(5):
        twins.call(INPUTS["cnn"][1]())
        if k == 2:
            twins.both(lambda world: world.train(torch.ones(4, 2, 4, 4, dtype=torch.float64)))
    assert twins.captured.replayed >= 3


# -- steps of other shapes


def autocast() -> SimpleNamespace:
    world = training("mlp", "sgd")
    inner = world.step

    def step(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(x.float())

    world.stack.float()
    world.step = step
    return world


def own_inputs() -> SimpleNamespace:
    world = training("mlp", "sgd")

    def step(x: torch.Tensor) -> torch.Tensor:
        world.opt.zero_grad()
        out = world.stack(memberwise.each(torch.stack([x, 2 * x, -x])))
        losses = out.pow(2).mean((1, 2))
        losses.sum().backward()
        world.opt.step()
        return losses

    return SimpleNamespace(step=step, stack=world.stack, opt=world.opt)


def functional() -> SimpleNamespace:
    nets = [nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double() for _ in range(3)]
    params, buffers = memberwise.stack_module_state(nets)
    opt = optim.Adam(params.values(), lr=0.01)

    def one(p: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
        return memberwise.functional_call(nets[0], (p, b), (x,)).logsumexp(-1).mean()

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        losses = memberwise.vmap(one, (0, 0, None))(params, buffers, x)
        losses.sum().backward()
        opt.step()
        return losses

    return SimpleNamespace(step=step, params=params, buffers=buffers, opt=opt)


def gradients_inside() -> SimpleNamespace:
    """torch.func.grad for one member, and a hand-written update."""
    weight = torch.randn(3, 7, 4, dtype=torch.float64)
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x @ w).tanh().pow(2).mean()

    def step(x: torch.Tensor) -> torch.Tensor:
        grads, losses = memberwise.vmap(torch.func.grad_and_value(loss), (0, None))(weight, x)
        weight.sub_(lr[:, None, None] * grads)
        return losses

    return SimpleNamespace(step=step, weight=weight)


def checkpointed() -> SimpleNamespace:
    from torch.utils.checkpoint import checkpoint

    world = training("mlp", "sgd")

    def one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False).logsumexp(-1).mean()

    def step(x: torch.Tensor) -> torch.Tensor:
        world.opt.zero_grad()
        losses = memberwise.vmap(one, (0, None))(world.stack, x)
        losses.sum().backward()
        world.opt.step()
        return losses

    return SimpleNamespace(step=step, stack=world.stack, opt=world.opt)


def two_players() -> SimpleNamespace:
    makers = build(lambda: nn.Linear(4, 7), seeds=range(3), dtype=torch.float64)
    critics = build(lambda: nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.2), nn.Linear(5, 1)), seeds=range(3),
                    dtype=torch.float64)  # fmt: skip
    first, second = optim.Adam(makers.parameters(), lr=0.01), optim.Adam(critics.parameters(), lr=[0.1, 0.2, 0.3])

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        noise = torch.randn(6, 4, dtype=torch.float64)
        second.zero_grad()
        made = makers(noise)
        fooled = critics(memberwise.each(made.detach())).mean((1, 2)) - critics(x).mean((1, 2))
        fooled.sum().backward()
        second.step()
        first.zero_grad()
        seen = -critics(memberwise.each(makers(noise))).mean((1, 2))
        seen.sum().backward()
        first.step()
        return {"fooled": fooled, "seen": seen}

    return SimpleNamespace(step=step, makers=makers, critics=critics)


def average() -> SimpleNamespace:
    """A step that keeps an exponential average of the weights."""
    world = training("cnn", "sgd")
    kept = {name: p.detach().clone() for name, p in world.stack.named_parameters()}
    inner = world.step

    def step(x: torch.Tensor) -> Any:
        out = inner(x)
        with torch.no_grad():
            for name, parameter in world.stack.named_parameters():
                kept[name].lerp_(parameter, 0.1)
        return out

    return SimpleNamespace(step=step, stack=world.stack, kept=kept)


SHAPES = [autocast, own_inputs, functional, gradients_inside, checkpointed, two_players, average]


@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_steps_of_other_shapes(make: Callable[[], SimpleNamespace]) -> None:
    twins = Twins(make, exact=False)
    for _ in range(6):
        twins.call(INPUTS["cnn" if make is average else "mlp"][1]())
    assert twins.captured.replayed >= 4, [refusal.sentence() for refusal in twins.captured.refusals]


def test_torchs_adam_reads_its_counts_and_says_where() -> None:
    def make() -> SimpleNamespace:
        stack = build(lambda: nn.Linear(7, 2), seeds=range(3), dtype=torch.float64)
        opt = torch.optim.Adam(stack.parameters(), lr=0.01)

        def step(x: torch.Tensor) -> None:
            opt.zero_grad()
            stack(x).pow(2).sum().backward()
            opt.step()  # torch's own

        return SimpleNamespace(step=step, stack=stack)

    twins = Twins(make, exact=False)
    with pytest.warns(UserWarning, match=r"opt.step\(\)  # torch's own"):
        for _ in range(4):
            twins.call(INPUTS["mlp"][1]())


def test_recurrent_layers_are_recorded_as_operations_that_compilers_take() -> None:
    def make() -> SimpleNamespace:
        net = nn.LSTM(3, 5, batch_first=True)

        def step(x: torch.Tensor) -> torch.Tensor:
            net.zero_grad()
            loss = net(x)[0].pow(2).mean()
            loss.backward()
            return loss

        return SimpleNamespace(step=step, net=net)

    twins = Twins(make, exact=False)
    for _ in range(4):
        twins.call(torch.randn(4, 6, 3))
    names = {str(node.target) for node in twins.captured.programs[0].graph.graph.nodes}
    assert not any("rnn" in name for name in names), names
    assert torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available()
