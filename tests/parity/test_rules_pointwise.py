"""Rules of operations on each element: arguments are made from the schema, where no table says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from memberwise.rules.pointwise import BINARY, ONE_SHAPE, UNARY
from memberwise.rules.registry import RULES
from tests.parity.loops import check, numbers
from tests.parity.rule_case import RuleCase, case, of, positive, whole

_aten = torch.ops.aten
_INTEGER = ("bitwise", "gcd", "lcm")
_SHAPES = ((3, 4), (4,), (3, 1))
_EQUAL_AT_TIMES = ("eq", "ne", "le", "lt", "ge", "gt", "logical", "maximum", "minimum", "fmax", "fmin", "heaviside")
_SIGNED = ("abs", "sign", "sgn", "signbit", "relu", "neg", "ceil", "floor", "round", "trunc", "clamp", "hard", "leaky")
_UNUSUAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -2.5], dtype=torch.float64)
_MASK = of(3, 4) > 0

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "acosh": (1 + positive(3, 4),),
    "clamp.Tensor": (of(3, 4), of(4, seed=1) - 1, of(3, 1)),
    "clamp_.Tensor": (of(3, 4), of(4, seed=1) - 1, of(3, 1)),
    "conj_physical_": (torch.complex(of(3, 4), of(3, 4, seed=1)),),
    "elu_backward": (of(3, 4), 1.0, 1.0, 1.0, False, of(3, 4, seed=1)),
    "fill.Tensor": (of(3, 4), of()),
    "fill_.Tensor": (of(3, 4), of()),
    "gelu_backward": (of(3, 4), of(3, 4, seed=1)),
    "isinf": (_UNUSUAL,),
    "isnan": (_UNUSUAL,),
    "nan_to_num": (_UNUSUAL,),
    "full_like": (of(3, 4), 2.5),
    "log_sigmoid_backward": (of(3, 4), of(3, 4, seed=1), (-of(3, 4, seed=1).abs()).exp()),
    "masked_fill.Scalar": (of(3, 4), _MASK, 2.5),
    "masked_fill_.Scalar": (of(3, 4), _MASK, 2.5),
    "native_dropout_backward": (of(3, 4), _MASK, 2.0),
    "polygamma": (1, positive(3, 4)),
    "_prelu_kernel_backward": (of(3, 4), of(3, 4, seed=1), of(4)),
    "_prelu_kernel": (of(3, 4), of(4)),
    "rrelu_with_noise_backward": (of(3, 4), of(3, 4, seed=1), positive(3, 4), 0.1, 0.3, True, False),
    "_to_copy": (of(3, 4),),
    "where.self": (_MASK, of(3, 4), of(4)),
    "zero_": (of(3, 4),),
}
KEYWORDS: dict[str, dict[str, Any]] = {
    "round.decimals": {"decimals": 1},
    "round_.decimals": {"decimals": 1},
    "div.Tensor_mode": {"rounding_mode": "floor"},
    "div.Scalar_mode": {"rounding_mode": "floor"},
    "div_.Tensor_mode": {"rounding_mode": "trunc"},
    "div_.Scalar_mode": {"rounding_mode": "trunc"},
    "_to_copy": {"dtype": torch.float32},
}
ALONE = {
    _aten.empty_like.default: "its values are whatever the memory held",
    _aten.conj_physical.default: "only `conj` leads to it, which is a view alone",
}
"""Rules that are tested by hand, and why."""


def _name(op: Any) -> str:
    base, _, overload = str(op).removeprefix("aten.").partition(".")
    return base if overload == "default" else f"{base}.{overload}"


def _argument(name: str, kind: str, place: int) -> Any:
    """A value for one entry of a schema; tensors after the first have fewer dimensions."""
    integer = name.startswith(_INTEGER)
    if kind.startswith(("Tensor", "Optional[Tensor]")):
        shape = _SHAPES[place]
        if name.startswith(_EQUAL_AT_TIMES):
            return whole(3, *shape).double()
        if name.startswith(_SIGNED):
            return 2 * of(*shape, seed=place)
        return whole(7, *shape) + 1 if integer else positive(*shape, seed=place)
    if kind in ("number", "Scalar", "Optional[number]"):
        return 2 if integer else 1 if name.startswith(_EQUAL_AT_TIMES) else 0.7
    return {"int": 2, "float": 0.7, "bool": False, "str": "none", "Optional[float]": 0.2}.get(kind)


def _made(op: Any) -> RuleCase:
    name = _name(op)
    schema = op._schema
    args = ARGUMENTS.get(name)
    if args is None:
        needed = [arg for arg in schema.arguments if not arg.kwarg_only]
        needed = [arg for arg in needed if not arg.has_default_value() or str(arg.type) == "Optional[number]"]
        args = tuple(_argument(name, str(arg.type), place) for place, arg in enumerate(needed))
    places = [k for k, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    options: dict[str, Any] = dict(KEYWORDS.get(name, {}))
    if name in ("log_sigmoid_backward", "rrelu_with_noise_backward"):
        options["state"] = (2,)
    if schema.is_mutable:  # into what is shared no member can write
        options |= {"state": (0,), "stacked": [tuple(places), (0,)] if places != [0] else [(0,)]}
    return case(op, *args, name=name, thorough=False, dtypes=(torch.float32,), **options)


def _all() -> list[Any]:
    names = {name + suffix for name in (*UNARY, *BINARY, *ONE_SHAPE) for suffix in ("", "_")} | {
        "copy",
        "copy_",
        "fill",
        "fill_",
        "ldexp_",
        "zero_",
        "log_sigmoid_forward",
        "log_sigmoid_backward",
    }
    by_hand = {_aten.masked_fill.Tensor, _aten.masked_fill_.Tensor}  # in `indexing`
    return [op for op in RULES if op._schema.name.removeprefix("aten::") in names and op not in {*ALONE, *by_hand}]


CASES = [_made(op) for op in _all()]


@pytest.mark.parametrize("case", CASES, ids=lambda made: made.name)
def test_rule(case: RuleCase) -> None:
    case.check()


@pytest.mark.parametrize("name", ["add.Tensor", "mul.Tensor", "relu", "sub.Tensor", "sigmoid"])
def test_thoroughly(name: str) -> None:
    """The same rule serves hundreds; a few are run in every way."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(_aten, packet), overload or "default")
    args = (of(3, 4), of(4))[: len([a for a in op._schema.arguments if str(a.type) == "Tensor"])]
    case(op, *args, batch_dims=(0, None)[: len(args)]).check()


def test_conj() -> None:
    values = torch.complex(of(3, 4), of(3, 4, seed=1)).requires_grad_()
    check(lambda x: (x.conj() * x * (1 + 2j)).real, values)


def test_empty_like() -> None:
    out = memberwise.vmap(torch.empty_like)(of(3, 4, 5))
    assert out.shape == (3, 4, 5) and out.dtype == torch.float64


@pytest.mark.parametrize("one", [torch.float16, torch.float32, torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize("in_dims", [0, (0, None), (None, 0)])
def test_a_number_does_not_raise_the_type(one: torch.dtype, other: torch.dtype, in_dims: Any) -> None:
    """A 0-d tensor counts less in torch's types than one with dimensions; stacked, it has one, and counts as before."""
    rows, scalars = numbers(3, 4, grad=False).to(one), numbers(3, grad=False, seed=1).to(other)
    dims = (0, 0) if in_dims == 0 else in_dims
    args = tuple(value if dim == 0 else value[0] for value, dim in zip((rows, scalars), dims, strict=True))
    for func in (torch.add, torch.mul, torch.eq, lambda x, y: torch.where(y > 0, x, y)):
        check(func, *args, in_dims=dims, gradients=False)
    both = (scalars, scalars.to(one)) if dims[0] == 0 else (scalars[0], scalars.to(one))
    check(
        torch.mul,
        *(v if d == 0 else v[0] if v.ndim else v for v, d in zip(both, dims, strict=True)),
        in_dims=dims,
        gradients=False,
    )


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_prims(name: str) -> None:
    case(getattr(torch.ops.prims, name).default, of(3, 4), of(3, 4, seed=1), grad=False).check()


def test_lazy_zeros_of_a_second_derivative_go_by_rules() -> None:
    """torch adds them on the meta device, by operations that it cannot batch."""

    def penalty(x: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(F.lp_pool1d(x, 2, 2).sum(), x, create_graph=True)
        return grad.square().sum()

    with trace.recording() as record:
        check(penalty, numbers(3, 1, 2, 6))
    assert not [entry.op for entry in record.entries.values() if entry.path == "loop"]


@pytest.mark.parametrize("in_dims", [0, (0, None), (None, 0)])
def test_gelu_in_float32_takes_what_is_shared(in_dims: Any) -> None:
    """oneDNN's gradient, which float64 does not go by, broadcasts nothing: it read memory that was not there."""
    x, scale = (numbers(3, 4, 5, seed=seed).detach().float().requires_grad_() for seed in (0, 1))
    dims = (0, 0) if in_dims == 0 else in_dims
    args = [
        value if dim == 0 else value.detach()[0].requires_grad_() for value, dim in zip((x, scale), dims, strict=True)
    ]
    check(lambda x, scale: F.gelu(x) * scale, *args, in_dims=in_dims)


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", ["sub_", "mul_", "copysign_", "pow_"])
def test_a_number_is_written_in_its_own_memory(write: str, other: torch.dtype) -> None:
    """A member's number of a narrower type than what it is written with: not to a copy of the wider type."""

    def function(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16)
        getattr(x[0], write)(number.to(other))
        return x

    check(function, numbers(3, 4, grad=False).abs(), numbers(3, grad=False, seed=1).abs(), gradients=False)
