"""Memberwise: train and run many PyTorch models as one."""

from memberwise import engine, optim, rules, testing
from memberwise.capture import compile
from memberwise.construction import build, group, stack
from memberwise.engine.boundary import vmap
from memberwise.errors import MemberwiseError, StackWarning
from memberwise.estimation import estimate
from memberwise.functional import functional_call
from memberwise.grouped import Group
from memberwise.members import select
from memberwise.module import Stack
from memberwise.optim import clip_grad_norm_
from memberwise.parity import verify
from memberwise.report import explain
from memberwise.rules.users import register_rule
from memberwise.state import stack_module_state, unstack_module_state
from memberwise.trees import each

__all__ = [
    "Group",
    "MemberwiseError",
    "Stack",
    "StackWarning",
    "build",
    "clip_grad_norm_",
    "compile",
    "each",
    "engine",
    "estimate",
    "explain",
    "functional_call",
    "group",
    "optim",
    "register_rule",
    "rules",
    "select",
    "stack",
    "stack_module_state",
    "testing",
    "unstack_module_state",
    "verify",
    "vmap",
]
