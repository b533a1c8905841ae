"""What one model is refused, a stack is refused, with the same type of error: no dimension wraps around."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nested, nn
from torch.nn import functional as F

import memberwise
from memberwise import vmap
from memberwise.errors import EngineError

INDEX = torch.zeros(2, 3, dtype=torch.long)
OUT_OF_RANGE: dict[str, Callable[[Tensor, int], Any]] = {
    **{
        name: lambda x, dim, name=name: getattr(x, name)(dim)
        for name in (
            *("sum", "mean", "amax", "max", "var", "all", "any", "argmax", "prod", "nansum", "logsumexp", "median"),
            *("cumsum", "cumprod", "cummax", "logcumsumexp", "sort", "argsort", "mode", "softmax", "squeeze", "unbind"),
        )
    },
    "log_softmax": F.log_softmax,
    "norm": lambda x, dim: x.norm(dim=dim),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim + 1 if dim > 0 else dim - 1),
    "stack": lambda x, dim: torch.stack([x, x], dim + 1 if dim > 0 else dim - 1),
    "transpose": lambda x, dim: x.transpose(0, dim),
    "select": lambda x, dim: x.select(dim, 0),
    "slice": lambda x, dim: torch.ops.aten.slice.Tensor(x, dim, 0, 1),
    "cat": lambda x, dim: torch.cat([x, x], dim),
    "split": lambda x, dim: x.split(1, dim),
    "roll": lambda x, dim: x.roll(1, dim),
    "index_select": lambda x, dim: x.index_select(dim, INDEX[0]),
    "gather": lambda x, dim: x.gather(dim, INDEX),
    "topk": lambda x, dim: x.topk(1, dim),
    "kthvalue": lambda x, dim: x.kthvalue(1, dim),
}


@pytest.mark.parametrize("dim", [2, -3])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_dimension_out_of_range(name: str, dim: int) -> None:
    x = torch.ones(4, 2, 3)
    with pytest.raises(IndexError, match="out of range"):
        OUT_OF_RANGE[name](x[0], dim)
    with pytest.raises(IndexError, match="out of range"):
        vmap(lambda row: OUT_OF_RANGE[name](row, dim))(x)


@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize("name", ["sum", "amax", "argmax", "softmax", "squeeze", "unsqueeze", "cumsum", "sort", "var"])
def test_a_dimension_that_a_number_does_not_have(name: str, dim: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        vmap(lambda x: OUT_OF_RANGE[name](x, dim))(torch.ones(4))


TOO_FEW: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "tril of a vector": (torch.tril, (3,)),
    "triu of a vector": (torch.triu, (3,)),
    "t of three dimensions": (torch.t, (2, 3, 4)),
    "t of four dimensions": (torch.t, (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", TOO_FEW)
def test_too_few_or_many_dimensions(name: str) -> None:
    function, shape = TOO_FEW[name]
    x = torch.ones(3, *shape)
    with pytest.raises(RuntimeError):
        function(x[0])
    with pytest.raises(RuntimeError):
        vmap(function)(x)


@pytest.mark.parametrize("place", [3, -4])
def test_an_index_out_of_range_to_fill(place: int) -> None:
    fill = lambda x, value: x.index_fill(0, torch.tensor([0, place]), value)  # noqa: E731 # one line for both runs
    with pytest.raises(Exception, match="out of") as lone:
        fill(torch.ones(3), torch.tensor(2.0))
    with pytest.raises(lone.type):
        vmap(fill)(torch.ones(4, 3), torch.ones(4))


class Detector(nn.Linear):
    """Returns the rows that it finds, in each member another number."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": x[super().forward(x)[:, 0] > 0]}]


def test_what_differs_in_number_is_refused_and_the_sentence_says_what_does_it() -> None:
    models = [Detector(3, 1) for _ in range(3)]
    for i, model in enumerate(models):
        nn.init.constant_(model.weight, 1.0)
        nn.init.constant_(model.bias, -i)
    stack, x = memberwise.stack(models), torch.eye(3) * torch.tensor([0.5, 1.5, 2.5])
    with warnings.catch_warnings(), pytest.raises(EngineError, match=r"MW203") as refusal:
        warnings.simplefilter("ignore")  # the members part ways before
        stack(x)
    assert "[member(...) for member in stack]" in str(refusal.value)
    found = [member(x)[0]["boxes"] for member in stack]
    for own, model, count in zip(found, models, (3, 2, 1), strict=True):
        assert own.shape == (count, 3) and torch.equal(own, model(x)[0]["boxes"])


def rows(layout: torch.layout) -> Tensor:
    return nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_input_is_refused_by_name(layout: torch.layout) -> None:
    with warnings.catch_warnings(), pytest.raises(EngineError, match="MW204" if layout is torch.strided else "MW203"):
        warnings.simplefilter("ignore")  # one whose class is not torch's own runs by members, who return several sizes
        vmap(lambda t: t * 2)(rows(layout))


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_that_all_share(layout: torch.layout) -> None:
    x, shared = torch.arange(3.0), rows(layout)
    out = vmap(lambda x, t: x * nested.to_padded_tensor(t * 2, 0.0).sum(), in_dims=(0, None))(x, shared)
    assert torch.equal(out, x * 36)
    with warnings.catch_warnings(), pytest.raises(EngineError, match="MW203"):
        warnings.simplefilter("ignore")  # as above
        vmap(lambda x, t: t * 2, in_dims=(0, None))(x, shared)


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_members_that_return_nested_tensors(layout: torch.layout) -> None:
    function = lambda x: [x.item(), rows(layout)][1]  # noqa: E731 # reads on the host, so that members part ways
    with warnings.catch_warnings(), pytest.raises(EngineError, match="MW203"):
        warnings.simplefilter("ignore")  # that they part ways is said once a line
        vmap(function)(torch.arange(3.0))
