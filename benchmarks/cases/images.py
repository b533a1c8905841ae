"""W4, W5, W6: convolutional networks on 3 x 32 x 32 images: LeNet-5, ResNet-18, and one of depthwise convolutions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case
from benchmarks.recipe import Recipe


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., 1998) as it is used now: ReLU, max pooling, three channels of colour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class Basic(nn.Module):
    """The block of ResNet-18 (He et al., 2016)."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images: one 3 x 3 convolution, no pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        shapes += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*(Basic(*shape) for shape in shapes))
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """The block of MobileNetV2 (Sandler et al., 2018): 1 x 1 to more channels, depthwise 3 x 3, 1 x 1 to few."""

    def __init__(self, ins: int, outs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = ins * expand
        self.residual = stride == 1 and ins == outs
        self.expand, self.bn1 = nn.Conv2d(ins, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project, self.bn3 = nn.Conv2d(wide, outs, 1, bias=False), nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.expand(x)))
        out = F.relu6(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return x + out if self.residual else out


class MobileNet(nn.Module):
    """A short MobileNetV2, its stem and strides for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        shapes = [(16, 24, 2, 4), (24, 24, 1, 4), (24, 40, 2, 4), (40, 40, 1, 4), (40, 80, 2, 4)]
        self.blocks = nn.Sequential(*(Inverted(*shape) for shape in shapes))
        self.conv2, self.bn2 = nn.Conv2d(80, 160, 1, bias=False), nn.BatchNorm2d(160)
        self.fc = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        x = F.relu6(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def batch(size: int, generator: torch.Generator) -> Batch:
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def image(size: int, generator: torch.Generator) -> Batch:
    return (torch.randn(size, 3, 32, 32, generator=generator),)


W4 = Case(
    "W4",
    "LeNet-5, 3x32x32, batch 64",
    LeNet,
    partial(batch, 64),
    objectives.cross_entropy,
    members=(5, 50),
    workload="W4",
    rows=2_000,
    objective="cross_entropy",
    folded=folded.lenet,
    in_jax="lenet",
)
W6 = replace(
    W4,
    name="W6",
    about="MobileNetV2-like, depthwise, BatchNorm, batch 32",
    model=MobileNet,
    batch=partial(batch, 32),
    members=(3, 10),
    workload="W6",
    recipe=Recipe(lr=0.005, momentum=0.9),
    steps=4,
    folded=folded.mobilenet,
    in_jax="mobilenet",
)


def resnet(size: int) -> Case:
    return replace(
        W6,
        name=f"W5-batch-{size}",
        about=f"ResNet-18, BatchNorm in training mode, batch {size}",
        model=ResNet18,
        batch=partial(batch, size),
        workload="W5",
        folded=folded.resnet,
        in_jax="resnet",
    )


def predicting(size: int) -> Case:
    return replace(
        resnet(size),
        name=f"W5-predict-{size}",
        about=f"ResNet-18, one prediction, batch {size}",
        batch=partial(image, size),
        loss=objectives.prediction,
        trains=False,
        objective="",
    )


CASES = (W4, resnet(8), resnet(32), predicting(1), predicting(64), W6)
