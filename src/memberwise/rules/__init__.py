"""The rules: how each operation runs for all members at once. Importing this fills the table."""

from memberwise.rules import (
    along,
    attention,
    convolution,
    embedding,
    indexing,
    linear,
    loss,
    matmul,
    normalization,
    pointwise,
    pooling,
    reduce,
    shape,
)
from memberwise.rules.registry import register_rule

__all__ = [
    "along",
    "attention",
    "convolution",
    "embedding",
    "indexing",
    "linear",
    "loss",
    "matmul",
    "normalization",
    "pointwise",
    "pooling",
    "reduce",
    "register_rule",
    "shape",
]
