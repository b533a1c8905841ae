"""Member-wise optimizers and clipping, for tensors with a leading member axis M."""

from memberwise.optim.adam import Adam, AdamW
from memberwise.optim.clip import clip_grad_norm_
from memberwise.optim.grouping import param_groups
from memberwise.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "param_groups"]
