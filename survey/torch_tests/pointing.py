"""Which names of torch stand for which of Memberwise, while PyTorch's tests run."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import memberwise

NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    memberwise.vmap: ("torch.vmap", "torch.func.vmap", "functorch.vmap"),
    memberwise.functional_call: ("torch.func.functional_call", "torch.nn.utils.stateless.functional_call"),
    memberwise.stack_module_state: ("torch.func.stack_module_state",),
}
"""What torch itself calls under other names, inside `jacrev` for example, stays torch's."""

calls: Counter[str] = Counter()
"""How often each of Memberwise's functions was called by one of torch's names."""


def point() -> None:
    """From here on, in this process, the names lead to Memberwise."""
    for function, names in NAMES.items():
        counted = _counted(function)
        for name in names:
            module, _, attribute = name.rpartition(".")
            place = importlib.import_module(module)
            getattr(place, attribute)  # a name that torch has given up must not be made up here
            setattr(place, attribute, counted)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call
