"""The stage of the search that trains what lies beyond the budget: which candidates, how long, and what it tells."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'vinoopt[distill]'")

from test_distill import data, network  # noqa: E402

import vinoopt  # noqa: E402
from vinoopt import serde  # noqa: E402
from vinoopt.accuracy.datasets import Dataset  # noqa: E402
from vinoopt.accuracy.evaluate import Predictions, predict  # noqa: E402
from vinoopt.compression.build import Workshop  # noqa: E402
from vinoopt.compression.judge import Judge  # noqa: E402
from vinoopt.compression.quantize import import_nncf  # noqa: E402
from vinoopt.compression.search import SearchResult  # noqa: E402
from vinoopt.demo import demo_files  # noqa: E402
from vinoopt.distillation import stage  # noqa: E402
from vinoopt.distillation.distiller import Cost, Distilled, cost_of  # noqa: E402
from vinoopt.distillation.stage import Runner, StageOptions, distill_beyond, worth_a_run  # noqa: E402
from vinoopt.distillation.training import Outcome  # noqa: E402
from vinoopt.errors import DistillationError  # noqa: E402
from vinoopt.frontend.preprocess import read_preprocess  # noqa: E402
from vinoopt.records import (  # noqa: E402
    AccuracyBudget,
    CompressionPlan,
    Device,
    DistillationPlan,
    Evidence,
    GroupWidth,
    Measurement,
    Precision,
    QuantizationPlan,
    Target,
    Trial,
    TrialState,
)
from vinoopt.store import Store  # noqa: E402

FLOAT = CompressionPlan()
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Likeness:
    """Mean of 1 minus the relative error: moves with every step of training."""

    name, unit = "likeness", "share"
    higher_is_better, needs_labels, needs_reference, is_mean = True, False, True, True

    def statistic(self, outputs: Mapping[str, Any], label: object, reference: Mapping[str, Any] | None) -> float:
        assert reference is not None
        (key,) = reference
        return 1 - float(np.abs(outputs[key] - reference[key]).mean() / np.abs(reference[key]).mean())

    def value(self, statistics: Sequence[float]) -> float:
        return float(np.mean(statistics))


class Ruler:
    """A target where every kept channel costs a millisecond; the float model costs 100."""

    target = Target(profile="ruler", device=Device.CPU)
    float_precisions = (Precision.F32,)
    arithmetic = "ruler"

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        kept = sum(len(width.kept) for width in plan.widths)
        ms = 100.0 if plan.quantization is None else float(kept or 50)
        return Measurement(name=plan.title, device="CPU", evidence=Evidence.MEASURED, latency_p50_ms=ms)

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        return tuple(self.measure(plan, model) for plan, model in candidates)

    def predict(self, plan: CompressionPlan, model: ov.Model, samples: Dataset) -> Predictions:
        return predict(model, samples)

    def block_times(self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]) -> Mapping[str, float]:
        return dict.fromkeys(blocks, 1.0)


def pruned(kept: int) -> CompressionPlan:
    widths = (GroupWidth(group="a", kept=tuple(range(kept))),)
    return CompressionPlan(widths=widths, quantization=QuantizationPlan(subset_size=16))


def judge_in(folder: Path, *, max_drop: float, upside_down: int = 0) -> Judge:
    """Of a network that can be pruned; with so many channels kept its decisions are turned around."""
    model, store = network(), Store.open("distill", root=folder)
    weights = network.made  # type: ignore[attr-defined]
    turned = {**weights, "head": -weights["head"]}

    def narrowed(widths: Sequence[GroupWidth]) -> ov.Model:
        count = len(widths[0].kept)
        return network(count, weights=turned if count == upside_down else weights)

    judge = Judge(
        workshop=Workshop(
            source=model,
            calibration=data(),
            device=Device.CPU,
            store=store,
            prune=narrowed,
        ),
        yardstick=Ruler(),
        metric=Likeness(),
        budget=AccuracyBudget(max_drop=max_drop),
        data=data().subset(range(24)),
        reference=predict(model, data().subset(range(24)), properties=F32),
        seed=0,
        store=store,
    )
    judge.judge_anchors({"float": [FLOAT]})
    return judge


def found_by(judge: Judge, widths: Mapping[float, int]) -> SearchResult:
    """A search that knows a narrower model for each of these shares of the time."""

    def beyond(share: float) -> tuple[CompressionPlan, ...]:
        return tuple(pruned(kept) for least, kept in widths.items() if share >= least)[:1]

    return SearchResult(trials=tuple(judge.trials), damages={}, gains_us={}, reasons=("searched",), beyond=beyond)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    import_nncf()  # whose seconds are not the stage's
    monkeypatch.setattr(stage, "STAGE_S", 12.0)
    monkeypatch.setattr(stage, "BUILDING_SHARE", 0.9)
    monkeypatch.setattr(stage, "_STEP_QUANTUM", 10)
    monkeypatch.setattr(stage, "_LEAST_STEPS", 10)
    monkeypatch.setattr(stage, "_FAIR_STEPS", 10)


def test_faster_candidates_are_trained_in_rounds_and_may_win(tmp_path: Path) -> None:
    judge = judge_in(tmp_path, max_drop=0.1)
    said: list[str] = []
    result = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), StageOptions(), say=said.append)
    trained = [t for t in result.trials if t.plan.distillation is not None]
    first_round = [t for t in trained if t.plan.distillation is not None and len(t.plan.distillation.runs) == 1]
    kept = [len(t.plan.widths[0].kept) for t in first_round]
    damages = {n: judge.damage(pruned(n), lambda n=n: judge.workshop.build(pruned(n))) for n in (4, 6)}  # type: ignore[misc]
    assert kept and kept == sorted(damages, key=lambda n: damages[n])[: len(kept)], "the least damaged first"
    assert all(t.plan.title.startswith("distilled pruned int8") for t in trained)
    longer = [t for t in trained if t not in first_round]
    for trial in longer:  # a further run goes on where a shorter one ended, and only where that was not enough
        runs = trial.plan.distillation.runs if trial.plan.distillation else ()
        before = next(t for t in trained if t.plan.distillation and t.plan.distillation.runs == runs[:-1]
                      and t.plan.widths == trial.plan.widths)
        assert before.drop_high is not None and before.drop_high > 0.1, "it was not safely inside"
        assert trial.drop is not None and before.drop is not None and trial.drop < before.drop + 0.02
    rounds = [line for line in said if line.startswith("round ")]
    ends = said.index(rounds[1]) if len(rounds) > 1 else len(said)
    ran = [line for line in said[said.index(rounds[0]) : ends] if line.endswith("ms before training")]
    assert ran and rounds[0].startswith(f"round 1: {len(ran)} candidates"), "as many as there is time for"
    assert said.index(rounds[0]) > max(n for n, line in enumerate(said) if line.startswith("building "))
    assert result.reasons[0] == "searched" and "distillation" in result.reasons[-1]
    assert any("held back" in line for line in said)
    assert list(judge.store.folder.glob("distilled-cpu-*.xml"))
    assert not list(judge.store.folder.glob("*.pt"))


def test_what_training_brought_inside_is_the_start_for_faster_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 30.0)  # a round of several candidates takes but a quarter of it
    judge = judge_in(tmp_path, max_drop=2.0)  # whatever is trained is inside
    known = {0.85: 8, 0.75: 7, 0.5: 6, 0.0: 4}
    result = distill_beyond(judge, found_by(judge, known), StageOptions(), say=lambda text: None)
    trained = [len(t.plan.widths[0].kept) for t in result.trials if t.plan.distillation is not None]
    assert trained[-1] == 4, "predicted to be faster than all others, and looked at behind them"
    assert len(trained) > 1 and set(trained[:-1]) <= {8, 7, 6}


def runner(
    kept: int, drop: float | None = None, *, is_spent: bool = False, is_trained: bool = True
) -> Runner:
    """One that takes a millisecond for every kept channel, by its drop; None: neither trained nor judged yet."""
    trial, plan = None, pruned(kept)
    if drop is not None:
        state = TrialState.COMPLETE if drop <= 0.01 else TrialState.OVER_BUDGET
        plan = serde.replace(plan, distillation=DistillationPlan(runs=(10,))) if is_trained else plan
        trial = Trial(number=0, plan=plan, state=state, target="ruler:CPU", drop=drop, drop_high=drop + 0.008)
    return Runner(plan=plan, latency_ms=float(kept), damage=1 / kept, trial=trial, is_spent=is_spent)


@pytest.mark.parametrize(
    ("runners", "order"),
    [
        ([runner(6), runner(4), runner(5)], [6, 5, 4]),  # nothing is known but what they damage
        ([runner(6, 0.03), runner(4, 0.05), runner(5, 0.02)], [5, 6, 4]),  # the nearest first
        ([runner(6, 0.006), runner(4, 0.05), runner(5, 0.02)], [5, 4, 6]),  # what is inside already can wait
        ([runner(6, 0.006), runner(5, 0.008)], [5, 6]),  # and behind the fastest of its kind
        ([runner(5, 0.008), runner(6, 0.02)], [5, 6]),  # no faster than what is inside: in case that is refused
        ([runner(5, 0.001), runner(6, 0.02)], []),  # which a safe one will not be
        ([runner(6, 0.03, is_spent=True), runner(4, 0.05)], [4, 6]),
        ([runner(5), runner(6, 0.006, is_trained=False)], [6, 5]),  # a result in hand is made safe before anything
        ([runner(5), runner(6, 0.001, is_trained=False)], [5]),
    ],
)
def test_what_would_be_the_fastest_inside_is_trained_first(runners: list[Runner], order: list[int]) -> None:
    assert [each.latency_ms for each in worth_a_run(runners, 0.01)] == order
    fresh = [each for each in runners if not each.is_spent]
    assert worth_a_run(runners, 0.01, only_fresh=True) == worth_a_run(fresh, 0.01)


@pytest.mark.parametrize("is_near", [True, False], ids=["near the budget", "far inside"])
def test_the_best_of_the_search_is_made_safe_where_it_is_near_the_budget(tmp_path: Path, is_near: bool) -> None:
    probe = judge_in(tmp_path / "probe", max_drop=2.0)
    drop = probe.judge(pruned(8)).drop
    assert drop is not None and drop > 0
    judge = judge_in(tmp_path, max_drop=1.1 * drop if is_near else 10 * drop)
    judge.judge(pruned(8))
    result = distill_beyond(judge, found_by(judge, {}), StageOptions(), say=lambda text: None)
    trained = [t for t in result.trials if t.plan.distillation is not None]
    if not is_near:
        assert not trained and result.reasons[-1].startswith("nothing was distilled")
        return
    assert {len(t.plan.widths[0].kept) for t in trained} == {8}
    assert min(t.drop for t in trained if t.drop is not None) < drop
    assert "made nothing faster, but may have made the best safer" in result.reasons[-1]
    assert f"{drop:+.4f} without training" in result.reasons[-1]


def test_what_training_brings_nothing_is_not_trained_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 300.0)

    def idle(student: ov.Model, school: object, plan: DistillationPlan, run: object) -> Distilled:
        took = {"seconds": 0.01, "looking_s": 0.0}
        outcome = Outcome(
            steps=plan.runs[-1], best_step=0, first_loss=1.0, best_loss=1.0, reason="done", **took
        )
        return Distilled(
            model=student, plan=plan, before=1.0, after=1.0, is_better=False, reason="as it was", outcome=outcome
        )

    monkeypatch.setattr("vinoopt.distillation.distiller.train", idle)
    judge = judge_in(tmp_path, max_drop=0.0)
    started = time.monotonic()
    result = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), StageOptions(), say=lambda text: None)
    assert time.monotonic() - started < 200
    trained = [len(t.plan.widths[0].kept) for t in result.trials if t.plan.distillation is not None]
    assert trained and max(map(trained.count, trained)) <= len(stage.RUNG_SHARES)


class Stubborn(Likeness):
    """Thinks every compressed model as bad as any other."""

    name = "stubborn"

    def statistic(self, outputs: Mapping[str, Any], label: object, reference: Mapping[str, Any] | None) -> float:
        return float(super().statistic(outputs, label, reference) > 0.9999)


def test_what_comes_nearer_is_trained_on_though_no_decision_has_changed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 30.0)
    monkeypatch.setattr(stage, "_MOST_STEPS", 20)
    judge = judge_in(tmp_path, max_drop=0.0)
    judge.metric = Stubborn()
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)
    trained = [t for t in result.trials if t.plan.distillation is not None]
    runs = [t.plan.distillation.runs for t in trained if t.plan.distillation is not None]
    assert len({trial.drop for trial in trained}) == 1
    assert runs[:3] == [(20,), (20, 20), (20, 20, 20)]


def test_a_stage_that_breaks_off_leaves_the_search_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> float:
        raise RuntimeError("a library is missing")

    monkeypatch.setattr("vinoopt.distillation.distiller.cost_of", broken)
    judge = judge_in(tmp_path, max_drop=0.1)
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)
    assert [t.plan for t in result.trials] == [FLOAT]
    assert result.reasons[-1] == "distillation broke off: RuntimeError: a library is missing"


def test_what_is_slower_and_more_damaged_than_another_is_not_trained(tmp_path: Path) -> None:
    judge = judge_in(tmp_path, max_drop=0.0, upside_down=6)
    result = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), StageOptions(), say=lambda text: None)
    trained = {len(t.plan.widths[0].kept) for t in result.trials if t.plan.distillation is not None}
    assert trained == {4}


def test_what_was_trained_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_in(tmp_path, max_drop=0.0)
    first = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), StageOptions(), say=lambda text: None)
    assert any(trial.plan.distillation is not None for trial in first.trials)

    def never(*arguments: Any) -> Any:
        raise DistillationError("trained again")

    monkeypatch.setattr("vinoopt.distillation.distiller.train", never)
    again = judge_in(tmp_path, max_drop=0.0)
    again.resume()
    second = distill_beyond(again, found_by(again, {0.85: 6, 0.0: 4}), StageOptions(), say=lambda text: None)
    same = second.trials[: len(first.trials)]
    assert [(t.plan, t.state) for t in same] == [(t.plan, t.state) for t in first.trials]


def test_of_an_earlier_session_what_the_options_allow_is_taken_over_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 6.0)
    judge = judge_in(tmp_path, max_drop=0.0)
    distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)

    def taken(options: StageOptions, **how: Any) -> list[Trial]:
        again = judge_in(tmp_path, max_drop=0.0)
        again.resume()
        found = replace(found_by(again, {}), **how)  # this time nothing beyond the budget is known
        result = distill_beyond(again, found, options, say=lambda text: None)
        return [trial for trial in result.trials if trial.plan.distillation is not None]

    trained = [trial.plan for trial in judge.trials if trial.plan.distillation is not None]
    assert trained
    assert [trial.plan for trial in taken(StageOptions())] == trained
    assert [trial.plan for trial in taken(StageOptions(), is_interrupted=True)] == trained
    assert not taken(StageOptions(allows=lambda plan: not plan.widths))
    monkeypatch.setattr(judge.workshop, "distill", None)
    assert judge.workshop.build(trained[0]), "the store has it, and nothing needs to train"


def test_one_that_cannot_be_trained_does_not_stand_in_the_way_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 6.0)
    asked: list[object] = []

    def picky(student: ov.Model, *arguments: Any) -> Cost:
        asked.append(student)
        if len(asked) == 1:
            raise DistillationError("its outputs are not finite")
        return Cost(setup_s=0.5, step_s=0.01)

    monkeypatch.setattr("vinoopt.distillation.distiller.cost_of", picky)
    judge = judge_in(tmp_path, max_drop=0.0)
    result = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), StageOptions(), say=lambda text: None)
    assert any(trial.plan.distillation is not None for trial in result.trials)
    assert any("was not distilled: its outputs are not finite" in reason for reason in result.reasons)


def test_what_training_makes_worse_is_judged_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 6.0)
    drop = judge_in(tmp_path / "probe", max_drop=2.0).judge(pruned(4)).drop
    assert drop is not None
    monkeypatch.setattr(stage, "PRUNED_RATE", 30.0)
    judge = judge_in(tmp_path, max_drop=1.1 * drop)
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)
    plain = [trial for trial in result.trials if trial.plan == pruned(4)]
    assert plain and plain[0].state is TrialState.COMPLETE
    assert result.reasons[-1].startswith("before it was trained")


def test_a_model_that_cannot_be_trained_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> float:
        raise DistillationError("no rule to train through operator Loop ('l')")

    monkeypatch.setattr("vinoopt.distillation.distiller.cost_of", refuse)
    judge = judge_in(tmp_path, max_drop=0.1)
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)
    assert [t.plan for t in result.trials] == [FLOAT]
    assert "operator Loop" in result.reasons[-1]


def test_nothing_beyond_the_budget_is_said(tmp_path: Path) -> None:
    judge = judge_in(tmp_path, max_drop=0.1)
    result = distill_beyond(judge, found_by(judge, {}), StageOptions(), say=lambda text: None)
    assert result.reasons[-1].startswith("nothing was distilled")


def test_the_deadline_ends_the_stage(tmp_path: Path) -> None:
    judge = judge_in(tmp_path, max_drop=0.0)
    started = time.monotonic()
    options = StageOptions(deadline=started + 14.0)
    result = distill_beyond(judge, found_by(judge, {0.85: 6, 0.0: 4}), options, say=lambda text: None)
    assert time.monotonic() - started < 20
    assert result.reasons[-1] != "searched"


def test_a_run_that_time_cuts_counts_for_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeful(*args: Any) -> Cost:
        cost = cost_of(*args)
        return replace(cost, step_s=cost.step_s / 4)

    monkeypatch.setattr(stage, "_PATIENCE", 0.3)
    monkeypatch.setattr("vinoopt.distillation.distiller.cost_of", hopeful)
    monkeypatch.setattr("vinoopt.distillation.training._PATIENT", 2.0)  # nothing but time ends a run early
    judge = judge_in(tmp_path, max_drop=0.0)
    options = StageOptions(deadline=time.monotonic() + 16.0)
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), options, say=lambda text: None)
    runs = [t.plan.distillation.runs for t in result.trials if t.plan.distillation is not None]
    rounds = [json.loads(path.read_text()) for path in judge.store.folder.glob("distillation-round-*.json")]
    planned = {steps for _, steps in rounds}
    assert runs and any(each[-1] not in planned for each in runs)
    assert list(judge.store.folder.glob("distillation-*.pt")), "to be taken up by a search that has more time"
    stored = list(judge.store.folder.glob("distilled-cpu-*.xml"))
    assert len(stored) == len(runs), "nothing is kept under the plan that was not carried out"


def test_candidates_are_not_built_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 6.0)
    monkeypatch.setattr(stage, "BUILDING_SHARE", 0.0)
    judge = judge_in(tmp_path, max_drop=0.0)
    plans = tuple(pruned(kept) for kept in (7, 6, 5))
    found = SearchResult(
        trials=tuple(judge.trials), damages={}, gains_us={}, reasons=(), beyond=lambda share: plans
    )
    said: list[str] = []
    result = distill_beyond(judge, found, StageOptions(), say=said.append)
    assert sum(line.startswith("building ") for line in said) == 1
    assert any("2 candidates for distillation were not built" in reason for reason in result.reasons)


class LateRuler(Ruler):
    """One for which everything trained takes longer than was measured before."""

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        found = super().measure(plan, model)
        late = 101.0 if plan.distillation is not None else found.latency_p50_ms
        return found.model_copy(update={"latency_p50_ms": late})


def test_what_is_no_faster_in_the_end_has_bought_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 6.0)
    judge = judge_in(tmp_path, max_drop=9.0)
    judge.yardstick = LateRuler()
    result = distill_beyond(judge, found_by(judge, {0.0: 4}), StageOptions(), say=lambda text: None)
    assert "bought nothing" in result.reasons[-1] and "0.99x" in result.reasons[-1]


def compile_demo(folder: Path, count: int, **options: Any) -> vinoopt.Bundle:
    files = demo_files()
    with np.load(files.data) as digits:
        images, labels = digits["images"][:count], digits["labels"][:count]
    return vinoopt.compile(
        files.model,
        data=images,
        labels=labels,
        preprocess=read_preprocess(files.preprocess),
        effort="distill",
        tune=False,
        output=folder / "out",
        **options,
    )


def test_what_cannot_be_trained_is_told_and_nothing_else_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))
    (result,) = compile_demo(tmp_path, 40, quantize=False, prune=False).manifest.targets
    assert any(reason.startswith("nothing was distilled: 12 inputs are too few") for reason in result.reasons)


@pytest.mark.slow
def test_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STAGE_S", 20.0)
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))
    bundle = compile_demo(tmp_path, 700, budget=AccuracyBudget(metric="agreement", max_drop=0.002))
    (result,) = bundle.manifest.targets
    if any("was faster when timed" in reason for reason in result.reasons):
        pytest.skip("on this machine, at this time, no narrower model was faster than plain INT8")
    assert any("distill" in reason for reason in result.reasons)
    assert result.budget_met
    trials = (bundle.path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [json.loads(line) for line in trials if json.loads(line)["plan"]["distillation"]]
    assert trained and all(sum(trial["plan"]["distillation"]["runs"]) for trial in trained)
    report = (bundle.path / "report.html").read_text(encoding="utf-8")
    assert "distilled" in report
