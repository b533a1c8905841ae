"""The road of a member's tensor: boundary -> tensor -> dispatch -> a rule."""

from memberwise.engine import controlflow, dispatch, function, leaves, trace
from memberwise.engine.boundary import vmap

__all__ = ["controlflow", "dispatch", "function", "leaves", "trace", "vmap"]
