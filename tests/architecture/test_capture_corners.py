"""What the private corners of torch under capture must keep doing; a red test here names what breaks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from memberwise._torch import building, entry, folder, graphmodule, identity, inductor, openmp, tensorguards
from memberwise._torch.dispatch import DispatchMode


def test_a_generator_has_one_key_whatever_object_shows_it() -> None:
    """Breaks: draws of members' streams under capture; two streams would be taken for one, or one for two."""
    shown = []

    class Mode(DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shown.append((kwargs or {}).get("generator"))
            return func(*args, **(kwargs or {}))

    first, second = torch.Generator(), torch.Generator()
    with Mode():
        torch.empty(2).uniform_(generator=first)
    assert identity.stream_key(shown[-1]) == identity.stream_key(first) != identity.stream_key(second)


def test_views_share_a_memory_key_and_copies_do_not() -> None:
    """Breaks: what two inputs of a program may share would not be seen."""
    x = torch.ones(4)
    assert identity.memory_key(x) == identity.memory_key(x[2:].view(2, 1)) == identity.memory_key(x.detach())
    assert identity.memory_key(x) != identity.memory_key(x.clone())


def test_tensors_on_one_storage_are_counted() -> None:
    """Breaks: a result that somebody holds would be overwritten by the next replay of a CUDA graph."""
    x, leaf = torch.ones(4), torch.nn.Parameter(torch.zeros(4))
    alone = identity.holders(x)
    view = x[:2]
    assert identity.holders(x) == alone + 1
    leaf.grad = x.detach()
    array = view.numpy()
    assert identity.holders(x) >= alone + 2
    del view
    assert identity.holders(x) >= alone + 2, "an array is a holder, too"
    del array
    assert identity.holders(x) == alone + 1
    leaf.grad = None
    assert identity.holders(x) == alone


def test_a_tensor_is_plain_unless_its_class_handles_operations() -> None:
    """Breaks: the recorder would record member tensors, or nothing."""

    class Shown(torch.Tensor):
        pass

    class Handled(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    x = torch.ones(2)
    assert identity.is_plain(x)
    assert identity.is_plain(torch.nn.Parameter(x))
    assert identity.is_plain(x.as_subclass(Shown))
    assert not identity.is_plain(x.as_subclass(Handled))


OTHERS = {
    "dtype": lambda: torch.ones(2, 3, dtype=torch.float64),
    "shape": lambda: torch.ones(2, 4),
    "dimensions": lambda: torch.ones(2, 3, 1),
    "layout": lambda: torch.ones(3, 2).t(),
    "requires_grad": lambda: torch.ones(2, 3, requires_grad=True),
    "class": lambda: torch.nn.Parameter(torch.ones(2, 3), requires_grad=False),
    "nothing": lambda: None,
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "inference": lambda: _inference(),
}


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2, 3)


@pytest.mark.parametrize("name", OTHERS)
def test_a_tensor_of_another_kind_is_told(name: str) -> None:
    """Breaks: a program would run on inputs that it was not compiled for."""
    weight = torch.nn.Parameter(torch.ones(3))
    check = tensorguards.tensor_check([torch.ones(2, 3), weight])
    assert check(torch.zeros(2, 3), weight)
    assert not check(OTHERS[name](), weight)


def test_one_tensor_in_two_places_is_told() -> None:
    """Breaks: writes to one input would not be seen by the other."""
    first, second = torch.ones(2), torch.ones(2)
    check = tensorguards.tensor_check([first, second])
    assert check(second, first)
    assert not check(first, first)


def test_autocast_and_inference_mode_are_told() -> None:
    """Breaks: a recording made without autocast would stand for calls under it."""
    x = torch.ones(2)
    check = tensorguards.tensor_check([x])
    assert check(x)
    with torch.autocast("cpu"):
        assert not check(x)
    with torch.inference_mode():
        assert not check(x)
    with torch.no_grad():
        assert check(x)


def test_a_graph_that_writes_to_its_inputs_is_compiled() -> None:
    """Breaks: all of capture on the CPU. Parameters may be among the inputs, and nothing runs while compiling."""
    graph = fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    view = graph.call_function(torch.ops.aten.select.int, (weight, 0, 1))
    graph.call_function(torch.ops.aten.add_.Tensor, (view, scaled))
    graph.output((scaled,))
    inputs = [torch.nn.Parameter(torch.ones(2, 3)), torch.ones(3)]
    run = inductor.begin_graph(fx.GraphModule({}, graph), inputs)(lambda: [t.detach().clone() for t in inputs])
    assert torch.equal(inputs[0], torch.ones(2, 3))
    with torch.no_grad():
        (out,) = run(*inputs)
    assert torch.equal(out, torch.full((3,), 2.0))
    assert torch.equal(inputs[0], torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]))


def test_a_program_that_fails_when_it_runs_is_compiled_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: an operation that the wrapper in C++ does not know would fail in the middle of a step."""
    tried = []

    class Compiler:
        def __call__(self, module, inputs, options):
            def run(*args):
                tried.append("cpp_wrapper" in options)
                if "cpp_wrapper" in options:
                    raise RuntimeError("no such operation in C++")
                return module(*args)

            return run

    monkeypatch.setattr("torch._inductor.compile", Compiler())
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    x = torch.ones(2)
    run = inductor.begin_graph(fx.GraphModule({}, graph), [x])(lambda: [x])
    assert run(x)[0] is x
    assert tried == [True, False, False]
    assert inductor.compile_untried(fx.GraphModule({}, graph), [x])(x)[0] is x
    assert tried[3:] == [False]


def test_what_a_graph_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: convolutions get another memory order, which is slower; chunks in lanes share their loops among threads
    that are busy with other chunks."""
    given = []
    monkeypatch.setattr("torch._inductor.compile", lambda module, inputs, options: given.append(options))
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    for how in (inductor.How(), inductor.How(threads=1), inductor.How(channels_last=True)):
        inductor.compile_untried(fx.GraphModule({}, graph), [torch.ones(2)], how)
    as_it_is = {"layout_optimization": False}
    assert given == [as_it_is, {"cpp.threads": 1, **as_it_is}, {"layout_optimization": True}]
    known = torch._inductor.config.get_config_copy()
    assert known["layout_optimization"] is True and known["cpp.threads"] == -1  # there, and as they are by default


def test_a_team_runs_python_on_the_threads_of_kernels(two_threads: None) -> None:
    """Breaks: chunks on separate cores compete with kernels' own threads, or wait for threads that are not there."""
    torch.ones(1 << 20).add_(1)  # the kernels' threads have started
    found: dict[int, tuple[int, int]] = {}
    openmp.in_team(lambda k: found.update({k: (threading.get_ident(), torch.get_num_threads())}), 4, 2)
    assert found[0] == found[2] == (threading.get_ident(), 1)
    assert found[1] == found[3] and found[1][0] != found[0][0] and found[1][1] == 1
    assert torch.get_num_threads() == 2


def test_a_graph_that_was_begun_is_built_aside() -> None:
    """Breaks: regions would be built one after another, on one core."""
    from torch._inductor import config
    from torch._inductor.codecache import CppWrapperCodeCache

    later: list[inductor._Later] = []

    class Noted(inductor._Later):
        def __init__(self, found: Any, code: str) -> None:
            super().__init__(found, code)
            later.append(self)

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.cosh.default, (x,)),))
    before = vars(CppWrapperCodeCache).get("load_pybinding")
    with config.patch(compile_threads=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "_Later", Noted)
        end = inductor.begin_graph(fx.GraphModule({}, graph), [torch.ones(3)])
        assert vars(CppWrapperCodeCache).get("load_pybinding") is before
        assert [one.entry for one in later] == [None]  # nobody has waited
        assert later[0].takes == 1
        (found,) = end(lambda: [torch.ones(3)])(torch.zeros(3))
    assert torch.equal(found, torch.ones(3))
    assert later[0].entry is not None


@pytest.mark.parametrize("builds", [True, False])
def test_vector_instructions_are_tried_once_on_a_machine(
    builds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: each process takes two seconds more to its first compiled step, or takes for granted what fails."""
    from torch._inductor import cpu_vec_isa

    if not cpu_vec_isa.x86_isa_checker():
        pytest.skip("a processor for which torch tries nothing")
    tried: list[str] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: tried.append(code) or builds)
    try:
        found = [_vectors()]
        first = tried.count(cpu_vec_isa.VecISA._avx_code)
        found.append(_vectors())
    finally:
        _forget_vectors()
    assert bool(found[0]) == builds and found[1] == found[0]
    assert first and tried.count(cpu_vec_isa.VecISA._avx_code) == first * (1 if builds else 2)


def _vectors() -> list[str]:
    """Those that Inductor uses in a new process."""
    from torch._inductor import cpu_vec_isa

    _forget_vectors()
    building.know_vectors.__wrapped__()
    return [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]


def _forget_vectors() -> None:
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for base in type(isa).__mro__:
            for method in vars(base).values():
                if hasattr(method, "cache_clear"):
                    method.cache_clear()


def test_recurrent_layers_without_onednn() -> None:
    """Breaks: steps with a recurrent layer of torch's own are not compiled."""
    seen = []

    class Mode(DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = torch.nn.LSTM(3, 4), torch.ones(2, 1, 3)
    with inductor.without_onednn(), Mode():
        layer(x)
    assert seen and not any("mkldnn" in name for name in seen)
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


@pytest.mark.long
def test_a_missing_compiler_is_told() -> None:
    """Breaks: a step would fail, or wait, where it should say that it runs eagerly."""
    assert not inductor.compiler_missing()
    code = "from memberwise._torch.inductor import compiler_missing; print(compiler_missing())"
    command, environment = [sys.executable, "-W", "ignore", "-c", code], {**os.environ, "CXX": "/nonexistent/c++"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "compiler" in run.stdout


def test_where_the_compiler_keeps_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: plans would be remembered where nobody looks for them, or clears them away."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert folder.cache_folder() == tmp_path
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert str(folder.cache_folder()) == cache_dir()


def test_each_processor_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: of machines that share a home, one would run another's code, of instructions that it may not have; and
    its plans."""
    known = folder.processor()
    if Path("/proc/cpuinfo").exists():
        line = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
        assert line.partition(":")[2].strip() in known
    here = folder.kept_at("a step")
    for other in (known, (*known[:-1], f"{known[-1]} avx1024")):
        monkeypatch.setattr(folder, "processor", lambda other=other: other)
        folder._machine.cache_clear()
        assert (folder.kept_at("a step") == here) is (other == known)
    monkeypatch.undo()
    folder._machine.cache_clear()


def test_a_graph_module_is_written_out_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: recording a step takes half as long again, for Python code that nobody runs."""
    written: list[fx.Graph] = []
    real = fx.Graph.python_code
    monkeypatch.setattr(
        fx.Graph, "python_code", lambda graph, *args, **kw: written.append(graph) or real(graph, *args, **kw)
    )
    graph = fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    module = graphmodule.graph_module({}, graph)
    copied = copy.deepcopy(module)
    assert isinstance(module, fx.GraphModule) and not written
    for made in (module, copied):
        assert torch.equal(made(torch.ones(2)), -torch.ones(2))
    assert written


def test_a_graph_module_is_written_out_by_one_of_the_threads_that_call_it() -> None:
    """Breaks: chunks on separate cores, which call it first at the same time, would fail, or compute anything."""

    def found_by(threads: int) -> list[float | Exception]:
        graph = fx.Graph()
        one = x = graph.placeholder("x")
        for _ in range(300):
            one = graph.call_function(torch.add, (graph.call_function(torch.mul, (one, 0.5)), x))
        graph.output(one)
        run, start, found = graphmodule.graph_module({}, graph).forward, threading.Barrier(threads), []

        def call() -> None:
            start.wait()
            try:
                found.append(round(run(torch.ones(1)).item(), 6))
            except Exception as error:
                found.append(error)

        callers = [threading.Thread(target=call) for _ in range(threads)]
        [caller.start() for caller in callers]
        [caller.join() for caller in callers]
        return found

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            assert found_by(4) == [2.0] * 4
    finally:
        sys.setswitchinterval(before)


def _written() -> tuple[fx.GraphModule, Any]:
    """x += 2 y, which gives y + 1; and what to run it on."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(torch.ops.aten.add_.Tensor, (x, graph.call_function(torch.ops.aten.mul.Tensor, (y, 2.0))))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (y, 1.0)),))
    return fx.GraphModule({}, graph), lambda: [torch.ones(3), torch.full((3,), 5.0)]


def test_a_program_is_the_function_of_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: each call costs what lies around the function (40 us), and another process must import Inductor."""
    module, trial = _written()
    run = inductor.begin_graph(module, trial())(trial)
    assert isinstance(run, entry.Entry)
    run.keep(tmp_path / "a program")
    again = entry.Entry.kept(tmp_path / "a program")
    assert again is not None
    for program in (run, again):
        x, y = trial()
        versions = x._version, y._version
        (found,) = program(x, y)
        assert torch.equal(found, torch.full((3,), 6.0)) and torch.equal(x, torch.full((3,), 11.0))
        assert (x._version > versions[0], y._version > versions[1]) == (True, False)


def test_a_program_tried_in_inference_mode_counts_what_it_writes() -> None:
    """Breaks: a program first used for predictions would write, in a training, what autograd does not hear of."""
    module, trial = _written()
    with torch.inference_mode():
        run = inductor.begin_graph(module, trial())(trial)
        x, y = trial()
        run(x, y)
        assert torch.equal(x, torch.full((3,), 11.0))
    assert isinstance(run, entry.Entry) and run.changed == [0]


@pytest.mark.long
def test_a_captured_step_in_another_process_needs_no_inductor() -> None:
    """Breaks: the first captured step of each process takes two seconds more; what is built ahead on a new machine
    would be looked for, and not found, on any."""
    code = """
import sys, torch, memberwise
w = torch.ones(2, 3)
def step(x):
    w.mul_(0.5).add_(x @ torch.ones(3, 3)).clamp_(max=float(sys.argv[1]))
    return w.sum(1)
captured = memberwise.compile(step)
for _ in range(4):
    out = captured(torch.ones(2, 3))
print(out.tolist(), captured.captured.replayed, "torch._inductor" in sys.modules)
"""
    never_before = str(1000 + time.time() % 1)  # another directory would have torch's headers to compile
    for imports in (True, False):
        command = [sys.executable, "-W", "ignore", "-c", code, never_before]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == f"[17.0625, 17.0625] 3 {imports}"


@pytest.mark.parametrize("kind", ["constant", "alias"])
def test_a_program_that_is_more_than_its_function_stays_whole(kind: str) -> None:
    """Breaks: a function would be called with too few tensors, or give a tensor that no longer is the input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if kind == "constant":
        graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, graph.get_attr("held"))),))
    else:
        graph.output((graph.call_function(torch.ops.aten.view.default, (x, [3, 1])),))
    module = fx.GraphModule({"held": torch.tensor([1.0, 2.0, 4.0])}, graph)
    run = inductor.begin_graph(module, [torch.ones(3)])(lambda: [torch.ones(3)])
    given = torch.ones(3)
    (found,) = run(given)
    if kind == "constant":
        assert found.tolist() == [2.0, 3.0, 5.0]
    else:
        assert not isinstance(run, entry.Entry) and found.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("text", ["", "[]", '{"library": "/nowhere.so", "module": "a.b", "changed": []}'])
def test_a_program_whose_library_is_gone_is_none(text: str, tmp_path: Path) -> None:
    """Breaks: a cache that was cleared in part would fail the step."""
    path = tmp_path / "a program"
    path.write_text(text)
    assert entry.Entry.kept(path) is None


def test_a_compiled_graph_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: each process would compile anew. Inductor looks on disk only where shapes have an environment."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.compile", _asked_for_the_cache)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.sin.default, (x,)),))
    counters.clear()
    (found,) = inductor.compile_untried(fx.GraphModule({}, graph), [torch.ones(2, 3)])
    assert found == ("", torch.Size([2, 3]))


def _asked_for_the_cache(module: fx.GraphModule, inputs: list[torch.Tensor], options: object = None) -> object:
    """Why Inductor would not look for this graph on disk ("": it would), and the shape that it is shown."""
    from torch._inductor.codecache import BypassFxGraphCache, FxGraphCache
    from torch._subclasses.fake_tensor import FakeTensor

    (shown,) = inputs
    assert isinstance(shown, FakeTensor)
    try:
        with torch._guards.tracing(torch._guards.TracingContext(shown.fake_mode)):
            FxGraphCache._check_can_cache(module, inputs, {})
    except BypassFxGraphCache as error:
        return [(str(error), shown.shape)]
    return [("", shown.shape)]
