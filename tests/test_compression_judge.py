"""What the judge spares itself, what it takes over from an earlier run, and what it does with accidents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.accuracy.metrics import Metric, find_metric
from vinoopt.compression.build import Workshop
from vinoopt.compression.judge import Judge, Shared
from vinoopt.compression.options import SearchOptions
from vinoopt.compression.quantize import _translated
from vinoopt.compression.search import search
from vinoopt.compression.weight_search import LEAST_BYTES, search_weights, weigh
from vinoopt.errors import CompressionError, DeviceError
from vinoopt.records import (
    AccuracyBudget,
    CompressionPlan,
    Device,
    Evidence,
    Measurement,
    Precision,
    QuantizationPlan,
    Target,
    TensorSpec,
    Trial,
    TrialState,
    WeightCompressionPlan,
)
from vinoopt.store import Store

SPEC = TensorSpec(name="x", shape=(1, 3, 8, 8), dtype="float32")
RNG = np.random.default_rng(0)
DATA = from_arrays(RNG.normal(size=(24, 3, 8, 8)).astype(np.float32), inputs=[SPEC])
FLOAT, INT8 = CompressionPlan(), CompressionPlan(quantization=QuantizationPlan())
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Closeness:
    """The share of samples whose outputs are near the float model's; made at a prompt, so without a repr."""

    name, unit = "closeness", "share"
    higher_is_better, needs_labels, needs_reference, is_mean = True, False, True, True

    def __init__(self, near: float = 0.5) -> None:
        self.near = near

    def statistic(self, outputs: Mapping[str, Any], label: object, reference: Mapping[str, Any]) -> float:
        return float(all(np.abs(outputs[k] - reference[k]).max() < self.near for k in reference))

    def value(self, statistics: Sequence[float]) -> float:
        return float(np.mean(statistics))


def small() -> ov.Model:
    x = ops.parameter([1, 3, 8, 8], np.float32, name="x")
    x.output(0).set_names({"x"})
    rng = np.random.default_rng(1)

    def conv(data: ov.Node, outputs: int, inputs: int, name: str) -> ov.Node:
        weights = ops.constant(rng.normal(size=(outputs, inputs, 3, 3), scale=0.2).astype(np.float32))
        return ops.convolution(data, weights, [1, 1], [1, 1], [1, 1], [1, 1], name=name)

    y = ops.relu(conv(x, 16, 3, "first"))
    for number in range(3):
        y = ops.relu(conv(y, 16, 16, f"inner{number}"))
    y = ops.reduce_mean(y, ops.constant([2, 3]), keep_dims=False)
    y.output(0).set_names({"y"})
    return ov.Model([y], [x], "small")


class Ruler:
    """A target with made-up times: `unit` tells sessions apart, float blocks cost what `float_ms` says."""

    target = Target(profile="made-up", device=Device.CPU)
    float_precisions = (Precision.F32,)
    arithmetic = "f32"

    def __init__(self, *, unit: float = 1.0, float_ms: float = 0.1) -> None:
        self.unit, self.float_ms = unit, float_ms
        self.timed: list[CompressionPlan] = []
        self.run: list[tuple[CompressionPlan, int]] = []

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        self.timed.append(plan)
        floats = 4 if plan.quantization is None else len(plan.quantization.float_layers)
        ms = self.unit * (1.0 + self.float_ms * floats)
        return Measurement(name=plan.title, device="none", evidence=Evidence.MODELLED, latency_p50_ms=ms)

    def measure_together(self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]) -> tuple[Measurement, ...]:
        return tuple(self.measure(plan, model) for plan, model in candidates)

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        self.run.append((plan, len(data)))
        return predict(model, data, properties=F32)

    def block_times(self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]) -> Mapping[str, float]:
        self.timed.append(plan)
        return dict.fromkeys(blocks, 1.0 + 1e3 * self.float_ms * (plan.quantization is None))


@pytest.fixture(scope="module")
def model() -> ov.Model:
    return small()


@pytest.fixture(scope="module")
def reference(model: ov.Model) -> Predictions:
    return predict(model, DATA, properties=F32)


def judge_of(
    model: ov.Model, reference: Predictions, folder: Path, ruler: Ruler, *, near: float = 0.5, max_drop: float = 0.1
) -> Judge:
    store = Store.open("judge", root=folder)
    metric: Metric = Closeness(near)
    return Judge(
        workshop=Workshop(source=model, calibration=DATA, device=Device.CPU, store=store),
        yardstick=ruler,
        metric=metric,
        budget=AccuracyBudget(max_drop=max_drop),
        data=DATA,
        reference=reference,
        seed=0,
        store=store,
    )


def with_floats(*names: str) -> CompressionPlan:
    return CompressionPlan(quantization=QuantizationPlan(float_layers=tuple(sorted(names))))


# --------------------------------------------------------------------------- what is spared


def test_where_timing_is_cheaper_a_slower_candidate_is_not_run(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, ruler := Ruler())
    judge.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    judge.spent.accuracy_s, judge.spent.timing_s = 1.0, 0.1
    trial = judge.judge(with_floats("inner1"), beat_ms=1.0)
    assert trial.state is TrialState.SLOWER
    assert trial.drop is None
    assert trial.latency is not None
    assert trial.plan not in [plan for plan, _ in ruler.run]
    # Something else is the best now, or nothing is: it is judged after all.
    again = judge.judge(with_floats("inner1"), beat_ms=2.0)
    assert again.state is TrialState.COMPLETE
    assert again.drop is not None
    assert again.latency is not None


def test_where_running_is_cheaper_accuracy_comes_first(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler())
    judge.judge_anchors({"float": [FLOAT]})
    judge.spent.accuracy_s, judge.spent.timing_s = 0.1, 1.0
    assert judge.judge(with_floats("inner1"), beat_ms=1.0).drop is not None


class NoVnni(Ruler):
    """INT8 takes twice as long as float in the blocks `slow`, and half as long elsewhere; conversions cost `change`.

    Times are in microseconds.
    """

    def __init__(self, *slow: str, change: float = 0.0) -> None:
        super().__init__()
        self.slow, self.change = slow, change
        self.blocks = ["first", "inner0", "inner1", "inner2"]

    def _us(self, plan: CompressionPlan, name: str) -> float:
        is_float = plan.quantization is None or name in plan.quantization.float_layers
        return 100.0 if is_float else 200.0 if name in self.slow else 50.0

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        self.timed.append(plan)
        floats = self.blocks if plan.quantization is None else plan.quantization.float_layers
        changes = sum((a in floats) != (b in floats) for a, b in zip(self.blocks, self.blocks[1:], strict=False))
        us = sum(self._us(plan, name) for name in self.blocks) + changes * self.change
        return Measurement(name=plan.title, device="none", evidence=Evidence.MODELLED, latency_p50_ms=us / 1e3)

    def block_times(self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]) -> Mapping[str, float]:
        return {name: self._us(plan, name) for name in blocks}


def fastest(judge: Judge) -> tuple[Trial, tuple[str, ...]]:
    found = search(judge, options(effort="fast"), say=lambda text: None)
    return found.candidates[0], found.reasons


def test_blocks_that_int8_makes_slower_stay_float(model: ov.Model, reference: Predictions, tmp_path: Path) -> None:
    best, reasons = fastest(judge_of(model, reference, tmp_path, NoVnni("first", "inner0")))
    assert best.plan == with_floats("first", "inner0")
    assert any("2 of 4 blocks are not faster in INT8" in reason for reason in reasons)


def test_a_slower_block_stays_int8_where_conversions_cost_more(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, NoVnni("inner1", change=80.0))
    best, reasons = fastest(judge)
    assert best.plan == INT8
    assert any("would cost more in conversions" in reason for reason in reasons)
    assert not judge.knows(with_floats("inner1"))


def test_where_int8_is_slower_throughout_the_float_model_is_the_fastest(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    best, _ = fastest(judge_of(model, reference, tmp_path, NoVnni("first", "inner0", "inner1", "inner2")))
    assert best.plan == FLOAT


def test_a_tighter_budget_gives_a_slower_and_milder_point(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    times, floats = [], []
    for number, near in enumerate((0.5, 0.1, 0.07, 0.02)):
        judge = judge_of(model, reference, tmp_path / str(number), NoVnni(), near=near, max_drop=0.0)
        best, _ = fastest(judge)
        assert best.latency is not None
        times.append(best.latency.latency_p50_ms)
        floats.append(4 if best.plan.quantization is None else len(best.plan.quantization.float_layers))
    assert times == sorted(times)
    assert floats[0] == 0
    assert floats[-1] == 4
    assert len(set(floats)) == 4


class Choosy(Ruler):
    """INT8 outputs are too large by a share that hangs on the recipe."""

    def __init__(self, source: ov.Model) -> None:
        super().__init__()
        self.source = source

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        exact, found = super().predict(plan, self.source, data), Predictions()
        off = 0.0
        if plan.quantization is not None:
            off = 0.5 + 0.2 * (plan.quantization.preset is not None)
            off -= 0.1 * (not plan.quantization.fast_bias_correction)
            off -= 0.2 * (plan.quantization.activation_range == "histogram")
            off -= 0.1 * (plan.quantization.activation_range == "minmax")
        for call in exact:
            found.append({name: value * (1 + off) for name, value in call.items()})
        return found


def test_changes_of_the_recipe_that_help_alone_are_tried_together(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, ruler := Choosy(model), near=0.02, max_drop=0.0)
    found = search(judge, options(effort="thorough"), say=lambda text: None)
    assert any("recipe with" in reason and "accurate bias correction and histogram ranges:" in reason
               for reason in found.reasons)
    recipes = [t.plan.quantization for t in found.trials if t.plan.quantization is not None]
    best = recipes[-1]
    assert (best.fast_bias_correction, best.activation_range, best.preset) == (False, "histogram", None)
    ranges = {p.quantization.activation_range for p, _ in ruler.run if p.quantization is not None}
    assert ranges == {None, "minmax", "histogram"}


def test_a_milder_recipe_takes_the_place_of_plain_int8_that_is_inside(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, Choosy(model), near=10.0)
    found = search(judge, options(), say=lambda text: None)
    assert INT8 in [t.plan for t in found.trials if t.state is TrialState.COMPLETE]
    best = found.candidates[0].plan.quantization
    assert best is not None
    assert (best.fast_bias_correction, best.preset) == (False, None), "what may take time is not tried"
    assert INT8 not in [t.plan for t in found.candidates], "the same kernels are not timed twice"
    tight = judge_of(model, reference, tmp_path / "tight", Choosy(model), near=10.0)
    found = search(tight, options(memory_bytes=1 << 18), say=lambda text: None)
    assert any("bias correction was not tried: it would keep 0.188 MiB" in reason for reason in found.reasons)
    assert all(t.plan.quantization is None or t.plan.quantization.fast_bias_correction for t in found.trials)
    again = judge_of(model, reference, tmp_path / "fast", Choosy(model), near=10.0)
    assert search(again, options(effort="fast"), say=lambda text: None).candidates[0].plan == INT8


def test_what_is_too_big_to_calibrate_has_its_weights_compressed(tmp_path: Path) -> None:
    judge = judge_of_heavy(tmp_path)
    found = search(judge, options(prune=True, memory_bytes=8 << 20), say=lambda text: None)
    assert [t.plan.quantization for t in found.trials] == [None] * len(found.trials)
    assert {t.plan.weights.mode for t in found.trials if t.plan.weights is not None} == {"int8_asym", "int4_asym"}
    assert not any(t.plan.widths for t in found.trials)
    assert "calibration of this model takes 10 MiB or more, and 8 are free" in found.reasons[0]
    other = search(judge, options(memory_bytes=16 << 20), say=lambda text: None)
    assert not any(t.plan.quantization for t in other.trials), "for all targets of a run alike"
    judge.shared = Shared()
    enough = search(judge, options(memory_bytes=16 << 20), say=lambda text: None)
    assert any(t.plan.quantization is not None for t in enough.trials)
    judge.shared = Shared()
    again = search(judge, options(memory_bytes=0), say=lambda text: None)
    assert not any("calibration" in reason for reason in again.reasons), "what was calibrated once is there"


# --------------------------------------------------------------------------- resuming


def options(**given: Any) -> SearchOptions:
    return SearchOptions(**{"base": QuantizationPlan(), "prune": False, "effort": "balanced", **given})


def test_a_resumed_search_repeats_nothing(model: ov.Model, reference: Predictions, tmp_path: Path) -> None:
    # A budget so tight that INT8 is over it: tables, probes and the bisection all take part.
    first = judge_of(model, reference, tmp_path, Ruler(), near=0.02, max_drop=0.0)
    found = search(first, options(), say=lambda text: None)
    assert len(found.trials) > 3
    again = judge_of(model, reference, tmp_path, ruler := Ruler(unit=3.0), near=0.02, max_drop=0.0)
    assert again.resume() == len({t.plan.model_dump_json() for t in found.trials})
    repeated = search(again, options(), say=lambda text: None)
    assert ruler.run == []
    assert ruler.timed == []
    assert [t.plan for t in repeated.trials] == [t.plan for t in found.trials]


def test_what_an_earlier_session_found_is_not_lost_where_this_one_ends_sooner(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    first = judge_of(model, reference, tmp_path, Ruler(), near=10.0)
    first.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    mixed = first.judge(with_floats("inner1"))
    assert mixed.state is TrialState.COMPLETE
    again = judge_of(model, reference, tmp_path, ruler := Ruler(), near=10.0)
    again.resume()
    late = options(deadline=time.monotonic() - 1)
    assert mixed.plan in [t.plan for t in search(again, late, say=lambda text: None).trials]
    assert ruler.run == []
    floats_only = judge_of(model, reference, tmp_path, Ruler(), near=10.0)
    floats_only.resume()
    found = search(floats_only, options(quantize=False), say=lambda text: None)
    assert [t.plan for t in found.trials] == [FLOAT]


def test_one_anchor_that_fails_does_not_have_all_run_again(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    bad = CompressionPlan(quantization=QuantizationPlan(), weights=WeightCompressionPlan(mode="none such"))
    anchors = {"float": [FLOAT], "plain INT8": [INT8, bad]}
    judge_of(model, reference, tmp_path, Ruler()).judge_anchors(anchors)
    again = judge_of(model, reference, tmp_path, ruler := Ruler())
    again.resume()
    again.judge_anchors(anchors)
    assert ruler.run == []
    assert [t.state for t in again.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAILED]


class Deadly(Ruler):
    """Ends the process where INT8 is run, as a crash of native code does."""

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        if plan == INT8:
            os._exit(9)
        return super().predict(plan, model, data)


def session_in(folder: Path) -> Judge:
    """Of a target that INT8 is deadly to, going on where an earlier one was ended."""
    float_model = small()
    judge = judge_of(float_model, predict(float_model, DATA, properties=F32), folder, Deadly())
    judge.resume()
    return judge


def test_what_ends_the_process_each_time_is_left_out(tmp_path: Path) -> None:
    code = f"import pathlib, {__name__} as t; t.session_in(pathlib.Path({str(tmp_path)!r})).judge(t.INT8)"
    for _ in range(2):  # the first could have been the user
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
        assert done.returncode == 9
    judge = session_in(tmp_path)
    trial = judge.judge(INT8)
    assert trial.state is TrialState.FAILED and "the process ended" in str(trial.error)
    assert judge.judge(with_floats("inner1")).state is TrialState.COMPLETE


def test_another_session_times_in_the_first_one_s_unit(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge_of(model, reference, tmp_path, Ruler()).judge_anchors({"float": [FLOAT]})
    later = judge_of(model, reference, tmp_path, Ruler(unit=3.0))
    later.resume()
    trial = later.judge(with_floats("inner1"))
    assert trial.latency is not None
    assert trial.latency.latency_p50_ms == pytest.approx(1.1)


class Wandering(Ruler):
    """Its machine slows down from one timing to the next, whatever is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []
        self.refused: CompressionPlan | None = None

    def measure_together(self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]) -> tuple[Measurement, ...]:
        if self.refused in [plan for plan, _ in candidates]:
            raise DeviceError("out of memory")
        self.together.append(len(candidates))
        self.unit *= 1.3
        found = super().measure_together(candidates)
        return tuple(each.model_copy(update={"evidence": Evidence.MEASURED}) for each in found)


def test_measured_candidates_are_timed_beside_a_baseline_that_stays(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, ruler := Wandering())
    judge.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    trials = [judge.judge(with_floats("inner1")), judge.judge(with_floats("inner1", "inner2"))]
    assert ruler.together == [2, 2, 2]
    times = [t.latency.latency_p50_ms for t in (*judge.trials[:2], *trials) if t.latency is not None]
    assert times == pytest.approx([1.3 * each for each in (1.4, 1.0, 1.1, 1.2)]), "one unit, whatever the pace"


def test_a_baseline_that_cannot_be_timed_again_does_not_take_the_others_with_it(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, ruler := Wandering())
    judge.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    ruler.refused = INT8
    assert judge.judge(with_floats("inner1")).state is TrialState.COMPLETE
    assert ruler.together == [2, 1]


def test_a_metric_of_another_strictness_is_another_metric(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge_of(model, reference, tmp_path, Ruler(), near=0.5).judge(FLOAT)
    assert judge_of(model, reference, tmp_path, Ruler(), near=0.5).resume() == 1
    assert judge_of(model, reference, tmp_path, Ruler(), near=0.1).resume() == 0


def test_a_slow_model_is_probed_on_fewer_samples(model: ov.Model, reference: Predictions, tmp_path: Path) -> None:
    judge = judge_of(model, reference, tmp_path, ruler := Ruler())
    judge.sample_s = 0.05
    judge.damage(INT8, lambda: judge.workshop.build(INT8))
    assert ruler.run == [(INT8, 8)]


def test_damages_are_shared_by_targets_of_any_speed_and_by_later_runs(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler())
    known = judge.damage(INT8, lambda: judge.workshop.build(INT8))
    slow = judge_of(model, reference, tmp_path, ruler := Ruler(unit=40.0))
    slow.sample_s = 0.05
    slow.judge_anchors({"float": [FLOAT]})
    assert slow.damage(INT8, lambda: slow.workshop.build(INT8)) == known
    assert [plan for plan, _ in ruler.run] == [FLOAT]


class TwoOutputs(Ruler):
    """Computes `y` as it should be, and `aside` at random."""

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        self.run.append((plan, len(data)))
        return two_outputs(data, noise=1.0)


def two_outputs(data: Dataset, *, noise: float) -> Predictions:
    rng, found = np.random.default_rng(3), Predictions()
    for sample in data:
        y = sample["x"].reshape(1, -1)[:, :16]
        found.append({"y": y, "aside": y + noise * rng.normal(size=(1, 16)).astype(np.float32)})
    return found


def detector() -> ov.Model:
    """Boxes on a grid and their scores, of which a suppression inside the graph keeps some."""
    net = small()
    features = next(n for n in net.get_ordered_ops() if n.get_friendly_name() == "inner2")
    rng = np.random.default_rng(2)

    def head(outputs: int) -> ov.Node:
        weights = ops.constant(rng.normal(size=(outputs, 16, 1, 1), scale=0.5).astype(np.float32))
        return ops.convolution(features, weights, [1, 1], [0, 0], [0, 0], [1, 1])

    rows, columns = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    corners = np.stack([rows, columns, rows + 1, columns + 1]).astype(np.float32)[None]
    boxes = ops.add(ops.multiply(ops.tanh(head(4)), np.float32(0.2)), ops.constant(corners))
    boxes = ops.transpose(ops.reshape(boxes, [1, 4, 64], False), [0, 2, 1])
    scores = ops.reshape(ops.sigmoid(head(1)), [1, 1, 64], False)
    most, overlap, least = ops.constant(64), ops.constant(np.float32(0.5)), ops.constant(np.float32(0.5))
    kept = ops.non_max_suppression(boxes, scores, most, overlap, least, output_type="i64")
    places = ops.gather(kept.output(0), ops.constant(2), ops.constant(1))
    found = ops.gather(ops.squeeze(boxes, [0]), places, ops.constant(0))
    found.output(0).set_names({"boxes"})
    return ov.Model([found], net.get_parameters(), "detector")


class Count(Closeness):
    """How near the number of boxes is to the float model's."""

    name = "count"

    def statistic(self, outputs: Mapping[str, Any], label: object, reference: Mapping[str, Any]) -> float:
        own, other = len(outputs["boxes"]), len(reference["boxes"])
        return 1 - abs(own - other) / max(own, other, 1)


def test_boxes_behind_a_suppression_have_damages_by_which_blocks_are_told_apart(tmp_path: Path) -> None:
    model = detector()
    reference = predict(model, DATA, properties=F32)
    assert len({call["boxes"].shape for call in reference}) > 1
    judge = judge_of(model, reference, tmp_path, Ruler(), max_drop=0.0)
    judge.metric = Count()
    found = search(judge, options(), say=lambda text: None)
    int8 = judge.damage(INT8, lambda: judge.workshop.build(INT8))
    assert 0 < int8 < np.inf
    assert len(found.damages) >= 4 and all(np.isfinite(each) for each in found.damages.values())
    assert len(set(found.damages.values())) > 1
    assert any(t.plan.quantization is not None and t.plan.quantization.float_layers for t in found.trials)


def test_only_outputs_that_are_judged_count_as_damage(model: ov.Model, tmp_path: Path) -> None:
    outputs = [TensorSpec(name=name, shape=(1, 16), dtype="float32") for name in ("y", "aside")]
    judge = judge_of(model, two_outputs(DATA, noise=0.0), tmp_path, ruler := TwoOutputs())
    damages = []
    for name, options in (("top1", {"output": "y"}), ("cosine", {"output": "y"}), ("cosine", {})):
        judge.metric = find_metric(name, outputs=outputs, has_labels=True, options=options)
        damages.append(judge.damage(INT8, lambda: model))
    assert damages[:2] == [0.0, 0.0]
    assert damages[2] > 0.1
    assert len(ruler.run) == 3, "scores and values are compared in different ways, and kept apart"


# --------------------------------------------------------------------------- accidents


@pytest.mark.parametrize("error", [TypeError("unsupported operand"), AttributeError("no attribute"), KeyError("x")])
def test_what_breaks_inside_nncf_is_a_failed_candidate(error: Exception) -> None:
    with pytest.raises(CompressionError, match="NNCF quantization failed"), _translated("quantization"):
        raise error


class Brittle(Closeness):
    """Breaks on outputs that are not the float model's."""

    def statistic(self, outputs: Any, label: object, reference: Any) -> float:
        if not np.array_equal(outputs["y"], reference["y"]):
            raise IndexError("no box is left")
        return 1.0


def test_whatever_a_metric_raises_is_one_failed_candidate(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler())
    judge.metric = Brittle(near=1.0)
    found = search(judge, options(), say=lambda text: None)
    failed = [trial for trial in found.trials if trial.state is TrialState.FAILED]
    assert failed and {trial.error for trial in failed} == {"IndexError: no box is left"}
    assert [trial.plan.quantization for trial in found.candidates] == [None]


def test_a_search_that_breaks_off_keeps_its_trials(model: ov.Model, reference: Predictions, tmp_path: Path) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler(), near=0.02, max_drop=0.0)

    def broken(trial: Trial) -> None:
        if trial.number == 2:
            raise OSError("no space left on device")

    judge.on_trial = broken
    found = search(judge, options(), say=lambda text: None)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert "broke off" in found.reasons[-1] and found.reasons[-1].endswith("OSError: no space left on device")


def test_an_interrupt_of_the_search_keeps_its_trials(model: ov.Model, reference: Predictions, tmp_path: Path) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler(), near=0.02, max_drop=0.0)

    def interrupt(trial: Trial) -> None:
        if trial.number == 2:
            raise KeyboardInterrupt

    judge.on_trial = interrupt
    found = search(judge, options(), say=lambda text: None)
    assert found.is_interrupted
    assert len(found.trials) == 3
    assert any(reason.startswith("interrupted while") for reason in found.reasons)


# --------------------------------------------------------------------------- weights


def heavy(rows: int = 1, *, repeats: int = 0) -> ov.Model:
    """Two wide layers: all its time is the fetching of weights, unless many rows share them.

    Before them, if asked for, a small one that is used so many times.
    """
    x = ops.parameter([rows, 1024], np.float32, name="x")
    x.output(0).set_names({"x"})
    rng = np.random.default_rng(1)
    y: ov.Node = x
    if repeats:
        narrow = ops.constant(rng.normal(size=(1024 // repeats, 1024 // repeats), scale=0.1).astype(np.float32))
        parts = ops.reshape(x, ops.constant(np.array([repeats, 1024 // repeats])), False)
        parts = ops.matmul(parts, narrow, False, False, name="narrow")
        y = ops.reshape(parts, ops.constant(np.array([rows, 1024])), False)
    for number in range(2):
        weights = ops.constant(rng.normal(size=(1024, 1024), scale=0.03).astype(np.float32))
        y = ops.relu(ops.matmul(y, weights, False, False, name=f"wide{number}"))
    y.output(0).set_names({"y"})
    return ov.Model([y], [x], "heavy")


def judge_of_heavy(folder: Path, *, repeats: int = 0) -> Judge:
    model = heavy(repeats=repeats)
    spec = TensorSpec(name="x", shape=(1, 1024), dtype="float32")
    data = from_arrays(RNG.normal(size=(12, 1024)).astype(np.float32), inputs=[spec])
    store = Store.open("judge", root=folder)
    return Judge(
        workshop=Workshop(source=model, calibration=data, device=Device.CPU, store=store),
        yardstick=Ruler(),
        metric=Closeness(near=1.0),
        budget=AccuracyBudget(max_drop=0.1),
        data=data,
        reference=predict(model, data, properties=F32),
        seed=0,
        store=store,
    )


def test_weights_bind_a_model_that_uses_each_of_them_once(model: ov.Model) -> None:
    traffic = weigh(heavy())
    assert traffic is not None
    assert traffic.fetched == 2 * 1024 * 1024 * 4 >= LEAST_BYTES
    assert traffic.is_bound
    assert traffic.shared == ()
    shared = weigh(heavy(rows=64))
    assert shared is not None
    assert not shared.is_bound
    assert shared.shared == ("wide0", "wide1")
    convolutions = weigh(model)
    assert convolutions is not None
    assert not convolutions.is_bound


@pytest.mark.parametrize("repeats", [0, 32])
def test_weight_only_candidates_are_judged_where_weights_bind(tmp_path: Path, repeats: int) -> None:
    judge = judge_of_heavy(tmp_path, repeats=repeats)
    judge.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    (reason,) = search_weights(judge, options(), say=lambda text: None)
    tried = [t.plan.weights.mode for t in judge.trials if t.plan.weights is not None]
    assert tried == ["int8_asym", "int4_asym"]
    assert all(t.state is TrialState.COMPLETE for t in judge.trials if t.plan.weights is not None)
    assert "8.0 of 8.0 MiB" in reason
    spared = {t.plan.weights.float_layers for t in judge.trials if t.plan.weights is not None}
    assert spared == {("narrow",) if repeats else ()}, "what is used often is better left as it is"


def test_float_blocks_of_the_best_mix_store_their_weights_in_8_bits(tmp_path: Path) -> None:
    judge = judge_of_heavy(tmp_path)
    mixed = CompressionPlan(quantization=QuantizationPlan(float_layers=("wide1",)))
    judge.judge_anchors({"float": [FLOAT], "INT8 beside float": [mixed]})
    (reason,) = search_weights(judge, options(), say=lambda text: None)
    last = judge.trials[-1]
    assert last.plan.quantization == mixed.quantization
    assert last.plan.weights is not None
    assert last.plan.title == "int8+f32(1) with int8_asym weights"
    assert last.state is TrialState.COMPLETE
    assert last.plan.title in reason
    built = judge.workshop.build(last.plan)
    sizes = [n.get_byte_size() for n in built.get_ops() if n.get_type_name() == "Constant"]
    assert max(sizes) == 1 << 20, "no matrix is left in float"
    quantizers, before = (
        [n.get_friendly_name() for n in each.get_ops() if n.get_type_name() == "FakeQuantize"]
        for each in (built, judge.workshop.build(mixed))
    )
    assert sorted(quantizers) == sorted(before), "what is INT8 stays so"


def test_a_model_that_weights_do_not_bind_is_left_alone(
    model: ov.Model, reference: Predictions, tmp_path: Path
) -> None:
    judge = judge_of(model, reference, tmp_path, Ruler())
    judge.judge_anchors({"float": [FLOAT], "plain INT8": [INT8]})
    assert search_weights(judge, options(), say=lambda text: None) == []
    assert len(judge.trials) == 2
