"""A graph module that writes and compiles its Python code when it is first called, and not when it is made.

Most graphs of a recording are only read, rewritten or handed to a compiler. `torch.fx.GraphModule` writes each of them
out as Python at once, which took as long as recording it. Missing is a public way to say that it need not.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

_writing = threading.RLock()


class _Written(_LazyGraphModule):
    """Chunks on separate cores call it first at the same time, and a graph that two threads write out names nodes of
    one as the other does. A `forward` taken before is called in each step: it calls the code, and nothing around it."""

    def real_recompile(self) -> None:
        if self._needs_recompile():
            with _writing:
                super().real_recompile()

    def _lazy_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.real_recompile()
        return self.forward(*args, **kwargs)


def graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """`fx.GraphModule(root, graph)`, whose code waits for the first call."""
    return _Written(root, graph)
