"""`nn.TransformerEncoder` in evaluation: alone it leaves padding out by nested tensors, and gives zeros there."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import memberwise
from memberwise import each
from memberwise.engine import trace

_PADDED = torch.tensor([[False, False, False, False], [False, False, True, True], [False, True, True, True]])
_ALIGNED = torch.stack([_PADDED, _PADDED.roll(1, 0)])
_UNALIGNED = _ALIGNED.clone()
_UNALIGNED[:, 1, 0] = True


def _encoders() -> list[nn.Module]:
    layers = [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of what it would take for nested tensors
        return [nn.TransformerEncoder(layer, 1).eval() for layer in layers]


@pytest.mark.filterwarnings("ignore::memberwise.StackWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mask", [_ALIGNED, _UNALIGNED], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_padding_is_what_it_is_alone(mask: torch.Tensor, own: bool, gradients: bool) -> None:
    models, x = _encoders(), torch.randn(2, 3, 4, 8)
    with torch.set_grad_enabled(gradients), trace.recording() as record:
        lone = [model(x[i * own], src_key_padding_mask=mask[i * own]) for i, model in enumerate(models)]
        args = (each(x), each(mask)) if own else (x[0], mask[0])
        out = memberwise.stack(models)(args[0], src_key_padding_mask=args[1])
    torch.testing.assert_close(out, torch.stack(lone))
    retreated = any(entry.path == "retreat" for entry in record.entries.values())
    assert retreated == (mask is _ALIGNED)
    if retreated and not gradients:
        assert not out[0][mask[0]].any(), "alone padding gives zeros"
