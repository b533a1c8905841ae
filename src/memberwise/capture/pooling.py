"""Max pooling of adjacent windows, by a kernel of our own, in compiled recordings on a CPU.

torch's kernel and Inductor's loop go through a window value by value, and mispredict about every comparison; Inductor's
gradient adds atomically. Here a row of windows is compared at once, without branches: (64, 30, 28, 28) takes KERNEL ms
forward and BACKWARD backward on two cores, torch's 5.7 and 0.6, Inductor's loops 4.8 and 4.4. Where it cannot be built,
and for windows that overlap, are padded or larger than 3, torch's operations stay; they are the reference.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memberwise._torch.inductor import built

_aten = torch.ops.aten
FORWARD, BACKWARD = _aten.max_pool2d_with_indices.default, _aten.max_pool2d_with_indices_backward.default
TYPES = {torch.float32: "float", torch.float64: "double"}
WINDOWS = (2, 3)

_SOURCE = """
#include <cstdint>
#include <limits>
#include <vector>

template <typename T, int K>
static void forward(const T* x, T* out, int64_t* index, int64_t planes, int64_t H, int64_t W, int threads) {
    const int64_t OH = H / K, OW = W / K;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> offset(OW);
        int32_t* off = offset.data();
#pragma omp for
        for (int64_t row = 0; row < planes * OH; row++) {
            const int64_t plane = row / OH, h = row % OH * K;
            const T* from = x + plane * H * W + h * W;
            T* best = out + row * OW;
            int64_t* at = index + row * OW;
            for (int64_t w = 0; w < OW; w++) { best[w] = -std::numeric_limits<T>::infinity(); off[w] = 0; }
            for (int dy = 0; dy < K; dy++)
                for (int dx = 0; dx < K; dx++) {
                    const T* value = from + dy * W + dx;
                    const int32_t here = dy * W + dx;
#pragma omp simd
                    for (int64_t w = 0; w < OW; w++) {
                        const T v = value[w * K];
                        const bool more = (v > best[w]) | (v != v);
                        best[w] = more ? v : best[w];
                        off[w] = more ? here : off[w];
                    }
                }
#pragma omp simd
            for (int64_t w = 0; w < OW; w++) at[w] = h * W + w * K + off[w];
        }
    }
}

template <typename T, int K>
static void backward(const T* grad, const int64_t* index, T* out, int64_t planes, int64_t H, int64_t W, int threads) {
    const int64_t OH = H / K, OW = W / K;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < planes * H; row++) {
        const int64_t plane = row / H, h = row % H;
        T* to = out + row * W;
        if (h >= OH * K) {
            for (int64_t w = 0; w < W; w++) to[w] = 0;
            continue;
        }
        const T* g = grad + (plane * OH + h / K) * OW;
        const int64_t* at = index + (plane * OH + h / K) * OW;
#pragma omp simd
        for (int64_t w = 0; w < OW; w++)
            for (int dx = 0; dx < K; dx++) to[w * K + dx] = at[w] == h * W + w * K + dx ? g[w] : T(0);
        for (int64_t w = OW * K; w < W; w++) to[w] = 0;
    }
}

"""

_ENTRY = """
extern "C" void forward_TYPE_SIZE(
    const TYPE* x, TYPE* out, int64_t* index, int64_t planes, int64_t H, int64_t W, int threads) {
    forward<TYPE, SIZE>(x, out, index, planes, H, W, threads);
}
extern "C" void backward_TYPE_SIZE(
    const TYPE* grad, const int64_t* index, TYPE* out, int64_t planes, int64_t H, int64_t W, int threads) {
    backward<TYPE, SIZE>(grad, index, out, planes, H, W, threads);
}
"""


@torch.library.custom_op("memberwise::max_pool2d", mutates_args=())
def max_pool2d(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, C, H, W)` to `(B, C, H // size, W // size)`, and where each was, in its plane: as torch's `FORWARD`."""
    x = x.contiguous()
    out, index = _results(x, size)
    _call("forward", x, out, index, x.shape, size)
    return out, index


@torch.library.custom_op("memberwise::max_pool2d_backward", mutates_args=())
def max_pool2d_backward(grad: torch.Tensor, index: torch.Tensor, size: int, shape: Sequence[int]) -> torch.Tensor:
    """The gradient of the input, of that shape: as torch's `BACKWARD`."""
    out = grad.new_empty(shape)
    _call("backward", grad.contiguous(), index.contiguous(), out, shape, size)
    return out


@max_pool2d.register_fake
def _results(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = *x.shape[:2], x.shape[2] // size, x.shape[3] // size
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@max_pool2d_backward.register_fake
def _result(grad: torch.Tensor, index: torch.Tensor, size: int, shape: Sequence[int]) -> torch.Tensor:
    return grad.new_empty(shape)


def _call(name: str, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor, shape: Any, size: int) -> None:
    entry = getattr(_library(), f"{name}_{TYPES[first.dtype]}_{size}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (first, second, third)]
    numbers = [ctypes.c_int64(number) for number in (shape[0] * shape[1], shape[2], shape[3])]
    entry(*pointers, *numbers, torch.get_num_threads())


@functools.cache
def _library() -> Any:
    entries = [_ENTRY.replace("TYPE", name).replace("SIZE", str(size)) for name in TYPES.values() for size in WINDOWS]
    return built("".join([_SOURCE, *entries]))


def with_pooling(module: fx.GraphModule) -> fx.GraphModule:
    """A recording on a CPU in which pooling that the kernel knows is done by it."""
    windows = {node: _window(node) for node in module.graph.nodes if node.target is FORWARD}
    if not any(windows.values()):
        return module
    try:
        _library()
    except Exception:  # whatever keeps a compiler from it; torch's operations stay
        return module
    graph, new = fx.Graph(), {}
    for node in module.graph.nodes:
        if windows.get(node):
            new[node] = graph.call_function(torch.ops.memberwise.max_pool2d.default, (new[node.args[0]], windows[node]))
        elif node.target is BACKWARD and windows.get(_made_by(node)):
            of, x = node.args[:2]
            where = new[node.args[-1]], windows[_made_by(node)], list(x.meta["kind"][0])
            new[node] = graph.call_function(torch.ops.memberwise.max_pool2d_backward.default, (new[of], *where))
            new[node].meta = dict(node.meta)
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(module, graph)


def _made_by(backward: fx.Node) -> Any:
    """The operation that made the positions that a gradient is sent to."""
    made = backward.args[-1]
    return made.args[0] if isinstance(made, fx.Node) and made.target is operator.getitem else None


def _window(node: fx.Node) -> int:
    """The size of the windows, if the kernel knows such; else 0."""
    arguments: Any = (*node.args, *(None,) * 5)
    x, kernel, stride, padding, dilation, ceil, *_ = arguments
    shape, strides = x.meta.get("kind", ((), ()))
    known = (
        len(shape) == 4
        and x.meta.get("dtype") in TYPES
        and torch.empty(shape, device="meta").stride() == tuple(strides)
        and kernel[0] == kernel[-1] in WINDOWS
        and list(stride or kernel) == list(kernel)
        and not any(padding or ())
        and all(one == 1 for one in dilation or ())
        and not ceil
        and not node.kwargs
    )
    return int(kernel[0]) if known else 0
