"""The loop as one CUDA graph: launches cost next to nothing, the kernels are those of the loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.case import Batch, Case
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import loop


def start(case: Case, models: list[nn.Module]) -> Running:
    if next(models[0].parameters()).device.type != "cuda":
        raise Cannot("a CUDA graph needs a GPU")
    options = {"fused": True, "capturable": True} if case.trains else {}
    eager = loop.start(case, models, **options)
    held: list[tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = []

    def record(batch: Batch) -> Tensor:
        """The first step, eagerly on a stream of its own; then the graph, which runs nothing while recorded."""
        static = tuple(part.clone() for part in batch)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            losses = eager.step(static).clone()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = eager.step(static)
        held.append((graph, static, out))
        return losses

    def step(batch: Batch) -> Tensor:
        if not held:
            return record(batch)
        graph, static, out = held[0]
        for mine, given in zip(static, batch, strict=True):
            mine.copy_(given)
        graph.replay()
        return out

    return Running(step, eager.state)


RIVAL = Rival("loop-graph", "loop in a CUDA graph", "the loop over the members in one CUDA graph", start)
