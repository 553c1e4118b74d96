"""What is said about the choice: why blocks stay float, what was seen and what is expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import numpy as np
import openvino as ov
import pytest

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.accuracy.evaluate import Predictions
from vinoopt.accuracy.metrics import find_metric
from vinoopt.compression.judge import Judge
from vinoopt.compression.search import SearchResult
from vinoopt.records import (
    AccuracyBudget,
    CompressionPlan,
    Device,
    DeviceSpec,
    DistillationPlan,
    Evidence,
    Measurement,
    Precision,
    QuantizationPlan,
    Target,
    TensorSpec,
    Trial,
    TrialState,
)
from vinoopt.selection import FLOAT as FLOAT_NAME
from vinoopt.selection import PLAIN_INT8, Choice, TestPart, choose, float_blocks, trial_line
from vinoopt.yardsticks import TargetYardstick
from vinoopt.yardsticks.modelled import ModelledBench

FOUND = SearchResult(
    trials=(),
    damages={"head": 0.9, "stem": 0.1, "odd": math.inf},
    gains_us={"head": 5.0, "stem": 2.0, "thin": -3.0, "odd": 1.0},
    reasons=(),
    refused=frozenset({"tail"}),
)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine", "left alone as was asked"),
        ("tail", "the target's compiler refuses it in INT8"),
        ("head", "damage 0.9 (90% of all blocks) in INT8; INT8 would save 5.0 us"),
        ("thin", "INT8 would cost 3.0 us"),
        ("odd", "its damage in INT8 is not known: it does not run, or time was up; INT8 would save 1.0 us"),
        ("new", "the search did not look at it"),
    ],
)
def test_every_float_block_says_why(name: str, reason: str) -> None:
    plan = CompressionPlan(quantization=QuantizationPlan(float_layers=(name, "stem")))
    blocks = {block.name: block for block in float_blocks(plan, FOUND, ignored=("mine",))}
    assert blocks[name].reason == reason
    assert set(blocks) == {name, "stem"}


def test_the_most_damaging_comes_first_and_a_float_model_has_none() -> None:
    plan = CompressionPlan(quantization=QuantizationPlan(float_layers=("stem", "thin", "head")))
    assert [block.name for block in float_blocks(plan, FOUND, ignored=())] == ["head", "stem", "thin"]
    assert float_blocks(CompressionPlan(), FOUND, ignored=()) == ()


def trial(**fields: object) -> Trial:
    plan = CompressionPlan(quantization=QuantizationPlan())
    return Trial(**{"number": 3, "plan": plan, "target": "host:CPU", "state": TrialState.COMPLETE, **fields})


def test_a_trial_tells_what_was_seen_and_what_is_expected() -> None:
    assert trial_line(trial(drop=0.0197, expected_drop=0.0066)) == "#3 int8: drop +0.0197, expected +0.0066"
    assert trial_line(trial(drop=0.0, expected_drop=0.0)) == "#3 int8: drop +0.0000"
    over = trial(drop=0.05, expected_drop=0.03, state=TrialState.OVER_BUDGET)
    assert trial_line(over) == "#3 int8: drop +0.0500, expected +0.0300, over budget"
    timed = Measurement(name="int8", device="CPU", evidence=Evidence.MEASURED, latency_p50_ms=2.0)
    slower = trial(state=TrialState.SLOWER, latency=timed)
    assert trial_line(slower) == "#3 int8: not faster than what is known, so not judged: 2 ms (measured)"


# --------------------------------------------------------------------------- what is chosen

SAMPLES = 1000
SCORES = TensorSpec(name="y", shape=(1, 2), dtype="float32")
PICTURE = TensorSpec(name="x", shape=(1, 1), dtype="float32")
NOTHING = ov.Model([], [])
FLOAT, INT8 = CompressionPlan(), CompressionPlan(quantization=QuantizationPlan())


def mixed(*floats: str) -> CompressionPlan:
    return CompressionPlan(quantization=QuantizationPlan(float_layers=floats))


@dataclass(kw_only=True)
class World:
    """A target with made-up plans: what each takes in milliseconds, and loses of top-1 on either part."""

    plans: Mapping[CompressionPlan, tuple[float, float, float]]
    judged: list[CompressionPlan] = field(default_factory=list)
    """On the test part."""
    broken: str = ""
    """A contestant that cannot be measured."""

    target = Target(profile="made-up", device=Device.CPU)
    spec = cast(DeviceSpec, SimpleNamespace(kind=Device.CPU))
    float_precisions = (Precision.F32,)
    arithmetic, notes = "made up", ()

    def predict(self, plan: CompressionPlan, model: object, data: Dataset) -> Predictions:
        self.judged.append(plan)
        return decisions(self.plans[plan][2])

    def compare(self, candidates: Mapping[str, tuple[CompressionPlan, object, object]]) -> ModelledBench:
        if self.broken in candidates:
            raise RuntimeError("out of memory")
        times = {name: self.plans[plan][0] for name, (plan, *_) in candidates.items()}
        return ModelledBench(measurements=tuple(timed(name, ms) for name, ms in times.items()))

    def check(self, plan: CompressionPlan, model: object) -> None:
        pass

    def chosen(self, **options: bool) -> Choice:
        """What comes out of a search that has judged all plans."""
        labels = np.ones(SAMPLES, np.int64)
        dataset = from_arrays(np.zeros((SAMPLES, 1), np.float32), inputs=(PICTURE,), labels=labels)
        trials = [self._trial(number, plan) for number, plan in enumerate(self.plans)]
        judge = SimpleNamespace(
            workshop=SimpleNamespace(build=lambda plan: plan, ignored=(), source=NOTHING),
            metric=find_metric("top1", outputs=(SCORES,), has_labels=True),
            budget=AccuracyBudget(metric="top1", max_drop=0.01),
            data=dataset,
            seed=0,
        )
        return choose(
            cast(Judge, judge),
            cast(TargetYardstick, self),
            SearchResult(trials=tuple(trials), damages={}, gains_us={}, reasons=()),
            TestPart(data=dataset, reference=decisions(0.0)),
            say=lambda text: None,
            **options,
        )

    def _trial(self, number: int, plan: CompressionPlan) -> Trial:
        ms, drop, _ = self.plans[plan]
        state = TrialState.COMPLETE if drop <= 0.01 else TrialState.OVER_BUDGET
        note = PLAIN_INT8 if plan == INT8 else ""
        return Trial(
            number=number, plan=plan, state=state, target=str(self.target), drop=drop, expected_drop=drop,
            latency=timed("", ms), note=note,
        )  # fmt: skip


def timed(name: str, ms: float) -> Measurement:
    return Measurement(name=name, device="none", evidence=Evidence.MODELLED, latency_p50_ms=ms)


def decisions(drop: float) -> Predictions:
    """Outputs for samples of class 1, of which a share is taken for class 0."""
    wrong = round(drop * SAMPLES)
    found = Predictions()
    for number in range(SAMPLES):
        found.append({"y": np.array([[number < wrong, number >= wrong]], np.float32)})
    return found


FAST, SAFE, TWIN = mixed("a"), mixed("a", "b"), mixed("c")


@pytest.mark.parametrize("options", [{}, {"is_late": True}], ids=["in time", "late"])
def test_what_the_test_part_refuses_gives_way_to_a_safer_candidate(options: dict[str, bool]) -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), INT8: (1.0, 0.03, 0.03), FAST: (1.5, 0.009, 0.02), SAFE: (2.0, 0.004, 0.006)}
    choice = World(plans=plans).chosen(**options)
    assert choice.plan == SAFE
    assert choice.budget_met
    assert choice.drop.value == pytest.approx(0.006)
    assert any("stepped back along the frontier" in reason for reason in choice.reasons)


def test_one_of_the_same_kind_is_not_asked_about_until_chance_lets_it_pass() -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), FAST: (1.5, 0.008, 0.02), TWIN: (1.6, 0.009, 0.0), SAFE: (2.0, 0.004, 0.006)}
    world = World(plans=plans)
    assert world.chosen().plan == SAFE
    assert TWIN not in world.judged


def test_one_that_the_search_part_flattered_does_not_rule_out_all_others() -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), FAST: (1.5, -0.001, 0.02), TWIN: (1.6, 0.008, 0.0), SAFE: (2.0, 0.003, 0.006)}
    world = World(plans=plans)
    assert world.chosen().plan == SAFE, "safer than 0.95% over both parts together, halved"
    assert TWIN not in world.judged


def test_another_format_of_the_float_model_is_asked_about_whatever_was_refused() -> None:
    half = CompressionPlan(float_precision=Precision.BF16)
    plans = {FLOAT: (4.0, 0.0, 0.0), FAST: (1.5, -0.001, 0.02), TWIN: (1.8, 0.005, 0.0), half: (2.0, 0.003, 0.004)}
    choice = World(plans=plans).chosen()
    assert choice.plan == half and choice.budget_met


def test_of_those_that_differ_in_training_alone_the_safest_is_asked_about() -> None:
    trained = serde.replace(FAST, distillation=DistillationPlan(runs=(50,)))
    longer = serde.replace(FAST, distillation=DistillationPlan(runs=(50, 100)))
    plans = {
        FLOAT: (4.0, 0.0, 0.0),
        FAST: (1.4, 0.009, 0.0),
        trained: (1.5, 0.007, 0.0),
        longer: (1.6, 0.003, 0.0),
    }
    world = World(plans=plans)
    assert world.chosen().plan == longer, "its time is the others' but for noise"
    assert FAST not in world.judged and trained not in world.judged


@pytest.mark.parametrize("broken", [FLOAT_NAME, PLAIN_INT8])
def test_a_baseline_that_cannot_be_measured_does_not_take_the_result_with_it(broken: str) -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), INT8: (1.0, 0.03, 0.03), FAST: (1.5, 0.004, 0.004)}
    choice = World(plans=plans, broken=broken).chosen()
    assert choice.plan == FAST
    assert broken not in {each.reference for each in choice.comparisons}
    assert any("was not measured beside the result: RuntimeError: out of memory" in r for r in choice.reasons)


def test_plain_int8_takes_the_place_of_a_candidate_that_is_slower() -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), INT8: (1.0, 0.012, 0.002), FAST: (1.5, 0.004, 0.004)}
    choice = World(plans=plans).chosen()
    assert choice.plan == INT8, "0.7% over both parts together"
    assert any("was not faster than int8" in reason for reason in choice.reasons)


def test_plain_int8_that_one_part_lets_pass_by_chance_does_not() -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), INT8: (1.0, 0.018, 0.009), FAST: (1.5, 0.004, 0.004)}
    assert World(plans=plans).chosen().plan == FAST


def test_float_is_the_result_where_it_is_fastest_and_nothing_was_over_budget() -> None:
    plans = {FLOAT: (1.0, 0.0, 0.0), INT8: (2.0, 0.0, 0.0), FAST: (1.5, 0.0, 0.0)}
    world = World(plans=plans)
    choice = world.chosen()
    assert choice.plan == FLOAT
    assert choice.budget_met
    assert FAST not in world.judged, "one that is inside is enough to know"


def test_float_is_the_last_resort_where_all_others_are_over_budget() -> None:
    plans = {FLOAT: (4.0, 0.0, 0.0), INT8: (1.0, 0.03, 0.03), FAST: (1.5, 0.009, 0.02)}
    choice = World(plans=plans).chosen()
    assert choice.plan == FLOAT
    assert not choice.budget_met
