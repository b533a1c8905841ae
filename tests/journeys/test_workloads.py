"""The table of workloads: every figure follows from what was measured, and a wrong rival has none."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import costs, feed, plot, recipe, render, row, run, schema, timing, verify, workloads
from benchmarks.case import Batch, Case, Unwritten, stacked, watched
from benchmarks.cases import CASES, WORKLOADS
from benchmarks.folded.layers import losses
from benchmarks.recipe import Recipe
from benchmarks.rival import Cannot, Rival, Running
from benchmarks.rivals import RIVALS, folded_compiled

M = 3
QUICK = timing.Pace(rounds=2, block_s=1e-4, budget_s=60)
SGD = Recipe(lr=0.1, momentum=0.9, clip=0.5)


class Tiny(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).tanh()))  # type: ignore[no-any-return] # a tensor


def batch(generator: torch.Generator) -> Batch:
    return torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)


def inputs(generator: torch.Generator) -> Batch:
    return (torch.randn(6, 4, generator=generator),)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


DTYPES = {torch.float32, torch.float64}
TRAINS = Case("tiny", "tiny", Tiny, batch, loss, members=(M,), workload="W0", recipe=SGD, rows=40)
DRAWS = replace(TRAINS, model=lambda: Tiny(0.5), still=Tiny, shared=False)
PREDICTS = replace(TRAINS, batch=inputs, loss=lambda model, x: model(x), trains=False, rows=None)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Case], None]]:
    """Puts a case into the table under the name `tiny`; the machine's rates are not measured."""
    monkeypatch.setattr(costs, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(costs, "copy_rate", lambda *_: 1e9)
    threads = torch.get_num_threads()
    yield lambda case: monkeypatch.setitem(CASES, "tiny", case)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def ask(*rivals: str, **changes: Any) -> row.Request:
    more = {"pace": QUICK, "costs": True, "exact_members": 2, "memory_gib": 6.0, **changes}
    return row.Request("tiny", M, threads=1, rivals=rivals, **more)


def document_of(*rows: dict[str, Any]) -> dict[str, Any]:
    options = workloads.options_of(["--rounds", str(QUICK.rounds)])
    told = {"measured": {"date": "2026-01-01", "commit": "abc", "load_before": 0.0}}
    document = workloads.document_of(options, [{**each, **told} for each in rows], run.machine.machine())
    return json.loads(json.dumps(document))  # type: ignore[no-any-return] # a dict


# A row


@pytest.mark.parametrize("case", [TRAINS, DRAWS, PREDICTS], ids=["trains", "draws", "predicts"])
def test_a_row_has_its_costs_and_keeps_the_schema(case: Case, put: Callable[[Case], None]) -> None:
    put(case)
    measured = row.measure(ask("one", "loop", "vmap", "memberwise"))
    assert [figure["status"] for figure in measured["figures"]] == ["timed"] * 4
    assert schema.problems(document_of(measured)) == []
    one, loop, vmap, ours = measured["figures"]
    assert (one["members"], loop["members"]) == (1, M)
    assert loop["kernels"] > vmap["kernels"] > 0 and one["kernels"] < loop["kernels"]
    assert all(figure["memory_bytes"] >= figure["members"] * 4 * (4 * 5 + 5 * 2 + 2) for figure in measured["figures"])
    draws, said = case.still is not None, "training" if case.trains else "prediction"
    assert vmap["checked"] == (f"{said} without its draws" if draws else said)
    assert ours["checked"] == said
    assert {(ratio["of"], ratio["to"]) for ratio in measured["ratios"]} == {
        ("memberwise", name) for name in ("one", "loop", "vmap")
    }


def wrong(case: Case, models: list[nn.Module]) -> Running:
    """The loop, one step of one member late."""
    sound = RIVALS["loop"].start(case, models)
    return Running(lambda batch: sound.step(batch).roll(1, 0), sound.state)


def test_a_wrong_rival_has_a_line_and_no_figure(put: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch) -> None:
    put(TRAINS)
    monkeypatch.setitem(RIVALS, "wrong", Rival("wrong", "memberwise", "", wrong))
    measured = row.measure(ask("loop", "wrong"))
    figure = measured["figures"][1]
    assert (figure["status"], figure["us"], figure["over_one"]) == ("wrong", None, None)
    assert figure["why"].startswith("training, torch.float64: loss of step 0: 2 of 2 members wrong")
    document = document_of(measured)
    assert schema.problems(document) == []
    assert workloads.wrong_in(document["rows"]) == [f"tiny-3, wrong: {figure['why']}"]
    document["rows"][0]["figures"][1]["family"] = "another's"
    assert workloads.wrong_in(document["rows"]) == []


@pytest.mark.parametrize(("off_in", "status"), [({torch.float32}, "timed"), (DTYPES, "wrong")], ids=["float32", "both"])
def test_float64_decides_where_ours_differs_in_float32(
    off_in: set[torch.dtype], status: str, put: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last bit sends an activation to the other side of a kink; what is wrong in float64 is wrong."""
    put(TRAINS)
    started: list[torch.dtype] = []

    def off(case: Case, models: list[nn.Module]) -> Running:
        started.append(next(models[0].parameters()).dtype)
        sound = RIVALS["loop"].start(case, models)

        def state() -> dict[str, torch.Tensor]:
            found = sound.state()
            return {name: value + 1e-3 if value.dtype in off_in else value for name, value in found.items()}

        return Running(sound.step, state)

    monkeypatch.setitem(RIVALS, "off", Rival("off", "memberwise", "", off))
    (_, figure) = row.measure(ask("loop", "off", exact=False))["figures"]
    assert figure["status"] == status, figure["why"]
    assert started == [torch.float32, torch.float64]
    row.measure(ask("loop", "loop-fused", "off", exact=False, memory_gib=0.0))
    assert started[2:] == [torch.float32, torch.float64, torch.float32], "beside the second group it is known"
    monkeypatch.setitem(RIVALS, "off", Rival("off", "another's", "", off))
    (_, figure) = row.measure(ask("loop", "off", exact=False))["figures"]
    assert figure["status"] == "wrong", "a rival's bound is what the loop's worst member loses"


def test_a_stack_that_draws_as_no_member_would_is_wrong(
    put: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(DRAWS)

    def strange(case: Case, models: list[nn.Module]) -> Running:
        running = RIVALS["memberwise"].start(case, models)
        torch.manual_seed(7)
        return running

    def stale(case: Case, models: list[nn.Module]) -> Running:
        return RIVALS["loop"].start(case, models)  # draws from the global stream

    for name, start in {"strange": strange, "stale": stale}.items():
        rival = Rival(name, name, "", start, draws_alone=True)
        monkeypatch.setitem(RIVALS, name, rival)
    one, other = (verify.of_loop(DRAWS, M, DRAWS.batches(M, 1), dtype=torch.float32) for _ in range(2))
    assert verify.drew_alike(one, other)
    assert not verify.drew_alike(one, verify.of_loop(TRAINS, M, TRAINS.batches(M, 1), dtype=torch.float32))
    sound, stale_figure = row.measure(ask("strange", "stale", exact=False))["figures"]
    assert sound["status"] == "timed"  # the global stream is none of a stack's business
    assert stale_figure["why"].startswith("training, torch.float32: loss of step 0: 3 of 3 members wrong")


def test_a_rival_that_is_not_installed_is_left_out_and_says_so(
    put: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(TRAINS)
    monkeypatch.setitem(RIVALS, "absent", Rival("absent", "absent", "", wrong, needs=("no_such_package",)))
    measured = row.measure(ask("loop", "absent", exact=False))
    assert measured["figures"][1]["status"] == "left out"
    assert "absent left out in tiny-3 (1 thread): not installed: no_such_package" in render.markdown(
        document_of(measured)
    )


def test_rivals_that_do_not_fit_side_by_side_run_in_groups_with_ours_in_each(put: Callable[[Case], None]) -> None:
    put(TRAINS)
    names = ("one", "loop", "loop-fused", "vmap", "memberwise")
    assert len(row.groups(ask(*names), TRAINS)) == 1
    request = ask(*names, memory_gib=1e-9, exact=False)
    groups = [[rival.name for rival in group] for group in row.groups(request, TRAINS)]
    assert groups == [["one", other, "memberwise"] for other in ("loop", "loop-fused", "vmap")]
    measured = row.measure(request)
    assert schema.problems(document_of(measured)) == []
    assert [ratio["group"] for ratio in measured["ratios"]] == [0, 0, 1, 1, 2, 2]
    assert "| tiny-3 (1 thread) | vmap |" in render.markdown(document_of(measured))


def test_a_row_whose_time_is_spent_starts_no_rival_but_ours(put: Callable[[Case], None]) -> None:
    put(TRAINS)
    measured = row.measure(ask("one", "loop", "memberwise", row_s=0.0, exact=False))
    assert [figure["status"] for figure in measured["figures"]] == ["timed", "cut", "timed"]
    assert measured["figures"][1]["why"] == "the row's 0 s were spent before it"
    assert schema.problems(document_of(measured)) == []


# What a step is made of


def test_a_step_indexes_its_batch_from_among_the_rows() -> None:
    for case in (TRAINS, DRAWS):
        batches = case.batches(M, 3)
        data = feed.of(case, batches)
        assert data.rows[0].shape[data.axis] == 40
        at = feed.in_torch(data)
        for number in range(7):
            for found, expected in zip(at(number), batches[number % 3], strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
    ready = feed.in_torch(feed.of(PREDICTS, PREDICTS.batches(M, 2)))
    assert ready(3) is ready(1) and ready(2) is ready(0)


@pytest.mark.parametrize("one", [Recipe(), SGD, Recipe(clip=1e-3)], ids=lambda one: one.about)
def test_the_written_out_optimizer_is_that_of_torch(one: Recipe) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensors() -> dict[str, Tensor]:
        return {
            n: torch.randn(M, *s, generator=generator, dtype=torch.float64) for n, s in {"w": (3, 2), "b": (1,)}.items()
        }

    params = tensors()
    alone = [[value[i].clone().requires_grad_() for value in params.values()] for i in range(M)]
    optimizers = [one.of_torch(each) for each in alone]
    moments = one.moments(params)
    for _ in range(3):
        grads = tensors()
        one.update_(params, one.clipped(grads, stacked=True), moments)
        for i, (each, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            for param, grad in zip(each, grads.values(), strict=True):
                param.grad = grad[i].clone()
            if one.clip is not None:
                torch.nn.utils.clip_grad_norm_(each, one.clip)
            optimizer.step()
    for i, each in enumerate(alone):
        for param, value in zip(each, params.values(), strict=True):
            torch.testing.assert_close(value[i], param.detach(), rtol=1e-12, atol=1e-12)


def test_views_and_allocation_are_no_kernels() -> None:
    a = torch.ones(4, 4)
    assert costs.kernels(lambda: a.view(2, 8).t(), "cpu") == 0
    assert costs.kernels(lambda: (a @ a).view(16).add_(a.view(16)), "cpu") == 2


def test_memory_is_what_is_held_and_what_a_step_allocates() -> None:
    memory = costs.Memory("cpu")
    held = torch.ones(1000)
    assert memory.peak(lambda: held + held + held) == 3 * 4000


def test_a_floor_counts_both_products_and_bytes() -> None:
    one = costs.Floor(flops=200, bytes=30, flops_per_s=1e6, bytes_per_s=1e6)
    assert (one.us, one.binding) == (pytest.approx(200), "flops")
    assert replace(one, bytes=300).binding == "bytes"
    (data, target), model = TRAINS.batches(M, 1)[0], Tiny()
    linear = 2 * 6 * (4 * 5 + 5 * 2)
    assert costs.flops(TRAINS, model, (data, target)) == 3 * linear - 2 * 6 * 4 * 5  # no gradient of the data
    assert costs.flops(PREDICTS, model.eval(), (data,)) == linear


# The twins


@pytest.mark.parametrize("name", ["W3", "W4", "W10", "W12", "transformer-32"])
def test_a_model_folded_by_hand_is_its_members(name: str) -> None:
    case = CASES[name]
    models = [model.double() for model in case.models(2)]
    (given,) = [row._to(each, torch.float64) for each in case.batches(2, 1)]
    found, _ = folded_compiled.outputs_and_losses(case, models[0])(*stacked(models), *given)
    for member, model in enumerate(models):
        expected = case.loss(model, *case.of_member(given, member)).detach()
        torch.testing.assert_close(found[member].detach(), expected, rtol=1e-10, atol=1e-10)


def test_losses_of_all_are_those_of_each() -> None:
    out, target = torch.randn(M, 6, 1), torch.rand(6, 1)
    ways = {"mse": F.mse_loss, "logistic": F.binary_cross_entropy_with_logits}
    for name, way in ways.items():
        for i, each in enumerate(losses(name, out, target, shared=True)):
            torch.testing.assert_close(each, way(out[i], target))


def test_every_workload_has_its_twins_or_says_why_not() -> None:
    folder = Path(row.__file__).parent / "in_jax"
    for case in WORKLOADS:
        assert isinstance(case.folded, Unwritten) or callable(case.folded), case.name
        assert isinstance(case.in_jax, Unwritten) or (folder / f"{case.in_jax}.py").exists(), case.name
        assert case.objective or not case.trains, case.name


def test_what_is_frozen_and_common_is_one_object_and_not_watched() -> None:
    case = CASES["W10"]
    first, second = case.models(2)
    assert first.trunk is second.trunk
    assert not any(name.startswith("trunk") for name in watched(first))
    assert {*stacked([first, second])[0]} == {name for name, p in first.named_parameters() if p.requires_grad}


def test_a_rival_that_says_it_cannot_says_why(put: Callable[[Case], None]) -> None:
    put(TRAINS)
    with pytest.raises(Cannot, match="no folded form"):
        RIVALS["folded-compiled"].start(TRAINS, TRAINS.models(M))
    (figure,) = row.measure(ask("loop-graph", exact=False))["figures"]
    assert (figure["status"], figure["why"]) == ("cannot", "a CUDA graph needs a GPU")


# The command and its file


def test_a_workload_a_row_or_a_pattern_picks_rows() -> None:
    def names(*argv: str) -> list[str]:
        return [request.name for request in workloads.requests_of(workloads.options_of([*argv, "--threads", "1"]))]

    assert names("W3") == ["W3-100", "W3-1000"]
    assert names("W1-10", "W8") == ["W1-10", "transformer-32-32", "transformer-64-8"]
    assert names("W1", "--members", "10") == ["W1-10", "W1-bf16-10", "W1-predict-1-10", "W1-predict-64-10"]
    workload = {CASES[request.case].workload for request in workloads.requests_of(workloads.options_of([]))}
    assert workload == {f"W{number}" for number in range(1, 13)}
    with pytest.raises(SystemExit, match="nothing is called 'W13'"):
        names("W13")
    assert workloads.options_of(["W3"]).out is None


@pytest.fixture(scope="module")
def measured_once() -> dict[str, Any]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, "tiny", TRAINS)
        patch.setattr(costs, "product_rate", lambda *_: 1e9)
        patch.setattr(costs, "copy_rate", lambda *_: 1e9)
        measured = row.measure(ask("one", "loop", "vmap", "memberwise", exact=False))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    return measured


@pytest.fixture
def sound(measured_once: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(measured_once)


def test_rows_are_written_one_by_one_and_gone_on_with(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "workloads.json", []
    argv = ["W3", "--threads", "1", "--rounds", str(QUICK.rounds), "--out", str(out)]

    def measure(request: row.Request) -> dict[str, Any]:
        asked.append(request.name)
        if request.name == "W3-1000" and len(asked) == 2:
            raise row.Red("its process ended with code 9")
        return {**copy.deepcopy(sound), "row": request.name, "case": request.case}

    with pytest.raises(SystemExit, match="code 9"):
        workloads.main(argv, measure)
    assert [each["row"] for each in json.loads(out.read_text())["rows"]] == ["W3-100"]
    workloads.main([*argv, "--resume"], measure)
    assert asked == ["W3-100", "W3-1000", "W3-1000"]
    document = json.loads(out.read_text())
    assert schema.problems(document) == []
    assert [each["row"] for each in document["rows"]] == ["W3-100", "W3-1000"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="differs in settings"):
        workloads.main([*argv, "--resume", "--budget", "1"], measure)
    workloads.main(["W3-100", *argv[1:], "--again"], measure)
    assert asked[3:] == ["W3-100"]
    again = json.loads(out.read_text())["rows"]
    assert [each["row"] for each in again] == ["W3-100", "W3-1000"] and again[1] == document["rows"][1]


def test_the_schema_finds_figures_that_do_not_follow(sound: dict[str, Any]) -> None:
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda d: d["rows"][0]["figures"][1].update(member_steps_per_s=1.0), "loop: its member_steps_per_s is not"),
        (lambda d: d["rows"][0]["figures"][1].update(share_of_floor=1.0), "its share_of_floor is not"),
        (lambda d: d["rows"][0]["floor"].update(us=1.0), "its share_of_floor is not"),
        (lambda d: d["rows"][0]["figures"][2].update(over_one=None), "vmap: its over_one is not"),
        (lambda d: d["break_even"].clear(), "break_even: not what its rows say"),
        (lambda d: d["rows"][0].pop("measured"), "measured: missing"),
    ]
    assert schema.problems(document_of(sound)) == []
    for change, said in changes:
        document = document_of(sound)
        change(document)
        assert any(re.search(said, line) for line in schema.problems(document)), said


def test_break_even_is_the_least_m_from_which_on_ours_is_as_fast() -> None:
    def of(members: int, faster: float) -> dict[str, Any]:
        figures = [{"rival": "loop", "family": "loop"}, {"rival": "ours", "family": "memberwise"}]
        ratio = {"of": "ours", "to": "loop", "faster": {"median": faster, "low": faster, "high": faster}}
        return {"case": "W", "threads": 1, "members": members, "figures": figures, "ratios": [ratio]}

    def found(*ratios: float) -> int | None:
        (only,) = schema.break_even([of(10**i, ratio) for i, ratio in enumerate(ratios)])
        return only["members"]  # type: ignore[no-any-return] # as the schema says

    assert found(0.5, 1.5, 2.0) == 10
    assert found(1.5, 1.2) == 1
    assert found(1.5, 0.9) is None
    assert found(1.5, 0.9, 1.1) == 100


def test_the_plot_has_a_line_a_rival_and_the_floor(sound: dict[str, Any]) -> None:
    (lines,) = plot.panels_of(document_of(sound)).values()
    assert set(lines) == {"one", "loop", "vmap", "memberwise", "floor"}
    assert lines["loop"] == [(M, sound["figures"][1]["us"]["median"] / M)]
    assert lines["one"] == [(M, sound["figures"][0]["us"]["median"])]


@pytest.mark.long
def test_a_published_file_of_workloads_keeps_the_schema() -> None:
    for path in run.RESULTS.glob("workloads*.json"):
        assert schema.problems(json.loads(path.read_text())) == [], path.name


def test_bfloat16_is_allowed_its_own_rounding_and_no_more() -> None:
    def of(value: float) -> verify.Trajectory:
        return verify.Trajectory(torch.full((1, M), value), {}, torch.bfloat16)

    assert verify.in_norm(of(1.01), of(1.0), of(1.0)) == []
    assert verify.in_norm(of(1.1), of(1.0), of(1.0)) != []
    assert recipe.ADAM.about == "Adam"
