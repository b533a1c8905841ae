"""What functions of ours in C++ take for granted of torch: where memory and random numbers come from."""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import fx

from memberwise._torch import bernoulli, building, inductor, pool


@pytest.mark.parametrize("dtype", bernoulli._ONE, ids=str)
@pytest.mark.parametrize("before", [0, 1, 622, 623, 624])
def test_several_generators_draw_what_torch_draws(dtype: torch.dtype, before: int) -> None:
    """Breaks: members' dropout in captured steps would be drawn one after the other, on one core.

    The reference are uniform numbers of doubles: `bernoulli_` itself draws by MKL on processors of Intel.
    """
    for count, p in [(1, 0.5), (311, 0.2), (312, 0.9), (1500, 1 / 3), (5000, 1e-4), (7, 0.0), (7, 1.0)]:
        ours, theirs = ([torch.Generator().manual_seed(seed) for seed in (1, 2, 3)] for _ in range(2))
        for generator in (*ours, *theirs):
            torch.empty(before).uniform_(generator=generator)
        found = [torch.full((count,), 7, dtype=dtype) for _ in ours]
        bernoulli.draw(found, p, ours)
        for mine, own, other in zip(found, ours, theirs, strict=True):
            expected = torch.empty(count, dtype=torch.float64).uniform_(generator=other) < p
            assert torch.equal(mine, expected.to(dtype))
            assert torch.equal(own.get_state(), other.get_state())
            assert torch.equal(torch.randn(9, generator=own), torch.randn(9, generator=other))


def test_a_generator_that_was_never_used_is_drawn_from() -> None:
    """Breaks: likewise; a seeded state counts what is left differently."""
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    found = torch.empty(5)
    bernoulli.draw([found], 0.5, [ours])
    assert torch.equal(found, (torch.empty(5, dtype=torch.float64).uniform_(generator=theirs) < 0.5).float())


def test_where_tensors_are_made_by_default_is_no_matter() -> None:
    """Breaks: the comparison with torch's draws would fail for a user of `torch.set_default_device`."""
    alike = bernoulli._is_alike(torch.float32, 0.5)
    with torch.device("meta"):
        assert bernoulli._is_alike(torch.float32, 0.5) == alike


def test_a_library_is_looked_for_where_none_may_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: an eager call would build it, or never find what a captured step has built since."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = [torch.empty(1000)], 0.5, [torch.Generator()]
    for cached in (bernoulli._library, bernoulli._was_built):
        cached.cache_clear()
    assert not bernoulli.can_draw(*given, build=False)
    possible = bernoulli.can_draw(*given)
    assert bernoulli.can_draw(*given, build=False) == possible
    for cached in (bernoulli._library, bernoulli._was_built):
        cached.cache_clear()
    assert bernoulli.can_draw(*given, build=False) == possible, "another process finds it"


def test_what_is_built_ahead_is_built_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: a first step on a machine waits for one library after the other; or is timed beside a compiler."""
    free, done = threading.Event(), []

    def built(source: str) -> None:
        assert free.wait(60)
        done.append(source)
        if source == "broken":
            raise RuntimeError(source)

    monkeypatch.setattr(building, "built", built)
    monkeypatch.setattr(building, "_asked", {building._HEADERS})
    building.build_ahead(["broken", "one"])
    building.build_ahead(["one", "two"])
    waiting = threading.Thread(target=building.quiet)
    waiting.start()
    assert waiting.is_alive() and not done
    free.set()
    waiting.join(60)
    assert not waiting.is_alive() and done == ["broken", "one", "two"]


@pytest.mark.long
def test_headers_that_were_built_ahead_are_those_of_compiled_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: what is built ahead is of no use, and a first program waits for headers of its own."""
    from torch._inductor.codecache import CppWrapperCodeCache, _precompile_header

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for cached in (_precompile_header, CppWrapperCodeCache):  # as in a new process
        cached.cache_clear()
    building._build_headers()
    assert _precompile_header.cache_info().misses == 1
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.erfc.default, (x,)),))
    codes: list[str] = []
    later = inductor._Later
    monkeypatch.setattr(inductor, "_Later", lambda found, code: codes.append(code) or later(found, code))
    run = inductor.begin_graph(fx.GraphModule({}, graph), [torch.ones(3)])(lambda: [torch.ones(3)])
    assert torch.equal(run(torch.zeros(3))[0], torch.ones(3))
    assert _precompile_header.cache_info()[:2] == (1, 1)
    included = re.findall(r"#include <(torch/csrc/inductor/cpp\S+)>", codes[0])
    assert len(included) == 2, "the wrapper's and the kernels'"
    assert ">\n#include <".join(included) == building._headers(CppWrapperCodeCache, "cpu")


class _Owner:
    """Keeps memory while it lives."""


def test_memory_that_a_program_lets_go_of_is_kept_for_its_next_call() -> None:
    """Breaks: each call of a program with large intermediates would get its memory anew, page by page."""
    owner = _Owner()
    own = pool.Pool(owner)
    with own:
        first = torch.ones(1 << 20)
    address, size = first.data_ptr(), first.untyped_storage().nbytes()
    del first
    assert pool.spare() >= size
    outside = torch.ones(1 << 20)
    assert outside.data_ptr() != address
    with own:
        again, other, small = torch.zeros(1 << 20), torch.ones(1 << 20), torch.ones(8)
    assert again.data_ptr() == address != other.data_ptr()
    assert again.sum() == 0 and other.sum() == 1 << 20 and small.sum() == 8
    again.resize_(1 << 21).fill_(2.0)  # by whom it is allocated it stays, and outside that asks the system
    assert again.sum() == 1 << 22
    del owner, again
    gc.collect()
    assert pool.spare() == 0
    del other
    assert pool.spare() == 0, "nobody is left who would use it"


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (4 << 20) - 4, (4 << 20) + 1, 6_400_000, (32 << 20) + 1])
def test_memory_of_any_size_serves_the_next_of_its_size(size: int) -> None:
    """Breaks: what is held grows with each call (a block in huge pages was taken to be too large for what it held)."""
    owner = _Owner()
    with pool.Pool(owner):
        addresses = {torch.empty(size, dtype=torch.uint8).data_ptr() for _ in range(3)}
        (kept,) = addresses
    assert kept and pool.spare() < 2 * size


def test_memory_that_no_call_uses_goes_back() -> None:
    """Breaks: steps of other shapes would hold memory for ever."""
    owner = _Owner()
    own = pool.Pool(owner)
    with own:
        torch.ones(1 << 20)
    assert pool.spare()
    for _ in range(63):
        with own:
            pass
    assert pool.spare()
    with own:
        pass
    assert not pool.spare()


def test_kernels_whose_scratch_memory_is_given_by_address_run_in_a_pool() -> None:
    """Breaks: oneDNN asks for memory and gives it back by its address alone; the process would end."""
    owner = _Owner()
    own = pool.Pool(owner)
    conv = torch.nn.Conv2d(64, 64, 3).requires_grad_(False)
    x = torch.randn(8, 64, 56, 56)
    expected = conv(x)
    with own:
        found = [conv(x) for _ in range(3)]
    assert all(torch.equal(one, expected) for one in found)


def test_threads_share_a_pool() -> None:
    """Breaks: two threads would get the same memory."""
    owner = _Owner()
    own = pool.Pool(owner)
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(50):
            with own:
                made = [torch.full((1 << 18,), float(k)) for _ in range(3)]
            if any((one != k).any() for one in made):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
