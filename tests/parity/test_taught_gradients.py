"""Lesson: parity is with the loop. Gradients that torch's batching has wrong, or whose formulas read values in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

INDEX = torch.tensor([0, 2])


def in_place(out: torch.Tensor, change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    change(out)
    return out


SCATTERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "select_scatter": lambda x, v: torch.select_scatter(x, v, 1, 2),
    "slice_scatter": lambda x, v: torch.slice_scatter(x, v[:, None], 1, 1, 2),
    "diagonal_scatter": lambda x, v: torch.diagonal_scatter(x, v),
    "as_strided_scatter": lambda x, v: torch.as_strided_scatter(x, v, (4,), (4,), 1),
    "index_fill": lambda x, v: x.index_fill(0, INDEX, v[0]),
    "index_fill_": lambda x, v: in_place(x * 1, lambda y: y.index_fill_(1, INDEX, v[0])),
    "index_fill number": lambda x, v: x.index_fill(0, INDEX, 3.0) * v,
    "masked_fill": lambda x, v: x.masked_fill(x > 0, v[0]),
    "masked_scatter": lambda x, v: x.masked_scatter(torch.eye(4).bool(), v),
    "fill_diagonal_": lambda x, v: in_place(x * v, lambda y: y.fill_diagonal_(2.0)),
    "index_copy": lambda x, v: x.index_copy(0, INDEX, torch.stack([v, 2 * v])),
    "index_add": lambda x, v: x.index_add(0, INDEX, torch.stack([v, 2 * v]), alpha=2),
    "index_put": lambda x, v: x.index_put((INDEX, INDEX), v[:2]),
    "index_put accumulate": lambda x, v: x.index_put((INDEX[[0, 0]],), v.expand(2, 4), accumulate=True),
    "index_reduce": lambda x, v: x.index_reduce(0, INDEX, v.expand(2, 4), "mean"),
    "scatter": lambda x, v: x.scatter(1, torch.tensor([[1], [0], [3], [2]]), v[:, None]),
    "scatter_add": lambda x, v: x.scatter_add(0, torch.tensor([[1, 1, 3, 3]]), v[None]),
    "scatter_reduce prod": lambda x, v: x.scatter_reduce(0, torch.tensor([[1, 1, 3, 3]]), v[None], "prod"),
    "scatter_reduce amax": lambda x, v: x.scatter_reduce(1, torch.tensor([[1], [1], [3], [3]]), v[:, None], "amax"),
    "put_": lambda x, v: in_place(x * 1, lambda y: y.put_(INDEX, v[:2])),
    "fill_": lambda x, v: in_place(x * 1, lambda y: y[1].fill_(v[0])),
    "copy_": lambda x, v: in_place(x * 1, lambda y: y[:, 1].copy_(v)),
    "setitem": lambda x, v: in_place(x * 1, lambda y: y.__setitem__((slice(None), 0), v)),
    "setitem of a list": lambda x, v: in_place(x * 1, lambda y: y.__setitem__([0, 3], v)),
    "where": lambda x, v: torch.where(x > v, x, v),
    "clamp by members": lambda x, v: x.clamp(min=v),
    "tensor_split": lambda x, v: [part * v for part in torch.tensor_split(x, torch.tensor([1, 3]))],
    "outer in place": lambda x, v: in_place(x * 1, lambda y: y.addr_(v, v)),
    "baddbmm": lambda x, v: torch.baddbmm(x[None], x[None], v.expand(1, 4, 4), beta=0.5, alpha=2.0),
}


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["all own", "first shared", "second shared"])
@pytest.mark.parametrize("name", SCATTERS)
def test_scatter(name: str, shared: int | None) -> None:
    args = [numbers(3, 4, 4), numbers(3, 4, seed=1)]
    args = [t[0].detach().requires_grad_() if k == shared else t for k, t in enumerate(args)]
    check(SCATTERS[name], *args, in_dims=[None if k == shared else 0 for k in range(2)])


def with_zeros(*shape: int) -> torch.Tensor:
    """Different numbers of zeros in different members: a formula that asks the host for them cannot answer once."""
    x = numbers(*shape, grad=False)
    x[1].view(-1)[2] = 0.0
    x[2].view(-1)[0:6:5] = 0.0
    return x.requires_grad_()


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "prod": lambda x: x.prod(),
    "prod of a dim": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(0),
    "norm": lambda x: x.norm(),
    "norm of a dim": lambda x: x.norm(dim=1),
    "norm inf": lambda x: x.norm(p=float("inf")),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 3, dim=0),
    "std": lambda x: x.std(),
    "max": lambda x: x.max(),
    "min of a dim": lambda x: x.min(0),
    "amax with ties": lambda x: (x - x.detach() + x.detach().round()).amax(1),
    "median": lambda x: x.median(1).values,
    "nanmedian": lambda x: x.nanmedian(),
    "quantile": lambda x: x.quantile(0.3, dim=0),
    "det": lambda x: torch.linalg.det(x),
    "slogdet": lambda x: torch.linalg.slogdet(x + 4 * torch.eye(4)).logabsdet,
    "pinv": lambda x: torch.linalg.pinv(x[:, :2]),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "eigh": lambda x: torch.linalg.eigh(x + x.T).eigenvalues,
    "matrix_power": lambda x: torch.matrix_power(x, 3),
    "lstsq": lambda x: torch.linalg.lstsq(x + 4 * torch.eye(4), x[:, :1]).solution,
    "pow": lambda x: x.abs() ** x.sigmoid(),
    "xlogy": lambda x: torch.xlogy(x, x.abs() + 0.5),
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "embedding": lambda x: F.embedding(torch.tensor([0, 1, 1, 3]), x, padding_idx=1, scale_grad_by_freq=True),
    "max_unpool": lambda x: F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2),
    "max_pool2d with ties": lambda x: F.max_pool2d((x - x.detach() + x.detach().round()).view(1, 1, 4, 4), 2),
    "max_pool2d of zeros": lambda x: F.max_pool2d(F.relu(x).view(1, 1, 4, 4), 2, return_indices=True),
    "max_pool2d overlapping": lambda x: F.max_pool2d(x.sign().view(1, 1, 4, 4) * x.abs().sum(), 3, 1, 1),
    "max_pool3d": lambda x: F.max_pool3d(x.view(1, 1, 2, 2, 4), 2),
    "fractional": lambda x: F.adaptive_max_pool1d(x[None], 3),
    "ctc_loss": lambda x: F.ctc_loss(
        x.log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    ),
    "nll_loss with ignored": lambda x: F.nll_loss(x.log_softmax(1), torch.tensor([0, -100, 2, 1])),
    "cross_entropy weighted": lambda x: F.cross_entropy(
        x, torch.tensor([0, 1, 2, 1]), torch.arange(1.0, 5, dtype=x.dtype)
    ),
    "cross_entropy of members": lambda x: F.cross_entropy(x, x.detach().argmax(0)),
    "cross_entropy of probabilities": lambda x: F.cross_entropy(x, x.softmax(0)),
    "huber": lambda x: F.huber_loss(x, x.flip(0).detach()),
    "kl_div": lambda x: F.kl_div(x.log_softmax(0), x.softmax(1), reduction="batchmean"),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).to(x.dtype), pos_weight=x[0].detach().exp()),
    "triplet": lambda x: F.triplet_margin_loss(x[:1], x[1:2], x[2:3]),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0)),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "local_response_norm": lambda x: F.local_response_norm(x[None], 2),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "prelu": lambda x: F.prelu(x, x[0, :1]),
    "glu": lambda x: F.glu(x),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), dim=0),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.detach().argmax(1, keepdim=True), 1),
    "index by members": lambda x: x[x.detach().argmax(0)],
    "unfold": lambda x: F.unfold(x[None, None], 2),
    "bilinear": lambda x: F.bilinear(x, x, x.expand(2, 4, 4)),
    "affine_grid": lambda x: F.affine_grid(x.view(-1)[:6].view(1, 2, 3), [1, 1, 2, 2], align_corners=False),
    "complex": lambda x: torch.fft.fft2(x).abs().log1p(),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "tril_solve": lambda x: torch.linalg.solve_triangular(x.tril() + 3 * torch.eye(4), x, upper=False),
    "cholesky_solve": lambda x: torch.cholesky_solve(x[:, :1], torch.linalg.cholesky(x @ x.T + torch.eye(4))),
    "householder": lambda x: torch.linalg.householder_product(x[:, :3], x[0, :3]),
    "pdist": lambda x: F.pdist(x),
    "logdet": lambda x: torch.logdet(x @ x.T + torch.eye(4)),
    "segment_reduce": lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([1, 3])),
    "trace": lambda x: x.trace(),
    "diff": lambda x: x.diff(dim=1),
    "nan_to_num": lambda x: torch.nan_to_num(x / x.sign()),
    "cummax": lambda x: x.cummax(0).values,
    "topk": lambda x: x.topk(2).values,
    "fft of real": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2),
    "multi_head": lambda x: F.multi_head_attention_forward(
        x[:, None], x[:, None], x[:, None], 4, 2, x.repeat(3, 1), None, None, None, False, 0.0, x, None
    )[0],
}


@pytest.mark.parametrize("name", READS)
def test_formula(name: str) -> None:
    check(READS[name], with_zeros(3, 4, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunked", [True, False])
def test_linear_cross_entropy(chunked: bool, reduction: str) -> None:
    """torch.func gives wrong gradients for the chunked one, in silence."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None) if chunked else None
    target = torch.tensor([0, 2, 1, 1, 0, 2])

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(x, w, target, reduction=reduction, options=options)

    check(func, numbers(3, 6, 4), numbers(3, 3, 4, seed=1))
    check(func, numbers(6, 4), numbers(3, 3, 4, seed=1), in_dims=[None, 0])
