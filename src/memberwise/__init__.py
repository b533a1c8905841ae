"""Memberwise: train and run many PyTorch models as one."""

from memberwise import engine, rules
from memberwise.construction import build, stack
from memberwise.engine.boundary import vmap
from memberwise.functional import functional_call
from memberwise.module import Stack
from memberwise.parity import verify
from memberwise.report import explain
from memberwise.rules.registry import register_rule
from memberwise.state import stack_module_state, unstack_module_state
from memberwise.trees import each

__all__ = [
    "Stack",
    "build",
    "each",
    "engine",
    "explain",
    "functional_call",
    "register_rule",
    "rules",
    "stack",
    "stack_module_state",
    "unstack_module_state",
    "verify",
    "vmap",
]
