"""Tuning: the space of settings, the parity gate, the race and its database, on a real device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import optuna
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openvino import opset13 as ops

from vinoopt import serde
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, Sample
from vinoopt.errors import DeviceError, InputError
from vinoopt.hardware.detect import cpu_flags
from vinoopt.records import (
    Comparison,
    Device,
    DeviceSpec,
    Evidence,
    Measurement,
    Precision,
    RuntimeProperties,
)
from vinoopt.tuning import (
    Goal,
    Parity,
    SettingState,
    SettingTrial,
    TuneConfig,
    TuneResult,
    TuneTask,
    axes,
    tune,
)
from vinoopt.tuning.candidates import word
from vinoopt.tuning.parity import departure, parity
from vinoopt.tuning.settings import _ladder
from vinoopt.tuning.study import Study
from vinoopt.tuning.trials import UNFINISHED


def _model(seed: int = 0, *, offset: float = 0.0) -> ov.Model:
    """Two matrix products: 64 values to scores of 10 classes.

    `offset` is added between them and taken away after: where it is large, half precision loses the signal.
    """
    rng = np.random.default_rng(seed)
    x = ops.parameter([1, 64], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    first = ops.matmul(x, rng.normal(size=(64, 64)).astype(np.float32), False, False)
    hidden = ops.relu(ops.add(first, np.full((1, 64), offset, np.float32)))
    weights = rng.normal(size=(64, 10)).astype(np.float32)
    second = ops.matmul(hidden, weights, False, False)
    scores = ops.subtract(second, offset * weights.sum(0, keepdims=True))
    return ov.Model([scores], [x], "scores")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 64)).astype(np.float32)} for _ in range(20)]


def _spec(**tuning: tuple[str, ...]) -> DeviceSpec:
    return DeviceSpec(
        kind=Device.CPU,
        name="test",
        architecture="test",
        precisions=(Precision.F32,),
        channel_multiple=16,
        tuning=tuning,
    )


# --------------------------------------------------------------------------- space


def test_the_space_holds_what_the_device_lets_us_write() -> None:
    core = ov.Core()
    writable = {k for k, access in core.get_property("CPU", "SUPPORTED_PROPERTIES").items() if access == "RW"}
    space = axes("CPU", is_stream=True)
    assert set(space) <= writable
    assert {"NUM_STREAMS", "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT"} <= set(space)
    assert "NUM_STREAMS" not in axes("CPU", is_stream=False)


def test_every_value_of_the_space_compiles() -> None:
    core, model = ov.Core(), _model()
    for key, values in axes("CPU", is_stream=True).items():
        for value in values:
            core.compile_model(model, "CPU", {key: value})


def test_the_space_follows_hardware_goal_and_model() -> None:
    alone, stream = axes("CPU", is_stream=False), axes("CPU", is_stream=True)
    assert (alone["PERFORMANCE_HINT"], stream["PERFORMANCE_HINT"]) == (("THROUGHPUT",), ("LATENCY",))
    assert "PERFORMANCE_HINT_NUM_REQUESTS" in set(stream) - set(alone)
    assert ("CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE" in alone) == ("amx_int8" in cpu_flags())
    assert ("ENABLE_HYPER_THREADING" in alone) == (psutil.cpu_count() != psutil.cpu_count(logical=False))
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE" not in axes("CPU", is_stream=False, model=_model())
    x = ops.parameter([1, 64], np.float32, name="x")
    stored = ops.constant(np.ones((64, 64), np.uint8))
    weights = ops.multiply(ops.convert(stored, np.float32), np.full((1, 64), 0.5, np.float32))
    compressed = ov.Model([ops.matmul(x, weights, False, False)], [x], "compressed")
    assert "DYNAMIC_QUANTIZATION_GROUP_SIZE" in axes("CPU", is_stream=False, model=compressed)


def test_the_profile_adds_values_but_no_property_the_device_lacks() -> None:
    spec = _spec(INFERENCE_NUM_THREADS=("1",), SCHEDULING_CORE_TYPE=("ANY_CORE",), NPU_TILES=("2",))
    space = axes("CPU", spec, is_stream=False)
    assert space["INFERENCE_NUM_THREADS"] == ("1",)
    assert space["SCHEDULING_CORE_TYPE"] == ("ANY_CORE",)
    assert "NPU_TILES" not in space


def test_an_absent_device_is_named() -> None:
    with pytest.raises(DeviceError, match="NOSUCH does not answer"):
        axes("NOSUCH", is_stream=False)


@given(st.integers(1, 8), st.integers(0, 300))
def test_ladders_climb_from_end_to_end(low: int, more: int) -> None:
    steps = _ladder(low, low + more)
    assert (steps[0], steps[-1]) == (low, low + more)
    assert steps == sorted(set(steps))
    assert len(steps) <= 5


def test_values_read_back_as_they_are_written() -> None:
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": "1",
        "ENABLE_CPU_PINNING": "NO",
        "PERFORMANCE_HINT": "THROUGHPUT",
    }
    compiled = ov.Core().compile_model(_model(), "CPU", properties)
    assert {key: word(compiled.get_property(key)) for key in properties} == properties


# --------------------------------------------------------------------------- parity gate


def _scores(rows: list[list[float]]) -> list[list[np.ndarray]]:
    return [[np.array([row], np.float32)] for row in rows]


def test_parity_counts_cosine_and_agreement() -> None:
    expected = _scores([[1, 0], [0, 1]])
    same = parity(expected, expected)
    assert same.cosine[0] == pytest.approx(1)
    assert same.agreement == 1
    found = parity(_scores([[1, 0], [1, 0]]), expected)
    assert found.cosine[0] == pytest.approx(0.5)
    assert found.agreement == 0.5


def test_outputs_without_classes_have_no_agreement() -> None:
    image = [[np.ones((1, 2, 4, 4), np.float32)]]
    assert parity(image, image).agreement is None


@pytest.mark.parametrize("bad", [[[np.nan, 1.0]], [[np.inf, 1.0]]])
def test_what_is_not_finite_departs(bad: list[list[float]]) -> None:
    found = parity(_scores(bad), _scores([[1.0, 1.0]]))
    assert "cosine" in departure(found, min_cosine=-1, min_agreement=0, default=None)


def test_departures_carry_figures() -> None:
    found = Parity(cosine=(0.98, 1.0), agreement=0.9)
    reason = departure(found, min_cosine=0.99, min_agreement=0.95, default=None)
    assert reason == (
        "output 0 has cosine 0.980000, below 0.990000; top classes or ids agree on 90.0% of samples, below 95.0%"
    )


GATE = {"min_cosine": 0.999, "min_agreement": 0.99, "default": None}


def test_the_worst_sample_is_named() -> None:
    rng = np.random.default_rng(0)
    expected = [[rng.normal(size=(1, 8, 4, 4))] for _ in range(40)]
    outputs = [[each[0] * 1.0001] for each in expected]
    outputs[17] = [outputs[17][0] + 0.25 * rng.normal(size=(1, 8, 4, 4))]
    found = parity(outputs, expected)
    assert found.worst_sample == (17,)
    assert found.worst[0] == pytest.approx(0.97, abs=0.01)
    assert found.cosine[0] > 0.999
    assert departure(found, **GATE) == f"sample 17 has cosine {found.worst[0]:.6f} in output 0, below 0.990000"
    assert departure(found, **{**GATE, "default": found}) == ""


def test_what_moves_on_top_of_a_large_constant_counts() -> None:
    rng = np.random.default_rng(0)
    expected = [[500 + rng.normal(size=(1, 8, 4, 4))] for _ in range(10)]
    found = parity([[np.full((1, 8, 4, 4), 500.0)]] * 10, expected)
    assert found.cosine[0] > 0.99999
    assert found.error[0] == pytest.approx(1.0, abs=0.05)
    assert "output 0 is off by" in departure(found, **GATE)
    near = parity([[each[0] + 0.001] for each in expected], expected)
    assert departure(near, **GATE) == ""


def test_ids_are_judged_by_agreement() -> None:
    expected = [[np.array([[3, 900]], np.int64)] for _ in range(50)]
    outputs = [[each[0].copy()] for each in expected]
    outputs[0][0][0, 0] = 901  # one of a hundred, far away as a number
    found = parity(outputs, expected)
    assert (found.cosine, found.agreement) == ((None,), 0.99)
    assert departure(found, **GATE) == ""
    outputs[1][0][0, 0] = 4
    assert "ids agree on 98.0%" in departure(parity(outputs, expected), **GATE)


def test_other_shapes_are_told_as_such() -> None:
    found = parity(_scores([[1, 2, 3]]), _scores([[1, 2]]))
    assert departure(found, **GATE) == "output 0 has shape [1, 3] instead of [1, 2]"
    rows = [[np.ones((1, n, 4))] for n in (2, 5)]
    assert departure(parity(rows, rows), **GATE) == ""


def test_the_default_sets_the_demand_where_it_falls_short() -> None:
    default = Parity(cosine=(0.98,), agreement=0.9)
    same = {"min_cosine": 0.999, "min_agreement": 0.99, "default": default}
    assert departure(default, **same) == ""
    assert "cosine" in departure(Parity(cosine=(0.97,), agreement=0.9), **same)
    assert "top class" in departure(Parity(cosine=(0.98,), agreement=0.8), **same)


# --------------------------------------------------------------------------- the race


def _only(**tuning: tuple[str, ...]) -> DeviceSpec:
    """A profile that leaves nothing to tune but these."""
    return _spec(**{**dict.fromkeys(axes("CPU", is_stream=True), ()), **tuning})


class FakeBench:
    """Gives every contestant the speed that the table says for its setting."""

    def __init__(
        self, speeds: dict[str, float], p90_ms: dict[str, float] | None = None, *, usual_p90_ms: float = 1.0
    ) -> None:
        self.speeds, self.p90_ms, self.seen = speeds, p90_ms or {}, list[tuple[str, ...]]()
        self.usual_p90_ms = usual_p90_ms

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        self.seen.append(tuple(each.name for each in contestants))
        rng = np.random.default_rng(len(self.seen))
        measurements = []
        for each in contestants:
            times = np.exp(rng.normal(0, 0.01, config.rounds)) / self.speeds.get(each.name, 1.0)
            measurements.append(
                Measurement(
                    name=each.name,
                    device="CPU",
                    evidence=Evidence.MEASURED,
                    latency_p50_ms=float(np.median(times)),
                    latency_p90_ms=self.p90_ms.get(each.name, self.usual_p90_ms),
                    rounds_ms=tuple(map(float, times)),
                )
            )
        return BenchResult(mode=config.mode, measurements=tuple(measurements))


SETTLED = {
    SettingState.RUNNING, SettingState.CRASHED, SettingState.REFUSED, SettingState.DROPPED, SettingState.OVER_LIMIT
}  # fmt: skip
ACCURATE = RuntimeProperties.of({"EXECUTION_MODE_HINT": "ACCURACY"})
THREADS, PINNING, STREAMS = "INFERENCE_NUM_THREADS=1", "ENABLE_CPU_PINNING=NO", "NUM_STREAMS=1"
THREE = _only(INFERENCE_NUM_THREADS=("1",), ENABLE_CPU_PINNING=("NO",), NUM_STREAMS=("1",))
STREAM = TuneConfig(goal=Goal.THROUGHPUT)


def _states(result: TuneResult) -> dict[str, SettingState]:
    return {" ".join(f"{k}={v}" for k, v in t.properties.items): t.state for t in result.trials}


def test_a_tie_leaves_the_default(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    result = tune(task, config=STREAM, measure=FakeBench({THREADS: 1.003, PINNING: 0.9, STREAMS: 0.8}))
    assert result.is_default
    assert result.properties.as_dict() == {"PERFORMANCE_HINT": "THROUGHPUT"}
    assert result.chosen.state is SettingState.CHOSEN
    assert _states(result)[PINNING] is SettingState.DROPPED


def test_a_significant_gain_displaces_the_default(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    fake = FakeBench({THREADS: 1.2, PINNING: 0.9, STREAMS: 0.8})
    result = tune(task, config=STREAM, measure=fake)
    assert result.properties.as_dict() == {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "THROUGHPUT"}
    assert result.comparison is not None and result.comparison.low > 1.1
    assert _states(result)[""] is SettingState.LEADER
    assert all("default" in seen for seen in fake.seen)
    assert fake.seen[-1] == ("default", THREADS)


def test_leaders_are_combined(samples: list[Sample]) -> None:
    both = f"{PINNING} {THREADS}"
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    result = tune(
        task, config=STREAM, measure=FakeBench({THREADS: 1.1, PINNING: 1.1, STREAMS: 0.8, both: 1.3})
    )
    assert result.chosen.properties.as_dict() == {"ENABLE_CPU_PINNING": "NO", "INFERENCE_NUM_THREADS": "1"}


def test_a_limit_on_latency_excludes_faster_settings(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    config = TuneConfig(goal=Goal.THROUGHPUT, latency_limit_ms=2.0)
    fake = FakeBench({THREADS: 1.5, PINNING: 1.2, STREAMS: 0.8}, {THREADS: 3.0, f"{PINNING} {THREADS}": 3.0})
    result = tune(task, config=config, measure=fake)
    assert result.chosen.properties.as_dict() == {"ENABLE_CPU_PINNING": "NO"}
    assert _states(result)[THREADS] is SettingState.OVER_LIMIT


def test_a_slower_setting_wins_where_the_default_breaks_the_limit(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    config = TuneConfig(goal=Goal.THROUGHPUT, latency_limit_ms=2.0)
    late = {"default": 9.0, THREADS: 9.0, PINNING: 9.0, f"{PINNING} {THREADS}": 9.0}
    result = tune(task, config=config, measure=FakeBench({STREAMS: 0.8}, late))
    assert result.chosen.properties.as_dict()["NUM_STREAMS"] == "1"

    nobody = tune(task, config=config, measure=FakeBench({}, usual_p90_ms=9.0))
    assert nobody.is_default
    assert any("no setting keeps the latency limit of 2 ms" in each for each in nobody.warnings)


def test_what_the_device_does_not_take_is_a_failed_trial(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=_only(NUM_STREAMS=("many",)))
    result = tune(task, config=STREAM, measure=FakeBench({}))
    assert _states(result)["NUM_STREAMS=many"] is SettingState.FAILED
    assert "CPU does not take" in result.trials[0].reason


def test_half_precision_is_refused_where_it_changes_the_answer(samples: list[Sample]) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16 arithmetic")
    base = RuntimeProperties.of({"EXECUTION_MODE_HINT": "ACCURACY"})  # the default then computes in f32
    spec = _only(INFERENCE_PRECISION_HINT=("bf16",))
    task = TuneTask(model=_model(offset=2000), samples=samples, spec=spec)
    config = TuneConfig(base=base)
    result = tune(task, config=config, measure=FakeBench({"INFERENCE_PRECISION_HINT=bf16": 9.0}))
    refused = result.trials[0]
    assert refused.state is SettingState.REFUSED
    assert refused.measurement is None
    assert refused.parity is not None and refused.parity.cosine[0] < 0.999
    assert f"output 0 has cosine {refused.parity.cosine[0]:.6f}, below 0.999000" in refused.reason
    assert result.is_default


def test_a_reference_that_differs_is_reported(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(0), reference=_model(1), samples=samples, spec=_only())
    result = tune(task, measure=FakeBench({}))
    assert "the default setting itself departs from the float reference" in result.warnings[0]


def test_the_base_is_kept_and_not_tuned(samples: list[Sample]) -> None:
    base = RuntimeProperties.of({"INFERENCE_NUM_THREADS": "1"})
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    fake = FakeBench({PINNING: 1.5})
    result = tune(task, config=TuneConfig(goal=Goal.THROUGHPUT, base=base), measure=fake)
    assert result.properties.as_dict()["INFERENCE_NUM_THREADS"] == "1"
    assert not any(THREADS in name for seen in fake.seen for name in seen)


def test_unusable_requests_are_refused(samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="belongs to the goal throughput"):
        tune(TuneTask(model=_model(), samples=samples), config=TuneConfig(latency_limit_ms=1))
    with pytest.raises(InputError, match="needs samples"):
        tune(TuneTask(model=_model(), samples=[]))
    with pytest.raises(DeviceError, match="NOSUCH"):
        tune(TuneTask(model=_model(), samples=samples, device="NOSUCH"))


def test_a_race_on_the_real_device(samples: list[Sample], tmp_path: Path) -> None:
    storage = tmp_path / "tune.db"
    config = TuneConfig(turn_ms=0.5)
    task = TuneTask(model=_model(), samples=samples)
    seen: list[SettingTrial] = []
    result = tune(task, config=config, storage=storage, progress=seen.append)

    ov.Core().compile_model(task.model, "CPU", result.properties.as_dict())
    assert result.trials == tuple(seen)
    assert result.chosen.state is SettingState.CHOSEN
    assert all(each.reason for each in seen if each.state is not SettingState.CHOSEN)
    (name,) = optuna.study.get_all_study_names(f"sqlite:///{storage}")
    kept = optuna.load_study(study_name=name, storage=f"sqlite:///{storage}")
    assert kept.best_value >= 0
    assert {each.setting for each in seen} == set(Study(storage, name, axes("CPU", is_stream=False)).known)


# --------------------------------------------------------------------------- database


def test_settings_that_left_the_race_are_not_tried_again(samples: list[Sample], tmp_path: Path) -> None:
    storage = tmp_path / "tune.db"
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    speeds = {THREADS: 1.2, PINNING: 0.9, STREAMS: 0.8}
    first, second, other = FakeBench(speeds), FakeBench(speeds), FakeBench(speeds)
    before = tune(task, config=STREAM, storage=storage, measure=first)
    after = tune(task, config=STREAM, storage=storage, measure=second)
    tune(
        TuneTask(model=_model(1), samples=samples, spec=THREE), config=STREAM, storage=storage, measure=other
    )

    assert after.properties == before.properties
    gone = {each.setting.name: each.state for each in before.trials if each.is_settled}
    assert gone
    assert gone.items() <= _states(after).items()  # leaders race again
    assert any(PINNING in seen for seen in first.seen)
    assert not any(PINNING in seen for seen in second.seen)
    assert any(PINNING in seen for seen in other.seen)


def test_the_time_limit_leaves_settings_untried(samples: list[Sample], tmp_path: Path) -> None:
    storage = tmp_path / "tune.db"
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    hurried = TuneConfig(goal=Goal.THROUGHPUT, seconds=1e-6)
    result = tune(task, config=hurried, storage=storage, measure=FakeBench({}))
    assert _states(result)[THREADS] is SettingState.NOT_TRIED
    resumed = FakeBench({THREADS: 1.5})
    assert not tune(task, config=STREAM, storage=storage, measure=resumed).is_default


SPACE = {"A": ("1", "2"), "B": ("1", "2", "3")}


def _trial(speedup: float, state: SettingState = SettingState.DROPPED, **properties: str) -> SettingTrial:
    comparison = Comparison(
        reference="default",
        candidate="it",
        speedup=speedup,
        low=speedup,
        high=speedup,
        is_significant=True,
        evidence=Evidence.MEASURED,
    )
    return SettingTrial(
        properties=RuntimeProperties.of(properties), state=state, reason="so", comparison=comparison
    )


def test_trials_are_found_again_under_their_key(tmp_path: Path) -> None:
    path = tmp_path / "tune.db"
    trial = _trial(0.9, A="1")
    study = Study(path, "k", SPACE)
    study.tell(trial)
    study.tell(_trial(0.5, SettingState.OVER_LIMIT, B="3"))
    study.tell(SettingTrial(properties=RuntimeProperties.of({"B": "2"}), state=SettingState.FAILED, reason="no"))
    again = Study(path, "k", SPACE)
    assert again.closed[trial.setting] == trial
    assert len(again.closed) == 2  # what failed may have had other reasons
    assert len(again.known) == 3
    assert not Study(path, "other", SPACE).known


def test_what_was_dropped_within_noise_races_again(tmp_path: Path) -> None:
    path = tmp_path / "tune.db"
    noisy = _trial(0.99, A="1")
    assert noisy.comparison is not None
    noisy = serde.replace(noisy, comparison=serde.replace(noisy.comparison, is_significant=False))
    Study(path, "k", SPACE).tell(noisy)
    assert not Study(path, "k", SPACE).closed


def test_a_setting_that_ended_the_process_is_not_tried_again(samples: list[Sample], tmp_path: Path) -> None:
    storage, config = tmp_path / "tune.db", TuneConfig(goal=Goal.THROUGHPUT, base=ACCURATE)
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    tune(task, config=config, storage=storage, measure=FakeBench({}))
    (key,) = optuna.study.get_all_study_names(f"sqlite:///{storage}")
    space = {"INFERENCE_NUM_THREADS": ("1",), "ENABLE_CPU_PINNING": ("NO",), "NUM_STREAMS": ("1",)}
    left = {THREADS: SettingState.RUNNING, PINNING: SettingState.RACING, STREAMS: SettingState.RACING}
    for name, state in left.items():  # as a process leaves them that dies
        property, _, value = name.partition("=")
        Study(storage, key, space).tell(
            SettingTrial(properties=RuntimeProperties.of({property: value}), state=state)
        )
    fake = FakeBench({})
    after = tune(task, config=config, storage=storage, measure=fake)
    assert _states(after)[THREADS] is SettingState.CRASHED
    assert not any(THREADS in seen for seen in fake.seen)
    heats = [set(seen) - {"default"} for seen in fake.seen]
    assert {PINNING} in heats and {STREAMS} in heats  # one by one, so that the next crash has one culprit
    assert not any(each.state in UNFINISHED for each in Study(storage, key, space).known.values())


class Breaking(FakeBench):
    """Breaks off where one of these settings takes part."""

    def __init__(
        self, speeds: dict[str, float], broken: Sequence[str], error: type[BaseException] = DeviceError
    ) -> None:
        super().__init__(speeds)
        self.broken, self.error = broken, error

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        if any(each.name in self.broken for each in contestants):
            raise self.error("out of memory")
        return super().__call__(contestants, samples, config=config)


def test_a_setting_that_breaks_off_costs_its_own_place_only(samples: list[Sample], tmp_path: Path) -> None:
    task, storage = TuneTask(model=_model(), samples=samples, spec=THREE), tmp_path / "tune.db"
    broken = [STREAMS, f"{PINNING} {THREADS}"]
    result = tune(task, config=STREAM, storage=storage, measure=Breaking({THREADS: 1.3, PINNING: 1.1}, broken))
    assert _states(result)[STREAMS] is SettingState.FAILED
    assert result.chosen.setting.name == THREADS
    again = FakeBench({STREAMS: 1.5})
    assert tune(task, config=STREAM, storage=storage, measure=again).chosen.setting.name == STREAMS


def test_an_interrupt_leads_to_the_final(samples: list[Sample], tmp_path: Path) -> None:
    task, storage = TuneTask(model=_model(), samples=samples, spec=THREE), tmp_path / "tune.db"
    both = f"{PINNING} {THREADS}"
    speeds = {THREADS: 1.3, PINNING: 1.1}
    stopped = Breaking(speeds, [both], KeyboardInterrupt)
    result = tune(task, config=STREAM, storage=storage, measure=stopped, keeps_best=True)
    assert result.interrupted
    assert result.chosen.setting.name == THREADS
    resumed = FakeBench({**speeds, both: 1.6})
    assert tune(task, config=STREAM, storage=storage, measure=resumed).chosen.setting.name == both
    with pytest.raises(KeyboardInterrupt):
        tune(task, config=STREAM, measure=Breaking(speeds, [both], KeyboardInterrupt))


class Slow(FakeBench):
    """Takes a while for every inference."""

    def __init__(self, inference_s: float) -> None:
        super().__init__({}, usual_p90_ms=1e3 * inference_s)
        self.inference_s = inference_s

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        result = super().__call__(contestants, samples, config=config)
        time.sleep(len(contestants) * config.rounds * self.inference_s)
        measurements = tuple(
            serde.replace(
                each,
                latency_p50_ms=1e3 * self.inference_s,
                rounds_ms=tuple(1e3 * self.inference_s * ms for ms in each.rounds_ms),
            )
            for each in result.measurements
        )
        return serde.replace(result, measurements=measurements)


def test_a_slow_model_keeps_to_the_time(samples: list[Sample]) -> None:
    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    started = time.monotonic()
    result = tune(task, config=TuneConfig(seconds=2.0), measure=Slow(inference_s=0.15))
    assert time.monotonic() - started < 5  # 40 rounds of a duel alone would take 6 seconds
    assert {each.state for each in result.trials if each.properties.items} == {SettingState.NOT_TRIED}


def test_the_finalists_meet_the_default_freshly_compiled(samples: list[Sample]) -> None:
    seen: dict[str, list[object]] = {}

    class Watching(FakeBench):
        def __call__(
            self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
        ) -> BenchResult:
            for each in contestants:
                seen.setdefault(each.name, []).append(each.model)
            return super().__call__(contestants, samples, config=config)

    task = TuneTask(model=_model(), samples=samples, spec=THREE)
    tune(task, config=STREAM, measure=Watching({THREADS: 1.3, PINNING: 1.1}))
    for name in ("default", THREADS):
        *_, final, duel = seen[name]
        assert final is not duel


@pytest.mark.parametrize("state", [s for s in SettingState if s not in SETTLED])
def test_leaders_race_again(tmp_path: Path, state: SettingState) -> None:
    path = tmp_path / "tune.db"
    Study(path, "k", SPACE).tell(_trial(1.2, state, A="1"))
    again = Study(path, "k", SPACE)
    assert again.known
    assert not again.closed


def test_suggestions_are_new_combinations_and_outlive_the_race(tmp_path: Path) -> None:
    path = tmp_path / "tune.db"
    study = Study(path, "k", SPACE)
    for value in ("1", "2"):
        study.tell(_trial(1.1, A=value))
    known = _trial(1.3, A="1", B="1")
    study.tell(known)
    found = study.suggest(3)
    assert len(set(found)) == 3
    assert known.properties not in found
    assert all(len(each.items) == 2 for each in found)
    study.tell(_trial(0.8, **found[0].as_dict()))
    study.close()
    assert Study(path, "k", SPACE).suggest(1) == [found[0]]
    assert len(Study(None, "k", {"A": ("1",)}).suggest(5)) == 0  # there is nothing to combine


@pytest.mark.parametrize("content", [b"hello\n", b"SQLite format 3\x00 but no more"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.txt cannot be used"):
        Study(path, "k", SPACE)
    assert path.read_bytes() == content
