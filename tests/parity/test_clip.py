"""Clipping a stack's gradients against torch's clipping of each member's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memberwise.errors import ArgumentError, EngineError, StackWarning
from memberwise.optim import clip_grad_norm_
from memberwise.testing.tolerance import assert_equal

SHAPES = [(4, 3), (4,), (), (2, 2, 2), (0, 3)]


def gradients(members: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Members of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 2, members, dtype=torch.float64)
    return [
        (torch.randn(members, *s, generator=generator, dtype=torch.float64) * size.view(-1, *[1] * len(s))).to(dtype)
        for s in SHAPES
    ]


def stack_of(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    parameters = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def alone(grads: list[torch.Tensor], max_norm: Any, norm_type: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """torch's own, member by member: norms, and gradients after, stacked."""
    norms, members = [], []
    for i in range(len(grads[0])):
        own = stack_of([grad[i] for grad in grads])
        limit = max_norm[i] if isinstance(max_norm, list) else max_norm
        norms.append(torch.nn.utils.clip_grad_norm_(own, limit, norm_type))
        members.append([parameter.grad for parameter in own])
    return torch.stack(norms), [torch.stack(list(column)) for column in zip(*members, strict=True)]


def check(grads: list[torch.Tensor], max_norm: Any, norm_type: float = 2.0, **options: Any) -> torch.Tensor:
    expected_norms, expected = alone(grads, max_norm, norm_type)
    parameters = stack_of(grads)
    norms = clip_grad_norm_(parameters, max_norm, norm_type, **options)
    assert_equal(norms, expected_norms, "norms")
    for parameter, grad in zip(parameters, expected, strict=True):
        assert_equal(parameter.grad, grad, "gradient")
    return norms


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, float("inf"), 0.0])
@pytest.mark.parametrize("max_norm", [1.0, [0.01, 100.0, 0.5], 0.0])
def test_each_member_is_clipped_alone(max_norm: Any, norm_type: float) -> None:
    grads = gradients()[:-1] if norm_type == float("inf") else gradients()  # an empty gradient has no largest entry
    norms = check(grads, max_norm, norm_type)
    assert norms.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(gradients(dtype=dtype), [0.5, 0.1, 1.0])


@pytest.mark.parametrize("members", [1, 2, 8])
def test_numbers_of_members(members: int) -> None:
    check(gradients(members), 1.0)


def test_a_member_below_the_limit_keeps_its_bits() -> None:
    grads = gradients()
    parameters = stack_of(grads)
    norms = clip_grad_norm_(parameters, 1.0)
    assert norms[0] < 1 < norms[2]
    for parameter, grad in zip(parameters, grads, strict=True):
        assert torch.equal(parameter.grad[0], grad[0])
    clipped = torch.cat([p.grad[2].flatten() for p in parameters])
    assert clipped.norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_is_not_finite_leaves_the_others_alone(value: float) -> None:
    grads = gradients()
    clean = stack_of(grads)
    clip_grad_norm_(clean, 1.0)
    grads[0][1, 0, 0] = value
    parameters = stack_of(grads)
    norms = clip_grad_norm_(parameters, 1.0)
    assert norms.isfinite().tolist() == [True, False, True]
    for parameter, other in zip(parameters, clean, strict=True):
        assert torch.equal(parameter.grad[[0, 2]], other.grad[[0, 2]])
    check(grads, 1.0)


def test_members_that_are_not_finite_are_named() -> None:
    grads = gradients()
    grads[1][2, 0] = float("inf")
    grads[0][0, 0, 0] = float("nan")
    parameters = stack_of(grads)
    with pytest.raises(EngineError, match=r"order 2.0, found member 0: nan; member 2: inf.*\[MW407\]"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
    check(gradients(), 1.0, error_if_nonfinite=True)


class Stacked(torch.nn.Module):
    def __init__(self, grads: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(stack_of(grads))
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad.clone()


def test_what_parameters_may_be() -> None:
    """One tensor, a list, an iterator, a module: as torch takes, and a stack itself."""
    grads = gradients()
    expected, after = alone(grads, 1.0, 2.0)
    module = Stacked(grads)
    assert_equal(clip_grad_norm_(module, 1.0), expected)
    for weight, grad in zip(module.weights, after, strict=True):
        assert_equal(weight.grad, grad)
    assert_equal(clip_grad_norm_(iter(stack_of(grads)), 1.0), expected)
    assert_equal(clip_grad_norm_(stack_of(grads)[0], 1.0), alone(grads[:1], 1.0, 2.0)[0])


def test_gradients_that_are_not_there() -> None:
    grads = gradients()
    parameters = stack_of(grads)
    parameters[0].grad = None
    norms = clip_grad_norm_(parameters, 1.0)
    expected, after = alone(grads[1:], 1.0, 2.0)
    assert_equal(norms, expected)
    assert parameters[0].grad is None
    assert_equal(parameters[1].grad, after[0])
    for parameter in parameters:
        parameter.grad = None
    assert clip_grad_norm_(parameters, 1.0).tolist() == [0.0, 0.0, 0.0]


def test_an_empty_iterator_is_warned_of() -> None:
    spent = iter(())
    with pytest.warns(StackWarning, match=r"no parameters to clip.*\[MW412\]"):
        assert clip_grad_norm_(spent, 1.0).shape == (0,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_grad_norm_(stack_of(gradients()), 1.0)


def shared(grad: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros_like(grad))
    parameter._memberwise_shared = True
    parameter.grad = grad.clone()
    return parameter


@pytest.mark.parametrize("max_norm", [1.0, [1.0, 1.0, 1.0]])
def test_shared_parameters_are_clipped_together_by_their_own_norm(max_norm: Any) -> None:
    grads = gradients()
    trunk = [torch.full((3, 2), 2.0, dtype=torch.float64), torch.full((), 1.0, dtype=torch.float64)]
    common = [shared(grad) for grad in trunk]
    parameters = [common[0], *stack_of(grads), common[1]]
    norms = clip_grad_norm_(parameters, max_norm)
    assert_equal(norms, alone(grads, 1.0, 2.0)[0])
    for parameter, grad in zip(parameters[1:-1], alone(grads, 1.0, 2.0)[1], strict=True):
        assert_equal(parameter.grad, grad)
    twins = stack_of(trunk)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    for parameter, twin in zip(common, twins, strict=True):
        assert_equal(parameter.grad, twin.grad)


def test_shared_parameters_need_one_limit_and_count_as_finite_or_not() -> None:
    common = shared(torch.full((4,), float("nan"), dtype=torch.float64))
    parameters = [*stack_of(gradients()), common]
    before = [parameter.grad.clone() for parameter in parameters]
    with pytest.raises(ArgumentError, match=r"max_norm: expected one value, as there are shared.*\[MW403\]"):
        clip_grad_norm_(parameters, [1.0, 2.0, 3.0])
    with pytest.raises(EngineError, match=r"found the shared parameters: nan"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    for parameter, grad in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
    norms = clip_grad_norm_(parameters, 1.0)
    assert norms.isfinite().all() and parameters[0].grad.isfinite().all()
    assert clip_grad_norm_([common], 1.0).shape == (0,)


@pytest.mark.parametrize("max_norm", [[1.0, 2.0], torch.ones(4), "1"])
def test_a_wrong_number_of_limits(max_norm: Any) -> None:
    parameters = stack_of(gradients())
    with pytest.raises(ArgumentError, match=r"max_norm: expected .*\[MW401\]"):
        clip_grad_norm_(parameters, max_norm)
    assert torch.equal(parameters[0].grad, gradients()[0])


def test_parameters_of_different_numbers_of_members() -> None:
    parameters = stack_of(gradients()) + stack_of(gradients(4))
    with pytest.raises(ArgumentError, match=r"expected 3 members in each parameter, found: parameter 5 has 4.*MW404"):
        clip_grad_norm_(parameters, 1.0)


def test_dtypes_mixed_in_one_call() -> None:
    grads = [gradients(dtype=dtype)[0] for dtype in (torch.float32, torch.float64)]
    check(grads, 1.0)


def test_gradients_with_other_strides() -> None:
    grads = [grad.transpose(1, -1).contiguous().transpose(1, -1) for grad in gradients()[:1]]
    parameters = stack_of(grads)
    parameters[0].grad = grads[0].clone(memory_format=torch.preserve_format)
    assert not parameters[0].grad.is_contiguous()
    clip_grad_norm_(parameters, 1.0)
    assert_equal(parameters[0].grad, alone(gradients()[:1], 1.0, 2.0)[1][0])


def test_nothing_is_read_on_the_host_when_recorded() -> None:
    parameters = stack_of(gradients())
    inputs = [parameter.grad for parameter in parameters]
    limit = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def step(*_: torch.Tensor) -> torch.Tensor:
        return clip_grad_norm_(parameters, limit)

    graph = make_fx(step)(limit, *inputs)
    assert not [node for node in graph.graph.nodes if "foreach" in str(node.target) or node.op == "get_attr"]
    others = gradients(seed=1)
    expected, after = alone(others, [0.1, 0.2, 0.3], 2.0)
    norms = graph(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), *others)
    assert_equal(norms, expected)
    for found, grad in zip(others, after, strict=True):
        assert_equal(found, grad)
