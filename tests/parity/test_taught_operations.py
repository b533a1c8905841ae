"""Lessons of the sweep over all of torch's operations (`make check-operations`)."""

from __future__ import annotations

import pytest
import torch

from memberwise import vmap
from memberwise.errors import EngineError
from tests.parity.loops import numbers

CSR = torch.tensor([[1.0, 0, 2], [0, 0, 3]], dtype=torch.float64).to_sparse_csr()


def test_as_strided_stays_in_its_member() -> None:
    x = numbers(3, 4)
    with pytest.raises(EngineError, match="MW220"):
        vmap(lambda own: own.as_strided((2,), (3,), 2))(x)
    with pytest.raises(EngineError, match="MW220"):
        vmap(lambda own: torch.as_strided_scatter(own, own[:2], (2,), (1,), 3))(x)


def test_offset_of_as_strided_is_in_its_member() -> None:
    x = numbers(4, 4)[1:]
    assert torch.equal(vmap(lambda own: own[1:].as_strided((2,), (1,)))(x), x[:, 1:3])
    assert torch.equal(vmap(lambda own: own[1:].as_strided((2,), (1,), own.storage_offset()))(x), x[:, :2])
    with pytest.raises(EngineError, match="MW220"):
        vmap(lambda own: own.as_strided((2,), (1,), 0))(x)


@pytest.mark.parametrize("offset", [None, 0, 1, 2])
def test_scatter_into_a_view_counts_from_its_memory(offset: int | None) -> None:
    x = numbers(3, 6)

    def scattered(own: torch.Tensor) -> torch.Tensor:
        return torch.as_strided_scatter(own[1:], own[:2] * 10, (2,), (2,), offset)

    assert torch.equal(vmap(scattered)(x), torch.stack([scattered(own.clone()) for own in x]))


def test_layout_that_the_meta_device_tells_wrongly() -> None:
    x = numbers(3, 4, 4)
    seen = []
    vmap(lambda own: seen.append(torch.geqrf(own)[0].stride()) or own)(x)
    vmap(lambda own: seen.append(torch.svd(own.mT)[2].stride()) or own)(x)
    assert seen == [torch.geqrf(x[0])[0].stride(), torch.svd(x[0].mT)[2].stride()]


def test_shared_sparse_matrix_gets_its_gradient() -> None:
    x = numbers(3, 3, 2)
    stacked, alone = (CSR.clone().requires_grad_() for _ in range(2))
    vmap(lambda matrix, own: torch.sparse.mm(matrix, own).square(), in_dims=(None, 0))(stacked, x).sum().backward()
    for own in x:
        torch.sparse.mm(alone, own).square().sum().backward()
    torch.testing.assert_close(stacked.grad.to_dense(), alone.grad.to_dense())


def test_sparse_closure_gets_its_gradient() -> None:
    x = numbers(3, 3, 2)
    stacked, alone = (CSR.to_sparse_coo().requires_grad_() for _ in range(2))
    vmap(lambda own: torch.sparse.mm(stacked, own).square())(x).sum().backward()
    for own in x:
        torch.sparse.mm(alone, own).square().sum().backward()
    torch.testing.assert_close(stacked.grad.to_dense(), alone.grad.to_dense())


def test_results_that_torch_cannot_stack_are_refused() -> None:
    with pytest.raises(EngineError, match="MW203"):
        vmap(lambda own: torch.sparse.sampled_addmm(CSR, own[:2], own.mT @ own))(numbers(3, 3, 3))


def test_values_that_differ_come_back_one_a_member() -> None:
    x = numbers(3, 4)
    assert vmap(lambda own: (own.sum().item(), own[0]))(x)[0] == [own.sum().item() for own in x]


def test_joined_images_stay_channels_last() -> None:
    x = numbers(3, 2, 2, 3, 3)
    seen = []
    vmap(lambda own: seen.append(torch.cat([own.contiguous(memory_format=torch.channels_last)] * 2).stride()) or own)(x)
    assert seen == [torch.cat([x[0].contiguous(memory_format=torch.channels_last)] * 2).stride()]
