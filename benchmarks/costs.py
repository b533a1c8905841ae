"""What a step costs besides time: kernels, bytes, and the least that the hardware allows."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import Batch, Case

Run = Callable[[], object]
NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "expand", "expand_as", "as_strided", "permute"),
        *("t", "transpose", "numpy_T", "mT", "movedim", "select", "slice", "narrow", "split", "split_with_sizes"),
        *(
            "chunk",
            "unbind",
            "squeeze",
            "unsqueeze",
            "detach",
            "alias",
            "view_as",
            "empty",
            "empty_like",
            "result_type",
        ),
        *("empty_strided", "new_empty", "new_empty_strided", "resize_", "_reshape_alias", "is_nonzero", "lift_fresh"),
        *(
            "_local_scalar_dense",
            "item",
            "resolve_conj",
            "resolve_neg",
            "as_strided_",
            "cudnn_is_acceptable",
            "diagonal",
            "unfold",
            "set_",
            "detach_",
            "contiguous",
            "to",
            "_to_copy",
        ),
    )
)
"""Operations that start no kernel: views, allocation, questions."""


def kernels(run: Run, device: str) -> int | None:
    """How many kernels one run starts: on a GPU those it saw (None where the profiler may not look), on a CPU innermost
    operations and Inductor's loops."""
    if torch.device(device).type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        names = [event.name for event in found.events() if event.device_type is on_gpu]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None
    everywhere = _ExperimentalConfig(profile_all_threads=True)  # chunks run on the threads of kernels
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as found:
        run()
    return sum(_kernels_of(event) for event in found.events() if event.cpu_parent is None)


def _kernels_of(event: FunctionEvent) -> int:
    inside = sum(map(_kernels_of, event.cpu_children))
    return inside or int(_is_kernel(event.name))


def _is_kernel(name: str) -> bool:
    """Of an event with no kernel inside it."""
    operation = name.startswith(("aten::", "mkldnn::", "mkl::", "onednn::", "inductor::", "quantized::"))
    return "cpp_fused" in name or (operation and name not in NO_KERNEL)


class Memory:
    """Bytes of one rival: made before it starts, asked once it has run."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        gc.collect()
        self.before = torch.cuda.memory_allocated() if self.on_gpu else held()

    def peak(self, run: Run) -> int:
        """The most that it needs during one step: what it holds, and what the step allocates on top of that."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return held() - self.before + allocated(run)


def held() -> int:
    """Bytes of all CPU tensors that Python knows of, and of their gradients; what several look at counts once."""
    kinds = (Tensor, nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds and each.device.type == "cpu"]
    leaves = [grad for grad in map(_grad, tensors) if grad is not None]
    return sum(dict(filter(None, map(_storage, (*tensors, *leaves)))).values())


def _grad(tensor: Tensor) -> Tensor | None:
    """A leaf's gradient. A view that autograd no longer lets anybody use cannot even be asked whether it is one."""
    with contextlib.suppress(RuntimeError):
        return tensor.grad if tensor.is_leaf else None
    return None


def _storage(tensor: Tensor) -> tuple[int, int] | None:
    """Where its memory lies, and how much; None for what has no memory of its own, such as a transform's wrapper."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return None


def allocated(run: Run) -> int:
    """The most bytes that lived at one time during one run, less those that lived before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@dataclass(frozen=True)
class Floor:
    """The least time of a step of all members: products at the rate of one large one, bytes at that of a large copy."""

    flops: int
    bytes: int
    flops_per_s: float
    bytes_per_s: float

    @property
    def us(self) -> float:
        return 1e6 * max(self.flops / self.flops_per_s, self.bytes / self.bytes_per_s)

    @property
    def binding(self) -> str:
        return "flops" if self.flops / self.flops_per_s > self.bytes / self.bytes_per_s else "bytes"


def floor(case: Case, members: int, batch: Batch, device: str) -> Floor:
    """Of a step, with both rates as they are now.

    Bytes: parameters and moments once there and once back, what is frozen once, and the batch; activations may stay
    in the cache.
    """
    model = case.models(1)[0].to(device)
    params = {param: param.numel() * param.element_size() for param in model.parameters()}
    trained = sum(size for param, size in params.items() if param.requires_grad)
    frozen = sum(size for param, size in params.items() if not param.requires_grad)
    passes = case.recipe.passes if case.trains else 1
    moved = members * passes * trained + frozen + sum(part.numel() * part.element_size() for part in batch)
    dtype = case.precision or torch.float32
    return Floor(members * flops(case, model, batch), moved, product_rate(device, dtype), copy_rate(device))


def flops(case: Case, model: nn.Module, batch: Batch) -> int:
    """Of one member's step, as torch counts them: two for each multiplication with its addition."""
    if case.flops is not None:
        return case.flops
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(case.trains):
        out = case.loss(model, *case.of_member(batch, 0))
        if case.trains:
            out.backward()
    return counter.get_total_flops()


def product_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a square product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device)


def copy_rate(device: str, size: int = 2**25) -> float:
    """Bytes a second of a copy that no cache holds: read and written."""
    a = torch.ones(size, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * size / fastest(lambda: b.copy_(a), device)


def fastest(run: Run, device: str, times: int = 8) -> float:
    """Seconds of the fastest of some runs: what the machine can do."""
    finish = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        finish()
        found.append(time.perf_counter() - begin)
    return min(found)
