"""The modules of torch.nn, each stacked against its lone runs: outputs, gradients, buffers, draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import memberwise
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import cotangent, joined, numbers

pytestmark = [
    pytest.mark.usefixtures("composites"),
    pytest.mark.filterwarnings("ignore::memberwise.errors.StackWarning"),
]

Inputs = Sequence[torch.Tensor]


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return numbers(3, *shape, seed=seed)


def labels(*shape: int, top: int) -> torch.Tensor:
    return torch.randint(top, (3, *shape), generator=torch.Generator().manual_seed(1))


LINE, FLAT, SOLID = (2, 4, 9), (2, 4, 8, 8), (2, 4, 6, 6, 6)
STATEFUL: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "Linear": (lambda: nn.Linear(4, 3), [x(2, 4)]),
    "Bilinear": (lambda: nn.Bilinear(4, 5, 3), [x(2, 4), x(2, 5, seed=1)]),
    "Identity": (lambda: nn.Sequential(nn.Identity(3, arg=1), nn.Linear(4, 2)), [x(2, 4)]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), [x(*LINE)]),
    "Conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), [x(*LINE)]),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), [x(*FLAT)]),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), [x(*FLAT)]),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), [x(*FLAT)]),
    "Conv2d of one sample": (lambda: nn.Conv2d(4, 2, 3), [x(4, 8, 8)]),
    "Conv3d": (lambda: nn.Conv3d(4, 2, 2), [x(*SOLID)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), [x(*LINE)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), [x(*FLAT)]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), [x(*SOLID)]),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), [x(6, 4)]),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(4, momentum=None), [x(*LINE)]),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, eps=1e-2, momentum=0.4), [x(*FLAT)]),
    "BatchNorm2d bare": (lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 1, 1)), [x(*FLAT)]),
    "BatchNorm2d untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), [x(*FLAT)]),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), [x(*SOLID)]),
    "SyncBatchNorm in eval": (lambda: nn.BatchNorm2d(4).eval(), [x(*FLAT)]),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), [x(*LINE)]),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), [x(*FLAT)]),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), [x(*SOLID)]),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), [x(*FLAT)]),
    "LayerNorm": (lambda: nn.LayerNorm([8, 8]), [x(*FLAT)]),
    "LayerNorm without bias": (lambda: nn.LayerNorm(9, bias=False), [x(*LINE)]),
    "RMSNorm": (lambda: nn.RMSNorm(9), [x(*LINE)]),
    "PReLU": (lambda: nn.PReLU(4), [x(*FLAT)]),
    "PReLU of one": (lambda: nn.PReLU(), [x(2, 4)]),
    "Embedding": (lambda: nn.Embedding(6, 4, padding_idx=2), [labels(2, 5, top=6)]),
    "Embedding with max_norm": (lambda: nn.Embedding(6, 4, max_norm=1.0), [labels(2, 5, top=6)]),
    "Embedding by frequency": (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), [labels(2, 5, top=6)]),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(6, 4, mode="sum"), [labels(2, 5, top=6)]),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(6, 4, mode="max"), [labels(2, 5, top=6)]),
    "RNN": (lambda: nn.RNN(4, 3, num_layers=2, nonlinearity="relu"), [x(5, 2, 4)]),
    "RNN both ways": (lambda: nn.RNN(4, 3, bidirectional=True, batch_first=True), [x(2, 5, 4)]),
    "LSTM": (lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.3), [x(5, 2, 4)]),
    "LSTM both ways": (lambda: nn.LSTM(4, 3, bidirectional=True, bias=False), [x(5, 2, 4)]),
    "LSTM projected": (lambda: nn.LSTM(4, 5, proj_size=2), [x(5, 2, 4)]),
    "LSTM of one sequence": (lambda: nn.LSTM(4, 3), [x(5, 4)]),
    "GRU": (lambda: nn.GRU(4, 3, num_layers=2, dropout=0.3, batch_first=True), [x(2, 5, 4)]),
    "RNNCell": (lambda: nn.RNNCell(4, 3), [x(2, 4), x(2, 3, seed=1)]),
    "LSTMCell": (lambda: nn.LSTMCell(4, 3), [x(2, 4)]),
    "GRUCell": (lambda: nn.GRUCell(4, 3), [x(2, 4), x(2, 3, seed=1)]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.2), [x(5, 2, 4)] * 3),
    "MultiheadAttention of others": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        [x(2, 5, 4), x(2, 6, 3, seed=1), x(2, 6, 5, seed=2)],
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.2, batch_first=True), [x(2, 5, 4)]),
    "TransformerEncoderLayer pre-norm": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.2, "gelu", norm_first=True),
        [x(5, 2, 4)],
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 6, 0.2), [x(5, 2, 4), x(3, 2, 4, seed=1)]),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), 2),
        [x(2, 5, 4)],
    ),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 6, 0.1), [x(5, 2, 4), x(3, 2, 4, seed=1)]),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), [x(2, 4)]),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), [x(2, 4)]),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), [x(2, 4)]),
    "spectral_norm, the old one": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 2, 3)), [x(*FLAT)]),
    "AdaptiveLogSoftmax": (lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 12, [3, 7]), [x(6, 4), labels(6, top=12)]),
    "ModuleList and ParameterList": (lambda: Listed(), [x(2, 4)]),
}


class Listed(nn.Module):
    """Containers, a bare parameter of no dimension, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])})
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(()))])
        self.unused = nn.Parameter(torch.rand(2))

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        own = self.layers["a"](own) * self.scales[0]
        for layer in self.layers["b"]:
            own = layer(own) * self.scales[1]
        return own


ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
STATELESS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    **{kind.__name__: (kind, [x(2, 4)]) for kind in ACTIVATIONS},
    "ReLU in place": (lambda: nn.Sequential(nn.Softplus(), nn.ReLU(inplace=True)), [x(2, 4)]),
    "Threshold": (lambda: nn.Threshold(0.1, 0.2), [x(2, 4)]),
    "Softmax": (lambda: nn.Softmax(1), [x(2, 4)]),
    "Softmax2d": (nn.Softmax2d, [x(*FLAT)]),
    "LogSoftmax": (lambda: nn.LogSoftmax(0), [x(2, 4)]),
    "Softmin": (lambda: nn.Softmin(1), [x(2, 4)]),
    "Dropout": (lambda: nn.Dropout(0.4), [x(2, 9)]),
    "Dropout1d": (lambda: nn.Dropout1d(0.4), [x(*LINE)]),
    "Dropout2d": (lambda: nn.Dropout2d(0.4), [x(*FLAT)]),
    "Dropout3d": (lambda: nn.Dropout3d(0.4), [x(*SOLID)]),
    "Dropout in place": (lambda: nn.Sequential(nn.Softplus(), nn.Dropout(0.4, inplace=True)), [x(2, 9)]),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.4), [x(2, 9)]),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.4), [x(*FLAT)]),
    "MaxPool1d": (lambda: nn.MaxPool1d(2, 1), [x(*LINE)]),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), [x(*FLAT)]),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), [x(*SOLID)]),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), [x(*LINE)]),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), [x(*FLAT)]),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), [x(*SOLID)]),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), [x(*FLAT)]),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), [x(*FLAT)]),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, None)), [x(*FLAT)]),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(1), [x(*SOLID)]),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, 3), [x(*FLAT)]),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(2), [x(*FLAT)]),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), [x(*LINE)]),
    "CircularPad2d": (lambda: nn.CircularPad2d((1, 2, 0, 3)), [x(*FLAT)]),
    "ZeroPad2d": (lambda: nn.ZeroPad2d((1, -1, 0, 3)), [x(*FLAT)]),
    "ConstantPad1d": (lambda: nn.ConstantPad1d(2, 3.5), [x(*LINE)]),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), [x(*FLAT)]),
    "Upsample nearest": (lambda: nn.Upsample(size=5), [x(*LINE)]),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), [x(*FLAT)]),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), [x(*FLAT)]),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), [x(*FLAT)]),
    "Flatten": (lambda: nn.Flatten(), [x(*FLAT)]),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), [x(*FLAT)]),
    "Fold": (lambda: nn.Fold((4, 4), 2), [x(2, 8, 9)]),
    "Unfold": (lambda: nn.Unfold(3, stride=2), [x(*FLAT)]),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), [x(*FLAT)]),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(), [x(2, 4), x(2, 4, seed=1)]),
    "PairwiseDistance": (lambda: nn.PairwiseDistance(3), [x(2, 4), x(2, 4, seed=1)]),
    "L1Loss": (nn.L1Loss, [x(2, 4), x(2, 4, seed=1)]),
    "MSELoss": (lambda: nn.MSELoss(reduction="sum"), [x(2, 4), x(2, 4, seed=1)]),
    "SmoothL1Loss": (nn.SmoothL1Loss, [x(2, 4), x(2, 4, seed=1)]),
    "HuberLoss": (lambda: nn.HuberLoss(delta=0.3), [x(2, 4), x(2, 4, seed=1)]),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(ignore_index=1), [x(6, 4), labels(6, top=4)]),
    "NLLLoss": (lambda: nn.NLLLoss(reduction="none"), [x(6, 4), labels(6, top=4)]),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean", log_target=True), [x(2, 4), x(2, 4, seed=1)]),
    "BCELoss": (lambda: Squeezed(nn.BCELoss()), [x(2, 4), x(2, 4, seed=1)]),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, [x(2, 4), x(2, 4, seed=1)]),
    "PoissonNLLLoss": (nn.PoissonNLLLoss, [x(2, 4), x(2, 4, seed=1)]),
    "GaussianNLLLoss": (lambda: Positive(nn.GaussianNLLLoss()), [x(2, 4), x(2, 4, seed=1), x(2, 4, seed=2)]),
    "MarginRankingLoss": (lambda: nn.MarginRankingLoss(0.1), [x(4), x(4, seed=1), labels(4, top=2) * 2 - 1]),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss, [x(4), labels(4, top=2) * 2 - 1]),
    "CosineEmbeddingLoss": (nn.CosineEmbeddingLoss, [x(3, 4), x(3, 4, seed=1), labels(3, top=2) * 2 - 1]),
    "MultiMarginLoss": (nn.MultiMarginLoss, [x(6, 4), labels(6, top=4)]),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss, [x(2, 4), labels(2, 4, top=4)]),
    "SoftMarginLoss": (nn.SoftMarginLoss, [x(2, 4), labels(2, 4, top=2) * 2 - 1]),
    "TripletMarginLoss": (nn.TripletMarginLoss, [x(2, 4), x(2, 4, seed=1), x(2, 4, seed=2)]),
}


class Squeezed(nn.Module):
    """A loss of probabilities, fed with logits."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.loss(a.sigmoid(), b.sigmoid())


class Positive(Squeezed):
    """A loss that needs a positive last argument; it asks the host whether it is."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.loss(a, b, c.exp())


def flat(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for entry in out if entry is not None for t in flat(entry)]


def backward(outs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
    if pairs:
        torch.autograd.backward([out for out, _ in pairs], [grad.clone() for _, grad in pairs])


def leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def compare(make: Callable[[], nn.Module], inputs: Inputs, training: bool, shared: bool) -> None:
    models = []
    for i in range(3):
        torch.manual_seed(i)
        models.append(make().double().train(training))
    inputs = [t[0] if shared else t for t in inputs]
    params, buffers = memberwise.stack_module_state(models)
    own = [leaf(t) for t in inputs]
    generators = [torch.Generator().manual_seed(40 + i) for i in range(3)]
    dims = (0, 0, *[None if shared else 0] * len(own))
    outs = flat(
        memberwise.vmap(
            lambda p, b, *given: memberwise.functional_call(models[0], (p, b), given), dims, generators=generators
        )(params, buffers, *own)
    )
    grads = [cotangent(out, k) for k, out in enumerate(outs)]
    backward(outs, grads)
    lone_shared = [leaf(t) for t in inputs]
    for i, model in enumerate(models):
        given = lone_shared if shared else [leaf(t[i]) for t in inputs]
        torch.manual_seed(40 + i)
        lone = flat(model(*given))
        backward(lone, [grad[i] for grad in grads])
        assert len(outs) == len(lone)
        for k, out in enumerate(lone):
            assert_equal(outs[k][i].detach(), out.detach(), f"member {i}: output {k}")
        for name, buffer in model.named_buffers():
            assert_equal(buffers[name][i], buffer, f"member {i}: {name}")
        for k, t in enumerate([] if shared else given):
            assert (own[k].grad is None) == (t.grad is None)
            if t.grad is not None:
                assert_equal(own[k].grad[i], t.grad, f"member {i}: gradient of input {k}")
        assert torch.equal(generators[i].get_state(), torch.get_rng_state()), f"member {i}'s stream"
    for name, p in params.items():
        alone = [dict(model.named_parameters())[name] for model in models]
        expected = joined([own_p.grad for own_p in alone], alone, 0)
        assert (p.grad is None) == (expected is None), name
        if expected is not None:
            assert_equal(p.grad, expected, f"gradient of {name}")
    for k, t in enumerate(lone_shared if shared else []):
        assert (own[k].grad is None) == (t.grad is None)
        if t.grad is not None:
            assert_equal(own[k].grad, t.grad, f"gradient of shared input {k}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("name", STATEFUL)
def test_with_state(name: str, shared: bool, training: bool) -> None:
    make, inputs = STATEFUL[name]
    compare(make, inputs, training, shared)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STATELESS)
def test_without_state(name: str, training: bool) -> None:
    make, inputs = STATELESS[name]
    compare(lambda: Scaled(make()), inputs, training, shared=False)


class Scaled(nn.Module):
    """One parameter before a module that has none, so that there is something to stack."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.inner = inner

    def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> Any:
        return self.inner(first * self.scale, *rest)
