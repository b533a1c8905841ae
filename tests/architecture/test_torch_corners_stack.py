"""What a Stack needs of torch's private corners; a red test here names what breaks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from memberwise._torch import backward, checkpoint, controlflow, dlpack, dynamo, gradhooks, recurrent, views


class View(torch.Tensor):
    """A tensor that answers `.grad` itself."""

    @property
    def grad(self) -> str:
        return "its own answer"


def test_a_leaf_on_other_memory_writes_through_and_requires_grad() -> None:
    """Breaks: live members; `stack[i].weight` would be a copy, or no leaf."""
    whole = torch.zeros(3, 2)
    leaf = views.leaf_on(View, whole[1], True)
    assert type(leaf) is View
    assert leaf.is_leaf
    assert leaf.requires_grad
    with torch.no_grad():
        leaf += 1
    assert whole.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert leaf._version == whole._version == 1


def test_a_gradient_can_be_taken_out_below_an_answer_of_its_own() -> None:
    """Breaks: `stack[i](x).backward()` would lose its gradient, or count it twice."""
    leaf = views.leaf_on(View, torch.ones(2), True)
    passed_on = []
    leaf.register_post_accumulate_grad_hook(lambda param: passed_on.append(views.take_gradient(param)))
    (leaf * 3).sum().backward()
    (leaf * 4).sum().backward()
    assert [grad.tolist() for grad in passed_on] == [[3, 3], [4, 4]]
    assert views.take_gradient(leaf) is None
    assert leaf.grad == "its own answer"


seen: list[bool] = []


@dynamo.uncompiled
def looks_whether_compiled(x: torch.Tensor) -> torch.Tensor:
    return called_from_there(x)


def called_from_there(x: torch.Tensor) -> torch.Tensor:
    seen.append(torch.compiler.is_compiling())
    return x + 1


class Calls(nn.Module):
    """A module whose forward is not compiled."""

    @dynamo.uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return called_from_there(x)


def test_marked_code_and_what_it_calls_is_not_compiled() -> None:
    """Breaks: `torch.compile(stack)` would trace into the engine."""
    seen.clear()
    x = torch.ones(2)
    assert torch.compile(lambda x: looks_whether_compiled(x * 2) * 3, backend="eager")(x).tolist() == [9, 9]
    assert torch.compile(Calls(), backend="eager")(x).tolist() == [2, 2]
    assert seen == [False, False]
    assert looks_whether_compiled.__name__ == "looks_whether_compiled"


def test_a_recurrent_module_holds_its_weights_a_second_time() -> None:
    """Breaks: member tensors would stay behind in an LSTM after a call, and go into its copies and pickles."""
    lstm = nn.LSTM(2, 2)
    assert [*lstm._flat_weights] == [*lstm.parameters()]
    lists = recurrent.kept_lists(lstm)
    assert lists.keys() == {*recurrent.LISTS}
    lstm._parameters["weight_ih_l0"] = other = nn.Parameter(torch.zeros(8, 2))
    lstm(torch.ones(1, 2))
    assert lstm._flat_weights[0] is other
    recurrent.put_back(lstm, lists)
    assert lstm._flat_weights[0] is not other


def test_a_backward_pass_is_known_from_inside() -> None:
    """Breaks: a checkpoint around a seeded stack would draw other masks than in forward, silently."""
    told: list[bool] = [backward.in_backward()]
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: told.append(backward.in_backward()))
    y.sum().backward()
    told.append(backward.in_backward())
    assert told == [False, True, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_runs_lies_above_a_frame_of_it(reentrant: bool) -> None:
    """Breaks: members that part ways in one would be recomputed together, and what they write be counted wrong."""
    told: list[bool] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        frame: Any = sys._getframe()
        told.append(False)
        while frame is not None:
            told[-1] |= checkpoint.is_of_checkpoint(frame)
            frame = frame.f_back
        return x * 2

    x = torch.ones(2, requires_grad=True)
    inside(x)
    torch_checkpoint(inside, x, use_reentrant=reentrant)
    assert told == [False, True]


def test_hooks_on_a_gradient_are_seen() -> None:
    """Breaks: a stack would lose a parameter's hooks in silence."""
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        tensor = torch.ones(2, requires_grad=True)
        assert not gradhooks.has_hooks(tensor)
        handle = getattr(tensor, register)(lambda _: None)
        assert gradhooks.has_hooks(tensor)
        handle.remove()
        assert not gradhooks.has_hooks(tensor)


def test_control_flow_asks_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: `torch.cond` in a call would fail in the compiler, and so would each later one."""

    def objects() -> Any:
        raise KeyError("asked")

    monkeypatch.setattr(controlflow, "_around", objects)
    with pytest.raises(KeyError, match="asked"):
        torch.cond(torch.ones(()) > 0, torch.sin, torch.cos, (torch.ones(2),))


def test_to_dlpack_asks_the_kinds_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: `to_dlpack` of a member tensor gives out no memory, and the process ends."""

    class Answers(torch.Tensor):
        def __dlpack__(self, **kwargs: object) -> str:
            return "its own"

    tensor = torch.ones(2).as_subclass(Answers)
    monkeypatch.setattr(dlpack, "_asked", [*dlpack._asked, Answers])
    assert torch.utils.dlpack.to_dlpack(tensor) == torch.to_dlpack(tensor) == "its own"
    assert torch.from_dlpack(torch.to_dlpack(torch.ones(2))).tolist() == [1, 1]


def test_a_compound_function_is_overridden_inside() -> None:
    """Breaks: `nn.MultiheadAttention` would run by single operations, or call itself without end."""
    from memberwise._torch.compound import inside

    seen: list[Any] = []

    class Sees(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight = torch.ones(2, 1, 4).as_subclass(Sees), torch.eye(4)
    given = (x, x, x, 4, 2, weight.repeat(3, 1), None, None, None, False, 0.0, weight, None)
    named = {"need_weights": False}
    F = torch.nn.functional
    found, _ = inside(F.multi_head_attention_forward)(*given, **named)
    assert F.linear in seen
    assert F.scaled_dot_product_attention in seen
    assert F.multi_head_attention_forward not in seen
    alone = F.multi_head_attention_forward(*(torch.ones(2, 1, 4) if arg is x else arg for arg in given), **named)[0]
    assert torch.equal(found.as_subclass(torch.Tensor), alone)
    assert inside(F.multi_head_attention_forward).__kwdefaults__ is F.multi_head_attention_forward.__kwdefaults__
