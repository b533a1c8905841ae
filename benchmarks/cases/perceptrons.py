"""W1, W2, W3: perceptrons as they are trained for images, as critics of an agent, and by the thousand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case, Unwritten

WIDTHS = (784, 128, 128, 10)


def model(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        layers += [nn.Linear(ins, outs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(size: int, generator: torch.Generator) -> Batch:
    return torch.randn(size, WIDTHS[0], generator=generator), torch.randint(10, (size,), generator=generator)


def image(size: int, generator: torch.Generator) -> Batch:
    return (torch.randn(size, WIDTHS[0], generator=generator),)


def values(size: int, width: int, generator: torch.Generator) -> Batch:
    return torch.randn(size, width, generator=generator), torch.randn(size, 1, generator=generator)


W1 = Case(
    "W1",
    "MLP 784-128-128-10, batch 64",
    partial(model, *WIDTHS),
    partial(images, 64),
    objectives.cross_entropy,
    members=(10, 100, 1000),
    workload="W1",
    rows=10_000,
    objective="cross_entropy",
    folded=folded.perceptron,
    in_jax="perceptron",
    ahead=True,
)
BFLOAT16 = replace(
    W1,
    name="W1-bf16",
    about=f"{W1.about}, bf16 autocast",
    loss=objectives.in_bfloat16(W1.loss),
    precision=torch.bfloat16,
    in_jax=Unwritten("JAX has no autocast"),
)


def predicting(size: int) -> Case:
    return replace(
        W1,
        name=f"W1-predict-{size}",
        about=f"MLP 784-128-128-10, one prediction, batch {size}",
        batch=partial(image, size),
        loss=objectives.prediction,
        trains=False,
        objective="",
    )


W2 = replace(
    W1,
    name="W2",
    about="critics 23-256-256-1, batch 256",
    model=partial(model, 23, 256, 256, 1),
    batch=partial(values, 256, 23),
    loss=objectives.mse,
    members=(2, 10, 100),
    workload="W2",
    objective="mse",
)
W3 = replace(
    W2,
    name="W3",
    about="MLP 16-64-64-1, batch 32",
    model=partial(model, 16, 64, 64, 1),
    batch=partial(values, 32, 16),
    members=(100, 1000),
    workload="W3",
)
CASES = (W1, BFLOAT16, predicting(1), predicting(64), W2, W3)
