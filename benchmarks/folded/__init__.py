"""The workloads' models for all members at once, as one writes them by hand: `bmm`, grouped convolution, one attention.

Each is a function `(params, buffers, *inputs, mode)` of stacked tensors, (M, ...) by a member's names, that gives the
outputs, (M, B, ...), and the new buffers. `losses` turns outputs into losses, (M,).
"""

from __future__ import annotations

from benchmarks.folded.adapters import adapters
from benchmarks.folded.clicks import clicks
from benchmarks.folded.gcn import gcn
from benchmarks.folded.gpt import gpt
from benchmarks.folded.images import lenet, mobilenet, resnet
from benchmarks.folded.lstm import lstm
from benchmarks.folded.perceptron import perceptron
from benchmarks.folded.transformer import transformer

__all__ = ["adapters", "clicks", "gcn", "gpt", "lenet", "lstm", "mobilenet", "perceptron", "resnet", "transformer"]
