"""gather(): what stack() and build() are made of. Sharing, a known count, another device or dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memberwise.errors import StateError
from memberwise.gathering import gather


class Headed(nn.Module):
    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3) if trunk is None else trunk
        self.head = nn.Linear(3, 2)


@pytest.fixture
def trunk() -> nn.Linear:
    return nn.Linear(3, 3)


@pytest.mark.parametrize("kind", [list, iter])
def test_shared_state_is_the_one_object(trunk: nn.Linear, kind) -> None:
    gathered = gather(kind([Headed(trunk) for _ in range(4)]), shared=("trunk.*",), for_stack=True)
    assert gathered.params["trunk.weight"] is trunk.weight
    assert gathered.params["head.weight"].shape == (4, 2, 3)
    assert gathered.shared == {"trunk.weight", "trunk.bias"}
    assert gathered.count == 4


def test_shared_state_of_a_tie_is_named_by_any_of_its_names(trunk: nn.Linear) -> None:
    def make() -> nn.Module:
        model = Headed(trunk)
        model.again = model.trunk
        return model

    gathered = gather([make() for _ in range(2)], shared=("again.weight", "trunk.bias"))
    assert gathered.shared == {"trunk.weight", "trunk.bias"}


def test_one_object_in_all_members_must_be_declared(trunk: nn.Linear) -> None:
    models = [Headed(trunk) for _ in range(3)]
    with pytest.raises(StateError) as error:
        gather(models, for_stack=True)
    assert error.value.code == "MW105"
    assert "'trunk.weight' is one object in all members; shared=('trunk.weight',) says so" in str(error.value)
    assert gather(models).params["trunk.weight"].shape == (3, 3, 3)


def test_what_is_declared_must_be_one_object() -> None:
    with pytest.raises(StateError) as error:
        gather([Headed() for _ in range(3)], shared=("trunk.weight",))
    assert error.value.code == "MW105"
    assert "'trunk.weight' is declared shared, but is not one object in all members" in str(error.value)


def test_one_object_in_some_members_only_is_not_shared(trunk: nn.Linear) -> None:
    models = [Headed(trunk), Headed(trunk), Headed()]
    assert gather(models, for_stack=True).params["trunk.weight"].shape == (3, 3, 3)
    with pytest.raises(StateError, match=r"'trunk\.bias' is declared shared, but is not"):
        gather(models, shared=("trunk.*",))


def test_a_pattern_that_matches_nothing_is_an_error(trunk: nn.Linear) -> None:
    with pytest.raises(StateError, match=r"shared='trnk\.\*' names no parameter or buffer"):
        gather([Headed(trunk) for _ in range(2)], shared=("trnk.*",))


def test_patterns_mind_the_case(trunk: nn.Linear) -> None:
    with pytest.raises(StateError, match="names no parameter or buffer"):
        gather([Headed(trunk) for _ in range(2)], shared=("TRUNK.*",))


def test_a_single_member_has_nothing_to_share_undeclared() -> None:
    assert gather([Headed()], for_stack=True).params["trunk.weight"].shape == (1, 3, 3)
    assert gather([Headed()], shared=("trunk.*",)).params["trunk.weight"].shape == (3, 3)


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("kind", [list, iter])
def test_floating_state_is_converted_and_other_state_is_not(kind, count: int | None) -> None:
    models = [nn.BatchNorm1d(3) for _ in range(3)]
    gathered = gather(kind(models), count=count, dtype=torch.float64)
    assert gathered.params["weight"].dtype is torch.float64
    assert gathered.params["weight"].requires_grad
    assert gathered.buffers["num_batches_tracked"].dtype is torch.int64
    assert torch.equal(gathered.params["weight"], torch.stack([model.weight.double() for model in models]))


@pytest.mark.parametrize("kind", [list, iter])
def test_another_device(kind) -> None:
    gathered = gather(kind([nn.BatchNorm1d(3) for _ in range(3)]), count=3, device="meta")
    assert all(tensor.is_meta for tensor in (*gathered.params.values(), *gathered.buffers.values()))
    assert gathered.params["weight"].shape == (3, 3)


def test_what_differs_outside_tensors_is_a_value_a_member() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate)) for rate in (0.1, 0.2, 0.1)]
    with pytest.warns(UserWarning, match="MW106"):
        gathered = gather(models)
    assert gathered.settings == {"1.p": (0.1, 0.2, 0.1)}


def test_an_odd_first_member_is_told_from_the_others() -> None:
    models = [nn.Sequential(nn.Dropout(rate)) for rate in (0.5, 0.1, 0.1)]
    with pytest.warns(UserWarning, match=r"0\.p is 0\.5 in member 0, 0\.1 in members 1-2"):
        assert gather(models).settings == {"0.p": (0.5, 0.1, 0.1)}
