"""What C++ is built by: Inductor's own builder, and when it has nothing left to do.

A compiler is another process, so on a machine where nothing is built yet it works beside Python: what every captured
step will need is begun while a step still runs eagerly. Missing is a public way to build a library of C++ for the
processor, to know whether a former process has, to build the headers of compiled programs before there is one, and
to say which headers these are.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from memberwise._torch.entry import everywhere
from memberwise._torch.folder import get, kept_at, processor, put

_HEADERS = "headers of compiled programs"
_asked: set[str] = set()
_futures: list[Future[Any]] = []
_lock = threading.Lock()
_patching = threading.Lock()
_thread: threading.Thread | None = None


def built(source: str) -> Any:
    """A library of C++ functions, to be called by `ctypes`; built once on a machine. It shares Inductor's OpenMP."""
    library = built_before(source)
    if library is not None:
        return library
    from torch._inductor.codecache import CppCodeCache

    know_vectors()
    # which Inductor keeps by its text, whatever processor it was built for
    library = CppCodeCache.load(f"{source}\n// {processor()}\n", "cpu")
    put(_noted(source), {"library": library._name})
    return library


def built_before(source: str) -> Any:
    """The same library, if it has been built on this machine; else None."""
    _show_torch()
    return get(_noted(source), lambda known: ctypes.CDLL(known["library"]))


@functools.cache
def _show_torch() -> None:
    """Let libraries find torch's own classes, where theirs derive from them."""
    for library in Path(torch.__file__).parent.joinpath("lib").glob("libc10.*"):  # on Windows it needs no showing
        everywhere(str(library))


def _noted(source: str) -> Path:
    return kept_at(source).with_suffix(".json")


def build_ahead(sources: Sequence[str]) -> None:
    """Begin to build what of these libraries was never built on this machine, and the headers of compiled programs.

    Another thread waits for the compiler. Who needs one of them meanwhile waits as well, or builds it; what fails is
    told to who needs it. No compiler is called where all is there, and Inductor not imported.
    """
    global _thread
    new = [source for source in sources if source not in _asked]
    tasks: list[Callable[[], object]] = [functools.partial(built, one) for one in new if built_before(one) is None]
    if _HEADERS not in _asked and not kept_at(_HEADERS).exists():
        tasks.append(_build_headers)
    _asked.update(new, [_HEADERS])
    if not tasks:
        return
    with contextlib.suppress(Exception):
        for module in ("async_compile", "compile_fx"):  # two threads that import them would get in each other's way
            importlib.import_module(f"torch._inductor.{module}")
        _thread = threading.Thread(target=_run, args=(tasks, _thread), daemon=True)  # an exit does not wait for it
        _thread.start()


def _run(tasks: Sequence[Callable[[], object]], before: threading.Thread | None) -> None:
    if before is not None:
        before.join()
    for task in tasks:
        with contextlib.suppress(Exception):
            task()


def _build_headers() -> None:
    from torch._inductor.codecache import CppWrapperCodeCache

    know_vectors()
    with programs():
        CppWrapperCodeCache.load_async("", "cpu")  # what this returns would build a program of no lines; not called
    put(kept_at(_HEADERS), True)


@contextlib.contextmanager
def programs(**methods: Callable[..., Any]) -> Iterator[None]:
    """Here, Inductor's class of programs in C++ has these methods; and one that has all headers of a program compiled
    beforehand: those of kernels, which Inductor leaves out, are a third of the time to compile most programs."""
    from torch._inductor.codecache import CppWrapperCodeCache

    methods["_get_uncompiled_header"] = _headers
    with _patching:
        before = {name: vars(CppWrapperCodeCache).get(name) for name in methods}  # most are inherited
        try:
            for name, method in methods.items():
                setattr(CppWrapperCodeCache, name, classmethod(method))
            yield
        finally:
            for name, own in before.items():
                delattr(CppWrapperCodeCache, name) if own is None else setattr(CppWrapperCodeCache, name, own)


def _headers(cls: Any, device: str) -> str:
    """What stands between `#include <` and `>`: two of them, in the order in which a program includes them."""
    from torch._inductor.codecache import _get_cpp_prefix_header, _get_cpp_wrapper_header

    found = _get_cpp_wrapper_header(device), _get_cpp_prefix_header(device)
    return ">\n#include <".join(filter(None, found))


def beside(future: Future[Any]) -> Future[Any]:
    """The same, noted: a compiler works beside Python until it is done."""
    _futures[:] = [one for one in _futures if not one.done()] + [future]
    return future


def quiet() -> None:
    """Wait until no compiler works beside Python, as what is timed must."""
    if _thread is not None:
        _thread.join()
    wait(_futures)
    _futures.clear()


@functools.cache
def know_vectors() -> None:
    """Let Inductor know which vector instructions its compiler can build for, if a former process has seen that it can
    for all that the processor has: to try them takes a new process that imports torch, two seconds."""
    from torch._inductor import config, cpp_builder, cpu_vec_isa

    with _lock, contextlib.suppress(Exception):  # no compiler or folder: Inductor tries by itself
        has = cpu_vec_isa.x86_isa_checker()
        names = cpp_builder.get_cpp_compiler(), sorted(has)
        path = kept_at(names)
        with config.patch({"cpp.vec_isa_ok": True}) if path.exists() else contextlib.nullcontext():
            found = cpu_vec_isa.valid_vec_isa_list()
        if found and found == [isa for isa in cpu_vec_isa.supported_vec_isa_list if {*str(isa).split()} <= {*has}]:
            put(path, True)
