"""A part of a module that has no values, and says so as soon as a value of it is wanted.

torch does not: `F.linear(real, meta)` answers with uninitialised memory, as a result like any other.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from memberwise._torch.dispatch import make_wrapper
from memberwise.errors import StateError, fail
from memberwise.trees import tree_leaves


class Valueless(torch.Tensor):
    """A meta tensor that can be asked for its shape, dtype and the like; any operation on it is an error.

    Attributes:
        of: its name in the module.
    """

    of_memberwise = True
    of: str

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        leaves = tree_leaves((args, kwargs))
        name = next(leaf.of for leaf in leaves if isinstance(leaf, cls))
        what = f"'{name}' of the template is on the meta device, and was given no values"
        do = "Give it by name; .to('meta') unties tied weights, and only the keys of stack_module_state keep ties"
        fail(StateError, "MW111", what, do=do)


def valueless(tensor: torch.Tensor, name: str) -> Valueless:
    """A meta tensor as `Valueless`, named for the error."""
    out = make_wrapper(
        Valueless,
        tensor.size(),
        strides=tensor.stride(),
        dtype=tensor.dtype,
        layout=tensor.layout,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
    )
    out.of = name
    return out
