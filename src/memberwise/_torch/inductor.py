"""The compiler behind a recorded step: torch's Inductor, and whether it has a C++ compiler to call.

`torch._inductor.compile` is documented, and listed in no public namespace. Missing is a public way to compile an
fx graph that writes to its inputs, and public questions: "is there a compiler?", "where is what it has made?".
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

_WRAPPERS: tuple[dict[str, Any], ...] = ({"cpp_wrapper": True}, {})
"""Options to try, in turn. With a wrapper in C++, what calls the kernels is compiled as well: an MLP's step with
AdamW takes 109 us instead of 132, a two-layer transformer's 535 instead of 662, and compiles in less time, as all
kernels go through the compiler at once. Some operations are out of its reach, and some of these it finds out about
when they run (`mkldnn_rnn_layer_backward`); the wrapper in Python has all."""


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], trial: Callable[[], Sequence[torch.Tensor]] | None
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A compiled `module`: same inputs, same outputs, same writes to the inputs.

    Nothing runs on `inputs`; it has run once, on what `trial()` gives, when it is returned. Without `trial`, it has
    not, and only the wrapper that has all operations is used.
    """
    with torch.no_grad():
        for options in _WRAPPERS[:-1] if trial else ():
            with contextlib.suppress(Exception):  # what the last wrapper raises is the reason given
                return _compile(module, inputs, options, trial)
        return _compile(module, inputs, _WRAPPERS[-1], trial)


def _compile(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    options: dict[str, Any],
    trial: Callable[[], Sequence[torch.Tensor]] | None,
) -> Callable[..., Any]:
    from torch import _inductor

    shown = _without_values(inputs)
    compiled = _inductor.compile(copy.deepcopy(module), shown, options=options)  # it may change what it gets
    run: Any = compiled
    if trial is not None:
        run(*trial())
    return run


def _without_values(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs as Inductor would show them to itself, but with an environment for shapes, though all are fixed: only
    then it looks for the graph among those that it keeps on disk."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    return [mode.from_tensor(value, static_shapes=True) for value in inputs]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Let operations not choose oneDNN: its recurrent layers are one opaque operation that Inductor does not take.

    (`torch.backends.mkldnn.flags` sets three other flags as well, and warns of one.) Operations that choose inside,
    as convolutions do, are the same to who looks on.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled: `$TORCHINDUCTOR_CACHE_DIR`, or a folder of the user's for such."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def compiler_missing() -> str:
    """Why Inductor cannot build code for the CPU on this machine; "" if it can."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError) as error:
        return str(error) or type(error).__name__
    return ""
