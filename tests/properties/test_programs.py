"""Random programs: what a lone run can do, all members do at once, with its numbers, gradients and draws."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import memberwise
from memberwise.engine import lowering
from memberwise.rules.registry import composites_disabled
from memberwise.testing.tolerance import assert_equal
from tests.properties.programs import VALUES, Step, execute, runnable, steps

MEMBERS = 3
SHAPES = ((2, 3), (3, 3), (3,))


def inputs(member: int) -> list[torch.Tensor]:
    """Two tensors that require grad, and one that does not."""
    generator = torch.Generator().manual_seed(member)
    own = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [t.requires_grad_(k < 2) for k, t in enumerate(own)]


def pool_of(own: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*own, own[0] * 1, own[1] * 1]


def alone(program: list[Step], member: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Outputs, inputs afterwards with their gradients, and where the global stream stands."""
    torch.manual_seed(member + 5)
    own = inputs(member)
    outs = execute(program, pool_of(own))[len(SHAPES) :]
    wanted = [t for t in outs if t.requires_grad]
    torch.autograd.backward(wanted, [torch.full_like(t, 1 + 0.1 * member) for t in wanted])
    return [t.detach() for t in outs], own, torch.get_rng_state()


def together(program: list[Step]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    columns = zip(*[inputs(i) for i in range(MEMBERS)], strict=True)
    own = [torch.stack([t.detach() for t in column]).requires_grad_(k < 2) for k, column in enumerate(columns)]
    generators = [torch.Generator().manual_seed(i + 5) for i in range(MEMBERS)]

    def func(*given: torch.Tensor) -> list[torch.Tensor]:
        return execute(program, pool_of(list(given)))[len(SHAPES) :]

    lowering.raised = lowering.Raised()  # what one program asks for is remembered for the code of `func`, of all
    outs = memberwise.vmap(func, generators=generators)(*own)
    wanted = [t for t in outs if t.requires_grad]
    weights = 1 + 0.1 * torch.arange(MEMBERS, dtype=torch.float64)
    grads = [torch.ones_like(t) * weights.view(-1, *[1] * (t.ndim - 1)) for t in wanted]
    torch.autograd.backward(wanted, grads)
    return [t.detach() for t in outs], own, [generator.get_state() for generator in generators]


def compare(drawn: list[Step]) -> None:
    program = drawn
    for i in range(MEMBERS):
        torch.manual_seed(i + 5)
        program = runnable(program, lambda i=i: pool_of(inputs(i)))
    assume(program)
    lone = [alone(program, i) for i in range(MEMBERS)]
    outs, own, states = together(program)
    for i, (lone_outs, lone_own, state) in enumerate(lone):
        for k, expected in enumerate(lone_outs):
            assert_equal(outs[k][i], expected, f"member {i}, tensor {k} of {program}")
        for k, t in enumerate(lone_own):
            assert_equal(own[k][i].detach(), t.detach(), f"member {i}, input {k} after {program}")
            if t.grad is not None:
                grad = own[k].grad
                assert grad is not None, f"input {k} has lost its gradient: {program}"
                assert_equal(grad[i], t.grad, f"member {i}, gradient of input {k} of {program}")
        assert torch.equal(states[i], state), f"member {i}'s stream after {program}"


PROGRAM = st.lists(steps, min_size=1, max_size=20)


@settings(max_examples=120, report_multiple_bugs=False)
@given(PROGRAM)
def test_with_composite_rules(program: list[Step]) -> None:
    """The composite rule of layer norm may keep more than the layer alone, so programs with one write nothing."""
    layered = any(step.name == "layer_norm" for step in program)
    compare([step for step in program if not layered or step.name in VALUES])


@settings(max_examples=120, report_multiple_bugs=False)
@given(PROGRAM)
def test_by_single_operations(program: list[Step]) -> None:
    with composites_disabled():
        compare(program)
