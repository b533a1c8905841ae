"""stack_module_state beside torch's own, on the same inputs; then what torch lets pass in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize

import memberwise
from memberwise.errors import KindError, MemberwiseError, StackWarning, StateError
from memberwise.state import stack_module_state


def mixed_modes() -> list[nn.Module]:
    return [nn.Linear(2, 2), nn.Linear(2, 2).eval(), nn.Linear(2, 2)]


def mixed_classes() -> list[nn.Module]:
    return [nn.Linear(2, 2), nn.Bilinear(2, 2, 2)]


def a_subclass() -> list[nn.Module]:
    class Other(nn.Linear):
        pass

    return [nn.Linear(2, 2), Other(2, 2)]


def classes_of_one_name() -> list[nn.Module]:
    def make() -> nn.Module:
        class Net(nn.Linear):
            pass

        return Net(2, 2)

    return [make(), make()]


def mixed_requires_grad() -> list[nn.Module]:
    models = [nn.Linear(2, 2) for _ in range(3)]
    models[1].bias.requires_grad_(False)
    return models


def mixed_requires_grad_of_a_buffer() -> list[nn.Module]:
    models = [nn.BatchNorm1d(2) for _ in range(3)]
    models[2].running_mean.requires_grad_()
    return models


def mixed_shapes() -> list[nn.Module]:
    return [nn.Linear(2, 2), nn.Linear(3, 2)]


REFUSED_BY_BOTH: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "no model": (list, "MW101"),
    "modes": (mixed_modes, "MW103"),
    "classes": (mixed_classes, "MW102"),
    "subclass": (a_subclass, "MW102"),
    "classes of one name": (classes_of_one_name, "MW102"),
    "requires_grad": (mixed_requires_grad, "MW103"),
    "requires_grad of a buffer": (mixed_requires_grad_of_a_buffer, "MW103"),
    "shapes": (mixed_shapes, "MW103"),
}


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_what_torch_refuses_is_refused_with_torch_s_type(case: str, kind) -> None:
    make, code = REFUSED_BY_BOTH[case]
    with pytest.raises(Exception) as theirs:
        torch.func.stack_module_state(make())
    with pytest.raises(theirs.type) as ours:
        stack_module_state(kind(make()))
    assert theirs.type is RuntimeError
    assert isinstance(ours.value, StateError)
    assert ours.value.code == code
    assert f"[{code}]" in str(ours.value)


@pytest.mark.parametrize(
    ("make", "meaning"),
    [
        (list, "Expected at least one model, got 0"),
        (mixed_modes, "same training/eval mode"),
        (mixed_classes, "expected all models to be of the same class"),
        (mixed_requires_grad, ".requires_grad"),
    ],
)
def test_the_text_has_torch_s_meaning(make, meaning: str) -> None:
    with pytest.raises(RuntimeError) as theirs:
        torch.func.stack_module_state(make())
    with pytest.raises(StateError) as ours:
        stack_module_state(make())
    assert meaning.lower() in str(theirs.value).lower()
    assert meaning in str(ours.value)


def test_the_texts_name_member_and_parameter() -> None:
    with pytest.raises(StateError, match=r"member 1: parameter 'bias' has requires_grad=False, member 0 has True"):
        stack_module_state(mixed_requires_grad())
    with pytest.raises(StateError, match=r"member 1: the model is in eval mode, in member 0 it is in training mode"):
        stack_module_state(mixed_modes())
    with pytest.raises(StateError, match=r"member 1: it is a Bilinear, member 0 is a Linear"):
        stack_module_state(mixed_classes())
    with pytest.raises(StateError, match=r"member 1: it is a Net as member 0 is, but is of another class of that name"):
        stack_module_state(classes_of_one_name())
    with pytest.raises(StateError, match=r"member 1: parameter 'weight' has shape \(2, 3\), member 0 has \(2, 2\)"):
        stack_module_state(mixed_shapes())


@pytest.mark.parametrize("given", [nn.Linear(2, 2), 3, [nn.Linear(2, 2), "a"], nn.ModuleDict({"a": nn.Linear(2, 2)})])
def test_what_is_not_a_sequence_of_modules_is_named(given: object) -> None:
    with pytest.raises(KindError, match=r"\[MW108\]"):
        stack_module_state(given)


class Net(nn.Module):
    def __init__(self, width: int = 3, *, extra: bool = False, tie: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, width, bias=False)
        self.decoder = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("position", torch.arange(width), persistent=False)
        if extra:
            self.extra = nn.Parameter(torch.zeros(2))
        if tie:
            self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.drop(self.norm(self.encoder(x))))


def missing_parameter() -> list[nn.Module]:
    return [Net(extra=True), Net(), Net(extra=True)]


def extra_parameter() -> list[nn.Module]:
    return [Net(), Net(), Net(extra=True)]


def other_dtype() -> list[nn.Module]:
    models = [Net() for _ in range(2)]
    models[1].norm.double()
    return models


def other_device() -> list[nn.Module]:
    models = [Net() for _ in range(2)]
    models[1].norm.to("meta")
    return models


def other_submodule_mode() -> list[nn.Module]:
    models = [Net() for _ in range(3)]
    models[2].norm.eval()
    return models


def other_ties() -> list[nn.Module]:
    return [Net(), Net(tie=False)]


def other_persistence() -> list[nn.Module]:
    models = [Net() for _ in range(2)]
    models[1].register_buffer("position", models[1].position)
    return models


def a_buffer_for_a_parameter() -> list[nn.Module]:
    models = [Net(extra=True) for _ in range(2)]
    del models[1].extra
    models[1].register_buffer("extra", torch.zeros(2))
    return models


LET_PASS_BY_TORCH: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "extra": (extra_parameter, "member 2: parameter 'extra' of shape (2,) is extra, member 0 has none"),
    "dtype": (other_dtype, "member 1: parameter 'norm.weight' has dtype torch.float64, member 0 has torch.float32"),
    "submodule mode": (
        other_submodule_mode,
        "member 2: module 'norm' is in eval mode, in member 0 it is in training mode",
    ),
    "ties": (other_ties, "member 1: 'decoder.weight' is not tied, in member 0 it is tied to 'encoder.weight'"),
    "persistence": (other_persistence, "member 1: buffer 'position' has persistent=True, member 0 has False"),
}

REFUSED_OBSCURELY_BY_TORCH: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "missing": (missing_parameter, "member 1: parameter 'extra' is missing, member 0 has one of shape (2,)"),
    "device": (other_device, "member 1: buffer 'norm.running_var' is on meta, in member 0 it is on cpu"),
    "kind": (a_buffer_for_a_parameter, "member 1: buffer 'extra' is a buffer, it is a parameter in member 0"),
}


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("case", LET_PASS_BY_TORCH)
def test_what_torch_runs_silently_wrong_is_an_error(case: str, kind) -> None:
    make, line = LET_PASS_BY_TORCH[case]
    torch.func.stack_module_state(make())
    with pytest.raises(StateError) as error:
        stack_module_state(kind(make()))
    assert line in str(error.value)
    assert error.value.code == "MW103"


@pytest.mark.parametrize("case", REFUSED_OBSCURELY_BY_TORCH)
def test_what_torch_refuses_obscurely_is_said_plainly(case: str) -> None:
    make, line = REFUSED_OBSCURELY_BY_TORCH[case]
    with pytest.raises((KeyError, RuntimeError)):
        torch.func.stack_module_state(make())
    with pytest.raises(StateError) as error:
        stack_module_state(make())
    assert line in str(error.value)


@pytest.mark.parametrize("kind", [list, iter])
def test_every_difference_is_listed_ten_and_then_a_count(kind) -> None:
    models = [nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(17))) for _ in range(3)]
    for layer in models[1]:
        layer.double()
    models[2][16].eval()
    with pytest.raises(StateError) as error:
        stack_module_state(kind(models))
    lines = str(error.value).splitlines()
    assert lines[1] == "  member 1: parameter '0.weight' has dtype torch.float64, member 0 has torch.float32"
    assert len([line for line in lines if line.startswith("  member")]) == 10
    assert lines[11] == "  and 8 more"
    assert lines[12].endswith("[MW103]")


def test_differences_of_several_kinds_are_listed_together_under_the_gravest() -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Bilinear(2, 2, 2)]
    models[1].eval()
    with pytest.raises(StateError) as error:
        stack_module_state(models)
    assert error.value.code == "MW102"
    assert "member 2: it is a Bilinear" in str(error.value)
    assert "member 1: the model is in eval mode" in str(error.value)


def test_uninitialised_lazy_parameters_are_named() -> None:
    models = [nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()) for _ in range(2)]
    with pytest.raises(StateError) as error:
        stack_module_state(models)
    assert error.value.code == "MW104"
    for line in ("0: parameter '0.weight'", "0: buffer '1.running_mean'", "1: parameter '1.bias'"):
        assert f"member {line} has no values yet" in str(error.value)


def test_a_lazy_member_among_initialised_ones_is_named() -> None:
    models = [nn.Sequential(nn.LazyLinear(3)) for _ in range(3)]
    models[0](torch.zeros(2, 4))
    models[2](torch.zeros(2, 4))
    with pytest.raises(StateError) as error:
        stack_module_state(models)
    assert error.value.code == "MW104"
    assert "member 1: parameter '0.weight' has no values yet" in str(error.value)
    assert "member 2" not in str(error.value)


def test_lazy_modules_that_have_run_are_stacked() -> None:
    models = [nn.Sequential(nn.LazyLinear(3)) for _ in range(2)]
    for model in models:
        model(torch.zeros(2, 4))
    assert stack_module_state(models)[0]["0.weight"].shape == (2, 3, 4)


def test_an_error_leaves_the_models_as_they_were() -> None:
    models = mixed_requires_grad()
    before = copy.deepcopy(models)
    with pytest.raises(MemberwiseError):
        stack_module_state(models)
    for model, same in zip(models, before, strict=True):
        for (name, tensor), expected in zip(model.named_parameters(), same.parameters(), strict=True):
            assert torch.equal(tensor, expected), name
            assert tensor.requires_grad == expected.requires_grad


def test_the_same_object_in_all_members_is_copied_as_torch_does() -> None:
    model = nn.Linear(2, 2)
    params, _ = stack_module_state([model] * 3)
    assert torch.equal(params["weight"], torch.stack([model.weight] * 3))
    with torch.no_grad():
        params["weight"][0].zero_()
    assert torch.equal(params["weight"][1], model.weight)


def test_frozen_parameters_stay_frozen() -> None:
    models = [nn.Linear(2, 2) for _ in range(3)]
    for model in models:
        model.bias.requires_grad_(False)
    params, _ = stack_module_state(models)
    assert params["weight"].requires_grad
    assert not params["bias"].requires_grad


class Zoo(nn.Module):
    """Buffers and parameters of every shape and type that a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.wave = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
        self.brain = nn.Parameter(torch.randn(3).bfloat16())
        self.register_parameter("none", None)
        self.register_buffer("steps", torch.randint(9, ()))
        self.register_buffer("levels", torch.randint(255, (4,), dtype=torch.uint8))
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("nothing", None)
        self.register_buffer("spread", torch.randn(1, 3).expand(4, 3))
        self.register_buffer("turned", torch.randn(3, 4).t())
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("hidden", torch.randn(2), persistent=False)


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_shape_and_dtype(kind, count: int) -> None:
    models = [Zoo() for _ in range(count)]
    ours = stack_module_state(kind(models))
    for mine, theirs in zip(ours, torch.func.stack_module_state(models), strict=True):
        assert list(mine) == list(theirs)
        for name, stacked in theirs.items():
            assert mine[name].dtype == stacked.dtype, name
            assert mine[name].shape == stacked.shape, name
            assert mine[name].requires_grad == stacked.requires_grad, name
            assert torch.equal(mine[name], stacked), name


@pytest.mark.parametrize("kind", [list, iter])
def test_a_member_s_memory_format_is_kept(kind) -> None:
    """A lone kernel's result has other strides for channels-last weights; so must the member's."""
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(3)]
    params, _ = stack_module_state(kind(models))
    for index, model in enumerate(models):
        assert torch.equal(params["weight"][index], model.weight)
        assert params["weight"][index].stride() == model.weight.stride()


@pytest.mark.parametrize("kind", [list, iter])
def test_meta_models_give_meta_tensors(kind) -> None:
    with torch.device("meta"):
        models = [nn.BatchNorm1d(3) for _ in range(4)]
    params, buffers = stack_module_state(kind(models))
    assert params["weight"].is_meta
    assert params["weight"].shape == (4, 3)
    assert params["weight"].requires_grad
    assert buffers["num_batches_tracked"].shape == (4,)


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_grad_mode(kind, mode) -> None:
    models = [nn.BatchNorm1d(3) for _ in range(3)]
    with mode():
        (params, buffers), theirs = stack_module_state(kind(models)), torch.func.stack_module_state(models)
    for mine, expected in zip((params, buffers), theirs, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(mine[name], tensor)
            assert mine[name].requires_grad == tensor.requires_grad
            assert mine[name].is_inference() == tensor.is_inference()


@pytest.mark.parametrize("kind", [list, iter])
def test_models_made_in_inference_mode(kind) -> None:
    with torch.inference_mode():
        models = [nn.BatchNorm1d(3) for _ in range(3)]
    params, buffers = stack_module_state(kind(models))
    assert params["weight"].requires_grad
    assert not params["weight"].is_inference()
    params["weight"].sum().backward()
    buffers["running_mean"].add_(1)


@pytest.mark.parametrize("kind", [list, iter])
def test_a_default_device_changes_nothing(kind) -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    with torch.device("meta"):
        params, _ = stack_module_state(kind(models))
    assert torch.equal(params["weight"], torch.stack([model.weight for model in models]))


@pytest.mark.parametrize("kind", [list, iter])
def test_tied_weights_are_stored_once(kind) -> None:
    models = [Net() for _ in range(3)]
    params, _ = stack_module_state(kind(models))
    assert list(params) == [name for name, _ in models[0].named_parameters()]
    assert "encoder.weight" in params
    assert "decoder.weight" not in params


@pytest.mark.parametrize("kind", [list, iter])
def test_non_persistent_buffers_are_stacked_as_torch_does(kind) -> None:
    models = [Net() for _ in range(3)]
    _, buffers = stack_module_state(kind(models))
    assert torch.equal(buffers["position"], torch.arange(3).expand(3, 3))
    assert list(buffers) == list(torch.func.stack_module_state(models)[1])


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def doubled(model: nn.Linear) -> nn.Linear:
    return parametrize.register_parametrization(model, "weight", Double())


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize(
    "parametrization",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, doubled],
)
def test_parametrized_modules_count_as_one_class(parametrization, kind) -> None:
    models = [parametrization(nn.Linear(3, 3)) for _ in range(3)]
    assert len({type(model) for model in models}) == 3, "torch gives each a class of its own"
    params, buffers = stack_module_state(kind(models))
    expected = {name for name, _ in models[0].named_parameters()}
    assert {*params} == expected
    assert {*buffers} == {name for name, _ in models[0].named_buffers()}
    for name in expected:
        assert torch.equal(params[name], torch.stack([model.get_parameter(name) for model in models]))


def test_parametrizations_of_different_kinds_do_not_pass() -> None:
    models = [parametrizations.weight_norm(nn.Linear(3, 3)), parametrizations.spectral_norm(nn.Linear(3, 3))]
    with pytest.raises(StateError, match=r"'parametrizations\.weight\.original0' is missing"):
        stack_module_state(models)
    with pytest.raises(StateError):
        stack_module_state([nn.Linear(3, 3), doubled(nn.Linear(3, 3))])


def test_graph_modules_of_the_same_code_count_as_one_class() -> None:
    models = [fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())) for _ in range(3)]
    assert len({type(model) for model in models}) == 3
    params, _ = stack_module_state(models)
    assert params["0.weight"].shape == (3, 3, 3)


def test_graph_modules_of_other_code_do_not_pass() -> None:
    class Negative(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    models = [fx.symbolic_trace(kind(nn.Linear(3, 3))) for kind in (nn.Sequential, Negative)]
    with pytest.raises(StateError, match="member 1: it is a GraphModule as member 0 is, but runs other code"):
        stack_module_state(models)


def test_models_without_state_give_empty_dicts() -> None:
    assert stack_module_state([nn.ReLU() for _ in range(3)]) == ({}, {})


def test_settings_that_differ_are_one_warning_that_lists_them() -> None:
    models = [Net() for _ in range(3)]
    models[1].drop.p = 0.5
    models[2].norm.eps = 1e-3
    with pytest.warns(StackWarning) as caught:
        stack_module_state(models)
    (warning,) = caught
    text = str(warning.message)
    assert "drop.p is 0.1 in members 0, 2, 0.5 in member 1" in text
    assert "norm.eps is 1e-05 in members 0-1, 0.001 in member 2" in text
    assert "[MW106]" in text
    assert warning.filename == __file__, "the warning points at the caller's line"


def test_activations_that_differ_are_in_the_warning() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), activation()) for activation in (nn.ReLU, nn.ReLU, nn.GELU)]
    with pytest.warns(StackWarning, match=r"1 is torch.*ReLU in members 0-1, torch.*GELU in member 2"):
        stack_module_state(models)


def test_no_warning_where_nothing_differs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack_module_state([Net() for _ in range(3)])
        stack_module_state([nn.TransformerEncoderLayer(4, 2, 8, activation="gelu") for _ in range(2)])
        stack_module_state([nn.LSTM(3, 4, num_layers=2, bidirectional=True) for _ in range(2)])


def test_memory_shared_between_the_tensors_of_a_member_is_warned_of() -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("view", model.weight.data[0])
        return model

    with pytest.warns(StackWarning, match=r"'view' lies in the memory of 'weight'(.|\n)*\[MW107\]"):
        stack_module_state([make() for _ in range(2)])


def test_parameters_side_by_side_in_one_block_are_not_warned_of() -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        block = torch.randn(6)
        model.weight.data, model.bias.data = block[:4].view(2, 2), block[4:]
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack_module_state([make() for _ in range(2)])


@pytest.mark.parametrize("make", [mixed_classes, mixed_requires_grad, list])
def test_the_error_names_the_function_that_was_called(make) -> None:
    for function in (stack_module_state, memberwise.stack):
        with pytest.raises(StateError, match=rf"^{function.__name__}: "):
            function(make())
    if models := make():
        with pytest.raises(StateError, match=r"^build: "):
            memberwise.build(iter(models).__next__, seeds=range(len(models)))
