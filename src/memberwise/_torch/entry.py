"""A compiled program as the one function of a library that it is, without what lies around it.

Inductor's wrapper in C++ is a function of tensors, in a library on disk. What Inductor and AOTAutograd put around it
(guards, profiling, aliases, a cache of artefacts) costs some 40 us a call, and two seconds to import; a recording
needs none of it. Missing is a public way to call that function, and to load it again in another process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import increment_version

from memberwise._torch.folder import get, put

_give = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
_take = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs


class Entry:
    """A function of tensors, called with the graph's inputs; returns its outputs.

    Args:
        function: of the library; it takes and gives handles.
        changed: which inputs count it as a change of their values.
        needs: libraries in which it finds functions of ours.
    """

    def __init__(self, function: Callable[[Any], Any], changed: Sequence[int], needs: Sequence[str] = ()) -> None:
        self.function = function
        self.changed = list(changed)
        self.needs = list(needs)

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the program returns; what it writes is written in place."""
        outputs = _take(self.function(_give(list(inputs))))
        if self.changed:
            increment_version([inputs[k] for k in self.changed])
        return outputs  # type: ignore[no-any-return] # a list of tensors

    def keep(self, path: Path) -> None:
        """Note where the library lies, for another process; a file that cannot be written is none."""
        module = getattr(self.function, "__self__", None)
        library = getattr(module, "__file__", None)
        if library is None:
            return
        name = getattr(module, "__name__", "")
        put(path, {"library": library, "module": name, "changed": self.changed, "needs": self.needs})

    @classmethod
    def kept(cls, path: Path) -> Entry | None:
        """The program noted there, if its library is still there."""
        return get(path, cls._noted)

    @classmethod
    def _noted(cls, known: Any) -> Entry:
        for library in known["needs"]:
            everywhere(library)
        return cls(_function(known["module"], known["library"]), [int(k) for k in known["changed"]], known["needs"])


def everywhere(library: str) -> None:
    """Let libraries that are loaded after this one find its functions."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _function(module: str, library: str) -> Callable[[Any], Any]:
    pointer = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined] # not in the stubs
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(pointer)  # where the library asks for it
    spec = importlib.util.spec_from_file_location(module, library)
    if spec is None or spec.loader is None:
        raise ImportError(library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, module.rpartition(".")[2])  # type: ignore[no-any-return] # named after its module
