"""What a stack cannot hold: parts of a model whose state, or whose operations, no stacked tensor can stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memberwise._torch.gradhooks import has_hooks

PLAIN = frozenset(
    {torch.Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, nn.UninitializedBuffer}
)  # fmt: skip
"""The kinds of tensors whose operations are those of torch, and nobody else's."""

_KINDS: tuple[tuple[type, str], ...] = (
    (torch.jit.ScriptModule, "keeps its parameters in C++; stack the Python modules, as they were before torch.jit"),
    (DistributedDataParallel, "exchanges the gradients of its own parameters; stack the modules, and wrap the stack"),
)


def strangers(module: nn.Module, shared: Sequence[str] = ()) -> Iterator[str]:
    """Tells of each part of `module` what it is, and what to do; what is kept `shared` (patterns) is not stacked.

    >>> next(strangers(torch.jit.script(nn.Linear(2, 2))))[:40]
    'the model is a RecursiveScriptModule, wh'
    """
    closed: list[str] = []
    for path, sub in module.named_modules():
        if any(path.startswith(above) for above in closed):
            continue
        why = next((why for kind, why in _KINDS if isinstance(sub, kind)), None) or _in_cpp(sub)
        if why is not None:
            closed.append(f"{path}." if path else "")
            what = f"module '{path}'" if path else "the model"
            yield f"{what} is a {type(sub).__name__}, which {why}"
            continue
        for kind, table in (("parameter", sub._parameters), ("buffer", sub._buffers)):
            for key, tensor in table.items():
                name = f"{path}.{key}" if path else key
                if tensor is None or any(fnmatchcase(name, pattern) for pattern in shared):
                    continue
                why = unstackable(tensor)
                if why is not None:
                    yield f"{kind} '{name}' {why}"


def _in_cpp(module: nn.Module) -> str | None:
    """What a module keeps in C++, as torch's quantised layers keep their weights."""
    name = next((name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)), None)
    return name and f"keeps '{name}' in C++, where no stack can see it; stack the modules before they are quantised"


def unstackable(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be stacked, or None if it can."""
    if is_foreign(tensor):
        return f"is a {type(tensor).__name__}, whose operations are its own; make it an nn.Parameter or a plain tensor"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; make it dense, or keep it in an attribute"
    if has_hooks(tensor):
        return "has hooks, which stay with it; register them on the stack's own, where the gradient is (M, *s)"
    return None


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that is not known here: its operations may be its own.

    >>> is_foreign(torch.ones(2)), is_foreign(torch.ones(2).as_subclass(type("Mine", (torch.Tensor,), {})))
    (False, True)
    """
    kind = type(tensor)
    return kind not in PLAIN and not hasattr(kind, "of_memberwise")
