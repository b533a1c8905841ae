"""A user's program with its types written out: pyright checks that the public names have the types they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

import torch
from torch import nn
from torch.nn import functional as F

import memberwise


def make_model() -> nn.Module:
    """One member."""
    return nn.Linear(3, 2)


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Its loss."""
    return F.mse_loss(model(x), y)


def use() -> None:
    """Each public name once."""
    stack = memberwise.build(make_model, seeds=range(4))
    assert_type(stack, memberwise.Stack)
    assert_type(stack[0], nn.Module)
    assert_type(stack[1:3], memberwise.Stack)
    assert_type(stack.select([0, 0]), memberwise.Stack)
    assert_type(stack.unstack(), list[nn.Module])
    assert_type(len(stack), int)

    optimizer = memberwise.optim.AdamW(stack.parameters(), lr=[1e-3, 1e-3, 1e-2, 1e-2], weight_decay=0.01)
    norms = memberwise.clip_grad_norm_(stack, 1.0)
    assert_type(norms, torch.Tensor)
    kept, kept_optimizer = memberwise.select((stack, optimizer), [0, 1])
    assert_type(kept, memberwise.Stack)
    assert_type(kept_optimizer, memberwise.optim.AdamW)

    @memberwise.compile
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return memberwise.vmap(loss_fn, in_dims=(0, None, None))(stack, x, y)

    assert_type(step(torch.ones(5, 3), torch.ones(5, 2)), torch.Tensor)

    params, buffers = memberwise.stack_module_state([make_model(), make_model()])
    assert_type(params, dict[str, torch.Tensor])
    assert_type(memberwise.unstack_module_state(params, buffers), list[dict[str, torch.Tensor]])
    calls: Callable[[torch.Tensor], torch.Tensor] = memberwise.vmap(torch.sin, randomness="different")
    calls(torch.ones(3))
    memberwise.functional_call(make_model(), params, (torch.ones(5, 3),))
    stack(memberwise.each(torch.ones(4, 5, 3)))
    print(memberwise.verify(stack, torch.ones(5, 3)), memberwise.explain(stack, torch.ones(5, 3)))
