"""The rules: how each operation runs for all members at once. Importing this fills the table."""

from memberwise.rules import indexing, linear, matmul, pointwise, reduce, shape
from memberwise.rules.registry import register_rule

__all__ = ["indexing", "linear", "matmul", "pointwise", "reduce", "register_rule", "shape"]
