"""W7: a small GPT that reads bytes, in its own blocks and in those of `torch.nn`; each member reads its own text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import folded, objectives
from benchmarks.case import Batch, Case, Unwritten
from benchmarks.recipe import Recipe

WIDTH, LAYERS, HEADS, TIME, VOCABULARY = 256, 4, 8, 128, 256


class Attention(nn.Module):
    """Causal self-attention; without biases, for softmax does not see a key's."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(dropout)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.norm2(x)))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a last norm and a head: (B, T) -> (B, T, VOCABULARY)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(TIME, WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions)
        return self.head(self.norm(self.blocks(x)))


class EncoderGPT(nn.Module):
    """The same of `nn.TransformerEncoderLayer`, without biases."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(TIME, WIDTH))
        options = {"batch_first": True, "norm_first": True, "bias": False, "activation": F.gelu}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout, **options) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(TIME, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def text(size: int, generator: torch.Generator) -> Batch:
    """Random bytes; the target is the next one."""
    tokens = torch.randint(VOCABULARY, (size, TIME + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def prompt(size: int, generator: torch.Generator) -> Batch:
    return (torch.randint(VOCABULARY, (size, TIME), generator=generator),)


W7 = Case(
    "W7",
    "GPT d 256, 4 layers, batch 8 x 128, dropout 0.1, own blocks",
    partial(GPT, 0.1),
    partial(text, 8),
    objectives.cross_entropy,
    members=(5, 20),
    shared=False,
    workload="W7",
    recipe=Recipe(clip=1.0),
    still=partial(GPT, 0.0),
    rows=256,
    steps=4,
    objective="cross_entropy",
    folded=folded.gpt,
    in_jax="gpt",
)
BFLOAT16 = replace(
    W7,
    name="W7-bf16",
    about=f"{W7.about}, bf16 autocast",
    loss=objectives.in_bfloat16(W7.loss),
    precision=torch.bfloat16,
    in_jax=Unwritten("JAX has no autocast"),
)
SAME = Unwritten("by hand it is the same code as for the own blocks, in row W7")
ENCODER = replace(
    W7,
    name="W7-encoder",
    about="GPT d 256, 4 layers, batch 8 x 128, dropout 0.1, nn.TransformerEncoderLayer",
    model=partial(EncoderGPT, 0.1),
    still=partial(EncoderGPT, 0.0),
    folded=SAME,
    in_jax=SAME,
)


def predicting(size: int) -> Case:
    return replace(
        W7,
        name=f"W7-predict-{size}",
        about=f"GPT d 256, 4 layers, one prediction, batch {size} x 128",
        batch=partial(prompt, size),
        loss=objectives.prediction,
        shared=True,
        model=partial(GPT, 0.0),
        still=None,
        trains=False,
        objective="",
    )


CASES = (W7, BFLOAT16, ENCODER, predicting(1), predicting(64))
