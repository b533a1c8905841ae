"""Several Bernoulli draws at once, each from a generator of its own, number for number what torch draws on the CPU.

torch draws one after the other, on one core, 4.3 ns a number: a fifth of a step of five small GPTs with dropout. Here
generators draw side by side, and each makes its numbers in vector instructions, 0.4 ns a number. Missing is a public
way to do so: what a generator's state means is told by its bytes only. Where torch draws otherwise (by MKL, on Intel's
processors), it is left to do so.

The numbers are those of mt19937 (Matsumoto, Nishimura: Mersenne Twister, ACM TOMACS 8(1), 1998), two for each draw.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch

from memberwise._torch.building import built, built_before
from memberwise._torch.identity import stream_key

_SOURCE = """
#include <algorithm>
#include <cstdint>
#pragma GCC optimize("tree-loop-vectorize")  // Inductor turns it off: it writes its own vector instructions

namespace {

constexpr int N = 624, M = 397;

struct State {  // the beginning of at::CPUGeneratorImplState
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next, words[N];
};

inline uint32_t twist(uint32_t a, uint32_t b) {
    return (((a & 0x80000000u) | (b & 0x7fffffffu)) >> 1) ^ (-(b & 1u) & 0x9908b0dfu);
}

inline uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

struct Engine {
    uint32_t words[N], numbers[N];
    int next;  // of `numbers`; N: all are used

    explicit Engine(const State& state) : next(N + 1 - state.left) {
        std::copy(state.words, state.words + N, words);
        temper();
    }

    void refill() {
#pragma omp simd safelen(64)
        for (int k = 0; k < N - M; k++) words[k] = words[k + M] ^ twist(words[k], words[k + 1]);
#pragma omp simd safelen(64)
        for (int k = N - M; k < N - 1; k++) words[k] = words[k + M - N] ^ twist(words[k], words[k + 1]);
        words[N - 1] = words[M - 1] ^ twist(words[N - 1], words[0]);
        temper();
        next = 0;
    }

    void temper() {
#pragma omp simd
        for (int k = 0; k < N; k++) numbers[k] = tempered(words[k]);
    }

    uint32_t one() {
        if (next == N) refill();
        return numbers[next++];
    }

    void leave(State& state) const {
        std::copy(words, words + N, state.words);
        state.next = next;
        state.left = N + 1 - next;
    }
};

// the higher half comes first, and 53 bits count
inline uint64_t joined(uint32_t high, uint32_t low) { return (uint64_t(high & 0x1fffffu) << 32) | low; }

template <class T>
void draw(State& state, T* out, int64_t count, uint64_t below, T one) {
    Engine engine(state);
    int64_t done = 0;
    while (done < count) {
        const int64_t pairs = std::min<int64_t>((N - engine.next) / 2, count - done);
        const uint32_t* numbers = engine.numbers + engine.next;
#pragma omp simd
        for (int64_t k = 0; k < pairs; k++)
            out[done + k] = joined(numbers[2 * k], numbers[2 * k + 1]) < below ? one : T(0);
        engine.next += 2 * pairs;
        done += pairs;
        if (done < count) {  // the next two lie across the end, or after it
            const uint32_t high = engine.one();
            out[done++] = joined(high, engine.one()) < below ? one : T(0);
        }
    }
    engine.leave(state);
}

}  // namespace

extern "C" void memberwise_bernoulli(void** states, void** outs, int how_many, int threads, int64_t count,
                                     uint64_t below, int size, uint64_t one) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int k = 0; k < how_many; k++) {
        State& state = *static_cast<State*>(states[k]);
        if (size == 1) draw<uint8_t>(state, static_cast<uint8_t*>(outs[k]), count, below, one);
        if (size == 2) draw<uint16_t>(state, static_cast<uint16_t*>(outs[k]), count, below, one);
        if (size == 4) draw<uint32_t>(state, static_cast<uint32_t*>(outs[k]), count, below, one);
        if (size == 8) draw<uint64_t>(state, static_cast<uint64_t*>(outs[k]), count, below, one);
    }
}
"""

_ONE = {
    torch.bool: 1,
    torch.float16: 0x3C00,
    torch.bfloat16: 0x3F80,
    torch.float32: 0x3F800000,
    torch.float64: 0x3FF0000000000000,
}
"""Dtype -> the bits of its 1."""

_MANY = 512
"""Numbers from which on it pays: 9 us for five generators, and 14 one after the other."""


def can_draw(
    tensors: Sequence[torch.Tensor], p: float, generators: Sequence[torch.Generator], *, build: bool = True
) -> bool:
    """Whether `draw` can fill these dense tensors of one kind as torch would, and is faster.

    With `build=False` only if its library is there: this process has built it, or one before.
    """
    first = tensors[0]
    if first.numel() < _MANY or first.device.type != "cpu" or first.dtype not in _ONE or not 0 <= p <= 1:
        return False
    apart = len({stream_key(generator) for generator in generators}) == len(generators)
    return apart and (build or _is_built()) and _draws_alike()


def draw(tensors: Sequence[torch.Tensor], p: float, generators: Sequence[torch.Generator]) -> None:
    """For each `tensor.bernoulli_(p, generator=generator)`. The generators are different ones."""
    states = [generator.get_state() for generator in generators]
    _fill(tensors, p, states)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _fill(tensors: Sequence[torch.Tensor], p: float, states: Sequence[torch.Tensor]) -> None:
    first, pointers = tensors[0], ctypes.c_void_p * len(tensors)
    _library().memberwise_bernoulli(
        pointers(*[state.data_ptr() for state in states]),
        pointers(*[tensor.data_ptr() for tensor in tensors]),
        len(tensors),
        min(len(tensors), torch.get_num_threads()),
        ctypes.c_int64(first.numel()),
        ctypes.c_uint64(math.ceil(math.ldexp(p, 53))),  # a draw is a multiple of 2^-53, and 1 where it is less than p
        first.element_size(),
        ctypes.c_uint64(_ONE[first.dtype]),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library: ctypes.CDLL = built(_SOURCE)
    return library


def _is_built() -> bool:
    return _library.cache_info().currsize > 0 or _was_built()


@functools.cache
def _was_built() -> bool:
    return built_before(_SOURCE) is not None


@functools.cache
def _draws_alike() -> bool:
    """Whether torch's numbers and states are those of the functions above, which can be built."""
    try:
        _library()
    except Exception:  # whatever Inductor raises without a compiler
        return False
    return all(_is_alike(dtype, p) for dtype in _ONE for p in (0.1, 0.9))


def _is_alike(dtype: torch.dtype, p: float) -> bool:
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for generator in (ours, theirs):
        torch.empty(3, device="cpu").uniform_(generator=generator)  # an odd number
    expected = torch.empty(1001, dtype=dtype, device="cpu").bernoulli_(p, generator=theirs)
    found = torch.empty_like(expected)
    draw([found], p, [ours])
    return torch.equal(found, expected) and torch.equal(ours.get_state(), theirs.get_state())
