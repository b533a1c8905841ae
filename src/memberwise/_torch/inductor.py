"""The compiler behind a recorded step: torch's Inductor, and whether it has a C++ compiler to call.

`torch._inductor.compile` is documented, and listed in no public namespace. Missing is a public way to compile an
fx graph that writes to its inputs, and a public question "is there a compiler?".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], options: dict[str, Any] | None = None
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A compiled `module`: same inputs, same outputs, same writes to the inputs. Runs nothing on `inputs`."""
    from torch import _inductor

    with torch.no_grad():
        return _inductor.compile(module, list(inputs), options=options)  # type: ignore[return-value] # a callable


def compiler_missing() -> str:
    """Why Inductor cannot build code for the CPU on this machine; "" if it can."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        return str(error) or type(error).__name__
    return ""
