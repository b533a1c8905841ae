"""The road of a member's tensor: boundary -> tensor -> dispatch -> a rule."""

from memberwise.engine import dispatch, function, leaves, trace
from memberwise.engine.boundary import vmap

__all__ = ["dispatch", "function", "leaves", "trace", "vmap"]
