"""The losses of the workloads, for one model: the last tensor of a batch is the target, the others are inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cross_entropy(model: nn.Module, *batch: Tensor) -> Tensor:
    """Of logits (..., classes) and numbers of classes (...)."""
    *inputs, target = batch
    return F.cross_entropy(model(*inputs).flatten(0, -2), target.flatten())


def mse(model: nn.Module, *batch: Tensor) -> Tensor:
    *inputs, target = batch
    return F.mse_loss(model(*inputs), target)


def prediction(model: nn.Module, *inputs: Tensor) -> Tensor:
    """No loss: what the model says."""
    return model(*inputs)


def in_bfloat16(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same under autocast, the loss itself in float32."""

    def under_autocast(model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        def cast(*inputs: Tensor) -> Tensor:
            with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
                out = model(*inputs)
            return out.float() if out.dtype is torch.bfloat16 else out

        return loss(cast, *batch)

    return under_autocast
