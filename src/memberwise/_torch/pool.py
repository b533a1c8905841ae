"""Memory on the CPU that a program lets go of, kept for its next call.

A CPU's allocator gives large blocks back to the system at once, and gets them anew, page by page, each filled with
zeros: of a step of a hundred MLPs that is half its time. Missing is a public way to say which allocator tensors on the
CPU come from; torch's own cache for that is made for phones, and a thread can enter it in C++ only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from typing import Any

from memberwise._torch.building import built

SOURCE = """
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unordered_map>

namespace {

constexpr size_t LEAST = 1 << 20;       // smaller blocks the system's allocator keeps by itself
constexpr size_t LARGE = 4 << 20;       // from here on in huge pages, if the system has any
constexpr size_t PAGE = 2 << 20;
constexpr int AGE = 64;                 // calls after which a block that none has used goes back to the system

struct Block { void* data; size_t size; long used; };

void give(void* data);

struct Pool final : c10::Allocator {
    std::mutex lock;
    std::multimap<size_t, Block> spare;
    std::unordered_map<void*, Block> taken;
    c10::Allocator* plain = c10::GetCPUAllocator();
    long calls = 0;
    int inside = 0, owners = 0;

    c10::DataPtr allocate(size_t size) override {
        if (size < LEAST) return plain->allocate(size);
        Block block = take(size);
        if (block.data == nullptr) return plain->allocate(size);  // which says what is missing
        c10::reportMemoryUsageToProfiler(block.data, block.size, 0, 0, c10::Device(c10::DeviceType::CPU));
        // oneDNN wants memory whose context is its address
        return {block.data, block.data, &give, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give; }

    Block take(size_t size) {
        std::lock_guard<std::mutex> held(lock);
        const bool large = size >= LARGE;
        const size_t unit = large ? PAGE : 4096;
        size = (size + unit - 1) / unit * unit;  // before looking: what was taken for it is of that size
        auto found = spare.lower_bound(size);
        if (found != spare.end() && found->first - size <= size / 8 + LEAST) {
            Block block = found->second;
            spare.erase(found);
            return taken[block.data] = block;
        }
        void* data = nullptr;
        if (posix_memalign(&data, large ? PAGE : 64, size) != 0) return {nullptr, 0, 0};
#ifdef MADV_HUGEPAGE
        if (large) madvise(data, size, MADV_HUGEPAGE);
#endif
        return taken[data] = {data, size, 0};
    }

    void put(void* data) {
        std::lock_guard<std::mutex> held(lock);
        auto found = taken.find(data);
        if (found == taken.end()) return free(data);  // a small one, or of before
        Block block = found->second;
        taken.erase(found);
        c10::reportMemoryUsageToProfiler(data, -static_cast<int64_t>(block.size), 0, 0,
                                         c10::Device(c10::DeviceType::CPU));
        if (owners == 0) return free(data);
        block.used = calls;
        spare.emplace(block.size, block);
    }

    void enter() {
        std::lock_guard<std::mutex> held(lock);
        if (inside++ == 0) {
            plain = c10::GetCPUAllocator();
            c10::SetCPUAllocator(this);
        }
    }

    void leave() {
        std::lock_guard<std::mutex> held(lock);
        if (--inside == 0) c10::SetCPUAllocator(plain);
        calls++;
        clear(calls - AGE);
    }

    void own(int more) {
        std::lock_guard<std::mutex> held(lock);
        owners += more;
        if (owners == 0) clear(calls + 1);
    }

    void clear(long before) {
        for (auto one = spare.begin(); one != spare.end();) {
            if (one->second.used >= before) { ++one; continue; }
            free(one->second.data);
            one = spare.erase(one);
        }
    }

    void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

Pool& pool() {
    static Pool* only = new Pool();  // outlives every tensor
    return *only;
}

void give(void* data) { pool().put(data); }

}  // namespace

extern "C" void memberwise_pool_enter() { pool().enter(); }
extern "C" void memberwise_pool_leave() { pool().leave(); }
extern "C" void memberwise_pool_own(int more) { pool().own(more); }
extern "C" long long memberwise_pool_spare() {
    std::lock_guard<std::mutex> held(pool().lock);
    long long sum = 0;
    for (auto& one : pool().spare) sum += one.first;
    return sum;
}
"""


class Pool:
    """A context in which tensors on the CPU, of a megabyte or more, lie in memory that former calls have let go of.

    Other threads' tensors do so too meanwhile. A block stays for 64 calls without use; none does once no owner is left.

    Args:
        owner: as long as it lives, memory is kept.
    """

    def __init__(self, owner: object) -> None:
        library = _library()
        self._enter, self._leave = library.memberwise_pool_enter, library.memberwise_pool_leave
        library.memberwise_pool_own(1)
        weakref.finalize(owner, library.memberwise_pool_own, -1).atexit = False

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *error: object) -> None:
        self._leave()


def pool_of(owner: object) -> contextlib.AbstractContextManager[Any]:
    """A pool, or where the few lines of C++ that it takes cannot be built, a context that does nothing."""
    with contextlib.suppress(Exception):
        return Pool(owner)
    return contextlib.nullcontext()


def spare() -> int:
    """Bytes that are kept, and that no tensor lies in."""
    return int(_library().memberwise_pool_spare())


@functools.cache
def _library() -> Any:
    library = built(SOURCE)
    library.memberwise_pool_spare.restype = ctypes.c_longlong
    return library
