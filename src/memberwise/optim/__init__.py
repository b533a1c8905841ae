"""Member-wise optimizers and clipping, for tensors with a leading member axis M.

torch's schedulers drive them; with one rate a member, each member as a scheduler of its own would. That holds for all
but `ReduceLROnPlateau`, which decides by one number for all. A factor of `LambdaLR` may be an (M,) tensor itself: a
schedule a member.
"""

from memberwise.optim.adam import Adam, AdamW
from memberwise.optim.clip import clip_grad_norm_
from memberwise.optim.grouping import param_groups
from memberwise.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "param_groups"]
