"""A small convolutional network with BatchNorm in training mode, on 3 x 16 x 16 images."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Batch, Case


def model(channels: int) -> nn.Module:
    """Two convolutions, each with BatchNorm, ReLU and pooling, then a linear layer.

    The convolutions have no bias, as is usual before BatchNorm, which subtracts it again.
    """
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, 10),
    )


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(32, 3, 16, 16, generator=generator), torch.randint(10, (32,), generator=generator)


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def case(channels: int, members: tuple[int, ...]) -> Case:
    about = f"CNN with BatchNorm, {channels} channels, batch 32"
    return Case(f"cnn-{channels}", about, partial(model, channels), batch, loss, members=members)


CASES = (case(8, members=(16,)), case(32, members=(8,)))
