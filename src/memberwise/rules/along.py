"""Operations along a member's dimensions, wherever their schema has `dim`: one dimension further.

torch's own batching is right for these, at about 10 us an operation more; hence a table. What a training step runs
thousands of times (sums, means, softmax) is in `reduce`, with less to look up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memberwise.rules.axis import expanded, shift_all, shifted
from memberwise.rules.registry import register_rule

_aten = torch.ops.aten

KEPT = ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "sort.stable", "topk")
"""The dimension stays."""

REDUCED = (
    *("any.dim", "all.dim", "any.dims", "all.dims", "prod.dim_int", "nansum", "logsumexp"),
    *("max.dim", "min.dim", "argmax", "argmin", "median.dim", "kthvalue", "mode"),
    *("var.correction", "std.correction", "var_mean.correction", "std_mean.correction"),
    *("linalg_vector_norm", "norm.ScalarOpt_dim", "hash_tensor"),
)
"""The dimension goes, unless `keepdim`."""

WHOLE = {"max": _aten.amax.default, "min": _aten.amin.default, "any": _aten.any.dims, "all": _aten.all.dims}
"""Reductions of all values to one, and the same along given dimensions."""


class _Along:
    """The rule of one overload: its arguments by name, with `dim` moved."""

    def __init__(self, overload: Any, kept: bool) -> None:
        arguments = overload._schema.arguments
        self.overload = overload
        self.names = [argument.name for argument in arguments if not argument.kwarg_only]
        self.keywords = [argument.name for argument in arguments if argument.kwarg_only]
        self.defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        self.takes_list = any(a.name == "dim" and "List[int]" in str(a.type) for a in arguments)
        self.kept = kept

    def __call__(self, info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        x, dim = given["self"], given["dim"]
        if self.takes_list:
            given["dim"] = shift_all(dim, x.ndim - 1) if dim else list(range(1, x.ndim))
        elif dim is not None:
            given["dim"] = shifted(dim, x.ndim - 1)
        if x.ndim == 1:
            return self._of_numbers(given), 0
        if given["dim"] is None:
            return self._of_all(given), 0
        return self._call(given), 0

    def _of_all(self, given: dict[str, Any]) -> Any:
        """`argmax()`: an index into all of a member's values."""
        x = given["self"]
        out = self._call({**given, "self": x.flatten(1), "dim": 1, "keepdim": False})
        return out.view(-1, *(1,) * (x.ndim - 1)) if given["keepdim"] else out

    def _of_numbers(self, given: dict[str, Any]) -> Any:
        """One number a member: a dimension of one is put in, and taken out again."""
        given.update(self=given["self"].unsqueeze(1), dim=[1] if self.takes_list else 1)
        given.update(keepdim=False)
        out = self._call(given)
        if not self.kept:
            return out
        return tuple(one.squeeze(1) for one in out) if isinstance(out, tuple) else out.squeeze(1)

    def _call(self, given: dict[str, Any]) -> Any:
        named = {name: given[name] for name in self.keywords}
        out = self.overload(*(given[name] for name in self.names), **named)
        return tuple(out) if isinstance(out, tuple) else out


def _whole(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        return call(x if x.ndim > 1 else x.unsqueeze(1), list(range(1, max(x.ndim, 2)))), 0

    return rule


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


for _name in KEPT:
    register_rule(_overload(_name), _Along(_overload(_name), kept=True))
for _name in REDUCED:
    register_rule(_overload(_name), _Along(_overload(_name), kept=False))
for _name, _call in WHOLE.items():
    register_rule(_overload(_name), _whole(_call))


@register_rule(_aten.searchsorted.Scalar)
def searchsorted(
    info: Any, in_dims: Any, ordered: torch.Tensor, number: Any, *, sorter: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """torch batches the search of tensors, and not that of a number."""
    ordered = expanded(ordered, in_dims[0], info.batch_size)
    if sorter is not None and sorter.ndim == 1:
        sorter = sorter.expand(ordered.shape)
    if isinstance(number, float) and not ordered.is_floating_point():
        ordered = ordered.double()
    values = torch.full((info.batch_size, 1), number, dtype=ordered.dtype, device=ordered.device)
    return _aten.searchsorted.Tensor(ordered, values, sorter=sorter, **kwargs).squeeze(1), 0
