"""The rules: how each operation runs for all members at once. Importing this fills the table."""

from memberwise.rules import (
    activation,
    along,
    attention,
    convolution,
    cross_entropy,
    dropout,
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
    softmax,
)
from memberwise.rules.registry import register_rule

__all__ = [
    "activation",
    "along",
    "attention",
    "convolution",
    "cross_entropy",
    "dropout",
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
    "softmax",
]
