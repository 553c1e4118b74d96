"""What a start costs in processes of its own, and how two separate runs compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt import serde
from vinoopt.bench import (
    BenchRecord,
    Contestant,
    Engine,
    MeasureConfig,
    MeasureMode,
    Sample,
    compare_runs,
    measure,
    start_up,
)
from vinoopt.bench.pace import pace_contestant
from vinoopt.demo import demo_files
from vinoopt.errors import InputError
from vinoopt.fleet import Job, measure_job
from vinoopt.hardware.detect import fingerprint
from vinoopt.records import Evidence, HostFingerprint, Measurement

SIDE = 1024


@pytest.fixture(scope="module")
def host() -> HostFingerprint:
    return fingerprint()


def wide() -> ov.Model:
    """A product with 4 MB of weights, so that they show in the memory."""
    x = ops.parameter([1, SIDE], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    weights = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    return ov.Model([ops.relu(ops.matmul(x, weights, False, False))], [x], "wide")


SAMPLE: Sample = {"x": np.ones((1, SIDE), np.float32)}


# --------------------------------------------------------------------------- start-up


def test_a_start_is_measured_cold_and_with_the_cache() -> None:
    found = start_up(Contestant(name="wide", model=wide()), SAMPLE, mode=MeasureMode.LATENCY)
    assert found is not None
    assert found.compile_ms > 0
    assert found.first_inference_ms > 0
    assert found.cached_compile_ms is not None
    assert found.cached_compile_ms > 0
    assert 4 * SIDE * SIDE < found.peak_memory_bytes < 500e6


def test_a_blob_and_another_engine_have_no_model_cache(tmp_path: Path) -> None:
    blob = tmp_path / "wide.blob"
    blob.write_bytes(ov.Core().compile_model(wide(), "CPU").export_model().getvalue())
    imported = start_up(Contestant(name="blob", model=blob), SAMPLE, mode=MeasureMode.LATENCY)
    assert imported is not None
    assert imported.cached_compile_ms is None
    with np.load(demo_files().data) as arrays:
        digit = arrays["images"][:1].reshape(1, 1, 32, 32).astype(np.float32)
    other = Contestant(name="ort", model=demo_files().model, engine=Engine.ONNXRUNTIME)
    started = start_up(other, {"images": digit}, mode=MeasureMode.LATENCY)
    assert started is not None
    assert started.cached_compile_ms is None
    assert started.peak_memory_bytes > 0


def test_what_is_compiled_already_has_no_start() -> None:
    compiled = ov.Core().compile_model(wide(), "CPU")
    assert start_up(Contestant(name="c", model=compiled), SAMPLE, mode=MeasureMode.LATENCY) is None


def test_the_start_reaches_the_measurement() -> None:
    config = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1, start_up=True)
    each = measure([Contestant(name="wide", model=wide())], [SAMPLE], config=config).of("wide")
    assert each.peak_memory_bytes
    assert each.cached_compile_ms


# --------------------------------------------------------------------------- two runs


def measured(name: str, centre_ms: float, seed: int) -> Measurement:
    times = centre_ms * np.exp(np.random.default_rng(seed).normal(0, 0.01, 30))
    return Measurement(
        name=name,
        device="CPU",
        evidence=Evidence.MEASURED,
        latency_p50_ms=centre_ms,
        rounds_ms=tuple(map(float, times)),
    )


def record(host: HostFingerprint, *pairs: tuple[str, float], seed: int = 0) -> BenchRecord:
    found = tuple(measured(name, ms, seed + n) for n, (name, ms) in enumerate(pairs))
    return BenchRecord(host=host, mode=MeasureMode.LATENCY, measurements=found)


def test_a_slower_moment_falls_out_where_the_runs_share_a_contestant(host: HostFingerprint) -> None:
    before = record(host, ("new", 2.0), ("fp32", 4.0))
    after = record(host, ("new", 3.0), ("fp32", 6.0), seed=10)  # everything took half as long again
    found = compare_runs(before, after)
    assert found.through == ("fp32",)
    assert not found.comparison.is_significant
    assert found.comparison.speedup == pytest.approx(1.0, abs=0.02)
    faster = compare_runs(before, record(host, ("new", 1.0), ("fp32", 4.4), seed=20)).comparison
    assert faster.is_significant
    assert faster.speedup == pytest.approx(2.2, abs=0.04)
    assert faster.low < 2.2 < faster.high


def test_what_a_slower_moment_does_to_the_ratio_itself_is_no_difference(host: HostFingerprint) -> None:
    """Times that two runs of one bundle really had: the small model is slowed more than the one beside it."""
    quick = record(host, ("it", 0.100), ("int8", 0.222))
    slow = record(host, ("it", 0.154), ("int8", 0.294), seed=10)
    assert not compare_runs(quick, slow).comparison.is_significant
    assert not compare_runs(slow, quick).comparison.is_significant
    better = record(host, ("it", 0.080), ("int8", 0.294), seed=20)  # faster at a slower moment: another model
    assert compare_runs(quick, better).comparison.is_significant


def test_what_the_pace_says_counts_beside_a_contestant_that_was_not_slowed(host: HostFingerprint) -> None:
    before = serde.replace(record(host, ("it", 0.100), ("fp32", 4.0)), pace=measured("pace", 0.090, 1))
    after = serde.replace(record(host, ("it", 0.125), ("fp32", 4.0), seed=10), pace=measured("pace", 0.117, 2))
    assert not compare_runs(before, after).comparison.is_significant
    assert compare_runs(before, serde.replace(after, pace=before.pace)).comparison.is_significant


def test_a_contestant_of_another_device_does_not_tell_the_pace(host: HostFingerprint) -> None:
    def beside(ms: float, other_ms: float, seed: int) -> BenchRecord:
        whole = record(host, ("it", ms), ("onnxruntime", other_ms), seed=seed)
        subject, other = whole.measurements
        return serde.replace(whole, measurements=(serde.replace(subject, device="GPU"), other))

    found = compare_runs(beside(1.0, 4.0, 0), beside(1.0, 8.0, 10))
    assert found.through == ()
    assert not found.comparison.is_significant


def test_the_pace_of_the_device_stands_in_for_a_contestant(host: HostFingerprint) -> None:
    quick = serde.replace(record(host, ("it", 0.100)), pace=measured("pace", 0.090, 1))
    slow = serde.replace(record(host, ("it", 0.154), seed=10), pace=measured("pace", 0.117, 2))
    found = compare_runs(quick, slow)
    assert not found.comparison.is_significant
    assert found.through == ()
    assert any("took 1.30 times as long for the same in candidate as in reference" in w for w in found.warnings)
    worse = serde.replace(slow, pace=quick.pace)  # nothing but the model has changed
    assert compare_runs(quick, worse).comparison.is_significant


def test_the_pace_is_taken_beside_the_contestants_and_not_shown_among_them() -> None:
    config = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1, start_up=False)
    contestants = (Contestant(name="wide", model=wide()),)
    found = measure_job(Job(name="j", contestants=contestants, samples=(SAMPLE,), config=config))
    assert [each.name for each in found.result.measurements] == ["wide"]
    assert found.pace is not None and len(found.pace.rounds_ms) == 5
    assert pace_contestant("GPU.7", MeasureMode.LATENCY) is None


def test_times_alone_are_compared_with_the_spread_between_runs(host: HostFingerprint) -> None:
    before = record(host, ("it", 1.0))
    near = compare_runs(before, record(host, ("it", 1.04), seed=5))
    assert not near.comparison.is_significant
    assert any("share no contestant" in warning for warning in near.warnings)
    assert compare_runs(before, record(host, ("it", 1.3), seed=5)).comparison.is_significant


def test_other_machines_are_told_and_other_modes_refused(host: HostFingerprint) -> None:
    before, after = record(host, ("it", 1.0)), record(serde.replace(host, cpu="Another"), ("it", 1.0))
    assert any("different machines" in warning for warning in compare_runs(before, after).warnings)
    with pytest.raises(InputError, match="measure both alike"):
        compare_runs(before, serde.replace(after, mode=MeasureMode.THROUGHPUT))


@pytest.mark.parametrize("change", [{"device": "GPU"}, {"batch": 8}])
def test_other_devices_and_batches_are_refused(host: HostFingerprint, change: dict[str, object]) -> None:
    before = record(host, ("it", 1.0))
    (only,) = before.measurements
    after = serde.replace(before, measurements=(serde.replace(only, **change),))
    with pytest.raises(InputError, match="different things: it on CPU at batch 1, it on"):
        compare_runs(before, after)


def test_other_inputs_are_told(host: HostFingerprint) -> None:
    before = record(host, ("it", 1.0))
    after = serde.replace(before, inputs="images.npz")
    assert "measured on different inputs: not told, images.npz" in compare_runs(before, after).warnings


def test_a_record_survives_its_file(host: HostFingerprint) -> None:
    config = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1)
    contestants = [Contestant(name=name, model=wide()) for name in ("one", "other")]
    written = BenchRecord.of(measure(contestants, [SAMPLE], config=config), host)
    again = serde.from_json(BenchRecord, written.model_dump_json(), where="here")
    assert again == written
    assert (again.comparisons[0].reference, again.comparisons[0].candidate) == ("other", "one")
