"""What goes in and comes out: in_dims, out_dims, chunks, nested structures, keyword arguments, buffers written."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import memberwise
from memberwise import each, vmap
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]


def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w) * x.sum()


@pytest.mark.parametrize("w_dim", [0, 1, 2, -1, -2, -3, None])
@pytest.mark.parametrize("x_dim", [0, 1, -1, -2, None])
def test_in_dims(x_dim: int | None, w_dim: int | None) -> None:
    if x_dim is None and w_dim is None:
        pytest.skip("nothing to map over, which is an error with its own test")
    x = numbers(4) if x_dim is None else numbers(3, 4).detach().movedim(0, x_dim).requires_grad_()
    w = numbers(4, 5) if w_dim is None else numbers(3, 4, 5).detach().movedim(0, w_dim).requires_grad_()
    check(func, x, w, in_dims=[x_dim, w_dim])


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_buffers_written_in_place_under_in_dims(dim: int) -> None:
    """The caller's own tensor is written, at the axis where its members are."""

    def writes(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        state.mul_(0.9).add_(x.detach().sum())
        state[0] = 7.0
        state[-1, -1] = -1.0
        state.t().select(0, 1).sub_(x.detach()[0])
        return x * state.sum()

    state = numbers(3, 2, 4, grad=False).movedim(0, dim).contiguous()
    check(writes, state, numbers(3, 4), in_dims=[dim, 0])
    check(writes, state.detach()[..., ::1].clone(), numbers(4, 3), in_dims=[dim, -1])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_batch_norm_buffers_under_in_dims(dim: int) -> None:
    """What BatchNorm writes reaches a caller who keeps its statistics with the members last."""

    def norm(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        count.add_(1)
        return torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=0.3)

    mean, var = numbers(3, 4, grad=False, seed=1), numbers(3, 4, grad=False, seed=2).abs()
    count = torch.zeros(3, dtype=torch.int64)
    check(norm, numbers(3, 5, 4), mean.movedim(0, dim), var.movedim(0, dim), count, in_dims=[0, dim, dim, 0])


def test_a_view_of_a_larger_tensor_is_written() -> None:
    whole = torch.zeros(5, 3, 4)
    vmap(lambda own, k: own.add_(k), in_dims=(1, 0))(whole[1:3], torch.arange(3.0))
    expected = torch.zeros(5, 3, 4)
    expected[1:3] = torch.arange(3.0)[:, None]
    assert torch.equal(whole, expected)


def test_a_shared_input_written_alike_by_all_is_written_once() -> None:
    """As each lone run writes it, and as torch.vmap does; M times would be a loop's accident."""
    x, s = numbers(3, 4, grad=False), numbers(4, seed=2, grad=False)
    found = vmap(lambda own, shared: own * shared.add_(1.0), (0, None))(x, s)
    assert_equal(found, x * s)
    assert_equal(s, numbers(4, seed=2, grad=False) + 1)


def test_a_shared_input_written_with_members_values() -> None:
    """No stack can hold that; it runs as the loop does, one member after the other."""
    check(lambda x, s: x * s.add_(x.detach()).clone(), numbers(3, 4), numbers(4, seed=2, grad=False), in_dims=[0, None])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_chunks(chunk_size: int, dim: int) -> None:
    def writes(state: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Any:
        state.add_(x.detach())
        return torch.nn.functional.dropout(x @ w, 0.3), {"state": state * x}

    check(
        writes,
        numbers(4, 5, grad=False).movedim(0, dim).contiguous(),
        numbers(4, 5),
        numbers(5, 5, seed=1),
        in_dims=[dim, 0, None],
        seeds=[1, 2, 3, 4],
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("out_dims", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_out_dims(out_dims: int, chunk_size: int | None) -> None:
    x, w = numbers(3, 2, 4), numbers(3, 4, 5, seed=1)
    out = vmap(func, out_dims=out_dims, chunk_size=chunk_size)(x, w)
    y, v = numbers(3, 2, 4), numbers(3, 4, 5, seed=1)
    expected = torch.stack([func(y[i], v[i]) for i in range(3)], out_dims)
    assert_equal(out, expected)
    for result in (out, expected):
        (result * numbers(*result.shape, seed=5, grad=False)).sum().backward()
    assert_equal(x.grad, y.grad)
    assert_equal(w.grad, v.grad)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_out_dims_of_a_structure(chunk_size: int | None) -> None:
    x = numbers(3, 2, 4, grad=False)

    def several(own: torch.Tensor) -> Any:
        return own, (own * 2, {"a": own.sum(), "b": torch.arange(3.0)})

    mapped = vmap(several, out_dims=(1, (-1, {"a": 0, "b": None})), chunk_size=chunk_size)
    first, (second, rest) = mapped(x)
    assert_equal(first, x.movedim(0, 1))
    assert_equal(second, (x * 2).movedim(0, -1))
    assert_equal(rest["a"], x.sum((1, 2)))
    assert torch.equal(rest["b"], torch.arange(3.0))


def test_out_dims_broadcast_over_a_structure() -> None:
    x = numbers(3, 2, 4, grad=False)
    for found in vmap(lambda own: [own, own * 1, own * 1], out_dims=1)(x):
        assert_equal(found, x.movedim(0, 1))
    first, second = vmap(lambda own: (own, [own]), out_dims=(1, 2))(x)
    assert_equal(first, x.movedim(0, 1))
    assert_equal(second[0], x.movedim(0, 2))


def test_nested_in_dims() -> None:
    x, y, z = numbers(3, 4, grad=False), numbers(4, 3, seed=1, grad=False), numbers(4, seed=2, grad=False)

    def nested(a: dict[str, Any], b: list[Any], c: Any) -> torch.Tensor:
        return a["x"] * a["more"][0] + b[0] * b[1] + c

    mapped = vmap(nested, in_dims=({"x": 0, "more": (1,)}, [None, 0], None))
    found = mapped({"x": x, "more": (y,)}, [z, x], 2.0)
    assert_equal(found, torch.stack([nested({"x": x[i], "more": (y[:, i],)}, [z, x[i]], 2.0) for i in range(3)]))


def test_one_in_dim_for_a_whole_argument() -> None:
    tree = {"a": numbers(3, 4, grad=False), "b": [numbers(3, seed=1, grad=False)]}
    found = vmap(lambda t, k: t["a"] * t["b"][0] * k, in_dims=(0, None))(tree, 3)
    assert_equal(found, tree["a"] * tree["b"][0][:, None] * 3)


def test_in_dims_is_a_list_like_torch_refuses_it() -> None:
    for mapped in (torch.vmap, vmap):
        with pytest.raises(ValueError):
            mapped(func, in_dims=[0, 0])(numbers(3, 4), numbers(3, 4, 5))


def test_keyword_arguments() -> None:
    """As in torch a keyword tensor is shared; `each` says that it holds one entry a member; other values pass."""
    x, w = numbers(3, 4, grad=False), numbers(3, 4, 5, seed=1, grad=False)
    expected = torch.stack([func(x[i], w[i]) for i in range(3)])
    assert_equal(vmap(func)(x, w=each(w)), expected)
    assert_equal(vmap(func)(x=each(x.T.contiguous(), dim=1), w=each(w)), expected)
    options = vmap(lambda own, scale, name: own * scale if name == "yes" else own)(x, scale=2.0, name="yes")
    assert_equal(options, x * 2)


def test_keyword_tensors_are_torchs() -> None:
    x, y = numbers(3, 4, grad=False), numbers(3, 4, seed=1, grad=False)
    keyed = lambda own, other: own * other  # noqa: E731 # both maps take the same one
    assert_equal(vmap(keyed)(x, other=y), torch.vmap(keyed)(x, other=y))


def test_each_marks_a_leaf_whatever_in_dims_says() -> None:
    x, w = numbers(3, 4, grad=False), numbers(4, 5, 3, seed=1, grad=False)
    found = vmap(func, in_dims=(0, None))(x, each(w, dim=-1))
    assert_equal(found, torch.stack([func(x[i], w[..., i]) for i in range(3)]))
    found = vmap(lambda tree: func(*tree["both"]), in_dims=(None,))({"both": [each(x), each(w, -1)]})
    assert_equal(found, torch.stack([func(x[i], w[..., i]) for i in range(3)]))


class Point(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    """A dataclass with a default and something that is no tensor."""

    value: torch.Tensor
    name: str = "record"
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen one."""

    value: torch.Tensor


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dataclass that is an OrderedDict, whose attributes and keys are one."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclasses.dataclass
class CausalOutput(ModelOutput):
    """One of its kind."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: Any = None


STRUCTURES: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda t: t,
    "tuple": lambda t: (t, t * 2),
    "tuple of one": lambda t: (t,),
    "list": lambda t: [t, [t * 2, (t * 3,)]],
    "empty": lambda t: ((), [], {}, t),
    "dict": lambda t: {"b": t, "a": {"c": t * 2}},
    "ordered dict": lambda t: OrderedDict(z=t, a=t * 2),
    "user dict": lambda t: UserDict(a=t),
    "named tuple": lambda t: Point(t, Point(t * 2, None)),
    "old named tuple": lambda t: namedtuple("Old", "a b")(t, 1),
    "dataclass": lambda t: Record(t, "mine", [t * 2, None]),
    "frozen dataclass": lambda t: Frozen(t),
    "model output": lambda t: CausalOutput(loss=t.sum(), logits=t, hidden_states=(t, t * 2)),
    "none": lambda t: None,
    "none among": lambda t: (None, t, None),
    "int and text": lambda t: (3, "text", 2.5, True, t),
    "shape": lambda t: (t.shape, t.dtype, t.device, t),
    "a module": lambda t: (nn.ReLU, t),
    "same twice": lambda t: (t, t, [t]),
    "torch's own": lambda t: torch.max(t, dim=0),
    "set": lambda t: ({1, 2}, t),
}


def flat(value: Any) -> Any:
    """Everything in a structure in comparable form, tensors as they are."""
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, dict | UserDict):
        return [type(value).__name__, [(k, flat(v)) for k, v in value.items()]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, [(f.name, flat(getattr(value, f.name))) for f in dataclasses.fields(value)]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [flat(entry) for entry in value]]
    return value


def equal(ours: Any, members: list[Any]) -> None:
    first = members[0]
    if isinstance(first, torch.Tensor):
        assert type(ours) is torch.Tensor
        assert_equal(ours, torch.stack(members))
    elif isinstance(first, list):
        assert len(ours) == len(first)
        for k, entry in enumerate(ours):
            equal(entry, [member[k] for member in members])
    elif isinstance(first, tuple) and not isinstance(first, torch.Size):
        equal(list(ours), [list(member) for member in members])
    else:
        assert ours == first


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_of_any_structure(name: str, chunk_size: int | None) -> None:
    x = numbers(3, 4, grad=False)
    build = STRUCTURES[name]
    equal(flat(vmap(build, chunk_size=chunk_size)(x)), [flat(build(row)) for row in x])


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_of_any_structure_of_a_run_by_members(name: str) -> None:
    x = numbers(3, 4, grad=False)

    def build(own: torch.Tensor) -> Any:
        return STRUCTURES[name](own * 2 if bool(own.sum() > 0) else own * 3)

    equal(flat(vmap(build)(x)), [flat(build(row)) for row in x])


def test_model_output_is_whole() -> None:
    x = numbers(3, 4)
    out = vmap(STRUCTURES["model output"])(x)
    assert type(out) is CausalOutput and out.attentions is None
    assert out.loss is out["loss"] and out.logits is out["logits"] and list(out) == ["loss", "logits", "hidden_states"]
    (out.loss.sum() + out.hidden_states[1].sum()).backward()
    assert_equal(x.grad, torch.full((3, 4), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tuple", "dict", "named tuple", "dataclass", "model output", "ordered dict", "list"])
def test_structures_pass_through_inner_code(name: str) -> None:
    """Inside a call a structure holds member tensors, and what user code does with it works."""

    def func_of(x: torch.Tensor) -> torch.Tensor:
        built = STRUCTURES[name](x)
        values = [t for t in torch.utils._pytree.tree_leaves(built) if isinstance(t, torch.Tensor)]
        values += [built.value] if name == "dataclass" else []
        values += [built.loss, built["logits"], built.hidden_states[1]] if name == "model output" else []
        return sum(value.sum() for value in values) * x

    check(func_of, numbers(3, 4))


def test_members_of_different_output_shapes_are_a_coded_error() -> None:
    with pytest.raises(memberwise.errors.EngineError, match="MW203"):
        vmap(lambda x: x[x > 0])(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))


def test_results_do_not_alias_inputs_more_than_alone() -> None:
    """An input returned as it is aliases the stack; writing to the result of an operation does not reach it."""
    x = numbers(3, 4, grad=False)
    before = x.clone()
    vmap(lambda own: own * 1)(x).zero_()
    vmap(lambda own: own.clone())(x).zero_()
    assert torch.equal(x, before)
    shared = numbers(4, grad=False)
    out = vmap(lambda own, s: (own * 1, s * 1), (0, None))(x, shared)[1]
    assert out.shape == (3, 4)
    out.clone().zero_()
    assert torch.equal(shared, numbers(4, grad=False))
