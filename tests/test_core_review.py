"""Models, data and accidents at the edge of what the pipeline is made for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import numpy_helper, parser

import vinoopt
from vinoopt import pipeline, serde
from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.accuracy.metrics import find_metric
from vinoopt.bundle import _swap, check_output
from vinoopt.cli.main import main
from vinoopt.compression.build import Workshop
from vinoopt.compression.groups import find_groups
from vinoopt.compression.judge import Judge
from vinoopt.compression.search import SearchOptions, SearchResult, search
from vinoopt.compression.sensitivity import divergence
from vinoopt.errors import BundleError, DeviceError, InputError, MetricError, ToolchainRefused
from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.records import (
    AccuracyBudget,
    CompressionPlan,
    Device,
    DeviceSpec,
    DropType,
    Event,
    Evidence,
    Figure,
    Measurement,
    Precision,
    QuantizationPlan,
    RuntimeProperties,
    Target,
    TrialState,
)
from vinoopt.replay import departure
from vinoopt.selection import Choice, TestPart, _Selection
from vinoopt.store import Store
from vinoopt.yardsticks import HostYardstick

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((24, 3, 8, 8)).astype(np.float32)
CLASSIFIER = """<ir_version: 8, opset_import: ["": 17]>
g (float[1,3,8,8] x) => (float[1,10] y) {
  c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  d = Conv(r, v)  p = GlobalAveragePool(d)  TAIL
}"""


def written(folder: Path, tail: str = "y = Flatten(p)") -> Path:
    """A small classifier as an ONNX file, ending in `tail`."""
    model = parser.parse_model(CLASSIFIER.replace("TAIL", tail))
    rng = np.random.default_rng(1)
    for name, shape in {"w": (32, 3, 3, 3), "v": (10, 32, 1, 1)}.items():
        weights = rng.standard_normal(shape).astype(np.float32) / math.sqrt(math.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(weights.astype(np.float32), name))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


class Clock:
    """A target that runs here and whose times are made up: 2 ms in float, 1 ms in INT8."""

    target = Target(profile="made-up", device=Device.CPU)
    float_precisions = (Precision.F32,)
    arithmetic = "f32"

    def __init__(self, refuse: Callable[[CompressionPlan], bool] = lambda plan: False) -> None:
        self.refuse = refuse
        self.asked = 0

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        if self.refuse(plan):
            raise ToolchainRefused(f"no {plan.title} here")
        ms = 2.0 if plan.quantization is None else 1.0
        return Measurement(name=plan.title, device="none", evidence=Evidence.MODELLED, latency_p50_ms=ms)

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        return tuple(self.measure(plan, model) for plan, model in candidates)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        pass

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        return predict(model, data, properties={"INFERENCE_PRECISION_HINT": "f32"})

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        self.asked += 1
        return dict.fromkeys(blocks, 2.0 if plan.quantization is None else 1.0)


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return load_model(written(tmp_path))


def judge_of(source: SourceModel, yardstick: Any, folder: Path, **options: Any) -> Judge:
    data = from_arrays(IMAGES, inputs=source.inputs)
    store = Store.open("judge", root=folder)
    return Judge(
        workshop=Workshop(source=source.model, calibration=data, device=Device.CPU, store=store),
        yardstick=yardstick,
        data=data,
        reference=predict(source.model, data, properties={"INFERENCE_PRECISION_HINT": "f32"}),
        seed=0,
        store=store,
        **{
            "budget": AccuracyBudget(max_drop=0.5),
            "metric": find_metric("agreement", outputs=source.outputs, has_labels=False),
            **options,
        },
    )


INT8 = CompressionPlan(quantization=QuantizationPlan())


# --------------------------------------------------------------------------- the search


def test_a_target_that_refuses_int8_still_times_the_float_model(source: SourceModel, tmp_path: Path) -> None:
    judge = judge_of(source, Clock(refuse=lambda plan: plan.quantization is not None), tmp_path)
    judge.judge_anchors({"float": [CompressionPlan()], "plain INT8": [INT8]})
    assert [trial.state for trial in judge.trials] == [TrialState.COMPLETE, TrialState.FAILED]
    assert "no int8 here" in judge.trials[1].error


def test_a_target_that_refuses_everything_is_told_and_does_not_break_the_search(
    source: SourceModel, tmp_path: Path
) -> None:
    judge = judge_of(source, Clock(refuse=lambda plan: True), tmp_path)
    found = search(judge, SearchOptions(base=QuantizationPlan(), quantize=False), say=lambda text: None)
    assert found.candidates == ()
    assert any("nothing was pruned" in reason for reason in found.reasons)


def test_a_plan_that_quantizes_nothing_is_not_tried(source: SourceModel, tmp_path: Path) -> None:
    class NoGain(Clock):
        def block_times(self, plan: Any, model: Any, blocks: Sequence[str]) -> Mapping[str, float]:
            return dict.fromkeys(blocks, 1.0)

    judge = judge_of(source, NoGain(), tmp_path)
    found = search(judge, SearchOptions(base=QuantizationPlan(), prune=False), say=lambda text: None)
    assert {trial.plan.title for trial in found.trials} == {"f32", "int8"}
    assert any("2 of 2 blocks are not faster" in reason for reason in found.reasons)


def test_a_failed_probe_is_tried_again_by_the_next_run(source: SourceModel, tmp_path: Path) -> None:
    def fails() -> ov.Model:
        raise DeviceError("no memory left")

    assert judge_of(source, Clock(), tmp_path).damage(INT8, fails) == math.inf
    assert judge_of(source, Clock(), tmp_path).damage(INT8, lambda: source.model) == 0


def test_block_times_of_a_profile_that_was_changed_are_taken_again(source: SourceModel, tmp_path: Path) -> None:
    clock = Clock()
    spec = DeviceSpec(kind=Device.CPU, name="made up", architecture="none", precisions=(), channel_multiple=8)
    faster = serde.replace(spec, bandwidth_gb_per_s=Figure(value=100.0, source="made up"))
    for each in (spec, spec, faster):
        judge_of(source, clock, tmp_path, spec=each).block_times(INT8, lambda: source.model, ["c"])
    assert clock.asked == 2


def test_only_the_anchor_is_called_plain_int8(source: SourceModel, tmp_path: Path) -> None:
    mixed = CompressionPlan(quantization=QuantizationPlan(float_layers=("c",)))
    judge = judge_of(source, Clock(refuse=lambda plan: plan == INT8), tmp_path)
    judge.judge_anchors({"float": [CompressionPlan()], "plain INT8": [INT8]})
    judge.judge(mixed, note="what the target's compiler takes in INT8")
    found = SearchResult(trials=tuple(judge.trials), damages={}, gains_us={}, reasons=())
    run = _Selection(
        judge=judge,
        yardstick=Clock(),  # type: ignore[arg-type]  # asked for its formats only
        found=found,
        test=TestPart(data=judge.data, reference=judge.reference),
        say=lambda text: None,
    )
    assert run.plain is None
    assert list(run.contestants(mixed)) == ["float", "vinoopt"]


def test_no_damage_is_probed_beyond_the_time_limit(source: SourceModel, tmp_path: Path) -> None:
    deadline = time.monotonic() + 3

    class Slow(Clock):
        def block_times(self, plan: Any, model: Any, blocks: Sequence[str]) -> Mapping[str, float]:
            time.sleep(max(deadline - time.monotonic(), 0) + 0.01)
            return super().block_times(plan, model, blocks)

    cosine = find_metric("cosine", outputs=source.outputs, has_labels=False)
    judge = judge_of(source, Slow(), tmp_path, budget=AccuracyBudget(max_drop=0.0), metric=cosine)
    options = SearchOptions(base=QuantizationPlan(), deadline=deadline, effort="fast")
    found = search(judge, options, say=lambda text: None)
    assert {trial.note for trial in found.trials} == {"float", "plain INT8"}
    assert set(found.damages.values()) == {math.inf}


# --------------------------------------------------------------------------- values that are not finite


def test_masks_of_minus_infinity_are_no_damage() -> None:
    reference = {"y": np.array([[[1.0, -np.inf, 3.0]]])}
    near = {"y": np.array([[[1.1, -np.inf, 3.0]]])}
    other = {"y": np.array([[[1.0, 2.0, 3.0]]])}
    assert divergence([reference], [reference]) == 0
    assert 0 < divergence([reference], [near]) < math.inf
    assert divergence([reference], [other]) == math.inf


def test_a_replay_may_be_infinite_where_the_golden_output_is() -> None:
    golden = np.array([1.0, -np.inf, np.nan, 4.0])
    assert departure(golden, golden) == 0
    assert departure(golden, np.array([1.0, -np.inf, np.nan, 3.0])) == pytest.approx(0.25)
    assert departure(golden, np.array([1.0, np.inf, np.nan, 4.0])) == math.inf
    assert departure(golden, np.array([np.nan, -np.inf, np.nan, 4.0])) == math.inf


# --------------------------------------------------------------------------- what is handed in


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("tail", "options", "message"),
    [
        ("f = Flatten(p)  y = Log(f)", {}, "not finite"),
        ("y = Flatten(p)", {"labels": "worst", "budget": "relative"}, "float model is 0 on the search part"),
    ],
)
def test_a_float_model_that_nothing_can_be_compared_with_is_told_before_the_search(
    tail: str, options: dict[str, Any], message: str, tmp_path: Path, own_cache: None
) -> None:
    model = written(tmp_path, tail)
    if options:
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        labels = np.array([int(compiled(image[None])[0].argmin()) for image in IMAGES])
        budget = AccuracyBudget(metric="top1", drop_type=DropType.RELATIVE)
        options = {"labels": labels, "budget": budget}
    with pytest.raises(MetricError, match=message):
        vinoopt.compile(model, data=IMAGES, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_pruning": 1.5}, "max_pruning"), ({"preset": "mixd"}, "performance, mixed"), ({"subset": 3}, "subset")],
)
def test_what_a_request_cannot_hold_is_our_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        vinoopt.compress(written(tmp_path), data=IMAGES, **options)


def test_compress_takes_parts_of_their_own(tmp_path: Path, own_cache: None) -> None:
    with pytest.raises(InputError, match=r"no-such-part.npz"):
        vinoopt.compress(written(tmp_path), data=IMAGES, test_data=str(tmp_path / "no-such-part.npz"))


def test_a_model_without_a_contraction_has_no_groups(tmp_path: Path) -> None:
    graph = "g (float[1,16] x) => (float[1,16] y) { a = Sigmoid(x)  y = Mul(a, x) }"
    text = f'<ir_version: 8, opset_import: ["": 17]> {graph}'
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    assert find_groups(load_model(tmp_path / "m.onnx").model).groups == ()


def test_an_interrupt_while_a_bundle_is_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    class Interrupted(type(tmp_path)):  # type: ignore[misc]
        def rename(self, target: Any) -> Path:
            raise KeyboardInterrupt

    place, new = tmp_path / "out", Interrupted(tmp_path / "new")
    for folder in (place, new):
        folder.mkdir()
    (place / "old.txt").touch()
    with pytest.raises(KeyboardInterrupt):
        _swap(new, place)
    assert [file.name for file in place.iterdir()] == ["old.txt"]


def test_the_root_of_a_file_system_is_refused_as_output_before_any_work() -> None:
    with pytest.raises(BundleError, match="inside it"):
        check_output(Path("/"), force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "m.onnx", "--data", "x.npz", "--max-drop", "nan"], "--max-drop nan"),
        (["compile", "m.onnx", "--data", "x.npz", "--time-limit", "nan"], "is not a time"),
        (["tune", "m.onnx", "--device", "AUTO", "--profile", "host"], 'not "AUTO"'),
    ],
)
def test_odd_words_end_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- interrupts


def test_an_interrupt_while_settings_are_raced_keeps_the_result(source: SourceModel) -> None:
    said: list[str] = []

    def say(event: Event) -> None:
        said.append(event.message)
        if "runtime properties" in event.message:
            raise KeyboardInterrupt

    target = Target(profile="host", device=Device.CPU)
    spec = DeviceSpec(kind=Device.CPU, name="this", architecture="", precisions=(), channel_multiple=8)
    choice: Any = Choice(
        yardstick=HostYardstick(target=target, spec=spec, reference=source.model, samples=[{"x": IMAGES[:1]}]),
        plan=CompressionPlan(),
        model=source.model,
        budget_met=True,
        properties=RuntimeProperties(),
        **dict.fromkeys(("drop", "bench", "comparisons", "reasons", "trials")),  # type: ignore[arg-type]
    )
    material: Any = SimpleNamespace(say=say)
    (kept,) = pipeline._all_tuned(material, [choice], None)
    assert kept.interrupted
    assert kept.model is source.model
    assert "interrupted" in said[-1]
