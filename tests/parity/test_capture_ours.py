"""Operations of a recording by kernels of our own: the same step, and only where these serve and are faster."""

from __future__ import annotations

import functools
import operator
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import memberwise
from memberwise import optim
from memberwise._torch.entry import Entry
from memberwise.capture import layout, ours
from memberwise.capture.cache import Compiled
from memberwise.capture.ours import OURS, with_ours
from memberwise.capture.unfused import unfused
from memberwise.construction import build
from memberwise.kernels.attention import attention, attention_backward
from memberwise.kernels.convolution import convolution3x3, convolution3x3_backward
from memberwise.kernels.library import available
from memberwise.kernels.product import product
from memberwise.testing.tolerance import assert_equal
from tests.parity.test_capture_regions import MODELS, assert_computes_the_same, recorded

pytestmark = pytest.mark.skipif(not available("product"), reason="no C++ compiler, or a processor without AVX2")
_aten = torch.ops.aten


def _chosen(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[str]:
    """What there is to choose in what is recorded of it, as it was chosen."""
    program = recorded(function, *inputs)
    graph = with_ours(unfused(program.graph), program.values[: program.count]).graph
    return [str(node.target) for node in graph.nodes if node.target in {*OURS, *(own.run for own in OURS.values())}]


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it serves."""
    monkeypatch.setattr(ours, "_is_faster", lambda *_: True)


def sgd_step_of(name: str) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Plain SGD: of gradients that are rounding alone Adam makes full steps."""
    make, shape = MODELS[name]
    models = build(make, seeds=range(3))
    optimizer = optim.SGD(models.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        losses = memberwise.vmap(lambda model, x: model(x).square().mean(), (0, None))(models, x)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    return step, torch.randn(shape)


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("name", MODELS)
def test_the_same_step(name: str) -> None:
    program = recorded(*sgd_step_of(name))
    own = with_ours(unfused(program.graph), program.values[: program.count])
    assert any(node.target is product for node in own.graph.nodes)
    assert_computes_the_same(program, own, calls=1)


@pytest.mark.usefixtures("_ours")
def test_where_it_does_not_serve_torch_multiplies() -> None:
    def of(dtype: torch.dtype, m: int, k: int, n: int) -> list[str]:
        return _chosen(torch.bmm, torch.ones(3, m, k, dtype=dtype), torch.ones(3, k, n, dtype=dtype))

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert of(dtype, 4, 5, 6) == ["memberwise.product.default"]
    for other in [(torch.float16, 4, 5, 6), (torch.float32, 1, 5, 6)]:
        assert of(*other) == ["aten.bmm.default"], other
    for side in [(4, 1, 6), (4, 5, 1)]:
        assert of(torch.float32, *side) == ["aten.bmm.default"], "the compiler makes it a part of what is around"


@pytest.mark.usefixtures("_ours")
def test_a_bias_is_added_where_that_is_rounded_once() -> None:
    """In float32 a compiler adds it in what follows."""
    half = torch.bfloat16
    for bias in ((3, 1, 6), (1, 1, 6), (6,)):
        factors = torch.ones(3, 4, 5, dtype=half), torch.ones(3, 5, 6, dtype=half)
        assert _chosen(torch.baddbmm, torch.ones(bias, dtype=half), *factors) == ["memberwise.product_plus.default"]
    alone = torch.ones(6, dtype=half), torch.ones(4, 5, dtype=half), torch.ones(5, 6, dtype=half)
    assert _chosen(torch.addmm, *alone) == ["memberwise.product_plus.default"]
    wide = [one.float() for one in alone]
    assert _chosen(torch.addmm, *wide) == ["memberwise.product.default"]
    for other in ((4, 6), (4, 1), (1,)):
        assert _chosen(torch.addmm, torch.ones(other, dtype=half), *alone[1:]) == ["aten.addmm.default"], other
    scaled = functools.partial(torch.addmm, beta=0.5)
    assert _chosen(scaled, *alone) == ["aten.addmm.default"]


@pytest.mark.chooses
def test_what_torch_multiplies_as_fast_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is measured once on a machine."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked: list[tuple[int, ...]] = []

    def seconds(theirs: Any, own: Any) -> list[float]:
        if own.args[0].numel() == 1:
            return [0.0, 0.0]
        asked.append(tuple(size for factor in own.args for size in factor.shape))
        return [1.0, 0.9 if len(own.args[0]) == 3 else 0.99]

    monkeypatch.setattr(ours, "timed", seconds)
    many, few = (torch.ones(3, 4, 5), torch.ones(3, 5, 6)), (torch.ones(2, 4, 5), torch.ones(2, 5, 6))
    for _ in range(2):
        assert _chosen(torch.bmm, *many) == ["memberwise.product.default"]
        assert _chosen(torch.bmm, *few) == ["aten.bmm.default"]
        assert asked == [(3, 4, 5, 3, 5, 6), (2, 4, 5, 2, 5, 6)]


def test_of_what_is_known_no_trial_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process of the same step fills no examples."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made: list[str] = []

    def seconds() -> list[float]:
        made.append("examples")
        return [1.0, 0.5]

    for _ in range(2):
        assert ours.is_faster("an operation", seconds)
        assert made == ["examples"]


@pytest.mark.chooses
@pytest.mark.parametrize("idle", [0.0, 2.0])
def test_what_a_call_from_python_takes_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, idle: float
) -> None:
    """Compiled, both are called from C."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    seconds = {1: [0.0, idle], 4 * 5: [3.0, 4.0]}
    monkeypatch.setattr(ours, "timed", lambda theirs, own: seconds[own.args[0].numel()])
    chosen = "memberwise.product.default" if idle else "aten.mm.default"
    assert _chosen(torch.mm, torch.ones(4, 5), torch.ones(5, 6)) == [chosen]


def test_what_takes_microseconds_is_timed_for_a_while() -> None:
    """A moment in which the machine does something else passes."""
    runs: list[str] = []
    seconds = ours.timed(lambda: runs.append("theirs"), lambda: runs.append("own"))
    assert runs[:4] == ["theirs", "own"] * 2 and len(runs) > 2 * ours.TIMES
    assert max(seconds) < ours.AT_LEAST


@pytest.mark.chooses
def test_a_trial_leaves_members_out_not_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thousand large factors take no second gigabyte; the user's stream stays where it is."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ours, "MOST", 100)
    shapes: list[torch.Size] = []

    def seconds(theirs: Any, own: Any) -> list[float]:
        shapes.extend(factor.shape for factor in own.args if factor.numel() > 1)
        return [1.0, 1.0]

    monkeypatch.setattr(ours, "timed", seconds)
    before = torch.get_rng_state()
    _chosen(torch.bmm, torch.ones(9, 4, 5), torch.ones(1, 5, 6).expand(9, 5, 6))
    _chosen(torch.mm, torch.ones(40, 50), torch.ones(50, 60))
    assert shapes == [(3, 4, 5), (3, 5, 6), (40, 50), (50, 60)]
    assert torch.equal(torch.get_rng_state(), before)


def _heads(rows: int = 5, width: int = 4) -> list[torch.Tensor]:
    """Queries, keys and values of two heads, as a transformer's projection lies."""
    made = torch.randn(3, rows, 3, 2, width)
    return [made[:, :, k].transpose(1, 2).requires_grad_() for k in range(3)]


def attending(gradients: int = 3, **settings: Any) -> Callable[..., torch.Tensor]:
    """A step: attention, and the gradients of the first of what it is given; without any, its result."""

    def step(*given: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(gradients > 0):
            out = nn.functional.scaled_dot_product_attention(*given, **settings)
        parts = torch.autograd.grad(out.square().sum(), given[:gradients]) if gradients else [out]
        return torch.cat([part.flatten() for part in parts])

    return step


@pytest.mark.usefixtures("_ours")
def test_attention_is_ours_forward_and_backward() -> None:
    both = [str(attention), str(attention_backward)]
    for settings in ({}, {"is_causal": True}, {"scale": 0.3}):
        assert _chosen(attending(**settings), *_heads()) == both, settings
    masked = _chosen(attending(attn_mask=torch.ones(5, 5).tril().log()), *_heads())
    assert not set(both) & set(masked), "ours knows no mask"
    assert not set(both) & set(_chosen(attending(scale=-1.0), *_heads())), "nor which score is then the highest"


@pytest.mark.usefixtures("_ours")
def test_of_very_many_keys_attention_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LONGEST", 4)
    assert not {str(attention), str(attention_backward)} & set(_chosen(attending(), *_heads()))


def _convolving(*settings: Any) -> Callable[..., torch.Tensor]:
    """A step: a convolution, and the gradients of what it is given."""

    def step(*given: torch.Tensor) -> torch.Tensor:
        out = nn.functional.conv2d(*given, *settings)
        grads = torch.autograd.grad(out.square().sum(), [one for one in given if one.requires_grad])
        return torch.stack([grad.sum() for grad in grads])

    return step


def _images(deep: int = 16, wide: int = 16, taps: int = 3, **kind: Any) -> list[torch.Tensor]:
    return [torch.randn(size, **kind, requires_grad=True) for size in ((2, deep, 6, 7), (wide, deep, taps, taps))]


@pytest.mark.usefixtures("_ours")
def test_convolutions_are_ours_forward_and_backward() -> None:
    both = [str(convolution3x3), str(convolution3x3_backward)]
    for settings in ((), (None, 1, 1), (None, 1, (2, 0)), (None, 2), (None, 2, (1, 2))):
        assert _chosen(_convolving(*settings), *_images()) == both, settings
    grouped = _images(16, 32)
    grouped[0] = torch.randn(2, 32, 6, 7, requires_grad=True)
    assert _chosen(_convolving(None, 1, 1, 1, 2), *grouped) == both
    frozen = _images()
    frozen[0].requires_grad_(False)
    assert _chosen(_convolving(), *frozen)[1:] == ["aten.convolution_backward.default"], "ours makes both gradients"


@pytest.mark.usefixtures("_ours")
def test_other_convolutions_are_torchs() -> None:
    both = {str(convolution3x3), str(convolution3x3_backward)}
    for settings in ((None, 3), (None, (1, 2)), (None, 1, 1, 2), (None, 1, 3), (None, 2, 3)):
        assert not both & set(_chosen(_convolving(*settings), *_images())), settings
    assert str(convolution3x3) not in _chosen(_convolving(torch.ones(16)), *_images()), "ours adds no bias"
    for images in (_images(8), _images(16, 8), _images(taps=1), _images(taps=5), _images(dtype=torch.float64)):
        assert not both & set(_chosen(_convolving(), *images)), images[1].shape


class _Residual(nn.Module):
    """Channels that fill a vector, and some more; the last convolution's results are two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18)
        self.second, self.third = (nn.Conv2d(18, 18, 3, stride, padding=1, bias=False) for stride in (1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.third(self.second(x).relu()) + x[..., ::2, ::2]


@pytest.mark.usefixtures("_ours")
def test_the_same_step_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "residual", (_Residual, (4, 3, 7, 6)))
    program = recorded(*sgd_step_of("residual"))
    own = with_ours(unfused(program.graph), program.values[: program.count])
    served = [node.target for node in own.graph.nodes if "convolution3x3" in str(node.target)]
    assert served == [convolution3x3] * 2 + [convolution3x3_backward] * 2
    assert [node.args[-4] for node in own.graph.nodes if node.target in served] == [1, 2, 2, 1], "strides"
    assert_computes_the_same(program, own, calls=1)


@pytest.mark.usefixtures("_ours")
def test_with_the_channels_last_convolutions_are_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours make and take them second: what lies otherwise is known, of copies too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(layout, "channels_last_is_faster", lambda *_: True)
    monkeypatch.setitem(MODELS, "residual", (_Residual, (4, 3, 7, 6)))
    program = recorded(*sgd_step_of("residual"))
    given = program.values[: program.count]
    relaid, last = layout.laid_out(program.graph, lambda: [value.detach().clone() for value in given], program.outputs)
    assert last
    own = with_ours(unfused(relaid), given)
    assert not any("convolution3x3" in str(node.target) for node in own.graph.nodes)
    assert any(node.target is _aten.convolution.default for node in own.graph.nodes)
    assert_computes_the_same(program, own, calls=1)


def _convolved(stride: int) -> tuple[fx.GraphModule, Callable[[], list[torch.Tensor]]]:
    """A graph that convolves by ours, forward and backward."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    out = graph.call_function(convolution3x3, (x, w, stride, 1, 0, 1))
    back = graph.call_function(convolution3x3_backward, (out, x, w, stride, 1, 0, 1))
    graph.output((out, *(graph.call_function(operator.getitem, (back, k)) for k in range(2))))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator) for size in ((2, 16, 5, 5), (16, 16, 3, 3))]
    return fx.GraphModule({}, graph), lambda: [one.clone() for one in given]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_compiled_convolution_that_is_not_finite_is_torchs(stride: int) -> None:
    """By the function in C as by Python."""
    module, trial = _convolved(stride)
    run = Compiled(1, "inductor").begin(module, trial(), trial)()
    assert isinstance(run, Entry)
    for value in (1.0, torch.nan, torch.inf):
        x, w = trial()
        x[1, 3, 2, 2] = value
        settings = [stride, stride], [1, 0], [1, 1], False, [0, 0], 1
        expected = _aten.convolution(x, w, None, *settings)
        grads = _aten.convolution_backward(expected, x, w, None, *settings, [True, True, False])[:2]
        for found, theirs in zip(run(x, w), (expected, *grads), strict=True):
            assert_equal(found / 10, theirs / 10)


def _multiplied(scale: float = 0.5) -> tuple[fx.GraphModule, Callable[[], list[torch.Tensor]]]:
    """A graph that multiplies and attends by ours, and adds to its input; the `scale` of zeros changes nothing."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    made = graph.call_function(product, (x, graph.call_function(_aten.transpose.int, (y, 1, 2))))
    graph.call_function(_aten.add_.Tensor, (x, made))
    heads = graph.call_function(_aten.unsqueeze.default, (graph.call_function(_aten.relu.default, (made,)), 0))
    out = graph.call_function(attention, (heads, heads, heads, True, scale))
    graph.output((graph.call_function(operator.getitem, (out, 0)),))
    return fx.GraphModule({}, graph), lambda: [torch.full((2, 3, 3), -1.0), torch.ones(2, 3, 3)]


@pytest.mark.long
def test_another_process_finds_the_kernel_without_a_compiler() -> None:
    """Breaks (`aot_inductor.custom_ops_to_c_shims`): wrappers in C++ would call ours by Python, or not at all."""
    code = """
import sys, torch
from tests.parity.test_capture_ours import _multiplied
from memberwise._torch.entry import Entry
from memberwise.capture.cache import Compiled
module, trial = _multiplied(float(sys.argv[1]))
run = Compiled(1, "inductor").begin(module, trial(), trial)()
x, y = trial()
found, = run(x, y)
assert isinstance(run, Entry), run
print(found.sum().item(), x.sum().item(), "torch._inductor.codecache" in sys.modules)
"""
    never_before = str(1 + time.time() % 1)  # another directory would have torch's headers to compile
    for imports in (True, False):
        command = [sys.executable, "-W", "ignore", "-c", code, never_before]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stdout.split() == ["0.0", "-72.0", str(imports)]
