"""The batch as something to tune: models at other batches, the gate sample by sample, and the race."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from openvino import opset13 as ops

from vinoopt.bench import BenchResult, Contestant, MeasureConfig, Sample
from vinoopt.cli.tune import tune as tune_command
from vinoopt.demo import demo_files
from vinoopt.errors import InputError, ShapeError
from vinoopt.records import Device, DeviceSpec, Evidence, Measurement, Precision
from vinoopt.tuning import (
    BATCHES,
    Goal,
    Setting,
    SettingState,
    SettingTrial,
    TuneConfig,
    TuneResult,
    TuneTask,
    axes,
    tune,
)
from vinoopt.tuning.batches import by_sample, find_batching, rebatched

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
THREADS = "INFERENCE_NUM_THREADS=1"
STREAM = TuneConfig(goal=Goal.THROUGHPUT, batches=(1, 2, 4))


def _model(batch: int = 1, *, width: int = 64, mixes: bool = False) -> ov.Model:
    """Scores of 10 classes through a reshape with the batch written into it; `mixes`: samples see each other."""
    rng = np.random.default_rng(0)
    x = ops.parameter([batch, width], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    hidden = ops.relu(ops.matmul(x, rng.normal(size=(width, width)).astype(np.float32), False, False))
    halves = ops.reshape(hidden, np.array([batch, 2, width // 2]), False)
    mean = ops.reduce_mean(halves, np.array([1]), False)
    scores = ops.matmul(mean, rng.normal(size=(width // 2, 10)).astype(np.float32), False, False)
    return ov.Model([ops.softmax(scores, 0) if mixes else scores], [x], "scores")


def _samples(count: int = 20, batch: int = 1, width: int = 64) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(batch, width)).astype(np.float32)} for _ in range(count)]


def _only(**tuning: tuple[str, ...]) -> DeviceSpec:
    """A profile that leaves nothing to tune but these."""
    return DeviceSpec(
        kind=Device.CPU,
        name="test",
        architecture="test",
        precisions=(Precision.F32,),
        channel_multiple=16,
        tuning={**dict.fromkeys(axes("CPU", is_stream=True), ()), **tuning},
    )


# --------------------------------------------------------------------------- the model at other batches


@pytest.mark.parametrize(("own", "batch"), [(1, 4), (4, 1), (2, 8)])
def test_a_model_at_another_batch_computes_the_same_for_every_sample(own: int, batch: int) -> None:
    model, samples = _model(own), _samples(8 // own, own)
    found = find_batching(model, samples, (batch,), copies=1)
    core = ov.Core()

    def outputs(model: ov.Model, calls: Sequence[Sample], size: int) -> np.ndarray:
        compiled = core.compile_model(model, "CPU", EXACT)
        return np.stack([each[0] for each in by_sample([[compiled(dict(call))[0]] for call in calls], size)])

    assert found.own == own
    assert found.sizes == (batch,)
    other = outputs(found.model_at(batch), found.samples_at(batch), batch)
    np.testing.assert_allclose(other, outputs(model, samples, own), rtol=1e-4, atol=1e-4)
    assert model.input().partial_shape == ov.PartialShape([own, 64])  # as it was


def test_an_open_batch_is_closed() -> None:
    model = _model()
    model.reshape([-1, 64])
    assert rebatched(model, own=1, batch=8).output().shape == [8, 10]


def _of(output: ov.Output, x: ov.Node) -> ov.Model:
    return ov.Model([output], [x], "it")


def _stateful() -> ov.Model:
    x = ops.parameter([1, 4], np.float32, name="x")
    value = ops.read_value(x, "kept", np.float32, [1, 4])
    return ov.Model([ops.result(ops.add(value, x))], [ops.assign(value, "kept")], [x], "stateful")


def _fixed_sum() -> ov.Model:
    x = ops.parameter([2, 4], np.float32, name="x")
    return _of(ops.add(x, np.ones((2, 4), np.float32)), x)


def _over_the_batch() -> ov.Model:
    x = ops.parameter([1, 4], np.float32, name="x")
    return _of(ops.reduce_mean(x, np.array([0]), True), x)


@pytest.mark.parametrize(
    ("build", "own", "message"),
    [
        (_stateful, 1, "keeps state"),
        (_fixed_sum, 2, "does not work at batch 4"),
        (_over_the_batch, 1, "output 0 does not follow the batch"),
    ],
)
def test_a_model_whose_batch_cannot_be_changed_says_why(build: object, own: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        rebatched(build(), own=own, batch=4)  # type: ignore[operator]


def test_batches_are_bounded_by_samples_and_memory() -> None:
    found = find_batching(_model(), _samples(5), BATCHES, copies=1)
    assert found.sizes == (2, 4)
    assert found.left_out[0] == "batch 8 was not tried: there are 5 samples"
    assert [len(each["x"]) for each in found.samples_at(2)] == [2, 2]
    full = find_batching(_model(), _samples(5), (2,), copies=10**12)
    assert not full.sizes
    assert "it may need" in full.left_out[0]


def test_inputs_without_a_common_first_dimension_have_no_batch() -> None:
    samples = [{"x": np.ones((1, 64), np.float32), "y": np.ones((7, 2), np.float32)}]
    with pytest.raises(ShapeError, match=r"no first dimension in common .*\(1, 7\)"):
        find_batching(_model(), samples, (2,), copies=1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_outputs_are_cut_into_samples_in_order(calls: int, batch: int, rows: int) -> None:
    """Also outputs with several rows per sample."""
    whole = np.arange(calls * batch * rows * 2).reshape(calls, batch * rows, 2)
    single = by_sample([[call, call[..., 0]] for call in whole], batch)
    assert len(single) == calls * batch
    np.testing.assert_array_equal(np.concatenate([each[0] for each in single]), whole.reshape(-1, 2))
    assert {each[1].shape for each in single} == {(rows,)}


# --------------------------------------------------------------------------- the race


class FakeBench:
    """Gives every contestant the speed, in samples, that the table says for its setting."""

    def __init__(self, speeds: dict[str, float], p90_ms: dict[str, float] | None = None) -> None:
        self.speeds, self.p90_ms = speeds, p90_ms or {}
        self.seen: list[tuple[Contestant, ...]] = []

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        self.seen.append(tuple(contestants))
        rng = np.random.default_rng(len(self.seen))
        measurements = []
        for each in contestants:
            times = np.exp(rng.normal(0, 0.01, config.rounds)) / self.speeds.get(each.name, 1.0)
            measurements.append(
                Measurement(
                    name=each.name,
                    device="CPU",
                    evidence=Evidence.MEASURED,
                    latency_p50_ms=1.0,
                    latency_p90_ms=self.p90_ms.get(each.name, 1.0),
                    rounds_ms=tuple(map(float, times)),
                    batch=each.batch,
                )
            )
        return BenchResult(mode=config.mode, measurements=tuple(measurements))

    @property
    def names(self) -> set[str]:
        return {each.name for contestants in self.seen for each in contestants}


def _states(result: TuneResult) -> dict[str, SettingState]:
    return {each.setting.name: each.state for each in result.trials}


def test_the_best_batch_is_told_beside_the_properties_of_the_model_as_it_is() -> None:
    task = TuneTask(model=_model(), samples=_samples(), spec=_only(INFERENCE_NUM_THREADS=("1",)))
    joined = f"{THREADS} batch 4"
    fake = FakeBench({THREADS: 1.2, "batch 2": 0.9, "batch 4": 1.5, joined: 1.8})
    seen: list[SettingTrial] = []
    result = tune(task, config=STREAM, measure=fake, progress=seen.append)

    assert result.properties.as_dict() == {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "THROUGHPUT"}
    assert result.chosen.setting.name == THREADS
    choice = result.batched
    assert choice is not None
    assert (choice.batch, choice.properties) == (4, result.properties)
    assert (choice.comparison.reference, choice.comparison.candidate) == (THREADS, joined)
    assert choice.comparison.speedup == pytest.approx(1.5, rel=0.03)
    assert _states(result)["batch 2"] is SettingState.DROPPED
    assert _states(result)[joined] is SettingState.CHOSEN
    assert result.trials == tuple(seen)

    four = next(each for contestants in fake.seen for each in contestants if each.name == "batch 4")
    assert four.batch == 4
    assert four.samples is not None and four.samples[0]["x"].shape == (4, 64)
    assert four.requests is not None
    assert all(contestants[0].name == "default" for contestants in fake.seen)


def test_a_batch_must_beat_the_best_setting_and_not_only_the_default() -> None:
    task = TuneTask(model=_model(), samples=_samples(), spec=_only(INFERENCE_NUM_THREADS=("1",)))
    fake = FakeBench({THREADS: 1.5, "batch 4": 1.3, f"{THREADS} batch 4": 1.1})
    result = tune(task, config=STREAM, measure=fake)
    assert result.batched is None
    last = next(each for each in result.trials if each.setting.name == "batch 4")
    assert last.reason == f"no significant gain over {THREADS}"


def test_a_batch_beyond_the_latency_limit_is_out() -> None:
    task = TuneTask(model=_model(), samples=_samples(), spec=_only())
    config = TuneConfig(goal=Goal.THROUGHPUT, batches=(2, 4), latency_limit_ms=2.0)
    fake = FakeBench({"batch 2": 1.3, "batch 4": 2.0}, {"batch 4": 5.0})
    result = tune(task, config=config, measure=fake)
    assert result.batched is not None
    assert result.batched.batch == 2
    assert _states(result)["batch 4"] is SettingState.OVER_LIMIT


def test_a_batch_that_mixes_samples_is_refused_with_figures() -> None:
    task = TuneTask(model=_model(mixes=True), samples=_samples(), spec=_only())
    fake = FakeBench({"batch 2": 9.0, "batch 4": 9.0})
    result = tune(task, config=STREAM, measure=fake)
    assert result.batched is None
    refused = [each for each in result.trials if each.batch is not None]
    assert {each.state for each in refused} == {SettingState.REFUSED}
    assert all("output 0 has cosine" in each.reason for each in refused)
    assert fake.names == {"default"}


def test_where_the_batch_is_fixed_the_rest_is_tuned_and_the_reason_told() -> None:
    samples: list[Sample] = [{"x": np.full((1, 4), i, np.float32)} for i in range(8)]
    task = TuneTask(model=_over_the_batch(), samples=samples, spec=_only(INFERENCE_NUM_THREADS=("1",)))
    result = tune(task, config=STREAM, measure=FakeBench({THREADS: 1.2}))
    assert not result.is_default
    assert result.batched is None
    assert result.warnings[0] == (
        "no other batch was tried: output 0 does not follow the batch: it is [1,4] at 1, [1,4] at 2"
    )


def test_batches_that_there_is_no_time_for_are_not_tried() -> None:
    task = TuneTask(model=_model(), samples=_samples(), spec=_only())
    slow = FakeBench({"default": 1e-4})  # ten seconds a sample
    config = TuneConfig(goal=Goal.THROUGHPUT, batches=(2, 4), seconds=60)
    result = tune(task, config=config, measure=slow)
    found = [each for each in result.trials if each.batch is not None]
    assert {each.state for each in found} == {SettingState.NOT_TRIED}
    assert {each.reason for each in found} == {"it would take longer than the time that was left"}


def test_batches_that_left_an_earlier_race_are_not_tried_again(tmp_path: Path) -> None:
    storage = tmp_path / "tune.db"
    task = TuneTask(model=_model(), samples=_samples(), spec=_only(INFERENCE_NUM_THREADS=("1",)))
    speeds = {THREADS: 0.8, "batch 2": 0.9, "batch 4": 1.5}
    plain = tune(task, config=TuneConfig(goal=Goal.THROUGHPUT), storage=storage, measure=FakeBench(speeds))
    first, second = FakeBench(speeds), FakeBench(speeds)
    before = tune(task, config=STREAM, storage=storage, measure=first)
    after = tune(task, config=STREAM, storage=storage, measure=second)
    assert plain.batched is None
    assert THREADS not in first.names  # known from the race without batches
    assert {"batch 2", "batch 4"} <= first.names
    assert "batch 2" not in second.names
    assert before.batched is not None and after.batched is not None
    assert before.batched.batch == after.batched.batch == 4


def test_least_latency_knows_no_batches() -> None:
    with pytest.raises(InputError, match="batches belong to the goal throughput"):
        tune(TuneTask(model=_model(), samples=_samples()), config=TuneConfig(batches=(2,)))


def test_settings_have_names() -> None:
    assert Setting().name == ""
    assert Setting(batch=8).name == "batch 8"


def test_a_race_of_batches_on_the_real_device() -> None:
    """A matrix product that is bound by reading its weights gains by sharing them among samples."""
    width = 1024
    model, samples = _model(width=width), _samples(32, width=width)
    task = TuneTask(model=model, samples=samples, spec=_only())
    config = TuneConfig(goal=Goal.THROUGHPUT, batches=(2, 16), turn_ms=1.0, min_agreement=0.9, min_cosine=0.99)
    result = tune(task, config=config)
    choice = result.batched
    assert choice is not None
    assert choice.batch == 16
    assert choice.comparison.low > 1.5
    own = result.chosen.measurement
    assert own is not None
    assert own.throughput_per_s is not None and choice.measurement.throughput_per_s is not None
    assert choice.measurement.throughput_per_s > 1.5 * own.throughput_per_s
    assert choice.measurement.latency_p50_ms > 1000 / choice.measurement.throughput_per_s  # a call has many samples
    ov.Core().compile_model(rebatched(model, own=1, batch=16), "CPU", choice.properties.as_dict())
    ov.Core().compile_model(model, "CPU", result.properties.as_dict())


# --------------------------------------------------------------------------- the command


def _invoke(*words: object) -> Result:
    return CliRunner().invoke(tune_command, [str(word) for word in words], catch_exceptions=False)


def test_the_command_tells_the_batch_and_leaves_the_properties_of_the_model(tmp_path: Path) -> None:
    demo, output = demo_files(), tmp_path / "runtime.json"
    fed = (demo.model, "--data", demo.data, "--preprocess", demo.preprocess, "-t", 2, "--goal", "throughput")
    found = _invoke(*fed, "--batch", "auto", "-o", output)
    assert found.exit_code == 0
    assert "batch: " in found.stdout
    properties = json.loads(output.read_text())
    assert found.stdout.startswith(json.dumps(properties, indent=2))
    ov.Core().compile_model(demo.model, "CPU", properties)


@pytest.mark.parametrize("words", [("--batch", "auto"), ("--batch", "some"), ("--batch", "0")])
def test_a_batch_is_a_number_or_auto_for_throughput(words: tuple[str, ...]) -> None:
    found = _invoke(demo_files().model, *words)
    assert found.exit_code == 2
    assert "batch" in found.stderr
