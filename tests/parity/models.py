"""The models of the parity suite: small, each with its inputs and a loss as a user would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 5
STEPS = 6


class MLP(nn.Module):
    """Linear layers with the usual activations."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class CNN(nn.Module):
    """Convolutions with BatchNorm, both kinds of dropout, max and adaptive average pooling."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(p),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(6, momentum=None),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.features(x).flatten(1)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (s.view(b, t, self.heads, c // self.heads).transpose(1, 2) for s in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).contiguous().view(b, t, c)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A small causal language model; the output layer is tied to the embedding."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.token = nn.Embedding(CLASSES, 8)
        self.place = nn.Embedding(STEPS, 8)
        self.blocks = nn.ModuleList([Block(8, 2, p), Block(8, 2, p)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Embedding(nn.Module):
    """Embeddings of tokens, one with a padding index, and a bag of them."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.token = nn.Embedding(CLASSES, 4, padding_idx=0)
        self.bag = nn.EmbeddingBag(CLASSES, 4, mode="mean")
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.token(tokens).sum(1), self.bag(tokens)], dim=-1)
        return self.head(self.drop(both))


class LSTM(nn.Module):
    """Two LSTM layers with dropout between them, and a head on the last step."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True, dropout=p)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, (hidden, _) = self.lstm(x)
        return self.head(steps[:, -1] + hidden[0])


@dataclass(frozen=True)
class Case:
    """A model, what goes in (a lead of dimensions, a seed), and whether gradients of it exist."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False

    def inputs(self, *lead: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """Inputs with `lead` dimensions first: `(batch,)`, or `(M, batch)`."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(CLASSES, (*lead, *self.shape), generator=generator)
        values = torch.randn(*lead, *self.shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    def members(self, count: int, dtype: torch.dtype, p: float = 0.3) -> list[nn.Module]:
        """`count` models with weights and buffers of their own."""
        with torch.random.fork_rng(devices=[]):
            models = []
            for i in range(count):
                torch.manual_seed(i)
                models.append(self.make(p=p).to(dtype))
            for model in models:
                for buffer in model.buffers():
                    if buffer.is_floating_point():
                        buffer.add_(torch.rand_like(buffer))
        return models


CASES = {
    "mlp": Case(MLP, (7,)),
    "cnn": Case(CNN, (2, 12, 12)),
    "transformer": Case(Transformer, (STEPS,), tokens=True),
    "embedding": Case(Embedding, (STEPS,), tokens=True),
    "lstm": Case(LSTM, (STEPS, 3)),
}


def targets(*lead: int, seed: int = 9) -> torch.Tensor:
    """Class labels."""
    return torch.randint(CLASSES, lead, generator=torch.Generator().manual_seed(seed))


def loss(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, summed, so that an empty batch gives 0."""
    return F.cross_entropy(out.reshape(-1, CLASSES), labels.reshape(-1), reduction="sum", label_smoothing=0.1)
