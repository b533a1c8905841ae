"""Layers of all members by hand. The batch is behind the member axis: x is (M, B, ...), or (B, ...) for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


class Mode(NamedTuple):
    """Whether the model trains, whether it draws, and the module that all members hold, if there is one."""

    training: bool
    draws: bool
    trunk: torch.nn.Module | None = None


def linear(params: Tensors, name: str, x: Tensor) -> Tensor:
    """(M, rows, ins) or (rows, ins) -> (M, rows, outs), as one `baddbmm`."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    x = x.expand(len(weight), *x.shape[-2:])
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def layer_norm(params: Tensors, name: str, x: Tensor) -> Tensor:
    """(M, rows, width) -> the same."""
    normed = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(params[f"{name}.bias"][:, None], normed, params[f"{name}.weight"][:, None])


def dropout(x: Tensor, p: float, mode: Mode) -> Tensor:
    return F.dropout(x, p) if mode.draws and mode.training else x


def attend(qkv: Tensor, members: int, batch: int, heads: int, p: float = 0.0) -> Tensor:
    """Causal attention of (M, B * T, 3 * width), as one with batch M * B: (M, B * T, width)."""
    _, rows, width = qkv.shape
    split = qkv.view(members * batch, rows // batch, 3, heads, width // 3 // heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    return y.transpose(1, 2).reshape(members, rows, width // 3)


def conv(params: Tensors, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """(B, M * ins, H, W) -> (B, M * outs, H, W), as one grouped convolution."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    bias = None if bias is None else bias.flatten()
    return F.conv2d(x, weight.flatten(0, 1), bias, stride, padding, groups=len(weight) * groups)


def batch_norm(params: Tensors, buffers: Tensors, name: str, x: Tensor, mode: Mode, new: Tensors) -> Tensor:
    """(B, M * channels, H, W) -> the same; the running statistics go into `new`."""
    weight, bias = params[f"{name}.weight"].flatten(), params[f"{name}.bias"].flatten()
    mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    if not mode.training:
        return F.batch_norm(x, mean.flatten(), var.flatten(), weight, bias)
    out, now, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    count = x.numel() // x.shape[1]
    spread = (inverse.detach().pow(-2) - 1e-5) * (count / (count - 1))
    new[f"{name}.running_mean"] = mean.lerp(now.detach().view_as(mean), 0.1)
    new[f"{name}.running_var"] = var.lerp(spread.view_as(var), 0.1)
    new[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    return out


def losses(objective: str, out: Tensor, target: Tensor, shared: bool) -> Tensor:
    """(M, B, ...) and the targets, (B, ...) for all or (M, B, ...) -> (M,)."""
    members = len(out)
    if shared:
        target = target.expand(members, *target.shape)
    if objective == "cross_entropy":
        each = F.cross_entropy(out.flatten(0, -2), target.flatten(), reduction="none")
    elif objective == "logistic":
        each = F.binary_cross_entropy_with_logits(out, target, reduction="none")
    else:
        each = (out - target).square()
    return each.view(members, -1).mean(1)
