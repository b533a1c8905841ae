"""Operations on each element: the same call on the stacked tensors, ranks aligned.

torch's own batching is right for these, at about 10 us an operation more; hence a table, and no functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch

from memberwise.rules.axis import aligned, expanded, member_ndim
from memberwise.rules.registry import RULES, register_rule

_aten = torch.ops.aten


def _words(text: str) -> list[str]:
    return text.split()


UNARY = _words("""
abs acos acosh angle asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min conj_physical cos
cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish
hardtanh i0 isinf isnan leaky_relu lgamma log log10 log1p log2 logical_not logit
mish nan_to_num neg polygamma rad2deg reciprocal relu round rsqrt sgn sigmoid sign signbit
silu sin sinc sinh softplus softshrink sqrt tan tanh threshold trunc zeros_like ones_like full_like
empty_like clone _to_copy alias_copy _conj_physical special_entr special_erfcx special_i0e special_i1 special_i1e
special_log_ndtr special_ndtri special_airy_ai real_copy imag_copy
""")

BINARY = _words("""
add sub mul div floor_divide remainder fmod pow maximum minimum fmax fmin atan2 hypot copysign nextafter
heaviside eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
bitwise_left_shift bitwise_right_shift rsub logaddexp logaddexp2 xlogy special_xlog1py special_zeta gcd lcm
threshold_backward silu_backward mish_backward elu_backward hardtanh_backward
leaky_relu_backward sigmoid_backward tanh_backward softplus_backward softshrink_backward hardshrink_backward
hardsigmoid_backward hardswish_backward logit_backward native_dropout_backward where
addcmul addcdiv lerp clamp clamp_min clamp_max masked_fill polar complex igamma igammac
_prelu_kernel _prelu_kernel_backward
special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_hermite_polynomial_h
special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p
""")

ONE_SHAPE = ("gelu_backward", "rrelu_with_noise_backward")
"""Those whose kernels do not broadcast: oneDNN's reads memory that is not there."""

_SKIPPED = {"copy_", "fill_"}
_ELSEWHERE = {
    *(_aten.masked_fill.Tensor, _aten.masked_fill_.Tensor),
    *(_aten.where.default, _aten.where.Scalar, _aten.where.ScalarOther, _aten.where.ScalarSelf),
}
"""Overloads with a rule of their own, that are another operation (`where(mask)`), or are made of others."""


def _is_servable(overload: Any) -> bool:
    """Plain, of tensors and scalars only; `out=` and what takes numbers alone go down the ladder."""
    schema = overload._schema
    kinds = [str(arg.type) for arg in schema.arguments]
    return not schema.is_mutable and "Tensor" in kinds and not any("List" in kind or "Dict" in kind for kind in kinds)


def _unary(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs and kwargs.get("memory_format") in _CHANNELS_LAST:
            return _in_channels_last(call, *args, **kwargs), 0
        return call(*args, **kwargs), 0

    return rule


_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


def _in_channels_last(call: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The format counts dimensions: members join the batch for it."""
    return call(x.flatten(0, 1), *args, **kwargs).unflatten(0, x.shape[:2])


def _broadcasting(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        if (len(args) > 1 and isinstance(args[1], torch.Tensor)) or len(args) > 2:
            return call(*aligned(_typed_as_alone(args, in_dims), in_dims), **kwargs), 0
        return call(*args, **kwargs), 0

    return rule


def _broadcasting_in_place(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not isinstance(args[0], torch.Tensor):
            return call(target, *args, **kwargs), 0
        typed = _typed_as_alone((target, *args), in_dims)  # but the target itself, or a copy of it would be written
        return call(*aligned((target, *typed[1:]), in_dims), **kwargs), 0

    return rule


def _typed_as_alone(args: Any, dims: Any) -> Any:
    """A member's number, a 0-d tensor, does not raise the type of a tensor with dimensions: float16 times a float32
    number is float16, and a number on the CPU goes with tensors anywhere. Stacked it has a dimension, and would; so it
    is brought to the lone result's type, and to its device, before."""
    kinds = {(arg.dtype, arg.is_cpu) for arg in args if isinstance(arg, torch.Tensor)}
    if len(kinds) < 2:
        return args
    is_number = [
        isinstance(arg, torch.Tensor) and not member_ndim(arg, dim) for arg, dim in zip(args, dims, strict=True)
    ]
    pairs = list(zip(args, is_number, strict=True))
    kind = _result_type(tuple((arg.dtype, number) for arg, number in pairs if isinstance(arg, torch.Tensor)))
    place = next((arg.device for arg, number in pairs if isinstance(arg, torch.Tensor) and not number), None)
    return [arg.to(place, None if arg.dtype is torch.bool else kind) if number else arg for arg, number in pairs]


@cache
def _result_type(kinds: tuple[tuple[torch.dtype, bool], ...]) -> torch.dtype:
    """torch's type of a result from `(type, whether a number)` of its tensors."""
    found = [
        reduce(torch.promote_types, own) for number in (False, True) if (own := [k for k, n in kinds if n is number])
    ]
    if len(found) == 1:
        return found[0]
    return torch.result_type(torch.empty(1, dtype=found[0]), torch.empty((), dtype=found[1]))


def _quick(overload: Any, name: str) -> Callable[..., Any]:
    """The Python binding where there is one: its parser takes 1 us less than the overload's."""
    found = getattr(torch, name, None)
    return found if found is not None and overload._overloadname in ("default", "Tensor") else overload


_BINDINGS = {
    "add",
    "sub",
    "mul",
    "div",
    "relu",
    "sigmoid",
    "tanh",
    "exp",
    "log",
    "neg",
    "sqrt",
    "rsqrt",
    "clone",
}


_Make = Callable[[Callable[..., Any]], Callable[..., Any]]


def _register(names: list[str], make: _Make, in_place: _Make | None = None) -> None:
    """By `make`, and those that write their first argument by `in_place`, if that is another."""
    for name in names:
        for variant in (name, name + "_"):
            packet = getattr(_aten, variant, None)
            if packet is None or variant in _SKIPPED:
                continue
            for overload_name in packet.overloads():
                overload = getattr(packet, overload_name)
                if overload in RULES or overload in _ELSEWHERE or not (_is_servable(overload) or _in_place(overload)):
                    continue
                call = _quick(overload, name) if variant in _BINDINGS else overload
                register_rule(overload, ((in_place or make) if _in_place(overload) else make)(call))


def _in_place(overload: Any) -> bool:
    schema = overload._schema
    written = [k for k, arg in enumerate(schema.arguments) if arg.alias_info is not None]
    return schema.name.endswith("_") and written == [0] and str(schema.arguments[0].type) == "Tensor"


def _of_one_shape(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        full = (
            expanded(arg, dim, info.batch_size).contiguous() if isinstance(arg, torch.Tensor) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )
        return call(*full, **kwargs), 0

    return rule


_register(BINARY, _broadcasting, _broadcasting_in_place)
_register([*ONE_SHAPE], _of_one_shape)
for _name in ("add", "sub", "mul", "div"):  # by which torch infers the type of a sum with a lazy zero, on meta tensors
    _prim = getattr(torch.ops.prims, _name).default
    register_rule(_prim, _of_one_shape(_prim))
_register(UNARY, _unary)


@register_rule(_aten.copy_.default)
def copy_(info: Any, in_dims: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    """Copying broadcasts the source to the target's rank, as any in-place binary does."""
    return target.copy_(aligned((target, source), in_dims)[1], non_blocking), 0


@register_rule(_aten.copy.default)
def copy(info: Any, in_dims: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    """As `copy_`, into new memory."""
    target = expanded(target, in_dims[0], info.batch_size)
    return _aten.copy.default(target, aligned((target, source), (0, in_dims[1]))[1], non_blocking), 0


@register_rule(_aten.fill.Tensor)
def fill(info: Any, in_dims: Any, target: torch.Tensor, value: torch.Tensor) -> Any:
    """As `fill_`, into new memory."""
    target = expanded(target, in_dims[0], info.batch_size)
    return torch.empty_like(target).copy_(aligned((target, value), (0, in_dims[1]))[1]), 0


@register_rule(_aten.fill_.Tensor)
def fill_(info: Any, in_dims: Any, target: torch.Tensor, value: torch.Tensor) -> Any:
    """A member's 0-d value fills that member's tensor."""
    return target.copy_(aligned((target, value), in_dims)[1]), 0


@register_rule(_aten.log_sigmoid_forward.default)
def log_sigmoid_forward(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
    """What it keeps is of `x`'s shape on the CPU, and empty on a GPU."""
    out, kept = _aten.log_sigmoid_forward.default(x)
    return (out, kept if kept.shape == x.shape else kept.expand(info.batch_size, *kept.shape)), 0


@register_rule(_aten.log_sigmoid_backward.default)
def log_sigmoid_backward(info: Any, in_dims: Any, grad: torch.Tensor, x: torch.Tensor, kept: torch.Tensor) -> Any:
    """A GPU's does not read what was kept, and would broadcast with it to nothing."""
    args = [expanded(value, dim, info.batch_size) for value, dim in zip((grad, x, kept), in_dims, strict=True)]
    return _aten.log_sigmoid_backward.default(*args), 0


register_rule(_aten.fill.Scalar, _unary(_aten.fill.Scalar))
register_rule(_aten.isin.Tensor_Scalar, _unary(_aten.isin.Tensor_Scalar))
register_rule(_aten.ldexp_.default, _broadcasting_in_place(_aten.ldexp_.default))  # `ldexp` is made of others
register_rule(_aten.fill_.Scalar, _unary(_aten.fill_.Scalar))
register_rule(_aten.zero_.default, _unary(_aten.zero_.default))
