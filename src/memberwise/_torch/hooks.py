"""The hooks of an optimizer: whether there are any, and carrying them over to another one.

Missing public way: hooks are registered one by one, and cannot be listed. Calling them, with a mark for a profiler, is
what torch wraps around every `step()`; that costs 18 us, as much as the fused kernel for six small parameters.
"""

# The names without a public home are what this file is for.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import torch
import torch.optim.optimizer as _optimizer
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


def is_profiled() -> bool:
    """Whether a profiler is on."""
    return torch.autograd._profiler_enabled()


def is_attended(optimizer: Optimizer) -> bool:
    """Whether anyone waits for the optimizer's steps: a hook, or a profiler."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
        or is_profiled()
    )
