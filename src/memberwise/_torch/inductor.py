"""The compiler behind a recorded step: torch's Inductor, and whether it has a C++ compiler to call.

`torch._inductor.compile` is documented, and listed in no public namespace. Missing is a public way to compile an
fx graph that writes to its inputs, and public questions: "is there a compiler?", "where is what it has made?".
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.building import beside, know_vectors, programs
from memberwise._torch.entry import Entry, everywhere
from memberwise._torch.identity import memory_key
from memberwise._torch.versions import version

_WRAPPERS: tuple[dict[str, Any], ...] = ({"cpp_wrapper": True}, {})
"""Options to try, in turn. With a wrapper in C++, what calls the kernels is compiled as well: an MLP's step with
AdamW takes 109 us instead of 132, a two-layer transformer's 535 instead of 662, and compiles in less time, as all
kernels go through the compiler at once. Some operations are out of its reach, and some of these it finds out about
when they run (`mkldnn_rnn_layer_backward`); the wrapper in Python has all."""

Trial = Callable[[], Sequence[torch.Tensor]]
Compiled = Callable[..., Sequence[torch.Tensor]]


class How(NamedTuple):
    """How a graph is compiled.

    Attributes:
        threads: for how many its loops are; 0: as many as torch uses.
        channels_last: whether convolutions on the CPU get, and give, images with the channels last.
    """

    threads: int = 0
    channels_last: bool = False


USUAL = How()


class Shim(NamedTuple):
    """How Inductor's wrapper in C++ calls an operation of ours.

    Attributes:
        declaration: of the function in C.
        library: where it lies, which may have to be built first.
    """

    declaration: str
    library: Callable[[], str]


_shims: dict[Any, Shim] = {}


def put_shim(operation: Any, shim: Shim) -> None:
    """Let the wrapper in C++ call `operation`, which it would else call by Python."""
    _shims[operation] = shim


def _shims_of(module: fx.GraphModule) -> dict[Any, Shim]:
    return {node.target: _shims[node.target] for node in module.graph.nodes if node.target in _shims}


def compile_untried(module: fx.GraphModule, inputs: Sequence[torch.Tensor], how: How = USUAL) -> Compiled:
    """A compiled `module` that has not run: only the wrapper that has all operations is used; else as `begin_graph`."""
    with torch.no_grad():
        return _compile(module, inputs, _WRAPPERS[-1], how)


def begin_graph(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], how: How = USUAL
) -> Callable[[Trial], Compiled]:
    """Begin to compile `module`: same inputs, same outputs, same writes to the inputs. What is returned ends it.

    In between, the C++ compiler works in another process, while the next graph is begun. Nothing runs on `inputs`; the
    compiled graph has run, on what the trial gives, when it is returned.
    """
    begun: Compiled | None = None
    libraries: list[_Later] = []
    needs = sorted({shim.library() for shim in _shims_of(module).values()})
    for library in needs:
        everywhere(library)
    first = _WRAPPERS[0 if _on_cpu(inputs) else -1]  # a GPU's graph of launches needs no wrapper
    with contextlib.suppress(Exception), torch.no_grad(), _built_aside(libraries):
        begun = _compile(module, inputs, first, how)

    def end(trial: Trial) -> Compiled:
        with torch.inference_mode(False), torch.no_grad():  # in inference mode copies would count no versions
            if begun is not None:
                with contextlib.suppress(Exception):  # what the last wrapper raises is the reason given
                    return _direct(begun, libraries, trial, needs)
            run = _compile(module, inputs, _WRAPPERS[-1], how)
            run(*trial())
            return run

    return end


def _direct(begun: Compiled, libraries: list[_Later], trial: Trial, needs: list[str]) -> Compiled:
    """The function of the library that a compiled graph calls, if that does the same; else the compiled graph."""
    given = trial()
    versions = list(map(version, given))
    expected = begun(*given)
    changed = [k for k, (value, before) in enumerate(zip(given, versions, strict=True)) if version(value) != before]
    if len(libraries) != 1 or libraries[0].takes != len(given) or libraries[0].entry is None:
        return begun  # it is given constants as well, or is several graphs
    own, entry = trial(), Entry(libraries[0].entry, changed, needs)
    found = entry(*own)
    apart = set(map(memory_key, given)).isdisjoint(map(memory_key, expected))
    same = len(found) == len(expected) and all(
        ours.stride() == theirs.stride() and torch.allclose(ours, theirs, equal_nan=True)
        for ours, theirs in zip((*found, *own), (*expected, *given), strict=True)
    )
    return entry if apart and same else begun


def _on_cpu(inputs: Sequence[torch.Tensor]) -> bool:
    return all(value.device.type == "cpu" for value in inputs)


def _compile(module: fx.GraphModule, inputs: Sequence[torch.Tensor], options: dict[str, Any], how: How) -> Compiled:
    from torch import _inductor

    if how.threads:
        options = {**options, "cpp.threads": how.threads}
    if _on_cpu(inputs):
        know_vectors()
        options = {**options, "layout_optimization": how.channels_last}
    if shims := _shims_of(module):
        declared = {operation: [shim.declaration] for operation, shim in shims.items()}
        options = {**options, "aot_inductor.custom_ops_to_c_shims": declared}
    compiled: Any = _inductor.compile(copy.deepcopy(module), _without_values(inputs), options=options)
    return compiled  # type: ignore[no-any-return] # it may change what it gets, hence the copy


class _Later:
    """A function of a library that is being built; the first call waits for it.

    Attributes:
        entry: the function, once it was called.
        takes: how many tensors it takes.
    """

    def __init__(self, found: Callable[[], Callable[..., Any]], code: str) -> None:
        self._found = found
        self.entry: Callable[..., Any] | None = None
        (count, *_) = (*re.findall(r"raii_handles\(input_handles, (\d+)\)", code), -1)
        self.takes = int(count)

    def __call__(self, *args: Any) -> Any:
        if self.entry is None:
            self.entry = self._found()
        return self.entry(*args)


@contextmanager
def _built_aside(made: list[_Later]) -> Iterator[None]:
    """Here, Inductor's wrappers in C++ are handed to its pool of threads, each of which waits for a compiler.

    Inductor does so with kernels; for a wrapper it waits itself, for two seconds each. All are noted in `made`.
    """
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    alone = get_compile_threads() <= 1  # its pool would call the compiler here, and wait for itself
    submit = None if alone else lambda task: beside(AsyncCompile.submit(task))

    def load(cls: Any, argtypes: Any, main_code: str, *args: Any, **kwargs: Any) -> _Later:
        later = cls.load_pybinding_async(argtypes, main_code, *args, **kwargs, submit_fn=submit)
        made.append(_Later(later, main_code))
        return made[-1]

    with programs(load_pybinding=load):
        yield


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


def compiler_missing() -> str:
    """Why Inductor cannot build code for the CPU on this machine; "" if it can."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError) as error:
        return str(error) or type(error).__name__
    return ""
