"""What a checkpoint in a functional_call recomputes, it recomputes with the given tensors: as in a lone module."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from memberwise import vmap
from memberwise._torch.checkpoint import recomputed_inside
from memberwise.functional import functional_call
from memberwise.state import stack_module_state
from memberwise.testing.tolerance import assert_equal

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Block(nn.Module):
    """Checkpoints a method, which uses its parameters and reassigns a buffer."""

    def __init__(self, reentrant: bool, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.register_buffer("runs", torch.zeros(()))
        self.options = {"use_reentrant": reentrant, **options}

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, **self.options)


class Nested(Block):
    """A checkpoint in a checkpoint."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, **self.options) * torch.tanh(self.first.bias.sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.middle, checkpoint(self.middle, x, **self.options), **self.options)


class Sequential(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = [self.first, nn.Tanh(), self.second, nn.Tanh()]
        return checkpoint_sequential(layers, 2, x, use_reentrant=self.options["use_reentrant"])


class WithNorm(Block):
    """BatchNorm counts a batch twice under checkpoint, alone too; dropout repeats its mask."""

    def __init__(self, reentrant: bool, **options: Any) -> None:
        super().__init__(reentrant, **options)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return super().inner(self.drop(self.norm(x)))


def state_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    params = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    return params, {name: tensor.clone() for name, tensor in model.named_buffers()}


def assert_as_alone(build: Callable[[], nn.Module], steps: int = 1) -> None:
    """Outputs, gradients and buffers of a functional_call on a template, against a lone module."""
    lone, template = build().double(), build().double()
    params, buffers = state_of(lone)
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    same_x = x.detach().clone().requires_grad_()
    for step in range(steps):
        torch.manual_seed(step)
        expected = lone(x)
        expected.square().sum().backward()
        torch.manual_seed(step)
        out = functional_call(template, (params, buffers), (same_x,))
        out.square().sum().backward()
        assert_equal(out, expected, "output")
    assert_equal(same_x.grad, x.grad, "gradient of the input")
    for name, parameter in lone.named_parameters():
        assert_equal(params[name].grad, parameter.grad, f"gradient of {name}")
    for name, buffer in lone.named_buffers():
        assert_equal(buffers[name], buffer, name)
    assert all(parameter.grad is None for parameter in template.parameters())


@KINDS
@pytest.mark.parametrize("kind", [Block, Nested, Sequential, WithNorm])
@pytest.mark.parametrize("steps", [1, 3])
def test_recomputed_with_what_was_given(reentrant: bool, kind: type[Block], steps: int) -> None:
    assert_as_alone(lambda: kind(reentrant), steps)


def selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.parametrize(
    "options",
    [
        {"context_fn": selective},
        {"early_stop": False},
        {"preserve_rng_state": False},
        {"determinism_check": "none"},
        {"debug": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_of_checkpoint(options: dict[str, Any]) -> None:
    assert_as_alone(lambda: Nested(False, **options) if "context_fn" not in options else Block(False, **options))


@KINDS
def test_torch_still_has_that_fault(reentrant: bool) -> None:
    """If this turns red, torch has mended it, and `_torch/checkpoint.py` can go."""
    lone, template = Block(reentrant).double(), Block(reentrant).double()
    params, buffers = state_of(lone)
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    lone(x).sum().backward()
    torch.func.functional_call(template, (params, buffers), (x,)).sum().backward()
    gradient = params["first.weight"].grad
    assert gradient is None or not torch.allclose(gradient, lone.first.weight.grad)


@KINDS
def test_no_trace_of_it_in_torch_after_a_call(reentrant: bool) -> None:
    before = (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction)
    seen = []

    class Looking(Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction))
            return super().inner(x)

    model = Looking(reentrant)
    out = functional_call(model, state_of(model), torch.ones(1, 3, requires_grad=True))
    assert (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction) == before
    out.sum().backward()
    assert (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction) == before
    assert len(seen) == 2
    assert all(one[0] is not before[0] and one[1] is not before[1] for one in seen)


@KINDS
def test_a_failing_recomputation_leaves_everything_as_it_was(reentrant: bool) -> None:
    class Once(Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            if len(runs) > 1:
                raise ZeroDivisionError
            return super().inner(x)

    runs: list[int] = []
    model = Once(reentrant)
    held = dict(model.named_parameters())
    before = (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction)
    out = functional_call(model, state_of(model), torch.ones(1, 3, requires_grad=True))
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    assert (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction) == before
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_other_threads_are_not_concerned() -> None:
    """A lone checkpoint made in another thread, while a functional_call runs here, is recomputed as ever."""
    lone = Block(False).double()
    expected = Block(False).double()
    expected.load_state_dict(lone.state_dict())
    x = torch.randn(2, 3, dtype=torch.double)
    results = []

    class Waiting(Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=lambda: results.append(lone(x.detach())))
            thread.start()
            thread.join()
            return super().inner(x)

    template = Waiting(False).double()
    params, buffers = state_of(template)
    functional_call(template, (params, buffers), x).sum().backward()
    results[0].sum().backward()
    expected(x).sum().backward()
    assert_equal(lone.first.weight.grad, expected.first.weight.grad)


@KINDS
def test_threads_that_overlap_restore_torch(reentrant: bool) -> None:
    before = (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    class First(Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            first_in.set()
            second_in.wait(10)
            return super().inner(x)

    class Second(Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            second_in.set()
            first_out.wait(10)
            return super().inner(x)

    def run(model: Block) -> None:
        outs.append(functional_call(model, state_of(model), torch.ones(1, 3, requires_grad=True)))

    outs: list[torch.Tensor] = []
    threads = [threading.Thread(target=run, args=(kind(reentrant),)) for kind in (First, Second)]
    threads[0].start()
    first_in.wait(10)
    threads[1].start()
    threads[0].join()
    first_out.set()
    threads[1].join()
    assert len(outs) == 2
    assert (torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction) == before


def assert_same_gradients(params: dict[str, torch.Tensor], lone: nn.Module) -> None:
    compared = 0
    for name, parameter in lone.named_parameters():
        if parameter.grad is None:
            assert params[name].grad is None, name
        else:
            assert_equal(params[name].grad, parameter.grad, name)
            compared += 1
    assert compared


def test_gradients_of_gradients() -> None:
    lone, template = Block(False).double(), Block(False).double()
    params, buffers = state_of(lone)
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)

    def penalty(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    penalty(lone).backward()
    penalty(lambda x: functional_call(template, (params, buffers), x)).backward()
    assert_same_gradients(params, lone)


def test_backward_inside_the_call() -> None:
    """The recomputation swaps while the swap is on; the outer one still finds its way back."""

    class Penalised(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (gradient,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
            return gradient

    lone, template = Penalised(False).double(), Penalised(False).double()
    params, buffers = state_of(lone)
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    expected, out = lone(x), functional_call(template, (params, buffers), x)
    assert_equal(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    assert_same_gradients(params, lone)
    assert all(parameter.grad is None for parameter in template.parameters())


def test_one_template_in_two_graphs_at_once() -> None:
    template = Block(False).double()
    lones = [Block(False).double() for _ in range(2)]
    states = [state_of(lone) for lone in lones]
    x = torch.randn(2, 3, dtype=torch.double)
    outs = [functional_call(template, state, x) for state in states]
    for out, lone in zip(reversed(outs), reversed(lones), strict=True):
        out.sum().backward()
        lone(x).sum().backward()
    for lone, (params, _) in zip(lones, states, strict=True):
        assert_equal(params["first.weight"].grad, lone.first.weight.grad)


@KINDS
@pytest.mark.parametrize("kind", [Block, Nested])
def test_inside_vmap(reentrant: bool, kind: type[Block]) -> None:
    models = [kind(reentrant).double() for _ in range(3)]
    template = kind(reentrant).double()
    params, buffers = stack_module_state(models)
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    same_x = x.detach().clone().requires_grad_()
    out = vmap(lambda p, b, x: functional_call(template, (p, b), x), (0, 0, None))(params, buffers, same_x)
    out.square().sum().backward()
    for index, model in enumerate(models):
        expected = model(x)
        expected.square().sum().backward()
        assert_equal(out[index], expected)
        for name, parameter in model.named_parameters():
            assert_equal(params[name].grad[index], parameter.grad, name)
    assert_equal(same_x.grad, x.grad)


@KINDS
def test_what_a_graph_holds_goes_with_it(reentrant: bool) -> None:
    model = Block(reentrant)
    params, buffers = state_of(model)
    held = weakref.ref(params["first.weight"])
    out = functional_call(model, (params, buffers), torch.ones(1, 3, requires_grad=True))
    del params, buffers
    assert held() is not None
    del out
    gc.collect()
    assert held() is None


def test_surroundings_are_entered_outermost_first_and_again_for_nested_checkpoints() -> None:
    entered: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *exc_info: object) -> None:
            entered.append(f"-{self.name}")

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x, use_reentrant=False).sin()

    x = torch.ones(2, requires_grad=True)
    with recomputed_inside(lambda: Noted("a")), recomputed_inside(lambda: Noted("b")):
        out = checkpoint(outer, x, use_reentrant=False)
    assert entered == []
    out.sum().backward()
    assert entered[:2] == ["a", "b"]
    assert entered.count("a") == entered.count("b") == entered.count("-a") == 2
    torch.testing.assert_close(x.grad, torch.autograd.grad(x.sin().cos().sin().sum(), x)[0])
