"""Lesson: torch's batching of one operation is the second rung; below dispatch it needs its keys back."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")

WITHOUT_RULE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cumsum": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "sort": lambda x: x.sort(1).values,
    "kthvalue": lambda x: x.kthvalue(2, dim=1).values,
    "roll": lambda x: x.roll((1, -1), (0, 1)),
    "flip": lambda x: x.flip(0),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4, dtype=x.dtype)),
    "inv": lambda x: torch.linalg.inv(x),
    "solve": lambda x: torch.linalg.solve(x, x.T),
    "qr": lambda x: torch.linalg.qr(x).R,
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x + x.T),
    "matrix_exp": lambda x: torch.matrix_exp(0.1 * x),
    "det": lambda x: torch.linalg.det(x),
    "cdist": lambda x: torch.cdist(x, x.flip(0)),
    "renorm": lambda x: x.renorm(2, 0, 1.5),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "diag_embed": lambda x: torch.diag_embed(x),
    "diagonal": lambda x: x.diagonal(1),
    "tril": lambda x: x.tril(-1),
    "trace": lambda x: x.trace(),
    "kron": lambda x: torch.kron(x, x[:2]),
    "fold": lambda x: F.fold(x.reshape(1, 4, 4), 3, 2).squeeze(0),
    "grid_sample": lambda x: F.grid_sample(
        x.view(1, 1, 4, 4), x.view(1, 2, 4, 2).tanh(), padding_mode="border", align_corners=False
    ),
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2.0, mode="linear"),
    "pad reflect": lambda x: F.pad(x[None], (2, 1), mode="reflect"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.view(1, 4, 2, 2), 2),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "conj": lambda x: (torch.view_as_complex(x.view(4, 2, 2)).conj() * 1j).imag,
    "neg view": lambda x: torch.view_as_complex(x.view(4, 2, 2)).conj().imag.sin(),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "logaddexp": lambda x: torch.logaddexp(x, x.T),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.arange(4)),
    "median": lambda x: x.median(),
    "mode": lambda x: x.round().mode(1).values * x.sum(),
    "norm": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, 1)),
    "trapezoid": lambda x: torch.trapezoid(x, dx=0.5),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_operation(name: str) -> None:
    check(WITHOUT_RULE[name], numbers(3, 4, 4))


@pytest.mark.parametrize("name", ["cumsum", "inv", "lerp", "conj", "neg view"])
def test_operation_among_other_tensors(name: str) -> None:
    """The same with a plain tensor of the closure, and below a transform."""
    other = numbers(4, 4, seed=3, grad=False)
    check(lambda x: WITHOUT_RULE[name](x * other) * other.sum(), numbers(3, 4, 4))
    check(torch.func.grad(lambda x: WITHOUT_RULE[name](x).sum()), numbers(3, 4, 4), gradients=False)


def test_batching_comes_before_the_loop() -> None:
    with trace.recording() as record:
        memberwise.vmap(lambda x: x.cumsum(0))(numbers(3, 4))
    paths = {entry.path for entry in record.entries.values() if "cumsum" in entry.op}
    assert paths <= {"vmap", "rule"} and paths


BY_NUMBERS: dict[str, Callable[..., torch.Tensor]] = {
    "x[i]": lambda x, i: x[i],
    "x[i, j]": lambda x, i: x[i, -1 - i],
    "x[i, :, j]": lambda x, i: x[i, :, i.flip(0)],
    "x[..., i]": lambda x, i: x.transpose(0, 2)[..., i],
    "x[i[:, None], j]": lambda x, i: x[i[:, None], i],
    "a mask of all": lambda x, i: x[torch.tensor([True, False, True, True]), 1] + i.sum(),
}


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_an_indexing_by_numbers_is_batched(name: str, in_dims: tuple[int | None, int | None]) -> None:
    """torch marks all indexing as one whose result has a shape of values; a mask's has, and a member's own mask's."""
    x = numbers(*(() if in_dims[0] is None else (3,)), 4, 4, 4)
    i = torch.tensor([[0, 3], [2, 2], [1, 0]])[0 if in_dims[1] is None else slice(None)]
    with trace.recording() as record:
        check(BY_NUMBERS[name], x, i, in_dims=in_dims)
    assert not [entry.op for entry in record.entries.values() if entry.path in ("loop", "retreat")]


def test_an_indexing_by_masks_of_their_own_runs_by_members() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    with trace.recording() as record:
        check(lambda x, mask: x[mask], numbers(3, 3, 2), mask)
    assert ("aten::index", "loop") in {(entry.op, entry.path) for entry in record.entries.values()}


IN_PLACE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "addmm_": lambda x: (x * 1).addmm_(x, x, beta=0.5),
    "addr_": lambda x: (x * 1).addr_(x[0], x[:, 1]),
    "baddbmm_": lambda x: (x[None] * 1).baddbmm_(x[None], x[None]),
    "cumsum_ of a view": lambda x: in_place(x * 1, lambda y: y[1:].cumsum_(0)),
    "cumprod_": lambda x: (x * 1).cumprod_(1),
    "tril_": lambda x: (x * 1).tril_(-1),
}


def in_place(x: torch.Tensor, write: Callable[[torch.Tensor], object]) -> torch.Tensor:
    write(x)
    return x


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_as_out_of_place(name: str) -> None:
    """What torch batches out of place alone is written by a copy of that, and not member by member."""
    with trace.recording() as record:
        check(IN_PLACE[name], numbers(3, 4, 4))
    assert not [entry.op for entry in record.entries.values() if entry.path in ("loop", "retreat")]


def test_in_place_does_not_broadcast_what_it_writes_into() -> None:
    x = numbers(3, 4, 4, grad=False)
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")
        memberwise.vmap(lambda x: x[:1].clone().addmm_(x, x))(x)


def looped(x: torch.Tensor) -> torch.Tensor:
    """torch has no batching rule for `histc`."""
    return torch.histc(x, bins=4, min=-2, max=2) + x.sum()


def test_an_operation_that_torch_cannot_batch_runs_by_members_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_warned", set())
    with pytest.warns(memberwise.errors.StackWarning, match="MW206") as first:
        check(looped, numbers(3, 9))
    assert sum("histc" in str(w.message) for w in first) == 1
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        check(looped, numbers(3, 9))
    assert not again


def test_torch_keeps_its_own_fallback() -> None:
    """We forbid torch's silent loops in our calls only: afterwards, and if a call failed, they are there again."""

    def fails(x: torch.Tensor) -> torch.Tensor:
        torch.histc(x, bins=4, min=-2, max=2)
        raise KeyError("mine")

    x = numbers(3, 9, grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memberwise.vmap(looped)(x)
        with pytest.raises(KeyError, match="mine"):
            memberwise.vmap(fails)(x)
        found = torch.vmap(lambda row: torch.histc(row, bins=4, min=-2, max=2))(x)
    assert torch.equal(found, torch.stack([torch.histc(row, bins=4, min=-2, max=2) for row in x]))


def test_a_result_that_torch_batches_without_members() -> None:
    """torch's batching of `pinv` forgets the members where the matrix is empty, and all share it."""
    out = memberwise.vmap(lambda a, rtol: torch.linalg.pinv(a, rtol=rtol), (None, 0))(torch.ones(0, 2), torch.ones(3))
    assert out.shape == (3, 2, 0)
