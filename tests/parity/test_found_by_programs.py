"""What random programs and histories of stacks (`make check-fuzz`) have found, each at its smallest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memberwise
from memberwise.rules.registry import composites_disabled
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def differs(x: torch.Tensor) -> bool:
    return bool(x.detach().sum() > 0)


def test_a_gradient_of_one_input_runs_nothing_of_another() -> None:
    """One node took all inputs in: what leads to `b` alone ran too, and failed where a lone run does not look."""

    def func(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kept = b * 1
        out = a.sin() + kept * kept
        kept.mul_(2)
        return out

    a, b = numbers(3, 2), numbers(3, 2, seed=1)
    (found,) = torch.autograd.grad(memberwise.vmap(func)(a, b).sum(), a)
    assert_equal(found, a.detach().cos())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_result_of_a_recurrent_layer_may_be_written(kind: type[nn.Module], batch_first: bool) -> None:
    """The layer for all members keeps its rows for backward, which the lone layer does not."""
    layer = kind(2, 2, batch_first=batch_first).double()  # type: ignore[call-arg] # of all three

    def func(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(layer, {"weight_ih_l0": weight}, x)[0]
        out += x
        return out

    check(func, numbers(2, 3, 4, 2), numbers(2, *layer.weight_ih_l0.shape, seed=1))


def test_an_input_written_in_inference_mode_is_put_back() -> None:
    """Its values were kept in that mode, and could not be copied back outside of it."""

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            x.index_add_(0, torch.tensor([0]), x.detach()[-1:].clone())
        return w * w

    check(func, numbers(4, 3, seed=5), numbers(4, 3, seed=6))


def test_an_input_is_detached_by_a_member_that_runs_alone() -> None:
    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.detach_() * w * (2 if differs(x) else 3)

    check(func, numbers(4, 3, seed=5), numbers(4, 3, seed=6))


class Looking(nn.Module):
    """Asks whether its parameters require a gradient, and takes one where the caller has gradients off."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.linear, self.scale, self.parts = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        asked = (self.scale, self.linear.weight, hidden := self.linear(x), hidden * self.scale)
        if self.parts and differs(hidden):
            hidden = hidden * 2
        with torch.enable_grad():
            of_scale, of_weight = torch.autograd.grad(
                (self.scale * self.linear(x)).sum(), (self.scale, self.linear.weight)
            )
        return hidden + of_scale + of_weight.sum() + sum(2**k for k, t in enumerate(asked) if t.requires_grad)


@pytest.mark.parametrize("parts", [False, True])
def test_parameters_require_gradients_where_the_caller_has_them_off(parts: bool) -> None:
    models = [Looking(parts).double() for _ in range(3)]
    stack = memberwise.stack(models)
    x = numbers(3, 2, 3, grad=False)
    with torch.no_grad():
        out = stack(memberwise.each(x))
        assert_equal(out, torch.stack([model(own) for model, own in zip(models, x, strict=True)]))
        assert not out.requires_grad


class Keeping(nn.Module):
    """Leaves a tensor and a count in attributes, and asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.kept: torch.Tensor | None = None
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.weight if self.kept is None else x * self.weight + self.kept
        self.calls += 1
        self.kept = out.detach() * self.calls
        return out * 2 if differs(out) else out * 3


def test_a_template_of_a_mapped_function_keeps_what_each_member_leaves() -> None:
    """The half-done run left a member tensor in the attribute, and each member found its neighbour's."""
    models = [Keeping().double() for _ in range(4)]
    params, _ = memberwise.stack_module_state(models)
    template = Keeping().double()
    run = memberwise.vmap(lambda p, x: memberwise.functional_call(template, p, x), (0, None))
    x = numbers(2, 3, grad=False)
    for call in range(3):
        assert_equal(run(params, x).detach(), torch.stack([model(x).detach() for model in models]))
        assert template.calls == call + 1


def test_a_view_that_is_equal_in_all_members_is_written_in_a_list() -> None:
    """The view did not learn of the write, and its gradient went past it."""

    def func(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        view = (x * 1).narrow(-1, 0, 2)
        torch._foreach_mul_([view], 0.5)
        return view * own

    check(func, numbers(3), numbers(2, 2, seed=1), in_dims=[None, 0])


def test_layers_that_could_draw_and_do_not_in_inference_mode() -> None:
    """There torch hands dropout and recurrent layers over whole, as operations that draw."""
    layers = nn.Dropout(0.3).eval(), nn.AlphaDropout(0.3).eval(), nn.GRU(3, 3).double().eval()

    def func(x: torch.Tensor) -> torch.Tensor:
        return layers[1](layers[0](layers[2](x)[0])) * 2

    x = numbers(2, 4, 3, grad=False)
    with torch.inference_mode():
        assert_equal(memberwise.vmap(func)(x), torch.stack([func(own) for own in x]))


class Asking(nn.Module):
    """Asks for a value after its part has asked for one."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.scale = part, nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.part(x) * self.scale
        return out * 2 if differs(out) else out * 3


def test_a_module_parts_ways_after_a_part_of_it_has() -> None:
    """In each member's run of the larger module, the smaller one ran for all members once more."""
    models = [nn.Sequential(Asking(Asking(nn.Tanh()))).double() for _ in range(4)]
    stack = memberwise.stack(models)
    x = numbers(4, 2, 3, grad=False)
    for _ in range(2):
        out = stack(memberwise.each(x))
        assert_equal(out, torch.stack([model(own) for model, own in zip(models, x, strict=True)]))
    out.sum().backward()
    for name, p in stack.named_parameters():
        grads = [torch.autograd.grad(m(own).sum(), m.get_parameter(name))[0] for m, own in zip(models, x, strict=True)]
        assert_equal(p.grad, torch.stack(grads), name)


def test_what_torch_hands_back_in_inference_mode_is_what_was_given() -> None:
    """There torch hands dropout over whole, and batching it made a new tensor."""
    layer = nn.Dropout(0.3).eval()

    def func(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            same = layer(x)
        return same * 2

    check(func, numbers(2, 3))


def test_statistics_written_in_inference_mode_are_put_back() -> None:
    """There torch hands batch normalization over whole, as an operation whose schema tells of no writes."""
    models = [nn.BatchNorm1d(3).double() for _ in range(4)]
    params, buffers = memberwise.stack_module_state(models)
    x = numbers(4, 5, 3, grad=False)

    def func(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            out = memberwise.functional_call(models[0], (p, b), x)
        return x * 2 if differs(x) else out * 3

    with composites_disabled():
        memberwise.vmap(func)(params, buffers, x)
    for model, own in zip(models, x, strict=True):
        model(own)
    for name, buffer in buffers.items():
        assert_equal(buffer, torch.stack([model.get_buffer(name) for model in models]), name)


class Looked(nn.Module):
    """Takes a view of what a layer gives, where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, eps=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(x)
        with torch.no_grad():
            out[0].clone()
        return out


def test_a_result_of_a_layer_keeps_its_graph_when_a_view_of_it_is_taken() -> None:
    """The stacked result was brought into a lone run's memory order where autograd does not look."""
    models = [Looked().double().eval() for _ in range(3)]
    x = numbers(3, 4, 3)
    out = memberwise.stack(models)(memberwise.each(x))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    for own, model, found in zip(x.detach(), models, grad, strict=True):
        own.requires_grad_()
        assert_equal(found, torch.autograd.grad(model(own).square().sum(), own)[0])


class Recounting(nn.Module):
    """Counts its calls, a checkpoint's recomputation among them, before what backward needs or after it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(3, 3), first
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.kept: torch.Tensor | None = None
        self.python_calls = 0

    def count(self, now: bool) -> None:
        if now:
            self.calls += 1
            self.assigned = self.assigned + 1
            self.kept = self.calls * 2 if self.kept is None else self.kept + self.calls
            self.python_calls += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count(self.first)
        hidden = self.linear(x)
        out = hidden.sin() if differs(x) else hidden * 2
        self.count(not self.first)
        return out


class InCheckpoint(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[return-value] # one tensor


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_members_that_part_ways_in_a_checkpoint_are_recomputed_one_by_one(first: bool, nested: bool) -> None:
    """One recomputation served all: as often as one of them needed it, and to the end for all but the last."""
    models: list[nn.Module] = [InCheckpoint(Recounting(first)).double() for _ in range(2)]
    if nested:
        models = [nn.Sequential(model, nn.Tanh()) for model in models]
    stack = memberwise.stack(models)
    x = torch.stack([torch.ones(2, 3), -torch.ones(2, 3)]).double()

    def backward(model: nn.Module, x: torch.Tensor, given: torch.Tensor) -> None:
        grads = torch.autograd.grad(model(given).sum(), [x, *model.parameters()], create_graph=True)
        sum(grad.square().sum() for grad in grads if grad.requires_grad).backward()  # type: ignore[union-attr] # so

    for _ in range(2):
        backward(stack, x.requires_grad_(), memberwise.each(x))
        for model, own in zip(models, x.detach(), strict=True):
            backward(model, own.requires_grad_(), own)
        for found, *alone in zip(stack.buffers(), *(model.buffers() for model in models), strict=True):
            assert_equal(found, torch.stack(alone))
        for member, model in zip(stack, models, strict=True):
            ours, theirs = (
                next(part for part in m.modules() if hasattr(part, "python_calls")) for m in (member, model)
            )
            assert_equal(ours.kept, theirs.kept)  # type: ignore[arg-type] # tensors
            assert ours.python_calls == theirs.python_calls


def test_a_stack_of_one_keeps_what_a_member_leaves_stacked() -> None:
    """What all turns leave is one object where there is one turn, and was taken for a constant."""
    models = [Keeping().double() for _ in range(2)]
    for k, model in enumerate(models):
        nn.init.constant_(model.weight, 1 - 2 * k)
    stack, x = memberwise.stack(models), torch.ones(3, dtype=torch.float64)
    stack(x)
    one = stack[:1]
    models[0](x)
    for _ in range(2):
        assert_equal(one(x)[0].detach(), models[0](x).detach())
        assert_equal(one.kept[0], models[0].kept)  # type: ignore[index,arg-type] # tensors, by now


class KeepingInCheckpoint(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = Keeping(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=self.reentrant)  # type: ignore[return-value] # one tensor


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_template_of_a_mapped_function_is_recomputed_with_what_each_member_has_left(reentrant: bool) -> None:
    """A checkpoint found what all members had left, put together."""
    models = [KeepingInCheckpoint(reentrant).double() for _ in range(2)]
    for k, model in enumerate(models):
        nn.init.constant_(model.part.weight, 1 - 2 * k)
    params, _ = memberwise.stack_module_state(models)
    template = KeepingInCheckpoint(reentrant).double()
    run = memberwise.vmap(lambda p, x: memberwise.functional_call(template, p, x), (0, None))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        run(params, x).sum().backward()
        for model in models:
            model(x).sum().backward()
    (found,) = params.values()
    assert_equal(found.grad, torch.stack([model.part.weight.grad for model in models]))  # type: ignore[arg-type] # so
    assert template.part.calls == models[0].part.calls == (4 if reentrant else 2)  # else it ends before the count


class Ends(torch.autograd.Function):
    """Has no gradient for what it was given, as a reentrant checkpoint of what is detached inside."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: object) -> None:
        return None


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.GRU(3, 3), nn.ReLU()], ids=repr)
@pytest.mark.parametrize("again", [True, False])
def test_a_layer_gets_no_gradient(layer: nn.Module, again: bool) -> None:
    """Its backward runs all the same, with None, which the rule took for a tensor."""
    layer = layer.double()

    def func(x: torch.Tensor) -> torch.Tensor:
        out = layer(x)
        return Ends.apply(out if isinstance(out, torch.Tensor) else out[0])  # type: ignore[return-value] # a tensor

    x = numbers(2, 4, 3)
    assert torch.autograd.grad(func(x[0]).sum(), x, create_graph=again, allow_unused=True) == (None,)
    (found,) = torch.autograd.grad(memberwise.vmap(func)(x).sum(), x, create_graph=again, allow_unused=True)
    assert found is None or not found.any()


def test_gradients_of_a_module_that_parts_ways_are_plain_where_a_function_of_ones_own_exists() -> None:
    """The node that takes the members' rows out was taken for one of a user's Function, and ran inside the call."""
    assert issubclass(Ends, torch.autograd.Function)
    models = [nn.Sequential(Asking(nn.Tanh()), nn.Tanh()).double() for _ in range(4)]
    stack = memberwise.stack(models)
    x = numbers(4, 2, 3)
    for _ in range(2):
        stack(memberwise.each(x)).sum().backward()
    assert {type(leaf.grad) for leaf in (x, *stack.parameters())} == {torch.Tensor}


class Within(torch.autograd.Function):
    """Takes its gradients by a backward of its own, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.x = layer, x.detach()
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.layer(x), grads[0])
        return None, x.grad


class Checked(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.norm, self.by_hand = nn.LayerNorm(3), by_hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_hand:
            return Within.apply(self.norm, x)  # type: ignore[return-value] # a tensor
        return checkpoint(self.norm, x, use_reentrant=True)  # type: ignore[return-value] # likewise


@pytest.mark.parametrize("by_hand", [True, False])
def test_gradients_that_a_backward_in_a_backward_takes_are_plain(by_hand: bool) -> None:
    """It ran inside the call once more, and left a member tensor in `.grad`."""
    models = [Checked(by_hand).double() for _ in range(2)]
    stack = memberwise.stack(models)
    x = numbers(2, 4, 3)
    for _ in range(2):
        stack(memberwise.each(x)).square().sum().backward()
        for model, own in zip(models, x.detach(), strict=True):
            model(own.requires_grad_()).square().sum().backward()
    for name, p in stack.named_parameters():
        assert type(p.grad) is torch.Tensor
        assert_equal(p.grad, torch.stack([model.get_parameter(name).grad for model in models]))  # type: ignore[misc] # so


@pytest.mark.parametrize("both", [True, False])
def test_what_a_members_recomputation_writes_counts_for_it_alone(both: bool) -> None:
    """Members that run one by one hold rows of one tensor, which share their count of writes."""

    def halved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            b.mul_(0.5)
        return a * 2 if differs(a) else a * b.mean()

    def func(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return checkpoint(halved, a, b if both else a, use_reentrant=True)  # type: ignore[return-value] # a tensor

    check(func, numbers(3, 2), numbers(3, 2, seed=1))


def test_a_second_recomputation_that_writes_an_input_is_refused_as_alone() -> None:
    def halved(a: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            a.mul_(0.5)
        return a * a if differs(a) else a.sin()

    def backward_twice(call: Any, x: torch.Tensor) -> None:
        out = call(x).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()

    def func(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(halved, x * 1, use_reentrant=True)  # type: ignore[return-value] # a tensor

    backward_twice(func, numbers(2))
    backward_twice(memberwise.vmap(func), numbers(3, 2))


def test_a_view_reaches_into_the_gaps_of_another_and_is_written() -> None:
    """Autograd takes a view of a subclass anew by way of the view between, whose gradient has no place for the gaps."""

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        part = y[::2].as_strided((3,), (1,))
        part.mul_(3)
        return y.sin() + part.sum()

    check(func, numbers(3, 6))


def test_a_view_with_gradients_off_says_whether_its_base_requires_one() -> None:
    """It is no view to autograd where the graph of an input lies below."""
    seen: list[list[bool]] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            views = x.chunk(2)[0], x[1:].view(1, 3), x.detach(), x.detach()[1:], x[1:].detach(), x.data, (x * 1)[1:]
            seen.append([view.requires_grad for view in views])
        return x.sum()

    check(func, numbers(3, 4))
    assert all(one == [True, True, False, False, False, False, False] for one in seen)


class Multiplying(nn.Module):
    """Uses what its last run has left in an attribute, a recomputation among them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.kept = nn.Parameter(torch.ones(3).double()), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._counted, x, use_reentrant=True)  # type: ignore[return-value] # a tensor

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale if self.kept is None else x * self.scale * self.kept
        self.kept = (x.detach() * (2 if differs(x) else 3)).sum()
        return out


def test_a_recomputation_finds_what_a_later_call_has_left() -> None:
    """Members that run one by one in `functional_call`: of two calls, each knew what its own had left, alone."""
    xs = [numbers(3, 3), numbers(3, 3, seed=1)]
    template, weights = Multiplying(), {"scale": numbers(3, 3, seed=2)}
    mapped = memberwise.vmap(lambda w, x: memberwise.functional_call(template, w, x))
    outs = [mapped(weights, x) for x in xs]
    for out in outs:
        out.sum().backward()
    for member in range(3):
        lone, own = Multiplying(), {"scale": weights["scale"].detach()[member].requires_grad_()}
        rows = [x.detach()[member].requires_grad_() for x in xs]
        alone = [memberwise.functional_call(lone, own, x) for x in rows]
        for out in alone:
            out.sum().backward()
        assert_equal(weights["scale"].grad[member], own["scale"].grad)
        for x, row in zip(xs, rows, strict=True):
            assert_equal(x.grad[member], row.grad)
