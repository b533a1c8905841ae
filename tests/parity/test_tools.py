"""Users' tensors and tools inside a model: each row of the table against the models alone, and its verdict."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed

import memberwise
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.stacks import assert_same_gradient, backward, run_alone
from tests.parity.tools_table import BY_MEMBERS, WORKS, Tool, Using, on_page, rendered, sections
from tests.parity.tools_tensors import Doubling, Marked

TOOLS = {f"{section.title}: {tool.name}": tool for section in sections() for tool in section.tools}


@pytest.fixture(autouse=True)
def leaves_its_group() -> Iterator[None]:
    """A process group that a row has made would be there for all later tests: `SyncBatchNorm` asks for one."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def models(tool: Tool) -> list[Using]:
    made = []
    for i in range(3):
        torch.manual_seed(i)
        made.append(Using(tool.body, tool.make, tool.dtype))
    return made


def run_seeded(model: Any, x: torch.Tensor, i: int) -> torch.Tensor:
    torch.manual_seed(10 + i)
    return model(x)


@pytest.mark.parametrize("name", TOOLS)
def test_tool(name: str) -> None:
    tool = TOOLS[name]
    values = torch.randn(5, 4, dtype=tool.dtype, generator=torch.Generator().manual_seed(9))
    x, own = values.clone().requires_grad_(tool.grad), values.clone().requires_grad_(tool.grad)
    alone = models(tool)
    with torch.set_grad_enabled(tool.grad):
        expected = run_alone(alone, lambda model, i: run_seeded(model, own, i))
        if tool.verdict not in (WORKS, BY_MEMBERS):
            with pytest.raises(memberwise.MemberwiseError) as caught:
                backward(memberwise.stack(models(tool))(x))
            assert caught.value.code == tool.verdict
            return
        stack = memberwise.stack(models(tool))
        stack.generators = [torch.Generator().manual_seed(10 + i) for i in range(3)]
        with trace.recording() as record, warnings.catch_warnings():
            warnings.simplefilter("ignore", memberwise.StackWarning)
            out = stack(x)
            if tool.grad:
                backward(out)
    assert_equal(out.detach(), expected, "output")
    for key, p in stack.named_parameters() if tool.grad else ():
        theirs = [model.get_parameter(key).grad for model in alone]
        if all(grad is None for grad in theirs):
            assert p.grad is None or not p.grad.any(), key
        else:
            assert_same_gradient(key, p.grad, theirs)
    if tool.grad:
        assert (x.grad is None) == (own.grad is None)
        if own.grad is not None:
            assert_equal(x.grad, own.grad, "gradient of the input")
    for key, buffer in stack.named_buffers():
        assert_equal(buffer, torch.stack([model.get_buffer(key) for model in alone]), key)
    apart = sorted({entry.reason for entry in record.entries.values() if entry.path == "retreat"})
    assert bool(apart) == (tool.verdict == BY_MEMBERS), apart


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
@pytest.mark.parametrize("kind", [Doubling, Marked])
@pytest.mark.parametrize("shared", [True, False])
def test_an_input_of_a_subclass(kind: Any, shared: bool) -> None:
    """Its operations are its own, so that the members run one by one."""
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(9))

    def total(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(0).as_subclass(torch.Tensor) * y

    x = (values[0] if shared else values).as_subclass(kind)
    found = memberwise.vmap(total, (None if shared else 0, 0))(x, values[:, 0])
    expected = torch.stack([total(x if shared else x[i], values[i, 0]) for i in range(3)])
    assert_equal(found, expected, "output")


def test_the_page_shows_the_table() -> None:
    """`python -m tests.parity.tools_table` writes it."""
    assert on_page() == rendered()


def test_rows_have_names_of_their_own() -> None:
    assert len(TOOLS) == sum(len(section.tools) for section in sections())


def test_a_member_is_copied_with_its_tools() -> None:
    """What works in a stack works in its copies."""
    tool = next(tool for tool in TOOLS.values() if tool.verdict == WORKS)
    stack = memberwise.stack(models(tool))
    x = torch.randn(5, 4, dtype=tool.dtype)
    assert_equal(copy.deepcopy(stack)(x).detach(), stack(x).detach(), "output of a copy")


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_control_flow_runs_alone_after_it_ran_in_a_call(randomness: str) -> None:
    """What the compiler meets in a call, it does not remember of the code."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    found = memberwise.vmap(f, randomness=randomness)(x)
    assert_equal(found, torch.stack([f(own) for own in x]), "output")


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
def test_a_draw_in_control_flow_is_refused_as_others_are() -> None:
    with pytest.raises(memberwise.MemberwiseError) as caught:
        memberwise.vmap(lambda x: torch.cond(x.sum() > 0, torch.rand_like, torch.rand_like, (x,)))(torch.ones(3, 4))
    assert caught.value.code == "MW202"
