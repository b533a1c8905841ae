"""Products of a recording by our own kernel: the same step, and only where that kernel serves and is faster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

import memberwise
from memberwise import optim
from memberwise.capture import products
from memberwise.capture.products import multiplied
from memberwise.capture.unfused import unfused
from memberwise.construction import build
from memberwise.kernels.product import available, product
from memberwise.testing.tolerance import assert_equal
from tests.parity.test_capture_regions import MODELS, recorded

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler, or a processor without AVX2")
_aten = torch.ops.aten


def _chosen(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[str]:
    """What multiplies in what is recorded of it."""
    program = recorded(function, *inputs)
    graph = multiplied(unfused(program.graph), program.values[: program.count]).graph
    return [str(node.target) for node in graph.nodes if node.target in {product, *products._THEIRS}]


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it serves."""
    monkeypatch.setattr(products, "_is_faster", lambda *_: True)


def _step_of(name: str) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
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
    program = recorded(*_step_of(name))
    own = multiplied(unfused(program.graph), program.values[: program.count])
    assert any(node.target is product for node in own.graph.nodes)
    whole, ours = program.copies(program.values), program.copies(program.values)
    with torch.no_grad():
        expected, found = program.graph.forward(*whole), own.forward(*ours)
    for mine, theirs in zip((*found, *ours), (*expected, *whole), strict=True):
        assert_equal(mine, theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.usefixtures("_ours")
def test_where_it_does_not_serve_torch_multiplies() -> None:
    def of(dtype: torch.dtype, m: int, k: int, n: int) -> list[str]:
        return _chosen(torch.bmm, torch.ones(3, m, k, dtype=dtype), torch.ones(3, k, n, dtype=dtype))

    assert of(torch.float32, 4, 5, 6) == ["memberwise.product.default"]
    for other in [(torch.float64, 4, 5, 6), (torch.bfloat16, 4, 5, 6), (torch.float32, 1, 5, 6)]:
        assert of(*other) == ["aten.bmm.default"], other
    for side in [(4, 1, 6), (4, 5, 1)]:
        assert of(torch.float32, *side) == ["aten.bmm.default"], "the compiler makes it a part of what is around"


def test_what_torch_multiplies_as_fast_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is measured once on a machine."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked: list[tuple[int, ...]] = []

    def seconds(theirs: object, ours: object, a: torch.Tensor, b: torch.Tensor) -> list[float]:
        asked.append((*a.shape, *b.shape))
        return [1.0, 0.9 if len(b) == 3 else 0.99]

    monkeypatch.setattr(products, "_seconds", seconds)
    many, few = (torch.ones(3, 4, 5), torch.ones(3, 5, 6)), (torch.ones(2, 4, 5), torch.ones(2, 5, 6))
    for _ in range(2):
        assert _chosen(torch.bmm, *many) == ["memberwise.product.default"]
        assert _chosen(torch.bmm, *few) == ["aten.bmm.default"]
        assert asked == [(3, 4, 5, 3, 5, 6), (2, 4, 5, 2, 5, 6)]


def test_a_trial_leaves_members_out_not_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thousand large factors take no second gigabyte; the user's stream stays where it is."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(products, "MOST", 100)
    shapes = []
    monkeypatch.setattr(
        products, "_seconds", lambda *args: [1.0, float(bool(shapes.extend(a.shape for a in args[2:])))]
    )
    before = torch.get_rng_state()
    _chosen(torch.bmm, torch.ones(9, 4, 5), torch.ones(1, 5, 6).expand(9, 5, 6))
    _chosen(torch.mm, torch.ones(40, 50), torch.ones(50, 60))
    assert shapes == [(3, 4, 5), (3, 5, 6), (40, 50), (50, 60)]
    assert torch.equal(torch.get_rng_state(), before)


def _multiplied() -> tuple[fx.GraphModule, Callable[[], list[torch.Tensor]]]:
    """A graph that multiplies by ours and adds to its input."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    made = graph.call_function(product, (x, graph.call_function(_aten.transpose.int, (y, 1, 2))))
    graph.call_function(_aten.add_.Tensor, (x, made))
    graph.output((graph.call_function(_aten.relu.default, (made,)),))
    return fx.GraphModule({}, graph), lambda: [torch.full((2, 3, 3), -1.0), torch.ones(2, 3, 3)]


def test_another_process_finds_the_kernel_without_a_compiler(tmp_path: Path) -> None:
    code = """
import sys, torch
from tests.parity.test_capture_products import _multiplied
from memberwise._torch.entry import Entry
from memberwise.capture.cache import Compiled
module, trial = _multiplied()
run = Compiled(1, "inductor").get(module, trial(), trial)
x, y = trial()
found, = run(x, y)
assert isinstance(run, Entry), run
print(found.sum().item(), x.sum().item(), "torch._inductor.codecache" in sys.modules)
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for imports in (True, False):
        command = [sys.executable, "-W", "ignore", "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.split() == ["0.0", "-72.0", str(imports)]
