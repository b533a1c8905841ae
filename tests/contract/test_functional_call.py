"""functional_call beside torch.func.functional_call on the same inputs; then torch's known faults, mended."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from memberwise import vmap
from memberwise.errors import ArgumentError, KindError, MemberwiseError, StateError
from memberwise.functional import functional_call
from memberwise.names import named
from memberwise.state import stack_module_state

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch itself uses it, in jvp
BOTH = pytest.mark.parametrize("call", [torch.func.functional_call, functional_call], ids=["torch", "ours"])


class Foo(nn.Module):
    """The module of torch's documentation: foo and foo_tied are one parameter, and forward changes a buffer."""

    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.foo = nn.Parameter(torch.tensor(1.0))
        self.foo_tied = self.foo if tie else nn.Parameter(torch.tensor(1.0))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("total", torch.tensor(0.0))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.count = self.count + 1
        self.total.add_(x.detach().sum())
        return scale * (x + self.foo + self.foo_tied)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything a call could leave changed: which objects stand where, their values, attributes and class."""
    held = {
        (path, name): (tensor, None if tensor is None else tensor.detach().clone())
        for path, sub in module.named_modules(remove_duplicate=False)
        for table in (sub._parameters, sub._buffers)
        for name, tensor in table.items()
    }
    attributes = {path: (type(sub), sorted(vars(sub))) for path, sub in module.named_modules()}
    return {"held": held, "attributes": attributes}


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(module)
    assert now["attributes"] == before["attributes"]
    assert list(now["held"]) == list(before["held"])
    for place, (tensor, value) in before["held"].items():
        assert now["held"][place][0] is tensor, place
        assert value is None or value.is_meta or torch.equal(tensor, value), place


@BOTH
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(2),), None), (torch.ones(2), None), (None, {"x": torch.ones(2)}), ((torch.ones(2),), {"scale": 3.0})],
)
def test_arguments(call, args, kwargs) -> None:
    model = Foo()
    before = snapshot(model)
    given = {"foo": torch.tensor(2.0), "count": torch.tensor(5.0), "total": torch.tensor(0.0)}
    scale = (kwargs or {}).get("scale", 1.0)
    assert call(model, given, args, kwargs).tolist() == [5.0 * scale] * 2
    assert_untouched(model, before)


def test_what_is_not_a_module_is_named() -> None:
    with pytest.raises(KindError, match=r"expected an nn\.Module to call, got a function\. \[MW110\]"):
        functional_call(snapshot, {})


@BOTH
def test_a_list_is_one_argument(call) -> None:
    class Sum(nn.Module):
        def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
            return sum(xs)

    assert call(Sum(), {}, [torch.ones(()), torch.ones(())]) == 2


@BOTH
def test_what_is_changed_shows_in_the_dict(call) -> None:
    model = Foo()
    before = snapshot(model)
    given = {"count": torch.tensor(5.0), "total": torch.tensor(0.0)}
    total = given["total"]
    call(model, given, torch.ones(2))
    assert given["count"] == 6, "reassigned"
    assert given["total"] is total, "written in place"
    assert total == 2
    assert_untouched(model, before)


@BOTH
def test_tied_weights_as_the_documentation_has_them(call) -> None:
    model, zero = Foo(), torch.zeros(())
    rest = {"count": torch.zeros(()), "total": torch.zeros(())}
    assert call(model, {"foo": zero, **rest}, zero) == 0
    assert call(model, {"foo_tied": zero, **rest}, zero) == 0
    assert call(model, {"foo": zero, **rest}, zero, tie_weights=False) == 1
    assert call(model, {"foo": zero, "foo_tied": zero, **rest}, zero) == 0
    assert call(model, {"foo": zero, "foo_tied": torch.ones(()), **rest}, zero, tie_weights=False) == 1
    assert call(Foo(tie=False), {"foo": zero, **rest}, zero) == 1


@BOTH
def test_several_dicts(call) -> None:
    dicts = [{"foo": torch.tensor(2.0)}, {"count": torch.tensor(0.0)}, {"total": torch.tensor(0.0)}]
    assert call(Foo(), dicts, torch.ones(())) == 5
    assert call(Foo(), tuple(dicts), torch.ones(())) == 5
    assert call(Foo(), [], torch.ones(())) == 3


@BOTH
def test_gradients_reach_what_is_given_and_nothing_else(call) -> None:
    model = Foo()
    foo = torch.tensor(2.0, requires_grad=True)
    call(model, {"foo": foo, "count": torch.zeros(()), "total": torch.zeros(())}, torch.ones(2)).sum().backward()
    assert foo.grad == 4
    assert model.foo.grad is None


@BOTH
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_under_functorch_s_transforms(call, transform: str) -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(3)
    params = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return call(model, given, x)

    if transform == "grad":
        out = torch.func.grad(lambda given: run(given).sum())(params)
        assert torch.equal(out["weight"], x.expand(2, 3))
    elif transform == "vmap":
        out = torch.vmap(run)({name: torch.stack([tensor, 2 * tensor]) for name, tensor in params.items()})
        torch.testing.assert_close(out, torch.stack([model(x), 2 * model(x)]))
    elif transform == "jacrev":
        assert torch.equal(torch.func.jacrev(run)(params)["bias"], torch.eye(2))
    else:
        _, tangent = torch.func.jvp(run, (params,), ({name: torch.ones_like(t) for name, t in params.items()},))
        torch.testing.assert_close(tangent, (x.sum() + 1).expand(2))


@BOTH
def test_strict_takes_all_names_or_a_tie_for_them(call) -> None:
    rest = {"count": torch.zeros(()), "total": torch.zeros(())}
    assert call(Foo(), {"foo": torch.zeros(()), **rest}, torch.zeros(()), strict=True) == 0


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Foo()
        self.plain = torch.tensor(3.0)
        self.text = "text"
        self.register_parameter("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x) * self.plain
        return out if self.absent is None else out + self.absent


def call_strict_missing(call):
    call(Foo(), {"foo": torch.ones(())}, torch.ones(()), strict=True)


def call_strict_unexpected(call):
    call(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1), "b": torch.ones(1)}, torch.ones(1), strict=True)


def call_strict_untied(call):
    rest = {"count": torch.zeros(()), "total": torch.zeros(())}
    call(Foo(), {"foo": torch.ones(()), **rest}, torch.ones(()), strict=True, tie_weights=False)


def call_values_for_ties(call):
    call(Foo(), {"foo": torch.ones(()), "foo_tied": torch.zeros(())}, torch.ones(()))


def call_no_dict(call):
    call(Foo(), 3, torch.ones(()))


def call_an_iterator_of_dicts(call):
    call(Foo(), iter([{}]), torch.ones(()))


def call_no_dicts(call):
    call(Foo(), [{}, 3], torch.ones(()))


def call_repeated(call):
    call(Foo(), [{"foo": torch.ones(())}, {"foo": torch.ones(())}], torch.ones(()))


def call_no_tensor(call):
    call(Foo(), {"foo": 3.0}, torch.ones(()))


def call_no_tensor_attribute(call):
    call(Nested(), {"text": torch.ones(())}, torch.ones(()))


def call_no_submodule(call):
    call(Foo(), {"inner.foo": torch.ones(())}, torch.ones(()))


def call_through_a_tensor(call):
    call(Nested(), {"plain.foo": torch.ones(())}, torch.ones(()))


def call_no_name(call):
    call(Nested(), {"inner.": torch.ones(())}, torch.ones(()))


def call_scripted(call):
    call(torch.jit.script(nn.Linear(1, 1)), {}, torch.ones(1))


def call_data_parallel(call):
    call(nn.DataParallel(nn.Linear(1, 1)), {}, torch.ones(1))


REFUSED: dict[Callable[..., None], tuple[type[Exception], str]] = {
    call_strict_missing: (StateError, "Missing key(s): 'count', 'total'."),
    call_strict_unexpected: (StateError, "Unexpected key(s): 'b'."),
    call_strict_untied: (StateError, "Missing key(s): 'foo_tied'."),
    call_values_for_ties: (ArgumentError, "multiple values for keys ['foo', 'foo_tied'], which are tied"),
    call_no_dict: (ArgumentError, "expected a dict or a sequence of dicts, got a int"),
    call_an_iterator_of_dicts: (ArgumentError, "expected a dict or a sequence of dicts, got a list_iterator"),
    call_no_dicts: (ArgumentError, "to be dicts, got dict, int"),
    call_repeated: (ArgumentError, "['foo'] appeared in multiple dictionaries"),
    call_no_tensor: (KindError, "'foo': 3.0 is not an instance of torch.Tensor"),
    call_no_tensor_attribute: (KindError, "attribute `text`: 'text' is not an instance of torch.Tensor"),
    call_no_submodule: (AttributeError, "Foo has no attribute `inner` (of 'inner')"),
    call_through_a_tensor: (KindError, "'plain' of 'plain' is a Tensor, expected a module"),
    call_no_name: (KeyError, "'inner.' does not end in the name of a tensor"),
    call_scripted: (StateError, "Jitted modules"),
    call_data_parallel: (StateError, "nn.DataParallel"),
}


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: wrong.__name__)
def test_what_torch_refuses_is_refused_with_torch_s_type(wrong) -> None:
    kind, text = REFUSED[wrong]
    with pytest.raises(Exception) as theirs:
        wrong(torch.func.functional_call)
    with pytest.raises(kind) as ours:
        wrong(functional_call)
    assert isinstance(ours.value, theirs.type)
    assert text in str(ours.value)
    assert "[MW110]" in str(ours.value)
    assert not isinstance(ours.value, MemberwiseError) or ours.value.code == "MW110"


@pytest.mark.parametrize("name", ["text", "inner.text2.foo", "inner.foo"])
def test_a_refused_call_has_changed_nothing(name: str) -> None:
    model = Nested()
    before = snapshot(model)
    wrong = 3.0 if name == "inner.foo" else torch.ones(())
    with pytest.raises((TypeError, AttributeError)):
        functional_call(model, {"inner.count": torch.ones(()), "plain": torch.ones(()), name: wrong}, torch.ones(()))
    assert_untouched(model, before)


@BOTH
def test_names_that_are_neither_parameter_nor_buffer(call) -> None:
    model = Nested()
    before = snapshot(model)
    rest = {"inner.count": torch.zeros(()), "inner.total": torch.zeros(())}
    assert call(model, {"plain": torch.tensor(10.0), **rest}, torch.ones(())) == 30
    assert call(model, {"unheard_of": torch.tensor(10.0), **rest}, torch.ones(())) == 9
    assert call(model, {"absent": torch.tensor(10.0), **rest}, torch.ones(())) == 19
    assert call(model, {"absent": None, **rest}, torch.ones(())) == 9
    assert_untouched(model, before)


@BOTH
def test_an_error_in_forward_leaves_the_module_as_it_was(call) -> None:
    class Failing(Foo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise ZeroDivisionError

    model, given = Failing(), {"foo": torch.tensor(2.0), "count": torch.tensor(0.0), "total": torch.tensor(0.0)}
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        call(model, given, torch.ones(()))
    assert_untouched(model, before)
    assert given["count"] == 1


def test_an_interrupt_leaves_the_dicts_alone() -> None:
    class Interrupted(Foo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise KeyboardInterrupt

    model, given = Interrupted(), {"count": torch.tensor(0.0), "total": torch.tensor(0.0)}
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        functional_call(model, given, torch.ones(()))
    assert_untouched(model, before)
    assert given["count"] == 0


def test_buffers_set_to_none_deleted_or_made_attributes() -> None:
    """torch puts a marker of its own into the dict, and leaves the module without its buffers."""

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cleared", torch.ones(()))
            self.register_buffer("deleted", torch.ones(()))
            self.register_buffer("replaced", torch.ones(()))

        def forward(self) -> torch.Tensor:
            out = self.cleared + self.deleted + self.replaced
            self.cleared = None
            del self.deleted, self.replaced
            self.replaced = out  # a plain attribute now
            return out

    model = Forgetful()
    before = dict(model.named_buffers())
    given = {name: torch.tensor(2.0) for name in before}
    assert functional_call(model, given) == 6
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == {n: id(t) for n, t in before.items()}
    assert "replaced" not in vars(model)
    assert given["cleared"] is None
    assert given["deleted"] == 2
    assert given["replaced"] == 6


@BOTH
def test_parametrized_by_the_names_of_the_originals(call) -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    given = {"parametrizations.weight.original0": torch.full((2, 1), 2.0)}
    direction = model.parametrizations.weight.original1
    expected = nn.functional.linear(x, 2 * direction / direction.norm(dim=1, keepdim=True), model.bias)
    before = snapshot(model)
    torch.testing.assert_close(call(model, given, x), expected)
    assert_untouched(model, before)


# What torch gets wrong


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_submodule_reachable_by_two_paths_is_left_as_it_was(names: tuple[str, ...], tie_weights: bool) -> None:
    """pytorch#164759: torch leaves the given tensor in the module."""

    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = TwoPaths()
    before = snapshot(model)
    weight = 2 * torch.eye(2)
    out = functional_call(model, dict.fromkeys(names, weight), torch.ones(2), tie_weights=tie_weights)
    assert out.tolist() == [4.0, 4.0]
    assert_untouched(model, before)


def test_torch_still_has_that_fault() -> None:
    """If this turns red, torch has mended it, and the docstring of functional_call says too much."""

    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = TwoPaths()
    weight = model.a.weight
    torch.func.functional_call(model, {"a.weight": torch.eye(2)}, torch.ones(2))
    assert model.a.weight is not weight


def test_two_dicts_get_what_was_reassigned() -> None:
    """torch merges the dicts into one of its own, and drops what the module put there."""
    model = Foo()
    params, buffers = {"foo": torch.tensor(2.0)}, {"count": torch.tensor(5.0), "total": torch.tensor(0.0)}
    functional_call(model, (params, buffers), torch.ones(2))
    assert buffers["count"] == 6
    assert buffers["total"] == 2
    assert model.count == 0
    assert list(params) == ["foo"]


def test_reassigned_buffers_of_a_chain_of_calls() -> None:
    model, lone = Foo(), Foo()
    params, buffers = {"foo": torch.tensor(1.0)}, {"count": torch.tensor(0.0), "total": torch.tensor(0.0)}
    for step in range(4):
        x = torch.full((2,), float(step))
        assert torch.equal(functional_call(model, (params, buffers), x), lone(x))
    assert buffers["count"] == lone.count == 4
    assert buffers["total"] == lone.total


@pytest.mark.parametrize("mapped", [torch.vmap, vmap], ids=["torch.vmap", "ours"])
@pytest.mark.parametrize("merged", [True, False], ids=["one dict", "two dicts"])
def test_reassigned_buffers_of_all_members(mapped, merged: bool) -> None:
    models = [Foo() for _ in range(3)]
    with torch.no_grad():
        for index, model in enumerate(models):
            model.foo.fill_(index)
            model.count.fill_(10 * index)
    params, buffers = stack_module_state(models)

    def call(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        both = {**p, **b}
        out = functional_call(models[0], both if merged else (p, b), x)
        return out, (both if merged else b)["count"]

    out, count = mapped(call)(params, buffers, torch.ones(3, 2))
    assert out.tolist() == [[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]]
    assert count.tolist() == [1.0, 11.0, 21.0]
    assert buffers["total"].tolist() == [2.0, 2.0, 2.0], "written in place, through the member"
    assert models[0].count == 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_modules_inside_our_vmap(kind) -> None:
    models = [kind(3, 4).double() for _ in range(3)]
    x = torch.randn(5, 2, 3, dtype=torch.double)
    params, _ = stack_module_state(models)
    template = kind(3, 4).double()
    before = snapshot(template)
    out = vmap(lambda p: functional_call(template, p, x)[0])(params)
    out.square().sum().backward()
    assert_untouched(template, before)
    assert template._flat_weights[0] is template.weight_ih_l0
    for index, model in enumerate(models):
        expected = model(x)[0]
        expected.square().sum().backward()
        torch.testing.assert_close(out[index], expected, rtol=1e-10, atol=1e-10)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(params[name].grad[index], parameter.grad, rtol=1e-10, atol=1e-10)


def test_a_dict_that_forward_itself_changed_is_not_overwritten() -> None:
    class Writing(Foo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            given["count"] = torch.tensor(100.0)
            return super().forward(x)

    given = {"count": torch.tensor(0.0), "total": torch.tensor(0.0)}
    functional_call(Writing(), given, torch.ones(()))
    assert given["count"] == 100


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


@pytest.mark.parametrize("mapped", [torch.vmap, vmap], ids=["torch.vmap", "ours"])
def test_ties_are_kept_on_a_template_moved_to_meta(mapped) -> None:
    models = [TiedNet().double() for _ in range(3)]
    template = copy.deepcopy(models[0]).to("meta")
    assert template.decoder.weight is not template.encoder.weight, "the move unties them"
    params, _ = stack_module_state(models)
    x = torch.randn(5, 3, dtype=torch.double)
    out = mapped(lambda given, data: functional_call(template, given, data), (0, None))(params, x)
    out.sum().backward()
    for index, model in enumerate(models):
        expected = model(x)
        torch.testing.assert_close(out[index], expected, rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(expected.sum(), model.encoder.weight)
        torch.testing.assert_close(params["encoder.weight"].grad[index], gradient, rtol=1e-10, atol=1e-10)


def test_ties_of_the_names_satisfy_strict_and_yield_to_what_is_given() -> None:
    template = TiedNet().to("meta")
    name = named("encoder.weight", tied=("decoder.weight", "not.there"))
    given = {name: torch.eye(3)}
    assert functional_call(template, given, torch.ones(3), strict=True).tolist() == torch.ones(3).tanh().tolist()
    both = {name: torch.eye(3), "decoder.weight": 2 * torch.eye(3)}
    assert functional_call(template, both, torch.ones(3)).tolist() == (2 * torch.ones(3).tanh()).tolist()
    with pytest.raises(RuntimeError, match=r"'decoder\.weight'"):
        functional_call(template, given, torch.ones(3), strict=True, tie_weights=False)


class Looking(TiedNet):
    """Uses its decoder's weight in every way that needs no values before it uses the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.decoder.weight
        assert weight.shape == (3, 3)
        assert weight.dtype is x.dtype
        assert weight.requires_grad
        return x @ (weight.t().contiguous() * 2).view(3, 3)


@pytest.mark.parametrize("kind", [TiedNet, Looking])
@pytest.mark.parametrize("mapped", [None, torch.vmap, vmap], ids=["alone", "torch.vmap", "ours"])
def test_a_meta_template_that_was_given_too_little_is_refused(kind, mapped) -> None:
    """torch answers with uninitialised memory."""

    def call(x: torch.Tensor) -> torch.Tensor:
        return functional_call(template, {"encoder.weight": torch.eye(3)}, x)

    template = kind().to("meta")
    before = snapshot(template)
    with pytest.raises(StateError, match=r"'decoder\.weight' of the template is on the meta device(.|\n)*\[MW111\]"):
        call(torch.ones(3)) if mapped is None else mapped(call)(torch.ones(2, 3))
    assert_untouched(template, before)


@BOTH
def test_all_on_meta_gives_meta_results(call) -> None:
    template = TiedNet().to("meta")
    given = {"encoder.weight": torch.ones(3, 3, device="meta")}
    assert call(template, given, torch.ones(3, device="meta")).is_meta
    assert call(template, {}, torch.ones(3, device="meta")).is_meta


def test_a_meta_template_with_an_unused_rest_runs() -> None:
    template = TiedNet().to("meta")
    template.unused = nn.Linear(2, 2, device="meta")
    given = {"encoder.weight": torch.eye(3), "decoder.weight": torch.eye(3)}
    assert functional_call(template, given, torch.zeros(3)).tolist() == [0.0] * 3


class NoInverse(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


PARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "no right_inverse": lambda: parametrize.register_parametrization(nn.Linear(3, 3), "weight", NoInverse()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_computed_name_disables_its_parametrization(kind: str) -> None:
    """torch documents this, but runs the value through the parametrization backwards, and writes to the module."""
    model = PARAMETRIZED[kind]()
    before = snapshot(model)
    x, weight = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    out = functional_call(model, {"weight": weight}, x)
    assert torch.equal(out, nn.functional.linear(x, weight, model.bias))
    out.sum().backward()
    assert torch.equal(weight.grad, x.sum(0).expand(3, 3))
    assert_untouched(model, before)


def test_two_computed_names_and_a_call_inside_a_call() -> None:
    model = parametrizations.weight_norm(parametrizations.weight_norm(nn.Linear(2, 2)), "bias", dim=None)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = functional_call(model, {"weight": 5 * torch.eye(2), "bias": torch.ones(2)}, x)
            return first + self.inner(x)

    before = snapshot(model)
    given = {"inner.weight": torch.eye(2), "inner.bias": torch.zeros(2)}
    assert functional_call(Twice(), given, torch.ones(2)).tolist() == [7.0, 7.0]
    assert_untouched(model, before)
    assert model(torch.ones(2)).requires_grad


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_modules_keep_nothing_of_a_call(kind) -> None:
    """torch leaves the given weights in a second list of the module's, until it is called again."""
    model = kind(3, 4)
    x = torch.randn(2, 1, 3)
    expected = model(x)[0]
    given = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    held = weakref.ref(given["weight_ih_l0"])
    assert not functional_call(model, given, x)[0].any()
    assert model._flat_weights[0] is model.weight_ih_l0
    del given
    assert held() is None
    assert torch.equal(model(x)[0], expected)


def test_nested_calls_of_one_module() -> None:
    model = nn.Linear(2, 2, bias=False)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional_call(model, {"weight": 3 * torch.eye(2)}, x) + self.inner(x)

    before = snapshot(model)
    assert functional_call(Outer(), {"inner.weight": torch.eye(2)}, torch.ones(2)).tolist() == [4.0, 4.0]
    assert_untouched(model, before)


def test_threads_with_a_template_each() -> None:
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        model = TiedNet()
        for _ in range(20):
            results[index] = functional_call(model, {"encoder.weight": index * torch.eye(3)}, torch.ones(3))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert torch.equal(results[index], index * torch.tanh(index * torch.ones(3)))


@pytest.mark.parametrize("build", [TiedNet, lambda: nn.Linear(3, 3)])
def test_torch_compile_takes_it_in_one_graph(build) -> None:
    model = build()
    x = torch.randn(2, 3)
    compiled = torch.compile(lambda given, x: functional_call(model, given, x), backend="aot_eager", fullgraph=True)
    given = {
        name: torch.randn(3, 3, requires_grad=True) for name, tensor in model.named_parameters() if tensor.ndim > 1
    }
    expected = functional_call(model, given, x)
    out = compiled(given, x)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(
        torch.autograd.grad(out.sum(), given.values()), torch.autograd.grad(expected.sum(), given.values()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_modules_in_a_circle(tie_weights: bool) -> None:
    """With ties, torch goes around the circle without end."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model[0].parent = model
    given = {"0.parent.0.weight": torch.zeros(2, 2), "0.bias": torch.ones(2)}
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    out = functional_call(model, given, torch.ones(2), tie_weights=tie_weights)
    assert torch.equal(out, torch.ones(2).tanh())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
