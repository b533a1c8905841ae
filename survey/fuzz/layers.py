"""The modules that a random program may call: state, draws, hooks, reads and reassigned buffers among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH = 3
"""Of the last dimension of what a module takes."""


class Counting(nn.Module):
    """A buffer that is written, one that is reassigned, an attribute that is carried from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.kept: Any = None
        self.python_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.python_calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().reshape(-1, WIDTH).mean(0)
        out = x + self.average if self.kept is None else x + self.kept * self.python_calls
        self.kept = x.detach().sum() * 0.1
        return out


class Parting(nn.Module):
    """Draws and writes, then reads what differs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.detach().reshape(-1, WIDTH).sum(0))
        x = F.dropout(self.linear(x), 0.2, self.training)
        return x * 2 if x.detach().sum() > 1e-6 else x.sin()


class Checkpointed(nn.Module):
    """Its inside is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[return-value] # one tensor


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 1, dropout=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


def watched(module: nn.Module) -> nn.Module:
    """Hooks of each kind."""
    module.register_forward_pre_hook(lambda _, args: (args[0] * 0.9,))
    module.register_forward_hook(lambda _, args, out: out + 0.1)
    module.register_full_backward_hook(lambda _, inputs, outputs: tuple(g if g is None else g * 2 for g in inputs))
    return module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "Linear relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
    "BatchNorm1d": lambda: nn.BatchNorm1d(WIDTH, eps=0.1),
    "BatchNorm1d without affine": lambda: nn.BatchNorm1d(WIDTH, affine=False, momentum=None, eps=0.1),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=0.1),
    "Dropout": lambda: nn.Dropout(0.3),
    "PReLU": lambda: nn.PReLU(),
    "Bilinear free": lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU(), nn.Linear(4, WIDTH)),
    "GRU": Recurrent,
    "LSTMCell": Cell,
    "MultiheadAttention": Attending,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(WIDTH, 1, 4, dropout=0.2),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "Counting": Counting,
    "Parting": Parting,
    "Checkpointed": Checkpointed,
    "watched Linear": lambda: watched(nn.Linear(WIDTH, WIDTH)),
    "Tied": Tied,
}
