"""Above autograd: composite rules, and the reads of memory that no dispatch sees."""

from __future__ import annotations

from typing import Any

from memberwise._torch.dispatch import DisableTorchFunctionSubclass
from memberwise.engine.host import HOST
from memberwise.engine.signals import Decline
from memberwise.engine.tensor import MemberTensor
from memberwise.rules.registry import composite_for


def on_function(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Entry from `__torch_function__`."""
    with DisableTorchFunctionSubclass():
        read = HOST.get(func)
        if read is not None:
            return read(*args, **kwargs) if kwargs else read(*args)
        rule = composite_for(func)
        if rule is not None:
            out = rule(*args, **kwargs) if kwargs else rule(*args)
            if type(out) is not Decline:
                return out
        return func(*args, **kwargs) if kwargs else func(*args)


MemberTensor._on_function = on_function
