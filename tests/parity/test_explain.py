"""explain(): every operation with its path, its reason and its share; and nothing is left changed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import memberwise
from memberwise import each, explain
from memberwise.errors import StackWarning
from memberwise.report import Explanation
from tests.parity.stacks import Net, backward, inputs, nets

PATHS = {"rule", "vmap", "loop", "retreat", "agreement", "shared"}


def found(report: Explanation, phase: str = "forward") -> dict[str, str]:
    """Path by operation."""
    return {row.op: row.path for row in report.rows if row.phase == phase}


def test_forward_and_backward_of_a_stack() -> None:
    stack = memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4))
    report = explain(stack, torch.ones(5, 3))
    forward, back = found(report), found(report, "backward")
    assert any("linear" in op or "mm" in op for op in forward), forward
    assert any("linear" in op or "mm" in op for op in back), back
    assert {row.path for row in report.rows} <= PATHS
    assert report.seconds >= sum(row.seconds for row in report.rows) > 0
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    assert [row.seconds for row in report.rows] == sorted((row.seconds for row in report.rows), reverse=True)


def test_operations_are_counted() -> None:
    stack = memberwise.stack([nn.Sequential(*[nn.Softsign() for _ in range(3)], nn.Linear(3, 3)) for _ in range(2)])
    report = explain(stack, each(torch.randn(2, 5, 3)))
    assert sum(row.count for row in report.rows if row.op == "aten::abs" and row.phase == "forward") == 3


def test_without_gradients_there_is_no_backward() -> None:
    stack = memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4)).requires_grad_(False)
    assert {row.phase for row in explain(stack, torch.ones(5, 3)).rows} == {"forward"}


@torch.library.custom_op("memberwise_test::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


halve.register_autograd(lambda ctx, grad: grad / 2)


class Odd(nn.Module):
    """One operation that nobody can batch, and a read of a value in which members differ."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.reader = nn.Linear(3, 3), Reads()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(halve(self.layer(x)))


class Reads(nn.Module):
    """Reads on the host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > float(x.sum()) - 1 and x.sum().item() else x


@pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning")
def test_slow_paths_come_with_their_reason() -> None:
    report = explain(memberwise.build(Odd, seeds=range(4)), torch.ones(5, 3))
    slow = {row.op: row for row in report.slow}
    assert slow["memberwise_test::halve"].path == "loop"
    assert "batching rule" in slow["memberwise_test::halve"].reason
    assert slow["Reads"].path == "retreat"
    assert "host" in slow["Reads"].reason
    assert all(row.path not in ("loop", "retreat") for row in report.rows if row not in report.slow)


def test_a_loop_and_a_retreat_are_warned_of_once_a_place_with_the_line() -> None:
    stack, x = memberwise.build(Odd, seeds=range(4)), torch.ones(5, 3)
    with pytest.warns(memberwise.errors.StackWarning) as caught:
        memberwise.engine.trace._warned.clear()
        for _ in range(3):
            stack(x)
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if "MW206" in text]) == 1
    assert len([text for text in texts if "MW207" in text]) == 1
    assert all("test_explain.py:" in text for text in texts)


def test_an_agreement_is_a_path() -> None:
    report = explain(memberwise.vmap(lambda x: x * (2 if bool(x.isfinite().all()) else 1)), torch.ones(3, 4))
    assert "agreement" in {row.path for row in report.rows}


def test_a_function_is_called_once_with_what_it_is_given() -> None:
    calls = []
    stack, x = memberwise.stack(nets(3)), inputs(5, 3)

    def step(scale: float, *, x: torch.Tensor) -> torch.Tensor:
        calls.append(scale)
        return memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))(stack, x) * scale

    report = explain(step, 2.0, x=x)
    assert calls == [2.0]
    assert {row.phase for row in report.rows} == {"forward", "backward"}
    assert stack.first.weight.grad is None
    assert x.grad is None
    assert stack.calls.tolist() == [1, 1, 1]


def test_a_step_with_its_own_backward() -> None:
    stack, x = memberwise.stack(nets(3)), inputs(5, 3).detach()
    report = explain(lambda: stack(x).sum().backward())
    assert {row.phase for row in report.rows} == {"forward"}
    assert any("backward" in row.op for row in report.rows)
    assert stack.first.weight.grad.any()


def test_a_stack_is_left_as_it_is() -> None:
    stack, x = memberwise.build(Net, seeds=range(3), dtype=torch.float64), inputs(6, 3)
    backward(stack(x))
    x.grad = None
    before = {name: tensor.clone() for name, tensor in [*stack.named_parameters(), *stack.named_buffers()]}
    grads = {name: p.grad.clone() for name, p in stack.named_parameters()}
    streams, state = [generator.get_state() for generator in stack.generators], torch.get_rng_state()
    explain(stack, x)
    for name, tensor in [*stack.named_parameters(), *stack.named_buffers()]:
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(p.grad, grads[name]) for name, p in stack.named_parameters())
    assert all(g.get_state().equal(s) for g, s in zip(stack.generators, streams, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    unseeded = memberwise.stack(nets(3, p=0.5))
    explain(unseeded, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_stacked_nothing_told() -> None:
    report = explain(lambda x: x + 1, torch.ones(3))
    assert report.rows == []
    assert "0 kinds of operation" in str(report)


def test_the_report_reads_and_saves() -> None:
    report = explain(memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4)), torch.ones(5, 3))
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["rows"][0].keys() == {"op", "phase", "path", "reason", "count", "seconds", "share"}
    assert saved["seconds"] == report.seconds
    text = str(report)
    assert repr(report) == text
    for word in ("operation", "path", "share", report.rows[0].op):
        assert word in text


@pytest.mark.long
def test_rich_is_loaded_only_to_print() -> None:
    script = (
        "import sys, torch, memberwise\n"
        "stack = memberwise.build(lambda: torch.nn.Linear(3, 2), seeds=range(2))\n"
        "report = memberwise.explain(stack, torch.ones(5, 3))\n"
        "checked = memberwise.verify(stack, torch.ones(5, 3))\n"
        "assert 'rich' not in sys.modules\n"
        "str(report), str(checked)\n"
        "assert 'rich' in sys.modules\n"
        "assert not {'triton', 'optuna', 'torch._dynamo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_compiled_step_tells_its_plan() -> None:
    members = memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4))
    step = memberwise.compile(lambda x: members(x).square().mean((1, 2)).detach(), chunk=2, backend="fx")
    x = torch.ones(5, 3)
    assert memberwise.explain(step, x).plans == ()
    for _ in range(2):
        report = memberwise.explain(step, x)
    assert report.plans == ("2 at a time, as told",)
    assert str(report).endswith("plan: 2 at a time, as told")
    assert report.to_dict()["plans"] == report.plans


def test_a_compiled_step_tells_why_it_is_not_replayed() -> None:
    members = memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4))
    step = memberwise.compile(lambda x: members(x).sum().item(), backend="fx")
    with pytest.warns(StackWarning, match="MW501"):
        report = memberwise.explain(step, torch.ones(5, 3))
    assert report.plans[0].startswith("not replayed: ")


def test_a_compiled_step_whose_first_call_made_state_tells_that_it_is_replayed() -> None:
    members = memberwise.build(lambda: nn.Linear(3, 2), seeds=range(4))
    state: dict[str, torch.Tensor] = {}

    def step(x: torch.Tensor) -> torch.Tensor:
        total = state.setdefault("total", torch.zeros(()))
        return members(x).sum().detach() + total

    captured = memberwise.compile(step, backend="fx")
    for _ in range(4):
        captured(torch.ones(5, 3))
    assert captured.captured.replayed and captured.captured.refusals  # type: ignore[attr-defined] # set on the function
    plans = memberwise.explain(captured, torch.ones(5, 3)).plans
    assert plans and all(plan.startswith("a recording was refused: ") for plan in plans)
