"""Memberwise: train and run many PyTorch models as one."""

from memberwise import engine, rules
from memberwise.engine.boundary import vmap
from memberwise.rules.registry import register_rule
from memberwise.trees import each

__all__ = ["each", "engine", "register_rule", "rules", "vmap"]
