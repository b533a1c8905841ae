"""One random program: each member alone, all members as a stack, and whether both came to the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import memberwise
from memberwise.engine import lowering, parted
from memberwise.engine.tensor import MemberTensor
from memberwise.errors import MemberwiseError
from memberwise.rules.registry import composites_disabled
from memberwise.testing.tolerance import assert_equal, tolerance
from survey.fuzz.instructions import WRITES
from survey.fuzz.programs import SHARED, Model, Program, execute, inputs, model_of, pool_of, reached, take

MEMBERS = 2
RIGHT, REFUSED, WRONG, UNSTEADY, EMPTY = "right", "refused", "wrong", "unsteady", "empty"
"""Unsteady: a lone run's own numbers move as far, when its inputs are moved by a rounding error. Empty: no step of it
runs alone."""


@dataclass
class Outcome:
    """What a run left: one member's, or the stack's."""

    outs: list[torch.Tensor]
    given: list[torch.Tensor]
    grads: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]
    streams: list[torch.Tensor]


@dataclass
class Verdict:
    kind: str
    program: Program
    what: str = ""
    code: str = ""
    retreats: dict[str, int] = field(default_factory=dict)


# -- what is done with a model, of one member or of all


def finish(
    program: Program, outs: list[torch.Tensor], leaves: dict[str, torch.Tensor], weigh: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """The program's backward; the gradients of its leaves, by name."""
    wanted = [t for t in outs if t.requires_grad]
    weights = [weigh(t) for t in wanted]
    if program.backward in ("grad", "double") and wanted:
        asked = (name for name, leaf in leaves.items() if leaf.requires_grad and leaf.is_leaf)  # not what a call wrote
        taken = {name: leaves[name] for name in asked if name != f"input {SHARED}"}
        double = program.backward == "double"
        grads = torch.autograd.grad(wanted, [*taken.values()], weights, create_graph=double, allow_unused=True)
        if double:
            followed = [grad for grad in grads if grad is not None and grad.requires_grad]
            if followed:
                sum((grad * grad).sum() for grad in followed).backward()  # type: ignore[union-attr] # a tensor
        first = dict(zip((f"first gradient of {name}" for name in taken), grads, strict=True))
        return {**first, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}
    if program.backward == "each":
        for tensor, weight in zip(wanted, weights, strict=True):
            tensor.backward(weight, retain_graph=True)
    elif program.backward != "none" and wanted:
        for last in (False, True) if program.backward == "twice" else (True,):
            torch.autograd.backward(wanted, weights, retain_graph=not last)
    return {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def called(program: Program, call: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results of all calls of a program; and their values after each, as what ran member by member is no view of
    the inputs, and does not see a later write to them."""
    outs, values = [], []
    with torch.no_grad() if program.backward == "none" else nullcontext():
        for _ in range(program.calls):
            outs += (found := call())
            values += [out.detach().clone() for out in found]
    return outs, values


def attributes(model: Any) -> dict[str, torch.Tensor]:
    """What calls leave in plain attributes."""
    layers = getattr(model, "layers", {})
    if "Counting" not in layers or layers["Counting"].kept is None:
        return {}
    counting = layers["Counting"]
    return {"kept": counting.kept.detach(), "python calls": torch.tensor(counting.python_calls)}


def _detached(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach() for t in tensors]


def alone(program: Program, member: int, shaken: float = 0.0) -> Outcome:
    """A lone run, as its script would have it."""
    model = model_of(program, member)
    given = inputs(program, member, shaken)
    torch.default_generator.manual_seed(member + 5)
    leaves = {f"input {k}": t for k, t in enumerate(given)}
    state: dict[str, torch.Tensor] = {}
    if program.through == "vmap":
        outs, values = called(program, lambda: execute(program.steps, pool_of(given, given[1])))
    elif program.through == "stack":
        leaves |= dict(model.named_parameters())
        outs, values = called(program, lambda: model(*given))
        state = {name: buffer.detach() for name, buffer in model.named_buffers()} | attributes(model)
    else:
        params, buffers = memberwise.stack_module_state([model])
        params = {name: p.detach()[0].requires_grad_() for name, p in params.items()}
        buffers = {name: b[0].clone() for name, b in buffers.items()}
        leaves |= params
        outs, values = called(
            program, lambda: memberwise.functional_call(model, ({**params}, {**buffers}), tuple(given))
        )
        state = buffers
    grads = finish(program, outs, leaves, lambda t: torch.full_like(t, 1 + 0.1 * member))
    return Outcome(values, _detached(given), grads, state, [torch.get_rng_state()])


def together(program: Program) -> Outcome:
    """All members as one stack."""
    models = [model_of(program, i) for i in range(MEMBERS)]
    columns = [*zip(*[inputs(program, i) for i in range(MEMBERS)], strict=True)]
    given = [torch.stack(_detached([*c])).requires_grad_(c[0].requires_grad) for c in columns[:SHARED]]
    given.append(columns[SHARED][0])
    generators = [torch.Generator().manual_seed(i + 5) for i in range(MEMBERS)]
    leaves = {f"input {k}": t for k, t in enumerate(given)}
    state: dict[str, torch.Tensor] = {}
    if program.through == "vmap":
        mapped = memberwise.vmap(_steps_of(program), (0, 0, 0, None), generators=generators)
        outs, values = called(program, lambda: mapped(*given))
    elif program.through == "stack":
        stack = memberwise.stack(models)
        stack.generators = generators
        leaves |= dict(stack.named_parameters())
        marked = [*map(memberwise.each, given[:SHARED]), given[SHARED]]
        outs, values = called(program, lambda: stack(*marked))
        state = {name: b.detach() for name, b in stack.named_buffers()} | attributes(stack)
    else:
        params, buffers = memberwise.stack_module_state(models)
        leaves |= params
        template = copy.deepcopy(models[0])

        def call(p: Any, b: Any, *own: torch.Tensor) -> Any:
            return memberwise.functional_call(template, (p, b), own)

        mapped = memberwise.vmap(call, (0, 0, 0, 0, 0, None), generators=generators)
        outs, values = called(program, lambda: mapped(params, buffers, *given))
        state = {name: b.detach() for name, b in buffers.items()}
    grads = finish(program, outs, leaves, _weights)
    return Outcome(values, _detached(given), grads, state, [g.get_state() for g in generators])


def _steps_of(program: Program) -> Callable[..., Any]:
    def func(*given: torch.Tensor) -> list[torch.Tensor]:
        return execute(program.steps, pool_of(given, given[1]))

    return func


def _weights(tensor: torch.Tensor) -> torch.Tensor:
    own = 1 + 0.1 * torch.arange(MEMBERS, dtype=torch.float64)
    return torch.ones_like(tensor) * own.view(-1, *[1] * (tensor.ndim - 1)).to(tensor.dtype)


# -- what a lone run can do


def runnable(program: Program) -> tuple[Program, list[Outcome]] | None:
    """The program without the steps that no lone run takes, backward included; and the members' lone runs."""
    program = program.with_steps(_taken(program))
    while program.steps:
        reached[0] = -1
        try:
            return program, [alone(program, i) for i in range(MEMBERS)]
        except Exception:  # whatever torch says to a step that does not fit
            steps = [*program.steps]
            del steps[_at_fault(steps, reached[0])]
            program = program.with_steps(steps)
    return None


def _at_fault(steps: list[Any], at: int) -> int:
    """The step that a forward failed in; of a backward, the last write, as nothing tells."""
    if 0 <= at < len(steps):
        return at
    return max((k for k, step in enumerate(steps) if step.name in WRITES), default=len(steps) - 1)


def _taken(program: Program) -> list[Any]:
    """The steps that do not raise, one after the other, in a first forward."""
    model: Model = model_of(program, 0)
    given = inputs(program, 0)
    pool = pool_of(given, given[1] if program.through == "vmap" else model.own)
    kept = []
    for step in program.steps:
        try:
            take(step, pool, model.layers)
            kept.append(step)
        except Exception:
            continue
    return kept


# -- the comparison


@contextmanager
def _quiet(program: Program) -> Iterator[None]:
    lowering.raised = lowering.Raised()  # what one program asks for is remembered for the code of all
    parted.of_functions.clear()
    with warnings.catch_warnings(), nullcontext() if program.composites else composites_disabled():
        warnings.simplefilter("ignore")
        yield


def compared(drawn: Program) -> Verdict:
    """Run a program both ways."""
    with _quiet(drawn), torch.random.fork_rng(devices=[]):
        found = runnable(drawn)
        if found is None:
            return Verdict(EMPTY, drawn)
        program, lone = found
        try:
            whole = together(program)
        except MemberwiseError as error:
            return Verdict(REFUSED, program, str(error), error.code)
        except Exception as error:
            return Verdict(WRONG, program, f"{type(error).__name__}: {error}")
        if any(isinstance(t, MemberTensor) for t in (*whole.outs, *whole.state.values(), *whole.grads.values())):
            return Verdict(WRONG, program, "a member tensor left the call")
        what = difference(program, lone, whole)
        if what is None:
            return Verdict(RIGHT, program)
        return Verdict(UNSTEADY if _unsteady(program, lone) else WRONG, program, what)


def difference(program: Program, lone: list[Outcome], whole: Outcome) -> str | None:
    """The first thing in which the stack is not its members."""
    try:
        _check(program, lone, whole)
    except AssertionError as error:
        return str(error).split("\n\n")[0]
    return None


def _check(program: Program, lone: list[Outcome], whole: Outcome) -> None:
    equal = _equal_as(program)
    assert len(whole.outs) == len(lone[0].outs), "the number of results"
    for i, own in enumerate(lone):
        for k, (out, expected) in enumerate(zip(whole.outs, own.outs, strict=True)):
            equal(out[i], expected, f"result {k} of member {i}")
        for k, (found, expected) in enumerate(zip(whole.given[:SHARED], own.given, strict=False)):
            equal(found[i], expected, f"input {k} of member {i} afterwards")
        for name, expected in own.state.items():
            found = whole.state[name]
            equal(found if name == "python calls" else found[i], expected, f"{name} of member {i} afterwards")
        assert torch.equal(whole.streams[i], own.streams[0]), f"the stream of member {i}"
    for name in lone[0].grads:
        _check_gradient(name, [own.grads[name] for own in lone], whole.grads.get(name), equal)


def _check_gradient(name: str, alone: list[Any], found: torch.Tensor | None, equal: Callable[..., None]) -> None:
    known = [grad for grad in alone if grad is not None]
    if not known:
        assert found is None or not found.any(), f"the {name}: none alone"
        return
    if found is None and not any(grad.any() for grad in known):
        return  # a layer's own backward knows that nothing comes through; torch's gives zeros
    assert found is not None, f"the {name} is lost"
    filled = [torch.zeros_like(known[0]) if grad is None else grad for grad in alone]
    if _is_shared(name):
        equal(found, torch.stack(filled).sum(0), f"the {name}")
        return
    for i, expected in enumerate(filled):
        equal(found[i].detach(), expected.detach(), f"the {name} of member {i}")


def _assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """`assert_equal`, which takes as long as all the rest, where a glance does not do."""
    if found.dtype is not expected.dtype or not torch.equal(found, expected):
        assert_equal(found, expected, what)


def _equal_as(program: Program) -> Callable[..., None]:
    """What equal means: the table of tolerances; where autocast rounded, that of its type."""
    if not any(step.under == "autocast" for step in program.steps):
        return _assert_equal
    rtol, atol = tolerance(torch.bfloat16)

    def equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        assert found.dtype is expected.dtype, f"{what}: {found.dtype} for {expected.dtype}"
        torch.testing.assert_close(
            found, expected, rtol=4 * rtol, atol=4 * atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )

    return equal


def _unsteady(program: Program, lone: list[Outcome]) -> bool:
    """Whether inputs moved by a rounding error give other results than the tolerance allows."""
    for shaken in (1e-15, -1e-15, 1e-14) if program.dtype == "float64" else (1e-7, -1e-7, 3e-3, -3e-3):
        moved = [_as_stack(alone(program, i, shaken)) for i in range(MEMBERS)]
        if any(difference(program, [own], other) for own, other in zip(lone, moved, strict=True)):
            return True
    return False


def _as_stack(own: Outcome) -> Outcome:
    """A lone run as that of a stack of one."""
    return Outcome(
        [t[None] for t in own.outs],
        [t[None] for t in own.given],
        {name: grad if grad is None or _is_shared(name) else grad[None] for name, grad in own.grads.items()},
        {name: t if name == "python calls" else t[None] for name, t in own.state.items()},
        own.streams,
    )


def _is_shared(name: str) -> bool:
    return name.endswith(f"input {SHARED}")
