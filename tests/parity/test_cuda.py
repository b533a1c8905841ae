"""What a GPU adds: streams of draws of its own, work that the CPU does not wait for, CPU numbers among its tensors.

These need a GPU, and are skipped without one. The rest of the suite runs on one as well: see `tests/elsewhere.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.testing.tolerance import assert_equal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")

GPU = torch.device("cuda", 0)
SEEDS = [5, 0, 9]
SIZE = len(SEEDS)


class Net(nn.Module):
    """Convolution, running statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, bias=False)  # BatchNorm subtracts it again
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.convolution(x)).relu().mean((2, 3))
        return self.head(self.drop(x))


class Words(nn.Module):
    """Embedding, attention and an LSTM: the kernels that a GPU has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(16, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, _ = self.lstm(self.block(self.tokens(x)))
        return self.head(steps[:, -1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "images": (Net, lambda: torch.randn(6, 2, 8, 8, device=GPU)),
    "words": (Words, lambda: torch.randint(11, (6, 5), device=GPU)),
}
KINDS = pytest.mark.parametrize("kind", MODELS)


def made(kind: str, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """A model a seed, on the GPU."""
    models = []
    with torch.random.fork_rng():
        for seed in SEEDS:
            torch.manual_seed(seed)
            models.append(MODELS[kind][0]().to(GPU, dtype))
    return models


def data(kind: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = MODELS[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x, torch.randint(3, (6,), device=GPU)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def lone_training(kind: str, steps: int, x: torch.Tensor, y: torch.Tensor) -> tuple[list[nn.Module], list[Any]]:
    """Each member's own script: seeded, trained; the models, and where the GPU's stream stands."""
    models, streams = made(kind), []
    with torch.random.fork_rng():
        for seed, model in zip(SEEDS, models, strict=True):
            torch.cuda.manual_seed(seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(steps):
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
            streams.append(torch.cuda.get_rng_state())
    return models, streams


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@KINDS
def test_training_with_draws(kind: str, captured: bool) -> None:
    """Weights, buffers and streams after ten steps, each member drawing from a GPU stream of its own."""
    x, y = data(kind)
    alone, streams = lone_training(kind, 10, x, y)
    stack = memberwise.stack(made(kind))
    stack.generators = [torch.Generator(GPU).manual_seed(seed) for seed in SEEDS]
    optimizer = memberwise.optim.Adam(stack.parameters(), lr=0.01)
    losses = memberwise.vmap(loss, (0, None, None))
    before = torch.cuda.get_rng_state()

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        value = losses(stack, x, y)
        value.sum().backward()
        optimizer.step()
        return value.detach()

    run = memberwise.compile(step) if captured else step
    for _ in range(10):
        run(x, y)
    assert torch.equal(before, torch.cuda.get_rng_state()), "the global stream of the GPU was moved"
    for member, model in enumerate(alone):
        for name, expected in model.state_dict().items():
            assert_equal(stack[member].state_dict()[name], expected, f"member {member}: {name}")
        assert torch.equal(stack.generators[member].get_state(), streams[member]), f"member {member}: its stream"


@contextmanager
def never_waiting() -> Iterator[None]:
    """The CPU may not wait for the GPU in here."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KINDS
def test_a_step_waits_for_nothing(kind: str) -> None:
    """A stacked step enqueues its work as a lone one does; no value comes back to the CPU."""
    x, y = data(kind, torch.float32)
    stack = memberwise.stack(made(kind, torch.float32))
    stack.generators = [torch.Generator(GPU).manual_seed(seed) for seed in SEEDS]
    optimizer = memberwise.optim.SGD(stack.parameters(), lr=0.01, momentum=0.9)
    losses = memberwise.vmap(loss, (0, None, None))
    for attempt in range(3):
        with never_waiting() if attempt else nullcontext():  # the first step may set things up
            optimizer.zero_grad()
            losses(stack, x, y).sum().backward()
            optimizer.step()


def test_a_cpu_number_among_gpu_tensors() -> None:
    """Alone, a 0-d CPU tensor goes with GPU tensors; its M values do too."""
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(SIZE, 4, dtype=torch.float64, device=GPU, requires_grad=True)

    def one(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x * scale + scale, x / scale).clamp(max=2.0) - scale

    out = memberwise.vmap(one)(scale, x)
    rows = [one(scale[i], x[i]) for i in range(SIZE)]
    assert out.device == rows[0].device
    assert_equal(out, torch.stack(rows), "value")
    given = torch.randn_like(out)
    ours = torch.autograd.grad(out, [scale, x], given)
    for mine, expected in zip(ours, torch.autograd.grad(rows, [scale, x], list(given)), strict=True):
        assert mine.device == expected.device
        assert_equal(mine, expected, "gradient")


def test_cpu_indices_of_gpu_tensors() -> None:
    table, places = torch.randn(SIZE, 5, 2, device=GPU), torch.randint(5, (SIZE, 4))

    def one(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return table[places]

    rows = [one(table[i], places[i]) for i in range(SIZE)]
    assert_equal(memberwise.vmap(one)(table, places), torch.stack(rows), "own places")
    assert_equal(memberwise.vmap(one, (0, None))(table, places[0]), table[:, places[0]], "the same places")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@KINDS
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    """Dtypes of outputs and gradients are the lone run's, values near it."""
    models = [model.eval() for model in made(kind, torch.float32)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.LSTM):
                module.train()  # a GPU's LSTM has a backward in training mode only
    x, y = data(kind, torch.float32)
    stack = memberwise.stack(copy.deepcopy(models))
    with torch.autocast("cuda", dtype):
        out = memberwise.vmap(lambda model, x: model(x), (0, None))(stack, x)
        rows = [model(x) for model in models]
    assert out.dtype == rows[0].dtype
    assert_equal(out, torch.stack(rows), "out")
    F.cross_entropy(out.flatten(0, 1).float(), y.repeat(SIZE)).backward()
    for name, param in stack.named_parameters():
        assert param.grad is not None and param.grad.dtype is torch.float32, name


def test_moving_a_stack() -> None:
    """To the GPU and back, with its members' views, their gradients and a state dict from the other side."""
    models = [Net().double().eval() for _ in range(SIZE)]
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    stack = memberwise.stack(copy.deepcopy(models))
    expected = stack(x)
    view = stack[1]
    stack.to(GPU)
    out = stack(x.to(GPU))
    assert_equal(out.cpu(), expected, "on the GPU")
    out.sum().backward()
    assert next(stack[1].parameters()).is_cuda and next(stack.unstack()[1].parameters()).is_cuda
    stack[1].load_state_dict(models[0].state_dict())
    assert_equal(stack(x.to(GPU))[1].cpu(), expected[0], "a member loaded from the CPU")
    stack.cpu()
    assert_equal(stack(x)[1], expected[0], "back")
    assert view is not None


def test_streams_move_with_their_stack() -> None:
    """Built on the CPU and moved, members draw on the GPU as their lone scripts do, which seeded all devices."""
    stack = memberwise.build(Net, seeds=SEEDS).to(GPU)
    x = torch.randn(6, 2, 8, 8, device=GPU)
    with torch.random.fork_rng():
        for member, (seed, out) in enumerate(zip(SEEDS, stack(x), strict=True)):
            torch.manual_seed(seed)
            assert_equal(out, Net().to(GPU)(x), f"member {member}")


def test_streams_of_another_device_are_refused() -> None:
    drop, x = nn.Dropout(), torch.ones(SIZE, 4, device=GPU)
    with pytest.raises(memberwise.MemberwiseError, match=r"on cpu.*\[MW303\]"):
        memberwise.vmap(drop, generators=[torch.Generator() for _ in SEEDS])(x)


def test_another_stream() -> None:
    """Work goes to the caller's current stream."""
    stack = memberwise.stack([Net().to(GPU).eval() for _ in range(SIZE)])
    x = torch.randn(4, 2, 8, 8, device=GPU)
    expected = stack(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = stack(x)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(found, expected, "out")


def test_a_cuda_graph_of_a_stack() -> None:
    """torch.cuda.graph records a stack's call as it does a module's."""
    stack = memberwise.stack([Net().to(GPU).eval() for _ in range(SIZE)]).requires_grad_(False)
    x = torch.randn(4, 2, 8, 8, device=GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            stack(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stack(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_equal(out, stack(x), "replayed")


def test_grad_scaler() -> None:
    """A half-precision step with a GradScaler moves the members as their lone runs are moved."""
    models = made("images", torch.float32)
    for model in models:
        model.drop.p = 0.0
    x, y = data("images", torch.float32)
    stack = memberwise.stack(copy.deepcopy(models))
    optimizer, scaler = memberwise.optim.SGD(stack.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=128.0)
    losses = memberwise.vmap(loss, (0, None, None))
    with torch.autocast("cuda", torch.float16):
        value = losses(stack, x, y)
    scaler.scale(value.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    for member, model in enumerate(models):
        lone, scaling = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=128.0)
        with torch.autocast("cuda", torch.float16):
            value = loss(model, x, y)
        scaling.scale(value).backward()
        scaling.step(lone)
        for name, expected in model.named_parameters():
            mine = dict(stack[member].named_parameters())[name]
            torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3)
