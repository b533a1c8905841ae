"""LeNet-5, ResNet-18 and the depthwise network: members as groups of channels, (B, M * channels, H, W)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.folded.layers import Mode, Tensors, batch_norm, conv, linear


def lenet(params: Tensors, buffers: Tensors, x: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    members = len(params["conv1.weight"])
    x = F.max_pool2d(conv(params, "conv1", x.repeat(1, members, 1, 1)).relu(), 2)
    x = F.max_pool2d(conv(params, "conv2", x).relu(), 2)
    x = linear(params, "fc1", _rows(x, members)).relu()
    return linear(params, "fc3", linear(params, "fc2", x).relu()), {}


def resnet(params: Tensors, buffers: Tensors, x: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    new: Tensors = {}
    members = len(params["conv1.weight"])

    def norm(name: str, x: Tensor) -> Tensor:
        return batch_norm(params, buffers, name, x, mode, new)

    x = norm("bn1", conv(params, "conv1", x.repeat(1, members, 1, 1), padding=1)).relu()
    for number in range(8):
        block, stride = f"blocks.{number}", 2 if number in (2, 4, 6) else 1
        out = norm(f"{block}.bn1", conv(params, f"{block}.conv1", x, stride, padding=1)).relu()
        out = norm(f"{block}.bn2", conv(params, f"{block}.conv2", out, padding=1))
        if stride != 1:
            x = norm(f"{block}.shortcut.1", conv(params, f"{block}.shortcut.0", x, stride))
        x = (out + x).relu()
    return linear(params, "fc", _rows(x.mean((2, 3)), members)), new


def mobilenet(params: Tensors, buffers: Tensors, x: Tensor, mode: Mode) -> tuple[Tensor, Tensors]:
    new: Tensors = {}
    members = len(params["conv1.weight"])

    def norm(name: str, x: Tensor) -> Tensor:
        return batch_norm(params, buffers, name, x, mode, new)

    x = F.relu6(norm("bn1", conv(params, "conv1", x.repeat(1, members, 1, 1), padding=1)))
    for number in range(5):
        block, stride = f"blocks.{number}", 2 if number in (0, 2, 4) else 1
        wide = params[f"{block}.depthwise.weight"].shape[1]
        out = F.relu6(norm(f"{block}.bn1", conv(params, f"{block}.expand", x)))
        out = F.relu6(norm(f"{block}.bn2", conv(params, f"{block}.depthwise", out, stride, padding=1, groups=wide)))
        out = norm(f"{block}.bn3", conv(params, f"{block}.project", out))
        x = x + out if stride == 1 else out
    x = F.relu6(norm("bn2", conv(params, "conv2", x)))
    return linear(params, "fc", _rows(x.mean((2, 3)), members)), new


def _rows(x: Tensor, members: int) -> Tensor:
    """(B, M * channels, ...) -> (M, B, channels * ...)."""
    return x.view(len(x), members, -1).transpose(0, 1)
