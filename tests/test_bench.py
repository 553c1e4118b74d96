"""The measurement protocol: its statistics on synthetic series, its loop with fakes, its runners for real."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.parser
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from vinoopt import serde
from vinoopt.bench import (
    BenchResult,
    Contestant,
    Engine,
    MeasureConfig,
    MeasureMode,
    Progress,
    Sample,
    compare,
    measure,
    open_runner,
    paired_interval,
)
from vinoopt.bench.conditions import clock_warnings, evidence_here, round_warnings
from vinoopt.bench.intervals import percentile_ranges
from vinoopt.bench.protocol import least_requests, planned_rounds
from vinoopt.errors import DataError, DeviceError, InputError, ModelError
from vinoopt.records import Evidence, Measurement

SHORT = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1)
SAMPLES: list[Sample] = [{"x": np.full((1, 8), i, np.float32)} for i in range(3)]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        tiny (float[1,8] x) => (float[1,8] y) {
            half = Constant <value_float = 0.5> ()
            scaled = Mul(x, half)
            y = Relu(scaled)
        }
    """)
    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    onnx.save(model, path)
    return path


# --------------------------------------------------------------------------- statistics


def _independent(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.normal(size=n)


def _correlated(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """AR(1) with r = 0.5: load that outlasts a round."""
    values = rng.normal(size=n + 50)
    for i in range(1, n + 50):
        values[i] += 0.5 * values[i - 1]
    return values[50:]


def _disturbed(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Every eighth round is hit by something ten times as large."""
    hits = (rng.random(n) < 1 / 8) * rng.exponential(10, n) * rng.choice([-1, 1], n)
    return rng.normal(size=n) + hits


@pytest.mark.parametrize("rounds", [20, 60])
@pytest.mark.parametrize("noise", [_independent, _correlated, _disturbed])
def test_the_same_thing_twice_is_rarely_called_different(
    noise: Callable[[np.random.Generator, int], NDArray[np.float64]], rounds: int
) -> None:
    rng = np.random.default_rng(5)
    intervals = [paired_interval(noise(rng, rounds)) for _ in range(1000)]
    missed = sum(not low <= 0 <= high for _, low, high in intervals) / 1000
    # 5% by design; the estimate of the autocorrelation itself costs a little at r = 0.5.
    assert missed <= 0.085


def test_correlated_rounds_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    smooth = np.repeat(rng.normal(size=10), 6)  # ten facts told six times each
    shuffled = rng.permutation(smooth)
    width = {name: np.ptp(paired_interval(v)[1:]) for name, v in (("smooth", smooth), ("shuffled", shuffled))}
    assert width["smooth"] > 1.7 * width["shuffled"]


def _measurement(
    name: str, rounds_ms: Sequence[float], evidence: Evidence = Evidence.MEASURED
) -> Measurement:
    return Measurement(
        name=name, device="CPU", evidence=evidence, latency_p50_ms=1.0, rounds_ms=tuple(map(float, rounds_ms))
    )


def test_a_tenth_faster_is_found_under_common_noise() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        common = np.exp(rng.normal(0, 0.3, 20))  # the machine's mood, shared by a round
        slow = common * np.exp(rng.normal(0, 0.03, 20)) * 1.1
        fast = common * np.exp(rng.normal(0, 0.03, 20))
        result = compare(_measurement("slow", slow), _measurement("fast", fast))
        found += result.is_significant and result.low > 1 and abs(result.speedup - 1.1) < 0.05
    assert found >= 190


def _compiled_often(name: str, effects: Sequence[float], place: int, rng: np.random.Generator) -> Measurement:
    """80 rounds of as many compilations as there are effects, in the order in which the protocol takes them."""
    count = len(effects)
    ran = [(number + place * (number // count)) % count for number in range(80)]
    rounds = [math.exp(effects[each] + rng.normal(0, 0.005)) for each in ran]
    return _measurement(name, rounds).model_copy(update={"instances": tuple(ran)})


def test_what_compilations_differ_by_is_not_called_a_difference() -> None:
    rng = np.random.default_rng(4)
    wrong = found = 0
    for _ in range(200):
        spread = [rng.normal(0, 0.02, 4) for _ in range(2)]
        same = [_compiled_often("ab"[place], each, place, rng) for place, each in enumerate(spread)]
        wrong += compare(*same).is_significant
        slower = [_compiled_often("a", spread[0] + 0.1, 0, rng), same[1]]
        found += compare(*slower).is_significant
    assert wrong <= 10, "at least 19 of 20 say that there is no significant difference"
    assert found >= 190


def test_noise_of_rounds_is_not_taken_for_a_difference_of_compilations() -> None:
    rng = np.random.default_rng(6)
    widths = []
    for _ in range(100):
        same = [_compiled_often("ab"[place], [0.0] * 4, place, rng) for place in range(2)]
        found = compare(*same)
        logs = np.log(same[0].rounds_ms) - np.log(same[1].rounds_ms)
        widths.append(math.log(found.high / found.low) / np.ptp(paired_interval(logs)[1:]))
    assert np.median(widths) < 1.3


def test_a_difference_within_the_spread_of_compilations_is_not_significant() -> None:
    result = compare(_measurement("a", [1.004] * 40), _measurement("b", [1.0] * 40))
    assert not result.is_significant
    assert result.speedup == pytest.approx(1.004)


def test_every_compilation_has_its_turns_and_meets_every_other(onnx_file: Path) -> None:
    model = ov.Core().read_model(onnx_file)
    contestants = [Contestant(name=name, model=model) for name in "ab"]
    config = MeasureConfig(rounds=16, min_round_ms=40, warmup_ms=1, instances=2)
    result = measure(contestants, SAMPLES, config=config)
    a, b = (each.instances for each in result.measurements)
    assert sorted(zip(a, b, strict=True)) == [pair for pair in itertools.product((0, 1), repeat=2) for _ in range(4)]
    alone = measure(contestants, SAMPLES, config=serde.replace(SHORT, instances=1))
    assert [each.instances for each in alone.measurements] == [(), ()]


def test_comparison_turns_round_with_its_arguments() -> None:
    rng = np.random.default_rng(2)
    a, b = _measurement("a", rng.uniform(1, 2, 30)), _measurement("b", rng.uniform(2, 3, 30))
    there, back = compare(a, b), compare(b, a)
    assert there.speedup == pytest.approx(1 / back.speedup)
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))


def test_only_what_ran_side_by_side_is_compared() -> None:
    with pytest.raises(InputError, match="side by side"):
        compare(_measurement("a", [1.0] * 6), _measurement("b", [1.0] * 7))
    with pytest.raises(InputError, match="different evidence"):
        compare(_measurement("a", [1.0] * 6), _measurement("b", [1.0] * 6, Evidence.EMULATED))
    with pytest.raises(InputError, match="too few"):
        compare(_measurement("a", [1.0] * 4), _measurement("b", [1.0] * 4))


def test_percentiles_lie_in_their_intervals_and_more_rounds_narrow_them() -> None:
    rng = np.random.default_rng(4)
    covered, widths = 0, {}
    for trial in range(200):
        moods = np.exp(rng.normal(0, 0.1, 60))  # of each round
        rounds = [mood * np.exp(rng.normal(0, 0.02, 40)) for mood in moods]
        for count in (15, 60):
            (found,) = percentile_ranges(rounds[:count], (50,), seed=trial)
            widths.setdefault(count, []).append(found.high - found.low)
        covered += found.low <= 1.0 <= found.high
    assert covered / 200 >= 0.88
    assert np.median(widths[15]) > 1.6 * np.median(widths[60])  # half as wide with four times as many


def test_every_figure_has_its_interval() -> None:
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=6, min_round_ms=1, warmup_ms=0)
    each = measure(_fakes([], 0.001)[:1], SAMPLES, config=config).of("a")
    assert each.throughput_range_per_s.low <= each.throughput_per_s <= each.throughput_range_per_s.high
    for word in ("p50", "p90", "p99"):
        ends = getattr(each, f"latency_{word}_range_ms")
        assert ends.low <= getattr(each, f"latency_{word}_ms") <= ends.high


def test_a_clock_that_falls_is_reported() -> None:
    (told,) = clock_warnings(4200.0, 3100.0)
    assert "from 4200 to 3100 MHz" in told
    assert clock_warnings(3000.0, 2900.0) == clock_warnings(None, 3000.0) == clock_warnings(3000.0, None) == ()


def test_times_that_rise_or_scatter_are_reported() -> None:
    assert round_warnings("steady", [1.0, 1.01, 0.99] * 5) == ()
    assert "rose by 50%" in round_warnings("hot", [1.0] * 5 + [1.2] * 5 + [1.5] * 5)[0]
    assert "scatter" in round_warnings("noisy", [1.0, 2.0, 1.5] * 5)[0]


# --------------------------------------------------------------------------- the loop, with fakes


class FakeRunner:
    """Sleeps a little and notes who ran what."""

    def __init__(self, name: str, journal: list[tuple[str, int]], pause_s: float = 0.0) -> None:
        self.device, self.compile_ms, self.size_bytes = "CPU", 2.0, 7
        self.in_flight, self.warnings = 1, ()
        self.name, self.journal, self.pause_s = name, journal, pause_s

    def load(self, samples: Sequence[Sample]) -> None:
        self.count = len(samples)

    def infer(self, index: int) -> None:
        assert 0 <= index < self.count
        self.journal.append((self.name, index))
        time.sleep(self.pause_s)

    def stream(self, indices: Sequence[int]) -> Sequence[float]:
        for index in indices:
            self.infer(index)
        return [1.0] * len(indices)


def _fakes(journal: list[tuple[str, int]], pause_s: float = 0.0) -> list[Contestant]:
    return [Contestant(name=n, model=FakeRunner(n, journal, pause_s)) for n in ("a", "b", "c")]


def test_rounds_interleave_contestants_in_changing_order() -> None:
    journal: list[tuple[str, int]] = []
    config = MeasureConfig(rounds=12, min_round_ms=0.001, warmup_ms=0)
    result = measure(_fakes(journal, 0.0005), SAMPLES, config=config)

    turns = [name for i, (name, _) in enumerate(journal) if i == 0 or journal[i - 1][0] != name]
    assert all(len(each.rounds_ms) == 12 for each in result.measurements)
    assert len(turns) > 2 * 12  # hardly ever the same contestant twice running
    orders = {"".join(turns[i : i + 3]) for i in range(3, len(turns) - 3)}
    assert len(orders) > 3


def test_the_order_follows_the_seed() -> None:
    journals = []
    for seed in (1, 1, 2):
        journal: list[tuple[str, int]] = []
        measure(
            _fakes(journal, 0.002),
            SAMPLES,
            config=MeasureConfig(rounds=6, min_round_ms=0.001, warmup_ms=0, seed=seed),
        )
        journals.append(journal)
    assert journals[0] == journals[1]
    assert journals[0] != journals[2]


def test_requests_take_fresh_samples() -> None:
    journal: list[tuple[str, int]] = []
    fakes = _fakes(journal, 0.0002)
    measure(fakes[:1], SAMPLES, config=MeasureConfig(rounds=5, min_round_ms=5, warmup_ms=0))
    repeats = sum(after == before for before, after in itertools.pairwise(journal))
    assert repeats <= 12  # between turns only
    assert {index for _, index in journal} == {0, 1, 2}


@pytest.mark.parametrize(
    ("seconds", "pace_s", "spent_s", "rounds"),
    [(None, 0.1, 3.0, 20), (10.0, 0.1, 3.0, 70), (10.0, 3.0, 3.0, 5), (1.0, 0.1, 3.0, 5)],
)
def test_a_time_limit_sets_the_number_of_rounds(
    seconds: float | None, pace_s: float, spent_s: float, rounds: int
) -> None:
    assert planned_rounds(MeasureConfig(seconds=seconds), pace_s, spent_s) == rounds


def test_progress_counts_rounds() -> None:
    events: list[Progress] = []
    config = MeasureConfig(min_round_ms=0.001, warmup_ms=0, seconds=1e-3)
    result = measure(_fakes([], 0.001), SAMPLES, config=config, progress=events.append)
    assert [(event.round, event.rounds) for event in events] == [(i, 5) for i in range(1, 6)]
    assert len(result.of("a").rounds_ms) == 5


def test_facts_of_the_runner_reach_the_measurement() -> None:
    result = measure(_fakes([]), SAMPLES, config=SHORT)
    each = result.of("b")
    assert (each.compile_ms, each.size_bytes, each.peak_memory_bytes) == (2.0, 7, None)
    assert each.evidence is Evidence.MEASURED
    assert each.latency_p50_ms <= each.latency_p90_ms <= each.latency_p99_ms
    assert each.throughput_per_s is None
    assert each.samples > 0


def test_throughput_is_inferences_per_second() -> None:
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=5, min_round_ms=1, warmup_ms=0)
    result = measure(_fakes([], 0.001), SAMPLES, config=config)
    each = result.of("a")
    assert each.throughput_per_s == pytest.approx(1000 / np.median(each.rounds_ms))
    assert 0 < each.throughput_per_s < 1000  # a millisecond of sleep each, one at a time


def test_throughput_of_a_batch_is_samples_per_second_and_its_latency_that_of_a_call() -> None:
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=5, min_round_ms=1, warmup_ms=0)
    single, many = (
        measure([replace(_fakes([], 0.002)[0], batch=batch)], SAMPLES, config=config).of("a") for batch in (1, 8)
    )
    assert (single.batch, many.batch) == (1, 8)
    assert single.throughput_per_s < 500 < many.throughput_per_s < 4000  # 2 ms of sleep for each call
    assert many.latency_p50_ms == single.latency_p50_ms == 1.0  # what the runner says of a call


def test_a_turn_holds_enough_requests_to_hide_filling_and_draining() -> None:
    found = {
        (batch, requests): least_requests(requests, batch=batch)
        for batch, requests in ((1, 1), (8, 1), (32, 2), (1, 2), (1, 16))
    }
    assert found == {(1, 1): 64, (8, 1): 16, (32, 2): 32, (1, 2): 64, (1, 16): 256}


def test_a_turn_fills_the_requests_that_the_runner_keeps_in_flight() -> None:
    runner = FakeRunner("many", [])
    runner.in_flight = 16
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=5, min_round_ms=0.001, warmup_ms=0)
    each = measure([Contestant(name="many", model=runner)], SAMPLES, config=config).of("many")
    assert each.samples == 5 * 16 * 16


def test_an_instruction_set_cap_makes_it_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evidence_here() is Evidence.MEASURED
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert evidence_here() is Evidence.EMULATED


@pytest.mark.parametrize(
    ("names", "samples", "message"),
    [
        ((), SAMPLES, "nothing to measure"),
        (("a", "a"), SAMPLES, "names of their own"),
        (("a",), [], "no samples"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    names: Sequence[str], samples: list[Sample], message: str
) -> None:
    contestants = [Contestant(name=name, model=FakeRunner(name, [])) for name in names]
    with pytest.raises(InputError, match=message):
        measure(contestants, samples, config=SHORT)


# --------------------------------------------------------------------------- runners, for real


def _one(model: ov.Model | Path, **options: object) -> BenchResult:
    return measure([Contestant(name="it", model=model, **options)], SAMPLES, config=SHORT)


def test_every_form_of_a_model_runs_side_by_side(onnx_file: Path, tmp_path: Path) -> None:
    core = ov.Core()
    model = core.read_model(onnx_file)
    ov.save_model(model, tmp_path / "tiny.xml", compress_to_fp16=False)
    compiled = core.compile_model(model, "CPU")
    (tmp_path / "tiny.blob").write_bytes(compiled.export_model().getvalue())

    result = measure(
        [
            Contestant(name="memory", model=model, properties={"INFERENCE_PRECISION_HINT": "f32"}),
            Contestant(name="compiled", model=compiled),
            Contestant(name="ir", model=tmp_path / "tiny.xml"),
            Contestant(name="onnx", model=onnx_file),
            Contestant(name="blob", model=tmp_path / "tiny.blob"),
            Contestant(name="ort", model=onnx_file, engine=Engine.ONNXRUNTIME),
        ],
        SAMPLES,
        config=SHORT,
    )

    assert all(each.latency_p50_ms > 0 for each in result.measurements)
    assert {each.name for each in result.measurements if each.compile_ms is None} == {"compiled"}
    assert result.of("memory").size_bytes == 4  # one float
    assert math.isfinite(result.compare("onnx", "ort").speedup)


@pytest.mark.parametrize("engine", list(Engine))
def test_throughput_of_real_engines(onnx_file: Path, engine: Engine) -> None:
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=5, min_round_ms=0.5, warmup_ms=1)
    each = measure([Contestant(name="it", model=onnx_file, engine=engine)], SAMPLES, config=config).of("it")
    assert each.throughput_per_s is not None and each.throughput_per_s > 0
    assert each.samples >= 5 * 32


def test_as_many_requests_are_in_flight_as_asked_for() -> None:
    x = ops.parameter([1, 512], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    model = ov.Model([ops.matmul(x, np.ones((512, 4096), np.float32), False, False)], [x], "wide")
    alone = {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": "1"}
    contestants = [
        Contestant(name=str(count), model=model, properties=alone, is_hinted=False, requests=count)
        for count in (1, 8)
    ]
    config = MeasureConfig(mode=MeasureMode.THROUGHPUT, rounds=5, min_round_ms=5)
    result = measure(contestants, [{"x": np.ones((1, 512), np.float32)}], config=config)
    one, eight = result.of("1"), result.of("8")
    assert eight.latency_p50_ms > 3 * one.latency_p50_ms  # they wait for each other


def test_without_a_hint_the_device_gets_its_own_properties_only(onnx_file: Path) -> None:
    bare = Contestant(name="it", model=onnx_file, properties={"NUM_STREAMS": "2"}, is_hinted=False)
    assert bare.hinted(MeasureMode.THROUGHPUT) == {"NUM_STREAMS": "2"}
    hinted = replace(bare, is_hinted=True)
    assert hinted.hinted(MeasureMode.THROUGHPUT) == {"NUM_STREAMS": "2", "PERFORMANCE_HINT": "THROUGHPUT"}
    assert replace(hinted, engine=Engine.ONNXRUNTIME, properties={}).hinted(MeasureMode.LATENCY) == {}


@pytest.mark.parametrize("engine", list(Engine))
def test_samples_may_be_read_only_or_strided(onnx_file: Path, engine: Engine) -> None:
    fixed = np.frombuffer(bytes(32), np.float32).reshape(1, 8)
    strided = np.ones((8, 1), np.float32).T[:, ::-1]
    samples: list[Sample] = [{"x": fixed}, {"x": strided}]
    result = measure([Contestant(name="it", model=onnx_file, engine=engine)], samples, config=SHORT)
    assert result.of("it").samples > 0


@pytest.mark.parametrize("mode", list(MeasureMode))
def test_every_sample_finds_a_state_of_zero(mode: MeasureMode) -> None:
    """A sum over calls would leave what the last call read; its blob tells what the state was."""
    x = ops.parameter([1, 8], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    kept = ops.add(ops.read_value(x, "kept", np.float32, [1, 8]), x)
    model = ov.Model([ops.result(kept)], [ops.assign(kept, "kept")], [x], "sum")
    runner = open_runner(Contestant(name="sum", model=model, requests=1), mode=mode)
    runner.load([{"x": np.ones((1, 8), np.float32)}])
    once = runner._request  # type: ignore[attr-defined]
    for _ in range(3):
        runner.infer(0)
        runner.stream([0, 0])
    assert once.output_tensors[0].data[0, 0] == 2  # its first read brings the input itself


def test_a_format_that_the_device_does_not_compute_in_is_told(onnx_file: Path) -> None:
    if "FP16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU computes in f16")
    each = _one(onnx_file, properties={"INFERENCE_PRECISION_HINT": "f16"}).of("it")
    assert any("f16 was asked for, but CPU computes in" in warning for warning in each.warnings)
    exact = _one(onnx_file, properties={"INFERENCE_PRECISION_HINT": "f32"}).of("it")
    assert not any("asked for" in warning for warning in exact.warnings)


def test_the_measurement_tells_properties_and_shapes(onnx_file: Path) -> None:
    each = _one(onnx_file, properties={"INFERENCE_NUM_THREADS": "1"}).of("it")
    assert each.properties.as_dict() == {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY"}
    assert each.shapes == {"x": (1, 8)}


def test_a_contestant_may_bring_its_own_samples(onnx_file: Path) -> None:
    model = ov.Core().read_model(onnx_file)
    model.reshape([2, 8])
    pairs = [{"x": np.ones((2, 8), np.float32)}]
    result = measure(
        [Contestant(name="one", model=onnx_file), Contestant(name="two", model=model, samples=pairs)],
        SAMPLES,
        config=SHORT,
    )
    assert [each.name for each in result.measurements] == ["one", "two"]


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"y": np.ones((1, 8), np.float32)}, 'lack input "x"'),
        ({"x": np.ones((1, 8), np.float64)}, "takes float32, the samples are float64"),
        ({"x": np.ones((1, 9), np.float32)}, r"the samples are \[1, 9\]"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    onnx_file: Path, engine: Engine, sample: Sample, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        measure([Contestant(name="it", model=onnx_file, engine=engine)], [sample], config=SHORT)


def test_errors_name_the_contestant(onnx_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"it: .*no such file"):
        _one(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match=r"it: .*cannot be read"):
        _one(broken)
    with pytest.raises(ModelError, match="it: onnxruntime refuses"):
        _one(broken, engine=Engine.ONNXRUNTIME)
    with pytest.raises(DeviceError, match=r"it .*cannot be compiled"):
        _one(onnx_file, device="NOSUCH")
    with pytest.raises(DeviceError, match=r"it .*cannot be compiled"):
        _one(onnx_file, properties={"NUM_STREAMS": "many"})
    with pytest.raises(InputError, match="onnxruntime does not know NUM_STREAMS"):
        _one(onnx_file, engine=Engine.ONNXRUNTIME, properties={"NUM_STREAMS": "2"})
    (tmp_path / "old.blob").write_bytes(b"another release")
    with pytest.raises(DeviceError, match=r"it .*cannot be imported"):
        _one(tmp_path / "old.blob")
