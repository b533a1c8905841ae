"""The hooks of an optimizer, carried over to another one.

Missing public way: hooks are registered one by one, and cannot be listed.
"""

from __future__ import annotations

from torch.optim.optimizer import Optimizer

_KINDS = [
    f"_optimizer_{kind}_hooks"
    for kind in (
        *("step_pre", "step_post", "state_dict_pre", "state_dict_post"),
        *("load_state_dict_pre", "load_state_dict_post"),
    )
]


def copy_hooks(old: Optimizer, new: Optimizer) -> None:
    """Let `new` call what `old` calls."""
    for kind in _KINDS:
        getattr(new, kind).update(getattr(old, kind))
