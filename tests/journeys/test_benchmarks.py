"""The benchmark is honest: it finds a wrong rival before timing it, says what it cut, and writes no figure on red."""

from __future__ import annotations

import contextlib
import copy
import doctest
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import memberwise
from benchmarks import intervals, overhead, render, row, run, schema, summary, timing, verify
from benchmarks.case import Batch, Case
from benchmarks.cases import CASES
from benchmarks.recipe import LR
from benchmarks.rival import Rival, Running
from benchmarks.rivals import RIVALS, memberwise_eager

ROOT = Path(__file__).parents[2]
M = 3
QUICK = timing.Pace(rounds=3, block_s=1e-4, budget_s=60)


def tiny_batch(generator: torch.Generator) -> Batch:
    return torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)


def tiny_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


@pytest.fixture(params=[True, False], ids=["shared batch", "own batches"])
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A case small enough for a test, in the table under the name `tiny`."""
    case = Case("tiny", "tiny", tiny_model, tiny_batch, tiny_loss, members=(M,), shared=request.param)
    monkeypatch.setitem(CASES, "tiny", case)
    threads = torch.get_num_threads()
    yield case
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def ask(*rivals: str, **changes: Any) -> row.Request:
    return row.Request("tiny", M, threads=1, rivals=rivals, **{"pace": QUICK, **changes})


def document_of(*rows: dict[str, Any], rounds: int = QUICK.rounds) -> dict[str, Any]:
    options = run.options_of(["--rounds", str(rounds)])
    return json.loads(json.dumps(run.document_of(options, list(rows), run.machine.machine())))


# A sound run


def test_a_row_of_sound_rivals_is_a_row_of_the_schema(tiny: Case) -> None:
    measured = row.measure(ask("loop", "loop-fused", "vmap", "memberwise"))
    assert [figure["status"] for figure in measured["figures"]] == ["timed"] * 4
    assert all(len(figure["samples_us"]) == QUICK.rounds for figure in measured["figures"])
    assert [(ratio["of"], ratio["to"]) for ratio in measured["ratios"]] == [
        ("memberwise", "loop"),
        ("memberwise", "loop-fused"),
        ("memberwise", "vmap"),
    ]
    assert schema.problems(document_of(measured)) == []


def captured_by(**options: Any) -> Rival:
    """The captured rival, without a compiler."""
    capture = partial(memberwise.compile, backend="fx", **options)
    return Rival("captured", "memberwise captured", "", partial(memberwise_eager.start, capture=capture))


def test_a_captured_rival_is_started_and_checked_too(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RIVALS, "captured", captured_by())
    (figure,) = row.measure(ask("captured"))["figures"]
    assert (figure["status"], figure["why"]) == ("timed", "")


@pytest.mark.usefixtures("tiny")
def test_several_steps_in_a_call_are_checked_as_steps_and_timed_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", replace(CASES["tiny"], ahead=True))
    monkeypatch.setattr(memberwise, "compile", partial(memberwise.compile, backend="fx"))
    calls: list[int] = []
    real = timing.interleaved

    def interleaved(steps: Any, *args: Any, together: dict[str, int], **named: Any) -> Any:
        calls.append(together["memberwise-steps"])
        return real(steps, *args, together=together, **named)

    monkeypatch.setattr(timing, "interleaved", interleaved)
    figures = row.measure(ask("loop", "memberwise-steps"))["figures"]
    assert [figure["status"] for figure in figures] == ["timed"] * 2, figures
    assert calls == [8]


def test_a_captured_rival_that_fell_back_to_eager_steps_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = tiny_loss(model, x, y)
        return loss if bool((loss > -1).all()) else -loss  # the host looks at a value

    monkeypatch.setitem(CASES, "tiny", Case("tiny", "tiny", tiny_model, tiny_batch, reads, members=(M,)))
    monkeypatch.setitem(RIVALS, "captured", captured_by())
    figures = row.measure(ask("memberwise", "captured", exact=False))["figures"]
    assert [figure["status"] for figure in figures] == ["timed", "cannot"]
    assert figures[1]["why"].startswith("StackWarning: the step runs eagerly")


@pytest.mark.long
def test_the_command_measures_in_a_process_of_its_own_and_writes_a_results_file(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    run.main(
        ["mlp-4", "--rivals", "loop", "vmap", "--threads", "1", "--rounds", "2", "--steps", "2", "--out", str(out)]
    )
    document = json.loads(out.read_text())
    assert schema.problems(document) == []
    assert [each["row"] for each in document["rows"]] == ["mlp-4"]


def test_a_selection_of_rows_never_replaces_the_published_table() -> None:
    assert run.options_of(["mlp-4"]).out is None
    assert run.options_of(["--rivals", "loop"]).out is None
    assert run.options_of([]).out == run.RESULTS / "table.json"


def test_a_name_that_nothing_has_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(SystemExit, match="'mpl-4'; there are mlp-4, mlp-16"):
        run.requests_of(run.options_of(["mpl-4"]))


# A wrong rival


def sabotaged(change: Callable[[Callable[[Batch], Tensor], Running], Callable[[Batch], Tensor]]) -> Rival:
    """torch.vmap's rival, its step changed."""

    def start(case: Case, models: list[nn.Module]) -> Running:
        sound = RIVALS["vmap"].start(case, models)
        return Running(change(sound.step, sound), sound.state)

    return Rival("sabotaged", "sabotaged", "", start)


def untrained_bias(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    def changed(batch: Batch) -> Tensor:
        before = running.state()["3.bias"].detach().clone()
        losses = step(batch)
        running.state()["3.bias"].detach().copy_(before)
        return losses

    return changed


def permuted_members(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    return lambda batch: step(batch).flip(0)


def stale_batch(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    seen: list[Batch] = []

    def changed(batch: Batch) -> Tensor:
        seen.append(batch)
        return step(seen[0])

    return changed


def member_left_out(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    def changed(batch: Batch) -> Tensor:
        before = {name: value.detach()[1].clone() for name, value in running.state().items()}
        losses = step(batch)
        for name, value in running.state().items():
            value.detach()[1] = before[name]
        return losses

    return changed


def stale_buffer(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    def changed(batch: Batch) -> Tensor:
        before = running.state()["1.running_mean"].clone()
        losses = step(batch)
        running.state()["1.running_mean"].copy_(before)
        return losses

    return changed


def not_a_number(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
    return lambda batch: step(batch) * float("nan")


SABOTAGES = {
    untrained_bias: r"3\.bias.*: 3 of 3 members wrong",
    permuted_members: r"loss of step 0: 2 of 3 members wrong",
    stale_batch: r"loss of step 1: 3 of 3 members wrong",
    member_left_out: r"loss of step 1: 1 of 3 members wrong, most of all member 1",
    stale_buffer: r"1\.running_mean.*: 3 of 3 members wrong",
    not_a_number: r"loss of step 0: 3 of 3 members wrong, most of all member \d, off by nan",
}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
@pytest.mark.parametrize("exact", [True, False], ids=["float64 too", "float32 alone"])
def test_a_wrong_rival_is_found_before_it_is_timed(
    tiny: Case, monkeypatch: pytest.MonkeyPatch, sabotage: Callable, exact: bool
) -> None:
    monkeypatch.setitem(RIVALS, "sabotaged", sabotaged(sabotage))
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(row.Red, match=SABOTAGES[sabotage]) as red:
        row.measure(ask("loop", "sabotaged", exact=exact))
    lines = str(red.value).splitlines()
    assert all(line.startswith("tiny-3, sabotaged, torch.float") for line in lines)
    assert len(lines) <= (1 + exact) * (verify.SHOWN + 1)


def test_a_rounded_gradient_is_found_in_float64(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(step: Callable[[Batch], Tensor], running: Running) -> Callable[[Batch], Tensor]:
        def changed(batch: Batch) -> Tensor:
            losses = step(batch)
            weight = running.state()["0.weight"].detach()
            weight.copy_(weight.float())
            return losses

        return changed

    monkeypatch.setitem(RIVALS, "sabotaged", sabotaged(rounded))
    with pytest.raises(row.Red, match=r"torch\.float64: 0\.weight: 3 of 3"):
        row.measure(ask("sabotaged"))


def test_one_element_that_adam_sent_the_other_way_is_no_fault_in_float32_and_one_untrained_bias_is(tiny: Case) -> None:
    case = CASES["mlp"]
    batches = case.batches(2, 5)
    expected = verify.of_loop(case, 2, batches, torch.float32)
    exact = verify.of_loop(case, 2, [(x.double(), y) for x, y in batches], torch.float64)
    for name, wrong in {"0.weight": False, "4.bias": True}.items():
        state = {key: value.clone() for key, value in expected.state.items()}
        if wrong:
            state[name][1] = case.models(2)[1].state_dict()[name]
        else:
            state[name][1, 0, 0] += LR
        found = verify.Trajectory(expected.losses, state)
        assert bool(verify.in_norm(found, expected, exact)) == wrong
        assert verify.exactly(found, expected)[0].startswith(f"{name}: 1 of 2 members wrong, most of all member 1")


def test_another_library_may_lose_to_rounding_in_one_member_what_the_loop_loses_in_another() -> None:
    def of(first: float, second: float) -> verify.Trajectory:
        return verify.Trajectory(torch.ones(1, 2), {"weight": torch.tensor([[first], [second]])})

    loop, exact = of(1.0, 1.01), of(1.0, 1.0)
    assert verify.in_norm(of(1.015, 1.0), loop, exact) != []
    assert verify.in_norm(of(1.015, 1.0), loop, exact, ours=False) == []
    assert verify.in_norm(of(1.025, 1.0), loop, exact, ours=False) != []
    assert verify.in_norm(of(1.07, 1.0), loop, exact, ours=False, proven=True) == []
    assert verify.in_norm(of(1.09, 1.0), loop, exact, ours=False, proven=True) != []
    assert verify.in_norm(of(1.07, 1.0), loop, exact, ours=True, proven=True) != []


def test_a_state_with_other_names_or_shapes_is_wrong(tiny: Case) -> None:
    expected = verify.of_loop(tiny, M, tiny.batches(M, 1), torch.float32)
    less = verify.Trajectory(expected.losses, {k: v for k, v in expected.state.items() if k != "3.bias"})
    for compare in (verify.exactly, lambda found, expected: verify.in_norm(found, expected, expected)):
        assert compare(less, expected) == ["parameters or buffers on one side only: 3.bias"]
    short = verify.Trajectory(expected.losses, {**expected.state, "3.bias": expected.state["3.bias"][:1]})
    for compare in (verify.exactly, lambda found, expected: verify.in_norm(found, expected, expected)):
        assert compare(short, expected) == ["3.bias: (1, 2) torch.float32 where the loop has (3, 2) torch.float32"]


def test_on_a_red_check_nothing_is_written_and_no_figure_shown(
    tiny: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RIVALS, "sabotaged", sabotaged(permuted_members))
    out = tmp_path / "table.json"
    argv = ["tiny-3", "--rivals", "loop", "sabotaged", "--threads", "1", "--rounds", "2", "--out", str(out)]
    with pytest.raises(SystemExit, match="no figures"):
        run.main(argv, measure=row.measure)
    assert not out.exists()
    assert "ms a step" not in capsys.readouterr().out


# A slow rival, and one that cannot


def slow(case: Case, models: list[nn.Module]) -> Running:
    sound = RIVALS["loop"].start(case, models)

    def step(batch: Batch) -> Tensor:
        time.sleep(0.1)
        return sound.step(batch)

    return Running(step, sound.state)


def test_a_rival_over_its_budget_is_cut_and_said_to_be(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RIVALS, "slow", Rival("slow", "slow", "", slow))
    pace = timing.Pace(rounds=timing.FEWEST + 2, block_s=1e-4, budget_s=0.2)
    measured = row.measure(ask("loop", "slow", pace=pace))
    cut = measured["figures"][1]
    assert (cut["status"], len(cut["samples_us"])) == ("cut", timing.FEWEST)
    assert cut["us"]["median"] > 100_000
    assert measured["figures"][0]["status"] == "timed"
    document = document_of(measured, rounds=pace.rounds)
    assert schema.problems(document) == []
    said = "slow cut in tiny-3 (1 thread): 3 of 5 rounds in 0.2 s"
    assert said in summary.notes(document)
    document["rows"][0]["figures"].append(cut)  # as of a rival that runs beside a second group
    assert summary.notes(document).count(said) == 1
    assert any("(cut)" in cell for cell in summary.times(document)[1])


def test_a_start_over_its_limit_is_cut_and_said_to_be(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(case: Case, models: list[nn.Module]) -> Running:
        with contextlib.suppress(Exception):  # what a library on the way may do
            time.sleep(60)
        raise AssertionError("ran on")

    monkeypatch.setitem(RIVALS, "never", Rival("never", "never", "", never))
    measured = row.measure(ask("loop", "never", start_s=0.3))
    figure = measured["figures"][1]
    assert (figure["status"], figure["why"], figure["us"]) == ("cut", "its start took more than 0.3 s", None)
    assert schema.problems(document_of(measured)) == []


def test_a_rival_that_cannot_run_the_case_stays_in_the_table_with_its_reason(
    tiny: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(case: Case, models: list[nn.Module]) -> Running:
        raise RuntimeError("no rule in /home/someone/torch/file.py for this\nmore")

    monkeypatch.setitem(RIVALS, "unable", Rival("unable", "unable", "", start))
    measured = row.measure(ask("loop", "unable"))
    figure = measured["figures"][1]
    assert (figure["status"], figure["why"]) == ("cannot", "RuntimeError: no rule in file.py for this")
    document = document_of(measured)
    assert schema.problems(document) == []
    assert summary.times(document)[1][-1] == "cannot"
    assert "| cannot |" in render.markdown(document)
    assert "unable cannot in tiny-3 (1 thread): RuntimeError: no rule" in render.markdown(document)


# The clock


def test_every_round_times_every_rival_once_in_a_changing_order() -> None:
    calls: list[str] = []
    names = ["a", "b", "c", "d"]
    steps = {name: lambda number, name=name: calls.append(name) for name in names}
    samples = timing.interleaved(steps, timing.Pace(rounds=8, block_s=1e-9, budget_s=60))
    assert {name: len(each) for name, each in samples.items()} == dict.fromkeys(names, 8)
    timed = calls[-4 * 8 :]
    rounds = [timed[start : start + 4] for start in range(0, len(timed), 4)]
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_a_sample_is_the_time_of_one_step() -> None:
    samples = timing.interleaved({"sleep": lambda number: time.sleep(0.002)}, timing.Pace(2, 0.01, 60))
    assert all(sample >= 0.002 for sample in samples["sleep"])


def test_of_a_call_of_several_steps_a_sample_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", partial(next, itertools.count(step=8)))
    samples = timing.interleaved(
        {"eight seconds": lambda number: None}, timing.Pace(2, 1, 60), together={"eight seconds": 4}
    )
    assert samples == {"eight seconds": [2.0, 2.0]}


def test_steps_are_numbered_on_so_that_each_sees_the_next_batch() -> None:
    numbers: list[int] = []
    timing.interleaved({"step": numbers.append}, timing.Pace(2, 1e-6, 60))
    assert numbers == list(range(len(numbers)))


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40))
def test_an_interval_holds_its_median_and_lies_among_the_samples(samples: list[float]) -> None:
    interval = intervals.of_median(samples)
    assert min(samples) <= interval.low <= interval.median <= interval.high <= max(samples)
    assert interval.median == pytest.approx(torch.tensor(samples).double().quantile(0.5).item())


def test_an_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(100, 30, generator=generator, dtype=torch.float64)
    covered = [low <= 0 <= high for _, low, high in map(intervals.of_median, draws.tolist())]
    assert 0.88 <= sum(covered) / len(covered) <= 0.99


def test_a_ratio_pairs_neighbours_not_medians() -> None:
    assert intervals.of_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)
    assert intervals.of_ratio([2.0, 8.0], [1.0]).median == 2.0


# The results file


@pytest.fixture
def sound(tiny: Case) -> dict[str, Any]:
    return document_of(row.measure(ask("loop", "vmap", "memberwise", exact=False)))


def test_the_schema_finds_what_is_wrong(sound: dict[str, Any]) -> None:
    figure = sound["rows"][0]["figures"][0]
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda d: d.pop("versions"), "table.versions: missing"),
        (lambda d: d.update(more=1), "table.more: not in the schema"),
        (lambda d: d["rows"][0].update(members="3"), r"table.rows\[0\].members: expected .*int.*, found '3'"),
        (lambda d: d["rows"][0].update(members=True), r"table.rows\[0\].members: expected"),
        (lambda d: d["rows"][0]["figures"][0].update(status="fine"), "expected one of"),
        (lambda d: d["machine"].update(system="/home/me/x"), "holds an absolute path"),
        (
            lambda d: d["rows"][0]["figures"][0]["us"].update(median=figure["us"]["median"] / 2),
            "not those of its samples",
        ),
        (lambda d: d["rows"][0]["figures"][0].update(samples_us=[], us=None), "timed, with 0 of 3 samples"),
        (lambda d: d["rows"][0]["figures"][0].update(samples_us=[], us=None, status="cut"), "no word why"),
        (lambda d: d["rows"][0]["ratios"][0]["faster"].update(median=9.0), "is not that of their samples"),
        (lambda d: d.update(kind="other"), "kind: expected one of"),
    ]
    assert schema.problems(sound) == []
    for change, said in changes:
        broken = copy.deepcopy(sound)
        change(broken)
        assert any(re.search(said, line) for line in schema.problems(broken)), said


def test_the_name_of_the_machine_is_not_published(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema.platform, "node", lambda: "desk-7")
    sound["machine"]["processor"] = "fast one on desk-7"
    assert schema.problems(sound) == ["table.machine.processor: holds the machine's name"]


def test_a_document_against_the_schema_is_not_written(sound: dict[str, Any], tmp_path: Path) -> None:
    sound["rows"][0]["figures"][0]["us"]["median"] = 1.0
    with pytest.raises(SystemExit, match="not those of its samples"):
        run.write(sound, tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


def test_every_published_results_file_keeps_the_schema() -> None:
    for name in ("table.json", "overhead.json"):
        if (path := run.RESULTS / name).exists():
            assert schema.problems(json.loads(path.read_text())) == [], name


# The page


def with_samples(sound: dict[str, Any], **samples: list[float]) -> dict[str, Any]:
    """The document as if its rivals had taken these microseconds."""
    measured = sound["rows"][0]
    for figure in measured["figures"]:
        figure["samples_us"] = samples[figure["rival"]]
        figure["us"] = schema.of_samples(figure["samples_us"])
    for ratio in measured["ratios"]:
        ratio["faster"] = schema.faster(samples[ratio["of"]], samples[ratio["to"]])
    assert schema.problems(sound) == []
    return sound


def test_a_loss_is_printed_as_one(sound: dict[str, Any]) -> None:
    document = with_samples(sound, loop=[500.0] * 3, vmap=[2000.0] * 3, memberwise=[1000.0] * 3)
    text = render.markdown(document)
    assert "| **0.50 (0.50-0.50) slower** | 2.00 (2.00-2.00) |" in text
    assert "| 0.50 | 2.00 | 1.00 |" in text


def test_a_ratio_whose_interval_holds_one_is_a_tie(sound: dict[str, Any]) -> None:
    document = with_samples(sound, loop=[900.0, 1000.0, 1100.0], vmap=[2000.0] * 3, memberwise=[1000.0] * 3)
    assert "| 1.00 (0.90-1.10) tie |" in render.markdown(document)


def test_a_column_is_the_fastest_rival_of_its_family(sound: dict[str, Any]) -> None:
    sound["rows"][0]["figures"][1]["family"] = "loop"
    document = with_samples(sound, loop=[4000.0] * 3, vmap=[2000.0] * 3, memberwise=[1000.0] * 3)
    heading, cells = summary.times(document)
    assert cells[heading.index("loop")] == "2.00"
    heading, cells = summary.ratios(document)
    assert cells[heading.index("eager / loop")] == "2.00 (2.00-2.00)"


def test_the_command_prints_a_results_file_and_refuses_another(
    sound: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "table.json"
    run.write(sound, results)
    render.main([str(results)])
    assert capsys.readouterr().out == render.markdown(sound) + "\n"
    results.write_text(json.dumps({**sound, "rows": "none"}))
    with pytest.raises(SystemExit, match=r"table\.rows: expected a list"):
        render.main([str(results)])


# The cases

AGAIN = {name for name, case in CASES.items() if not case.trains} | {"W1-bf16", "W5-batch-32", "W7-bf16"}
"""Cases of a model that another case trains."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in AGAIN])
def test_a_case_trains_every_parameter_by_its_loss(name: str) -> None:
    case = CASES[name]
    (model,) = case.models(1)
    loss = case.loss(model, *case.of_member(case.batches(1, 1)[0], 0))
    assert loss.shape == ()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("trunk."):
            assert case.common is not None and not parameter.requires_grad
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", [name for name in CASES if name not in AGAIN])
def test_members_and_batches_differ_and_come_again(name: str) -> None:
    case = CASES[name]
    first, second = case.models(2)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    again = case.models(2)[1]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), second.parameters(), strict=True))
    one, other = case.batches(2, 2)
    assert not torch.equal(one[0], other[0])
    assert case.shared or (len(one[0]) == 2 and not torch.equal(one[0][0], one[0][1]))


def test_the_rows_are_those_of_the_published_table() -> None:
    rows = {request.name for request in run.requests_of(run.options_of(["--threads", "1"]))}
    assert rows == {
        *("mlp-4", "mlp-16", "mlp-64", "mlp-256", "critics-2", "critics-10", "transformer-32-32"),
        *("transformer-64-8", "cnn-8-16", "cnn-32-8", "lstm-16"),
    }


def test_every_rival_has_one_learning_rate() -> None:
    assert torch.optim.Adam([nn.Parameter(torch.zeros(1))]).defaults["lr"] == LR


# The overhead


def test_the_overhead_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    overhead.main(["--rounds", "2", "--block", "1e-5", "--out", str(out)])
    document = json.loads(out.read_text())
    assert schema.problems(document) == []
    measured = {(cost["operation"], cost["way"], cost["rival"]) for cost in document["operations"]}
    assert len(measured) == len(overhead.OPERATIONS) * len(overhead.WAYS) * len(overhead.RIVALS)
    assert {cost["rival"] for cost in document["empty"]} == {"torch.vmap", "memberwise.vmap"}
    assert "| layer_norm, forward and backward |" in render.markdown(document)


@pytest.mark.parametrize("way", overhead.WAYS)
def test_a_chain_with_wrong_values_is_not_timed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        overhead.RIVALS, "torch.vmap", lambda function: lambda *each: torch.vmap(function)(*each) * 1.01
    )
    with pytest.raises(AssertionError, match=r"torch\.vmap"):
        overhead.costs("linear", way, QUICK)


# The pages


@pytest.mark.parametrize("module", [intervals, render, summary], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0


def test_the_page_names_every_file() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in page, path.name
