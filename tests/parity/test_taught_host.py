"""Lesson: values that C++ or the host reads without asking must be right, retreat, or be refused by name."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memberwise
from memberwise.engine import trace
from memberwise.testing.tolerance import assert_equal
from tests.parity.loops import check, numbers

pytestmark = pytest.mark.usefixtures("composites")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """A run by members is announced by a warning, which has its own test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memberwise.errors.StackWarning)
        yield


def saved(x: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(x.detach(), file)
    file.seek(0)
    return torch.load(file)


def by_set(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, dtype=x.dtype)
    y.set_((x.detach() * 2).untyped_storage(), 0, (4,))
    return y


def by_data(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, dtype=x.dtype)
    y.data = x.detach() * 2
    return y


def through_data(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.data.add_(1.0)
    y.data[0] = 5.0
    return y


def by_item(x: torch.Tensor) -> float:
    return float(x.detach()[0])


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "set_": lambda x: by_set(x) * x,
    "data of a fresh tensor": lambda x: by_data(x) * x,
    "data of a member": lambda x: through_data(x) * x,
    "set_ to another": lambda x: torch.empty(0, dtype=x.dtype).set_((x * 1).detach()) * x,
    "resize_": lambda x: torch.empty(0, dtype=x.dtype).resize_(4).copy_(x.detach()) * x,
    "swap of data": lambda x: x * (lambda t: t)(x.detach().clone().data),
    "numpy": lambda x: torch.from_numpy(np.sin(x.detach().numpy())) * x,
    "numpy of a fresh tensor": lambda x: torch.from_numpy(torch.arange(4.0).numpy() + 1) * x,
    "array": lambda x: torch.as_tensor(np.asarray(x.detach()) * 2) * x,
    "tensor of a list": lambda x: torch.tensor([x.detach()[0], x.detach()[1]]) * x[:2],
    "tensor of a list of items": lambda x: torch.tensor([v.item() for v in x.detach()], dtype=x.dtype) * x,
    "tensor of a member": lambda x: torch.tensor(x.detach()) * x,
    "as_tensor": lambda x: torch.as_tensor(x) * x,
    "asarray": lambda x: torch.asarray(x, dtype=torch.float32) * x,
    "tolist": lambda x: torch.tensor(x.detach().tolist(), dtype=x.dtype) * x,
    "from dlpack": lambda x: torch.from_dlpack(x.detach()) * x,
    "storage": lambda x: torch.tensor(list(x.detach().clone().untyped_storage()[:2])) * x[:2],
    "data_ptr": lambda x: x * float(x.data_ptr() == x.data_ptr() and x.data_ptr() != 0),
    "deepcopy": lambda x: copy.deepcopy(x.detach()) * x,
    "save and load": lambda x: saved(x) * x,
    "share_memory": lambda x: (x * 1).detach().clone().share_memory_() * x,
    "isinstance": lambda x: x * (2.0 if isinstance(x, torch.Tensor) else 3.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_memory(name: str) -> None:
    check(WRITES[name], numbers(3, 4))


FORMATS: dict[str, Callable[[torch.Tensor], str]] = {
    "format": lambda x: f"{x[0]:.3f}",
    "format of many": lambda x: f"{x.round()[:1].sum():4.1f}",
    "str of an item": lambda x: str(x[0].item()),
    "percent": lambda x: "%.2f" % x[0],  # noqa: UP031 # this way reads the value in C
    "round": lambda x: str(round(x[0].item(), 2)),
    "hex": lambda x: hex(x[0].long()),
    "numpy": lambda x: str(x.detach().numpy()[0]),
}


@pytest.mark.parametrize("agree", [True, False], ids=["agreeing", "differing"])
@pytest.mark.parametrize("name", FORMATS)
def test_text(name: str, agree: bool) -> None:
    """The text that each member would print; read through what the caller collects, as a log would."""
    x = torch.ones(3, 4, dtype=torch.float64) * (torch.ones(3, 1) if agree else torch.arange(1, 4)[:, None])
    found: list[str] = []

    def func(own: torch.Tensor) -> torch.Tensor:
        found.append(FORMATS[name](own))
        return own * 2

    alone = [FORMATS[name](row) for row in x]
    memberwise.vmap(func)(x)
    assert set(found) == set(alone) if agree else found[-3:] == alone


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x * x[0].item(),
    "float": lambda x: x * float(x[0]),
    "int": lambda x: x * int(x[0] * 10),
    "bool": lambda x: x * 2 if x[0] > 0.3 else x * 3,
    "while": lambda x: counted(x),
    "complex": lambda x: x * complex(x[0]).real,
    "index": lambda x: x[x.abs().argmax()] * x,
    "index by int": lambda x: x[int(x.abs().argmax())] * x,
    "range": lambda x: x * sum(range(int(x.abs().argmax()) + 2)),
    "slice": lambda x: x[: x.abs().argmax() + 1].sum() * x,
    "in": lambda x: x * (2 if x[0].detach() in x.round() else 3),
    "equal": lambda x: x * (2 if torch.equal(x, x.abs()) else 3),
    "allclose": lambda x: x * (2 if torch.allclose(x, x.abs()) else 3),
    "is_nonzero": lambda x: x * (2 if torch.is_nonzero((x[0] > 0).long()) else 3),
    "any": lambda x: x * (2 if (x > 1.0).any() else 3),
    "max of Python": lambda x: max(x) * x,
    "sorted": lambda x: torch.stack(sorted(x)),
    "sum of Python": lambda x: sum(x) * x,
    "masked_select": lambda x: x[x > 0].sum() * x,
    "nonzero": lambda x: x[(x > 0).nonzero()[:, 0]].prod() * x,
    "unique": lambda x: x.round().unique().numel() * x,
    "bincount": lambda x: torch.bincount((x.detach() * 2).abs().long())[:1] * x,
    "argwhere": lambda x: len(torch.argwhere(x > 0)) * x,
    "where of one": lambda x: x[torch.where(x > 0)[0]].sum() * x,
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long() + 1).sum() * x,
    "one_hot": lambda x: F.one_hot((x > 0).long()).sum(0)[0] * x,
    "multiply by a Python bool": lambda x: x * (1 + bool(x.sum() > 0)),
    "dict key": lambda x: {1: x, 0: -x}[int(x[0] > 0)] * x,
    "arange": lambda x: torch.arange(int(x.abs().argmax()) + 1).sum() * x,
    "full": lambda x: torch.full((4,), x[0].item(), dtype=x.dtype) * x,
    "linspace": lambda x: torch.linspace(0, x[0].item(), 4) * x,
    "clamp by item": lambda x: x.clamp(max=x[0].item()),
    "add with alpha": lambda x: torch.add(x, x, alpha=x[0].item()),
    "assertion": lambda x: asserted(x),
    "distribution with validation": lambda x: torch.distributions.Normal(x, x.abs() + 1, True).log_prob(x),
}


def counted(x: torch.Tensor) -> torch.Tensor:
    steps = 0
    y = x
    while y.abs().max() > 0.1:
        y = y * 0.5
        steps += 1
    return y * steps


def asserted(x: torch.Tensor) -> torch.Tensor:
    assert torch.isfinite(x).all(), "not finite"
    assert x.abs().max() < 100
    return x * 2


@pytest.mark.parametrize("name", READS)
def test_read_where_members_differ(name: str) -> None:
    check(READS[name], numbers(3, 4))


@pytest.mark.parametrize("name", READS)
def test_read_where_members_agree(name: str) -> None:
    check(READS[name], numbers(1, 4).detach().expand(3, 4).clone().requires_grad_())


def test_agreement_keeps_the_run_stacked() -> None:
    x = numbers(1, 4, grad=False).expand(3, 4).clone()
    with trace.recording() as record:
        memberwise.vmap(lambda own: own * own[0].item() if own.sum() < 100 else own)(x)
    assert {entry.path for entry in record.entries.values()} <= {"rule", "vmap", "agreement", "shared"}
    assert any(entry.path == "agreement" for entry in record.entries.values())


def test_parameters_are_parameters_inside() -> None:
    class Probe(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.weight, torch.Tensor)
            decay = sum(p.pow(2).sum() for p in self.parameters())
            named = dict(self.named_parameters())
            assert set(named) == {"weight", "bias"} and named["weight"] is self.weight
            return super().forward(x) * (2 if isinstance(self.weight, nn.Parameter) else 3) + decay

    probes = [Probe(3, 2, dtype=torch.float64) for _ in range(3)]
    params, buffers = memberwise.stack_module_state(probes)
    x = numbers(4, 3, grad=False)
    out = memberwise.vmap(lambda p, b, own: memberwise.functional_call(probes[0], (p, b), (own,)), (0, 0, None))(
        params, buffers, x
    )
    out.sum().backward()
    for i, probe in enumerate(probes):
        lone = probe(x)
        lone.sum().backward()
        assert_equal(out[i], lone)
        for name, p in probe.named_parameters():
            assert_equal(params[name].grad[i], p.grad)


INDEX_READS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "tensor_split": lambda x, i: torch.tensor_split(x, i)[0].sum() * x,
    "tensor_split all": lambda x, i: [part.sum() for part in torch.tensor_split(x, i)],
    "repeat_interleave": lambda x, i: x[:2].repeat_interleave(i).sum() * x,
    "split by list": lambda x, i: x.split([int(i[0]), 4 - int(i[0])])[0].sum() * x,
    "embedding_bag": lambda x, i: F.embedding_bag(torch.tensor([0, 1, 2, 3]), x[:, None], i - i[0], mode="sum"),
    "narrow": lambda x, i: x.narrow(0, i[0], 1) * x,
    "select": lambda x, i: x[i[0]] * x,
    "slice": lambda x, i: x[i[0] :].sum() * x,
    "roll": lambda x, i: x.roll(int(i[0])),
    "segment_reduce": lambda x, i: torch.segment_reduce(x, "sum", lengths=torch.stack([i[0], 4 - i[0]])),
    "pack": lambda x, i: nn.utils.rnn.pack_padded_sequence(
        x.view(4, 1, 1).expand(4, 2, 1), i, enforce_sorted=False
    ).data.sum() * x,
    "ctc": lambda x, i: F.ctc_loss(
        torch.stack([x, -x, 0 * x], 1).log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([4]), i[:1]
    ),
    "sequence_mask": lambda x, i: x * (torch.arange(4) < i[0]),
    "histc": lambda x, i: torch.histc(x.detach(), 4) * x,
    "bucketize": lambda x, i: x * torch.bucketize(x, i),
}  # fmt: skip


@pytest.mark.parametrize("agree", [True, False], ids=["agreeing", "differing"])
@pytest.mark.parametrize("name", INDEX_READS)
def test_an_index_tensor_read_in_cpp(name: str, agree: bool) -> None:
    index = torch.tensor([[1, 3]] * 3 if agree else [[1, 3], [2, 3], [1, 2]])
    check(INDEX_READS[name], numbers(3, 4), index)


@pytest.mark.parametrize("name", INDEX_READS)
def test_an_index_tensor_shared_or_made_inside(name: str) -> None:
    check(INDEX_READS[name], numbers(3, 4), torch.tensor([1, 3]), in_dims=[0, None])
    check(lambda x: INDEX_READS[name](x, torch.tensor([1, 3])), numbers(3, 4))
