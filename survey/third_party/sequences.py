"""Models of sequences: packed language models, x-transformers, liquid networks, conformers, spiking networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import ncps.torch
import ncps.wirings
import snntorch
import torch
from conformer import Conformer
from snntorch import surrogate as spike_gradients
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from tab_transformer_pytorch import FTTransformer, TabTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper, XTransformer

from survey.third_party.case import Case, Inputs, call, call_in_order, randn, tokens

VOCABULARY, BATCH, LENGTH = 20, 3, 6


class LanguageModel(nn.Module):
    """An LSTM over packed sentences, its output tied to its embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True, **options)
        self.head = nn.Linear(8, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, enforce_sorted: bool = False) -> Any:
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=enforce_sorted)
        steps, state = self.lstm(packed)
        hidden, _ = pad_packed_sequence(steps, batch_first=True, total_length=LENGTH)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        return loss, logits, state


def sentences(generator: torch.Generator) -> Inputs:
    """Of lengths that differ from member to member, padded with 0."""
    lengths = torch.randint(1, LENGTH + 1, (BATCH,), generator=generator)
    ids = tokens(generator, BATCH, LENGTH, below=VOCABULARY, least=1)
    return {"ids": ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], 0), "lengths": lengths}


def same_lengths(generator: torch.Generator) -> Inputs:
    ids = tokens(generator, BATCH, LENGTH, below=VOCABULARY, least=1)
    return {
        "ids": ids.masked_fill(torch.arange(LENGTH) >= torch.tensor([[6], [4], [2]]), 0),
        "lengths": torch.tensor([6, 4, 2]),
    }


def ids(generator: torch.Generator) -> Inputs:
    return {"x": tokens(generator, 2, 8, below=VOCABULARY)}


def pair(generator: torch.Generator) -> Inputs:
    return {"src": tokens(generator, 2, 8, below=VOCABULARY), "tgt": tokens(generator, 2, 7, below=VOCABULARY)}


def decoder(*, flash: bool = True, **options: Any) -> Any:
    layers = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 32, "attn_flash": flash}
    return lambda: TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=16, attn_layers=Decoder(**layers, **options), emb_dropout=0.1
    )


CASES = [
    Case("LSTM language model, packed", "torch", LanguageModel, sentences, call),
    Case("LSTM language model, packed alike", "torch", LanguageModel, same_lengths, call),
    Case("x-transformers decoder", "x-transformers", decoder(attn_dropout=0.1), ids),
    Case(
        "x-transformers, rotary, RMS norm, GLU",
        "x-transformers",
        decoder(rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True),
        ids,
    ),
    Case(
        "x-transformers, ALiBi, talking heads",
        "x-transformers",
        decoder(flash=False, alibi_pos_bias=True, attn_pre_talking_heads=True),
        ids,
        exact=torch.float32,
    ),
    Case("x-transformers, sparse top-k attention", "x-transformers", decoder(flash=False, attn_sparse_topk=3), ids),
    Case(
        "x-transformers, relative bias, memory",
        "x-transformers",
        decoder(flash=False, rel_pos_bias=True, attn_num_mem_kv=2),
        ids,
        exact=torch.float32,
    ),
    Case(
        "x-transformers encoder-decoder",
        "x-transformers",
        lambda: XTransformer(
            dim=32,
            enc_num_tokens=VOCABULARY,
            enc_depth=1,
            enc_heads=2,
            enc_max_seq_len=16,
            dec_num_tokens=VOCABULARY,
            dec_depth=1,
            dec_heads=2,
            dec_max_seq_len=16,
            tie_token_emb=True,
        ),
        pair,
        exact=torch.float32,
    ),
    Case(
        "x-transformers continuous",
        "x-transformers",
        lambda: ContinuousTransformerWrapper(
            dim_in=5, dim_out=4, max_seq_len=16, attn_layers=Encoder(dim=32, depth=2, heads=2)
        ),
        randn(2, 8, 5),
        exact=torch.float32,
    ),
    Case(
        "Conformer",
        "conformer",
        lambda: Conformer(
            dim=16,
            depth=2,
            dim_head=8,
            heads=2,
            ff_mult=2,
            conv_expansion_factor=2,
            conv_kernel_size=5,
            attn_dropout=0.1,
            ff_dropout=0.1,
            conv_dropout=0.1,
        ),
        randn(2, 10, 16),
    ),
    Case("liquid network (CfC)", "ncps", lambda: ncps.torch.CfC(4, ncps.wirings.AutoNCP(10, 3)), randn(2, 5, 4)),
    Case("liquid network (LTC)", "ncps", lambda: ncps.torch.LTC(4, ncps.wirings.AutoNCP(10, 3)), randn(2, 5, 4)),
]


# -- tables


def table(generator: torch.Generator) -> Inputs:
    columns = [tokens(generator, 4, 1, below=k) for k in (3, 5, 2)]
    return {"kinds": torch.cat(columns, 1), "numbers": torch.randn(4, 2, generator=generator, dtype=torch.float64)}


CASES += [
    Case(
        "TabTransformer",
        "tab-transformer-pytorch",
        lambda: TabTransformer(
            categories=(3, 5, 2),
            num_continuous=2,
            dim=8,
            dim_out=1,
            depth=2,
            heads=2,
            attn_dropout=0.1,
            ff_dropout=0.1,
            mlp_act=nn.ReLU(),
        ),
        table,
        exact=torch.float32,
    ),
    Case(
        "FT-Transformer",
        "tab-transformer-pytorch",
        lambda: FTTransformer(
            categories=(3, 5, 2), num_continuous=2, dim=8, dim_out=1, depth=2, heads=2, attn_dropout=0.1, ff_dropout=0.1
        ),
        table,
        exact=torch.float32,
    ),
]


# -- spiking networks, which keep their state from call to call


def detach(net: nn.Module, reset: bool = False) -> None:
    """The state of the last call gets no gradient any more; `reset`: is gone. (snntorch.utils has it for what it finds
    in a global variable.)"""
    for neurons in net.modules():
        if isinstance(neurons, snntorch.Leaky):
            neurons.mem = torch.zeros_like(neurons.mem) if reset else neurons.mem.detach()


class Spiking(nn.Module):
    """Leaky neurons that learn their decay; the membrane stays in the module."""

    def __init__(self) -> None:
        super().__init__()
        kept = {"init_hidden": True, "spike_grad": spike_gradients.fast_sigmoid()}
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.spike = snntorch.Leaky(beta=0.8, learn_beta=True, **kept)
        self.out = snntorch.Leaky(beta=0.7, learn_threshold=True, output=True, **kept)

    def forward(self, x: torch.Tensor) -> Any:
        detach(self, reset=True)
        steps = [self.out(self.two(self.spike(self.one(now)))) for now in x]
        return torch.stack([spikes for spikes, _ in steps]), steps[-1][1]


class StillSpiking(Spiking):
    """The same; the state of the last call is where the next one begins."""

    def forward(self, x: torch.Tensor) -> Any:
        detach(self)
        steps = [self.out(self.two(self.spike(self.one(now)))) for now in x]
        return torch.stack([spikes for spikes, _ in steps]), steps[-1][1]


class Synaptic(nn.Module):
    """State that the caller carries along."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 8)
        self.spike = snntorch.Synaptic(alpha=0.9, beta=0.8)

    def forward(self, x: torch.Tensor) -> Any:
        synapse, membrane = self.spike.init_synaptic()
        found = []
        for now in x:
            spikes, synapse, membrane = self.spike(self.one(now), synapse, membrane)
            found.append(spikes)
        return torch.stack(found), membrane


def jelly(multi: bool) -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1),
        layer.BatchNorm2d(4),
        neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan()),
        layer.Flatten(),
        layer.Linear(4 * 16, 5),
        neuron.ParametricLIFNode(surrogate_function=surrogate.ATan()),
    )
    functional.set_step_mode(net, "m" if multi else "s")
    return net


def anew(model: nn.Module, x: torch.Tensor) -> Any:
    functional.reset_net(model)
    return model(x)


def going_on(model: nn.Module, x: torch.Tensor) -> Any:
    """From the state of the last call, which gets no gradient any more."""
    functional.detach_net(model)
    return model(x)


CASES += [
    Case("leaky neurons, reset each call", "snntorch", Spiking, randn(4, 2, 5), dtype=torch.float32),
    Case("leaky neurons, state kept", "snntorch", StillSpiking, randn(4, 2, 5), steps=3, dtype=torch.float32),
    Case("synaptic neurons", "snntorch", Synaptic, randn(4, 2, 5)),
    Case("spiking CNN, many steps", "spikingjelly", partial(jelly, True), randn(3, 2, 1, 4, 4), anew),
    Case("spiking CNN, state kept", "spikingjelly", partial(jelly, False), randn(2, 1, 4, 4), going_on, steps=3),
]
__all__ = ["CASES", "call_in_order"]
