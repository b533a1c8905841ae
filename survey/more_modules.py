"""The modules of `torch.nn` that torch's own list of samples leaves out, with samples of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import make_tensor
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput

Make = Callable[[], Any]


class Way(NamedTuple):
    """One way to make a module and to call it: its arguments, and what makes its inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Make, ...]


def way(*args: Any, to: tuple[Any, ...], **kwargs: Any) -> Way:
    """Arguments, and `to` what it is applied: shapes of floating tensors, or what makes an input."""
    return Way(args, kwargs, tuple(partial(_floats, entry) if isinstance(entry, tuple) else entry for entry in to))


def _floats(shape: tuple[int, ...]) -> torch.Tensor:
    return make_tensor(shape, device="cpu", dtype=torch.float32, requires_grad=True)


def _whole(high: int, *shape: int) -> Make:
    return lambda: torch.randint(high, shape)


def _pooled(pool: Callable[..., Any], *shape: int) -> tuple[Make, Make]:
    """Maxima, and where they are; from one tensor, so that they fit."""

    def found(which: int) -> torch.Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(torch.initial_seed()))
        out = pool(x, 2, return_indices=True)[which]
        return out.requires_grad_(which == 0)

    return partial(found, 0), partial(found, 1)


def _packed(*shape: int, lengths: tuple[int, ...]) -> Make:
    return lambda: pack_padded_sequence(_floats(shape), torch.tensor(lengths), enforce_sorted=False)


MORE: dict[type[nn.Module], tuple[Way, ...]] = {
    nn.AdaptiveLogSoftmaxWithLoss: (way(8, 12, [4, 8], to=((5, 8), _whole(12, 5))),),
    **dict.fromkeys((nn.AlphaDropout, nn.Dropout, nn.FeatureAlphaDropout), (way(0.3, to=((4, 6),)),)),
    nn.Dropout1d: (way(0.3, to=((4, 6, 5),)),),
    nn.Dropout2d: (way(0.3, to=((2, 4, 3, 3),)), way(0.3, True, to=((2, 4, 3, 3),))),
    nn.Dropout3d: (way(0.3, to=((2, 4, 3, 3, 2),)),),
    nn.ChannelShuffle: (way(2, to=((2, 4, 3, 3),)),),
    nn.CosineSimilarity: (way(to=((4, 6), (4, 6))), way(0, to=((4, 6), (4, 6)))),
    nn.CrossMapLRN2d: (way(2, to=((2, 4, 3, 3),)),),
    nn.Embedding: (
        way(6, 4, max_norm=1.0, to=(_whole(6, 5, 2),)),
        way(6, 4, padding_idx=1, scale_grad_by_freq=True, to=(_whole(6, 5, 2),)),
        way(6, 4, sparse=True, to=(_whole(6, 5, 2),)),
    ),
    nn.EmbeddingBag: (
        *(way(6, 4, mode=mode, to=(_whole(6, 5, 3),)) for mode in ("sum", "mean", "max")),
        *(
            way(6, 4, mode=mode, to=(_whole(6, 7), lambda: torch.tensor([0, 2, 2, 5])))
            for mode in ("sum", "mean", "max")
        ),
        way(6, 4, mode="sum", to=(_whole(6, 5, 3), lambda: None, (5, 3))),
        way(6, 4, mode="sum", to=(_whole(6, 7), lambda: torch.tensor([0, 3, 4]), (7,))),
        way(6, 4, include_last_offset=True, to=(_whole(6, 7), lambda: torch.tensor([0, 3, 7]))),
        *(way(6, 4, padding_idx=2, mode=mode, to=(_whole(6, 5, 3),)) for mode in ("sum", "mean", "max")),
        way(6, 4, max_norm=1.0, to=(_whole(6, 5, 3),)),
        way(6, 4, scale_grad_by_freq=True, mode="sum", to=(_whole(6, 5, 3),)),
        way(6, 4, sparse=True, mode="sum", to=(_whole(6, 5, 3),)),
    ),
    nn.Flatten: (way(to=((2, 3, 4),)),),
    nn.Fold: (
        way((4, 5), 2, to=((2, 8, 12),)),
        way((4, 5), (2, 3), dilation=1, padding=1, stride=2, to=((2, 12, 9),)),
        way((4, 5), 2, to=((8, 12),)),
    ),
    nn.Hardsigmoid: (way(to=((4, 5),)),),
    nn.Identity: (way(to=((4, 5),)),),
    nn.InstanceNorm2d: (way(4, track_running_stats=True, to=((2, 4, 3, 3),)),),
    nn.LazyBatchNorm1d: (way(to=((4, 3),)),),
    nn.LazyBatchNorm2d: (way(to=((4, 3, 2, 2),)),),
    nn.LazyBatchNorm3d: (way(to=((4, 3, 2, 2, 2),)),),
    nn.LazyInstanceNorm1d: (way(to=((4, 3, 5),)),),
    nn.LazyInstanceNorm2d: (way(to=((4, 3, 2, 2),)),),
    nn.LazyInstanceNorm3d: (way(to=((4, 3, 2, 2, 2),)),),
    nn.LazyLinear: (way(4, to=((5, 3),)),),
    nn.LSTM: (
        way(3, 4, 2, proj_size=2, bidirectional=True, to=((5, 2, 3),)),
        way(3, 4, 2, dropout=0.4, to=((5, 2, 3),)),
        way(3, 4, bidirectional=True, to=(_packed(5, 3, 3, lengths=(5, 2, 3)),)),
        way(3, 4, 2, proj_size=2, to=(_packed(5, 3, 3, lengths=(5, 2, 3)),)),
    ),
    nn.GRU: (
        way(3, 4, 2, dropout=0.4, bidirectional=True, to=((5, 2, 3),)),
        way(3, 4, to=(_packed(5, 3, 3, lengths=(5, 2, 3)),)),
    ),
    nn.RNN: (way(3, 4, bidirectional=True, to=(_packed(5, 3, 3, lengths=(5, 2, 3)),)),),
    nn.MaxUnpool1d: (way(2, to=_pooled(F.max_pool1d, 2, 3, 6)),),
    nn.MaxUnpool2d: (way(2, to=_pooled(F.max_pool2d, 2, 3, 4, 6)), way(2, to=_pooled(F.max_pool2d, 3, 4, 6))),
    nn.MaxUnpool3d: (way(2, to=_pooled(F.max_pool3d, 2, 3, 4, 4, 2)),),
    nn.PairwiseDistance: (way(to=((4, 6), (4, 6))), way(1, keepdim=True, to=((4, 6), (4, 6)))),
    nn.PixelShuffle: (way(2, to=((2, 8, 3, 3),)),),
    nn.PixelUnshuffle: (way(2, to=((2, 2, 4, 6),)),),
    nn.RReLU: (way(to=((4, 6),)), way(0.1, 0.4, True, to=((4, 6),))),
    nn.SyncBatchNorm: (way(4, to=((3, 4, 2),)),),
    nn.TransformerDecoder: (
        way(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2, to=((2, 3, 8), (2, 4, 8))),
    ),
    nn.TripletMarginLoss: (way(to=((4, 6), (4, 6), (4, 6))), way(swap=True, p=1, to=((4, 6), (4, 6), (4, 6)))),
    nn.TripletMarginWithDistanceLoss: (way(to=((4, 6), (4, 6), (4, 6))), way(swap=True, to=((4, 6), (4, 6), (4, 6)))),
    nn.Unflatten: (way(1, (2, 3), to=((4, 6),)),),
    nn.Unfold: (way(2, to=((2, 3, 4, 5),)), way((2, 3), 1, 1, 2, to=((2, 3, 4, 5),)), way(2, to=((3, 4, 5),))),
    nn.Upsample: (
        *(way(scale_factor=2, mode=mode, to=((2, 3, 4),)) for mode in ("nearest", "nearest-exact", "linear")),
        *(
            way(scale_factor=1.5, mode=mode, to=((2, 3, 4, 5),))
            for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
        ),
        way(size=(3, 7), mode="bilinear", align_corners=True, to=((2, 3, 4, 5),)),
        *(way(scale_factor=2, mode=mode, to=((2, 3, 2, 3, 2),)) for mode in ("nearest", "nearest-exact", "trilinear")),
    ),
    nn.UpsamplingBilinear2d: (way(scale_factor=2, to=((2, 3, 4, 5),)),),
    nn.UpsamplingNearest2d: (way(scale_factor=2, to=((2, 3, 4, 5),)),),
}


def _inputs_of(ways: tuple[Way, ...]) -> Callable[..., list[ModuleInput]]:
    def inputs(info: Any, **_: Any) -> list[ModuleInput]:
        return [
            ModuleInput(FunctionInput(*args, **kwargs), FunctionInput(*(make() for make in to)), str(kwargs or args))
            for args, kwargs, to in ways
        ]

    return inputs


more_modules = [ModuleInfo(cls, module_inputs_func=_inputs_of(ways)) for cls, ways in MORE.items()]
