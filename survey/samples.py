"""Sample inputs of M members for each of torch's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.testing._internal.common_modules import ModuleInfo, module_db

from survey.more_modules import more_modules

MEMBERS = 3


@dataclass(frozen=True)
class Sample:
    """One way to make and call a module.

    Attributes:
        about: what is special about it, in torch's words.
        make: makes M modules, each with parameters of its own.
        inputs: of each, `(args, kwargs)`.
    """

    about: str
    make: Callable[[], list[nn.Module]]
    inputs: list[Any]


LISTS = {"modules": module_db, "more_modules": more_modules}
"""Results file -> the modules that are swept."""


def entries(infos: list[ModuleInfo], names: list[str] | None = None) -> list[tuple[ModuleInfo, bool]]:
    """Each of the modules in each of its modes; of some names alone, if there are any."""
    chosen = [info for info in infos if not names or info.name.removeprefix("nn.") in names]
    return [(info, training) for info in chosen for training in (True, False)]


def samples(info: ModuleInfo, training: bool) -> Iterator[Sample]:
    """All of a module's samples; the members' differ in values alone."""
    columns = [_inputs(info, training, seed) for seed in range(MEMBERS)]
    for row in zip(*columns, strict=True):
        made = [sample.constructor_input for sample in row]
        inputs = [(sample.forward_input.args, sample.forward_input.kwargs) for sample in row]
        yield Sample(row[0].desc, partial(_made, info, made, training), inputs)


def _made(info: ModuleInfo, ways: list[Any], training: bool) -> list[nn.Module]:
    models = []
    for member, way in enumerate(ways):
        torch.manual_seed(100 + member)
        args, kwargs = deepcopy((way.args, way.kwargs))
        models.append(_perturbed(info.module_cls(*args, **kwargs).to(torch.float32).train(training)))
    return models


def _perturbed(model: nn.Module) -> nn.Module:
    """With other weights, biases and running statistics than ones and zeros, which all members would have in common."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not is_lazy(tensor):
                tensor.add_(torch.rand_like(tensor), alpha=0.2)
    return model


def _inputs(info: ModuleInfo, training: bool, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return list(info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training))
