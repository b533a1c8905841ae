"""Names carry ties and persistence, and are plain strings in every other respect."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from memberwise.names import Name, named, saved, tied
from memberwise.state import stack_module_state

NAME = named("encoder.weight", tied=("decoder.weight",))


def test_a_name_with_nothing_to_say_is_a_plain_string() -> None:
    assert type(named("weight")) is str
    assert type(named(NAME)) is str
    assert all(type(name) is str for name in stack_module_state([nn.BatchNorm1d(3)])[1])


def test_a_name_is_found_by_its_plain_string_and_the_other_way() -> None:
    assert NAME == "encoder.weight"
    assert hash(NAME) == hash("encoder.weight")
    assert {NAME: 1}["encoder.weight"] == 1
    assert {"encoder.weight": 1}[NAME] == 1
    assert repr(NAME) == "'encoder.weight'"
    assert f"{NAME}!" == "encoder.weight!"
    assert type(str(NAME)) is str


def test_what_a_name_knows() -> None:
    assert tied(NAME) == ("decoder.weight",)
    assert saved(NAME) == ("encoder.weight", "decoder.weight")
    assert saved(named("cache", saved=())) == ()
    assert (tied("plain"), saved("plain")) == ((), ("plain",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles_keep_it(protocol: int) -> None:
    for other in (copy.copy(NAME), copy.deepcopy(NAME), pickle.loads(pickle.dumps(NAME, protocol))):
        assert isinstance(other, Name)
        assert (other, other.tied, other.saved) == (NAME, NAME.tied, NAME.saved)


def test_torch_load_takes_it_without_being_asked() -> None:
    file = io.BytesIO()
    torch.save({NAME: torch.ones(2)}, file)
    file.seek(0)
    (name,) = torch.load(file, weights_only=True)
    assert tied(name) == ("decoder.weight",)


def test_vmap_and_grad_keep_it() -> None:
    def keys(params: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(params)
        return sum(tensor.sum() for tensor in params.values())

    seen: list[str] = []
    params = {NAME: torch.ones(2, 3), "bias": torch.ones(2)}
    torch.vmap(keys)(params)
    gradient = torch.func.grad(keys)(params)
    assert [tied(name) for name in (*seen, *gradient)] == [("decoder.weight",), ()] * 3


def test_torch_compile_takes_it_in_one_graph() -> None:
    function = torch.compile(lambda params: params["encoder.weight"] * 2, backend="eager", fullgraph=True)
    assert function({NAME: torch.ones(2)}).tolist() == [2.0, 2.0]
