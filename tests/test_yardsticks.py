"""Targets that are not this machine, with toolchains that answer from a record; the real ones where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from rich.console import Console

import vinoopt
from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.accuracy.metrics import find_metric
from vinoopt.bundle import Bundle
from vinoopt.compiler import yardstick_for
from vinoopt.compression.build import Workshop
from vinoopt.compression.judge import Judge
from vinoopt.compression.quantize import quantize
from vinoopt.compression.search import SearchResult
from vinoopt.demo import demo_files
from vinoopt.errors import (
    InputError,
    TargetError,
    ToolchainCrashed,
    ToolchainMissing,
    ToolchainRefused,
    ToolchainTimeout,
)
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.hardware.detect import cpu_flags, detect_host
from vinoopt.hardware.isa import ISAS
from vinoopt.hardware.profile import resolve
from vinoopt.records import (
    AccuracyBudget,
    Availability,
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Diagnostic,
    Event,
    Evidence,
    LayerReport,
    Measurement,
    Precision,
    QuantizationPlan,
    RuntimeProperties,
    Target,
    TensorSpec,
    TrialState,
)
from vinoopt.report import render_manifest
from vinoopt.selection import TestPart, choose
from vinoopt.store import Store, cache_folder
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.cpu_isa import BlockTimesJob, CappedRun, CpuIsaToolchain, LatencyJob, PredictJob
from vinoopt.toolchains.gpu import GpuToolchain
from vinoopt.toolchains.host import known_as
from vinoopt.toolchains.npu import NpuEstimate, NpuToolchain
from vinoopt.yardsticks import (
    EmulatedCpuYardstick,
    HostYardstick,
    ModelledGpuYardstick,
    NpuYardstick,
    runtime_properties,
)
from vinoopt.yardsticks.base import computes_integers, without_intended
from vinoopt.yardsticks.modelled import ModelledBench, times_of_blocks

SHAPE = (1, 16, 16, 16)
SCORES = TensorSpec(name="scores", shape=(1, 8, 16, 16), dtype="float32")
FLOAT16 = CompressionPlan(float_precision=Precision.F16)
INT8 = CompressionPlan(quantization=QuantizationPlan(), float_precision=Precision.F16)
INT8_F32 = CompressionPlan(quantization=QuantizationPlan())


def network() -> ov.Model:
    """Two convolutions with bias and activation; the first is much larger than the second."""
    rng = np.random.default_rng(0)
    data = ops.parameter(list(SHAPE), np.float32, name="images")
    data.output(0).set_names({"images"})
    node: Any = data
    for name, channels, kernel in (("large", 64, 3), ("small", 8, 1)):
        depth = node.output(0).get_shape()[1]
        weights = rng.normal(size=(channels, depth, kernel, kernel)).astype(np.float32) / depth
        pad = [kernel // 2, kernel // 2]
        node = ops.convolution(node, ops.constant(weights), [1, 1], pad, pad, [1, 1], name=name)
        bias = ops.constant(rng.normal(size=(1, channels, 1, 1)).astype(np.float32))
        node = ops.relu(ops.add(node, bias, name=f"{name} bias"))
    node.output(0).set_names({"scores"})
    return ov.Model([ops.result(node)], [data], "network")


@pytest.fixture(scope="module")
def model() -> ov.Model:
    return network()


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(1)
    samples = [{"images": rng.normal(size=SHAPE).astype(np.float32)} for _ in range(12)]
    return from_arrays(samples, inputs=(TensorSpec(name="images", shape=SHAPE, dtype="float32"),))


@pytest.fixture(scope="module")
def quantized(model: ov.Model, data: Dataset) -> ov.Model:
    return quantize(model, QuantizationPlan(), data, device=Device.CPU)


def given(text: str, model: ov.Model, data: Dataset) -> dict[str, Any]:
    target = Target.parse(text)
    samples = [data[index] for index in range(4)]
    return {"target": target, "spec": resolve(target), "reference": model, "samples": samples}


# --------------------------------------------------------------------------- which one a target gets


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("host:CPU", HostYardstick),
        ("skylake:CPU", EmulatedCpuYardstick),
        ("skylake:GPU", ModelledGpuYardstick),
    ],
)
def test_only_the_host_profile_is_this_machine(text: str, kind: type, model: ov.Model, data: Dataset):
    known = given(text, model, data)
    found = yardstick_for(known["target"], known["spec"], reference=model, samples=known["samples"])
    assert type(found) is kind
    assert found.target == known["target"]


def test_cpu_beyond_this_host_is_refused_before_any_work(model: ov.Model, data: Dataset):
    known = given("skylake:CPU", model, data)
    yardstick = EmulatedCpuYardstick(**known, toolchain=CpuIsaToolchain(flags=frozenset({"sse4_1"})))
    with pytest.raises(ToolchainMissing, match=r'"skylake:CPU".*lacks avx2.*run on a machine'):
        yardstick.require()


def test_npu_without_a_cost_model_is_refused_with_how_to_get_one(model: ov.Model, data: Dataset):
    toolchain = NpuToolchain(find=lambda platform, places: ())
    with pytest.raises(ToolchainMissing):
        NpuYardstick(**given("lunar-lake:NPU", model, data), toolchain=toolchain).require()


def test_gpu_profile_without_figures_is_told_which(model: ov.Model, data: Dataset):
    known = given("skylake:GPU", model, data)
    known["spec"] = known["spec"].model_copy(update={"peak_gops": {}, "bandwidth_gb_per_s": None})
    with pytest.raises(TargetError, match=r"peak_gops\.f16, peak_gops\.f32, bandwidth_gb_per_s.*source"):
        ModelledGpuYardstick(**known).require()


def test_refusal_of_the_float_model_is_told_before_any_work(model: ov.Model, data: Dataset):
    class Refusing(FakeNpu):
        def estimate_latency(self, *arguments: Any, **options: Any) -> NpuEstimate:
            raise ToolchainRefused("Unique is not supported")

    with pytest.raises(ToolchainRefused, match=r'target "lunar-lake:NPU": Unique'):
        NpuYardstick(**given("lunar-lake:NPU", model, data), toolchain=Refusing()).require()
    with pytest.raises(ToolchainRefused, match=r'target "alder-lake:GPU": Inverse'):
        gpu("alder-lake:GPU", model, data, ToolchainRefused("Inverse")).require()
    gpu("alder-lake:GPU", model, data, ToolchainMissing("no driver")).require()  # a run goes on without it


def test_artefact_of_the_cap_is_told_before_any_work(model: ov.Model, data: Dataset):
    class Artefact(FakeCap):
        def compile(self, path: Path, spec: DeviceSpec, **options: Any) -> Build:
            told = Diagnostic(severity="warning", code="CPU_ISA_CAP_ARTEFACT", message="not under AVX2")
            target = Target(profile=spec.name, device=spec.kind)
            return Build(target=target, toolchain="t", evidence=Evidence.NOT_CHECKED, diagnostics=(told,))

    with pytest.raises(ToolchainCrashed, match=r'target "skylake:CPU": not under AVX2'):
        EmulatedCpuYardstick(**given("skylake:CPU", model, data), toolchain=Artefact()).require()


# --------------------------------------------------------------------------- modelled latencies side by side


def modelled(name: str, latency_ms: float) -> Measurement:
    return Measurement(name=name, device="NPU", evidence=Evidence.MODELLED, latency_p50_ms=latency_ms)


def test_modelled_ratios_are_points_and_differ_or_do_not():
    bench = ModelledBench(measurements=(modelled("float", 3.0), modelled("INT8", 1.5), modelled("same", 1.5)))
    faster = bench.compare("float", "INT8")
    assert (faster.speedup, faster.low, faster.high, faster.is_significant) == (2.0, 2.0, 2.0, True)
    assert faster.evidence is Evidence.MODELLED
    assert not bench.compare("INT8", "same").is_significant
    with pytest.raises(InputError, match='no contestant "int4"'):
        bench.compare("float", "int4")


def test_times_of_layers_go_to_the_blocks_that_they_belong_to(quantized: ov.Model):
    small = next(node for node in quantized.get_ops() if node.get_friendly_name() == "small")
    quantizer = small.input_value(0).get_node().get_friendly_name()
    layers = {"large": 10.0, "large bias": 1.0, quantizer: 0.5, "small": 2.0, "elsewhere": 7.0}
    assert times_of_blocks(quantized, ["large", "small"], layers) == {"large": 11.0, "small": 2.5}
    assert times_of_blocks(quantized, ["small"], layers) == {"small": 2.5}


# --------------------------------------------------------------------------- an emulated CPU


class FakeCap:
    """A capped child that is three times as fast with the last model as with the first."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def probe(self, spec: DeviceSpec) -> Availability:
        return Availability(ok=True, name="fake")

    def environment(self, spec: DeviceSpec) -> dict[str, str | None]:
        return {"CAP": "AVX2"}

    def properties(self, spec: DeviceSpec, properties: RuntimeProperties) -> RuntimeProperties:
        return RuntimeProperties.of({**properties.as_dict(), "FORCED": "YES"})

    def run_capped(self, spec: DeviceSpec, job: Any, *, timeout_s: float) -> CappedRun:
        self.jobs.append(job)
        if isinstance(job, LatencyJob):
            assert all(path.is_file() for path in job.models)
            pace = [(1.0 + 2.0 * (number == 0)) for number in range(len(job.models))]
            drift = 1.0 + len(self.jobs)  # the machine slows down from job to job
            rounds = tuple(tuple((drift * each, drift * each) for _ in range(job.rounds)) for each in pace)
            return CappedRun(isa_cap="AVX2", samples_ms=rounds)
        if isinstance(job, BlockTimesJob):
            return CappedRun(isa_cap="AVX2", times_us=dict.fromkeys(job.blocks, 1.0))
        assert isinstance(job, PredictJob)
        count = write_calls(job.outputs, ({job.names[0]: np.ones(3)} for _ in read_calls(job.calls)))
        return CappedRun(isa_cap="AVX2", calls=count)


@pytest.fixture
def emulated(model: ov.Model, data: Dataset) -> EmulatedCpuYardstick:
    return EmulatedCpuYardstick(**given("skylake:CPU", model, data), toolchain=FakeCap())


def test_emulated_latency_is_a_ratio_in_units_of_the_first_float_time(
    emulated: EmulatedCpuYardstick, quantized: ov.Model
):
    first, second = emulated.measure(INT8_F32, quantized), emulated.measure(INT8_F32, quantized)
    assert first.latency_p50_ms == pytest.approx(second.latency_p50_ms) == pytest.approx(2.0)
    assert first.evidence is Evidence.EMULATED
    assert "only ratios" in first.source
    assert "AVX2" in first.device


def test_emulated_comparison_has_an_interval(
    emulated: EmulatedCpuYardstick, model: ov.Model, quantized: ov.Model
):
    entries = {
        "float": (CompressionPlan(), model, runtime_properties(CompressionPlan(), Device.CPU)),
        "INT8": (INT8_F32, quantized, runtime_properties(INT8_F32, Device.CPU)),
    }
    bench = emulated.compare(entries)
    found = bench.compare("float", "INT8")
    assert found.evidence is Evidence.EMULATED
    assert found.speedup == pytest.approx(3.0)
    assert found.low < found.speedup < found.high
    (job,) = emulated.toolchain.jobs
    assert job.seconds == 2 * emulated.seconds_each
    sizes = [each.size_bytes for each in bench.measurements]
    assert sizes[1] < sizes[0]


def test_only_what_the_cap_can_change_is_run_under_it(
    emulated: EmulatedCpuYardstick, model: ov.Model, quantized: ov.Model, data: Dataset
):
    assert len(emulated.predict(CompressionPlan(), model, data)) == len(data)
    assert emulated.toolchain.jobs == []
    outputs = emulated.predict(INT8_F32, quantized, data)
    assert [call["scores"].tolist() for call in outputs] == [[1.0, 1.0, 1.0]] * len(data)
    # The plan of a model that came quantized changes nothing, and yet the cap changes its outputs.
    came_quantized = emulated.predict(CompressionPlan(), quantized, data)
    assert [call["scores"].tolist() for call in came_quantized] == [[1.0, 1.0, 1.0]] * len(data)


def test_compressed_weights_are_run_under_the_cap_and_indices_are_none():
    data = ops.parameter([1, 4], np.float32, name="x")
    weights = ops.constant(np.ones((4, 4), np.int8))
    scaled = ops.multiply(ops.convert(weights, np.float32), ops.constant(np.float32(0.1)))
    product = ops.matmul(data, scaled, False, True)
    assert computes_integers(ov.Model([ops.result(product)], [data], "compressed"))
    shaped = ops.reshape(data, ops.constant(np.array([2, 2], np.int64)), False)
    assert not computes_integers(ov.Model([ops.result(shaped)], [data], "reshaped"))


def test_golden_outputs_and_replay_are_those_of_the_capped_cpu(
    emulated: EmulatedCpuYardstick, quantized: ov.Model, data: Dataset, tmp_path: Path
):
    ir = tmp_path / "model.xml"
    ov.save_model(quantized, ir)
    (first, *others) = emulated.golden_outputs(ir, RuntimeProperties(), [data[0], data[1], data[2]])
    assert [output.tolist() for output in first] == [[1.0, 1.0, 1.0]]
    assert len(others) == 2
    assert emulated.replay_on(RuntimeProperties()) == (Device.CPU, RuntimeProperties.of({"FORCED": "YES"}))
    assert emulated.replay_environment == {"CAP": "AVX2"}


def test_lost_outputs_are_noticed(emulated: EmulatedCpuYardstick, quantized: ov.Model, data: Dataset):
    class Losing(FakeCap):
        def run_capped(self, spec: DeviceSpec, job: Any, *, timeout_s: float) -> CappedRun:
            return CappedRun(isa_cap="AVX2", calls=write_calls(job.outputs, [{"scores": np.ones(3)}]))

    emulated.toolchain = Losing()
    with pytest.raises(ToolchainCrashed, match="of 12 calls"):
        emulated.predict(INT8_F32, quantized, data)


@pytest.mark.offline
def test_capped_cpu_end_to_end(model: ov.Model, quantized: ov.Model, data: Dataset, tmp_path: Path):
    yardstick = EmulatedCpuYardstick(**given("skylake:CPU", model, data))
    found = yardstick.toolchain.probe(yardstick.spec)
    if not found.ok:
        pytest.skip(found.reason)
    measured = yardstick.measure(INT8_F32, quantized)
    assert measured.evidence is Evidence.EMULATED and measured.latency_p50_ms > 0
    times = yardstick.block_times(CompressionPlan(), model, ["large", "small"])
    assert times["large"] > times["small"] > 0
    reference = yardstick.predict(CompressionPlan(), model, data)
    outputs = yardstick.predict(INT8_F32, quantized, data)
    ir = tmp_path / "golden.xml"
    ov.save_model(quantized, ir, compress_to_fp16=False)
    golden = yardstick.golden_outputs(ir, runtime_properties(INT8_F32, Device.CPU), [data[0], data[1]])
    np.testing.assert_array_equal(golden[1][0], outputs[1]["scores"])
    assert yardstick.replay_environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert set(outputs[0]) == set(reference[0])
    assert (
        np.abs(outputs[0]["scores"] - reference[0]["scores"]).max()
        < 0.1 * np.abs(reference[0]["scores"]).max()
    )
    ir = tmp_path / "model.xml"
    ov.save_model(quantized, ir, compress_to_fp16=False)
    properties = runtime_properties(INT8_F32, Device.CPU)
    build = yardstick.compile(ir, properties, tmp_path / "model.blob")
    assert build.target == yardstick.target
    assert build.properties == properties  # those of the product, not those that the cap needs
    assert "avx2" in "".join(layer.kernel for layer in build.layers)


# --------------------------------------------------------------------------- a modelled NPU


class FakeNpu:
    """Compiles anything; more tiles are faster up to four, and the estimate follows the size of the IR."""

    def __init__(self) -> None:
        self.estimates = 0

    def require_cost_model(self, spec: DeviceSpec) -> None:
        pass

    def estimate_latency(
        self, path: Path, spec: DeviceSpec, properties: RuntimeProperties, *, timeout_s: float = 0
    ) -> NpuEstimate:
        self.estimates += 1
        tiles = int(properties.as_dict().get("NPU_TILES", "2"))
        return NpuEstimate(
            properties=properties,
            latency_ms=path.with_suffix(".bin").stat().st_size / 1e4 / min(tiles, 4),
            layer_us={"large": 5.0, "small": 1.0, "(scheduling)": 2.0},
            is_lower_bound=True,
            uncounted=1,
            source="a fake",
            warnings=("TopK counts as nothing",),
        )

    def compile(
        self, path: Path, spec: DeviceSpec, *, properties: RuntimeProperties, output: Path, timeout_s: float
    ) -> Build:
        output.write_bytes(b"blob")
        target = Target(profile=spec.name, device=spec.kind)
        return Build(target=target, toolchain="fake", evidence=Evidence.MODELLED, properties=properties)


@pytest.fixture
def npu(
    model: ov.Model, data: Dataset, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> NpuYardstick:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    return NpuYardstick(**given("lunar-lake:NPU", model, data), toolchain=FakeNpu())


def test_npu_latency_is_modelled_and_its_bound_is_told(npu: NpuYardstick, quantized: ov.Model):
    found = npu.measure(INT8, quantized)
    assert found.evidence is Evidence.MODELLED
    assert found.source == "a fake"
    assert found.warnings == ("the modelled latency is a lower bound", "TopK counts as nothing")
    assert npu.float_precisions == (Precision.F16,)


def test_npu_candidates_are_timed_with_the_tiles_that_suit_their_kind(
    npu: NpuYardstick, model: ov.Model, quantized: ov.Model, data: Dataset
):
    class Picky(FakeNpu):
        """Float is best with four tiles, INT8 with three."""

        def estimate_latency(self, path: Path, *words: Any, **options: Any) -> NpuEstimate:
            found = super().estimate_latency(path, *words, **options)
            tiles = found.properties.as_dict().get("NPU_TILES", "6")
            is_best = tiles == ("3" if "FakeQuantize" in path.read_text() else "4")
            return found.model_copy(update={"latency_ms": 1.0 if is_best else 2.0})

    npu.toolchain = Picky()
    assert npu.measure(FLOAT16, model).latency_p50_ms == npu.measure(INT8, quantized).latency_p50_ms == 1.0
    assert npu.compare({"one": (INT8, quantized, RuntimeProperties())}).measurements[0].latency_p50_ms == 1.0
    again = NpuYardstick(**given("lunar-lake:NPU", model, data), toolchain=Picky())
    assert again.measure(INT8, quantized).latency_p50_ms == 1.0
    assert again.toolchain.estimates == 1  # the number of tiles was kept


def test_npu_outputs_are_those_of_this_cpu_in_f32(npu: NpuYardstick, model: ov.Model, data: Dataset):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = compiled(data[0])[compiled.output(0)]
    np.testing.assert_allclose(npu.predict(FLOAT16, model, data)[0]["scores"], expected, rtol=1e-4, atol=1e-5)
    assert npu.replay_on(RuntimeProperties.of({"NPU_TILES": 4})) == (
        Device.CPU,
        RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32"}),
    )
    assert any("f16 arithmetic is not emulated" in note for note in npu.notes)


def test_npu_compiler_that_dies_on_the_result_costs_the_blob_alone(
    npu: NpuYardstick, model: ov.Model, tmp_path: Path
):
    class Dies(FakeNpu):
        def compile(self, path: Path, spec: DeviceSpec, **options: Any) -> Build:
            raise ToolchainCrashed("ended with SIGSEGV, twice")

    npu.toolchain = Dies()
    ir = tmp_path / "model.xml"
    ov.save_model(model, ir)
    build = npu.compile(ir, RuntimeProperties(), tmp_path / "model.blob")
    assert (build.evidence, build.blob) == (Evidence.NOT_CHECKED, None)
    assert "SIGSEGV" in build.diagnostics[0].message


def test_npu_blob_is_compiled_with_tuned_options_and_says_so(
    npu: NpuYardstick, quantized: ov.Model, tmp_path: Path
):
    ir = tmp_path / "model.xml"
    ov.save_model(quantized, ir, compress_to_fp16=False)
    build = npu.compile(ir, runtime_properties(INT8, Device.NPU), tmp_path / "model.blob")
    assert build.properties.as_dict()["NPU_TILES"] == "4"
    assert build.target == npu.target
    assert (tmp_path / "model.blob").read_bytes() == b"blob"
    (told,) = [each for each in build.diagnostics if each.code == "NPU_TUNED"]
    assert "NPU_TILES=4" in told.message


def test_npu_bundle_holds_the_network_that_the_compiler_took(npu: NpuYardstick, tmp_path: Path):
    picture = ops.parameter(list(SHAPE), np.float32, name="images")
    wider = ops.pad(picture, [0, 0, 0, 0], [0, 16, 0, 0], "constant", np.float32(0))
    kernel = ops.constant(np.ones((4, 32, 1, 1), np.float32))
    node = ops.convolution(wider, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    ir = tmp_path / "model.xml"
    ov.save_model(ov.Model([ops.result(node)], [picture], "padded"), ir, compress_to_fp16=False)
    npu.compile(ir, RuntimeProperties(), tmp_path / "model.blob")
    assert "Pad" not in {op.get_type_name() for op in ov.Core().read_model(ir).get_ops()}


@pytest.mark.offline
def test_npu_end_to_end(model: ov.Model, quantized: ov.Model, data: Dataset):
    yardstick = NpuYardstick(**given("lunar-lake:NPU", model, data))
    try:
        yardstick.require()
    except ToolchainMissing as exc:
        pytest.skip(str(exc))
    times = yardstick.block_times(INT8, quantized, ["large", "small"])
    assert min(times.values()) > 0
    latency = yardstick.measure(INT8, quantized).latency_p50_ms
    assert sum(times.values()) / 1e3 < latency
    assert (
        yardstick.compare({"again": (INT8, quantized, runtime_properties(INT8, Device.NPU))})
        .measurements[0]
        .latency_p50_ms
        == latency
    )


# --------------------------------------------------------------------------- a modelled GPU


class FakeGpu:
    """A driver that answers, or fails, as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def probe(self, spec: DeviceSpec) -> Availability:
        return Availability(ok=self.error is None, name="fake", reason="none", fix="install the driver")

    def compile(
        self, path: Path, spec: DeviceSpec, *, properties: RuntimeProperties, output: Path, timeout_s: float
    ) -> Build:
        if self.error is not None:
            raise self.error
        target = Target(profile=spec.name, device=spec.kind)
        layers = tuple(
            LayerReport(name=name, type="Convolution", precision="i8") for name in ("large", "small")
        )
        return Build(target=target, toolchain="fake", evidence=Evidence.COMPILED, layers=layers)


def gpu(text: str, model: ov.Model, data: Dataset, error: Exception | None = None) -> ModelledGpuYardstick:
    return ModelledGpuYardstick(**given(text, model, data), toolchain=FakeGpu(error))


@pytest.mark.parametrize(("text", "gains"), [("alder-lake:GPU", True), ("skylake:GPU", False)])
def test_int8_pays_only_where_the_gpu_computes_it(
    text: str, gains: bool, model: ov.Model, quantized: ov.Model, data: Dataset
):
    yardstick = gpu(text, model, data)
    slow, fast = yardstick.measure(FLOAT16, model), yardstick.measure(INT8, quantized)
    assert (fast.latency_p50_ms < slow.latency_p50_ms) is gains
    assert fast.evidence is Evidence.MODELLED
    times = yardstick.block_times(FLOAT16, model, ["large", "small"])
    assert times["large"] > times["small"] > 0


def test_gpu_build_is_the_drivers(model: ov.Model, data: Dataset, tmp_path: Path):
    yardstick = gpu("alder-lake:GPU", model, data)
    ir = tmp_path / "model.xml"
    ov.save_model(model, ir)
    build = yardstick.compile(ir, RuntimeProperties(), tmp_path / "model.blob")
    assert (build.target, build.evidence, build.blob) == (yardstick.target, Evidence.COMPILED, None)


def test_layers_that_were_left_in_float_on_purpose_are_no_finding(quantized: ov.Model, tmp_path: Path):
    half = quantized.clone()
    small = next(node for node in half.get_ops() if node.get_friendly_name() == "small")
    small.input(0).replace_source_output(small.input_value(0).get_node().input_value(0))
    ov.save_model(half, tmp_path / "model.xml")
    told = [
        Diagnostic(severity="warning", code=code, message="left in f16", layer=layer)
        for code in ("GPU_FLOAT_LAYER", "GPU_REFERENCE_KERNEL")
        for layer in ("large", "small", "large/1/MatMul", "small/1/MatMul")
    ]
    target = Target.parse("alder-lake:GPU")
    build = Build(target=target, toolchain="fake", evidence=Evidence.COMPILED, diagnostics=tuple(told))
    left = without_intended(build, tmp_path / "model.xml").diagnostics
    assert [(each.code, each.layer) for each in left] == [
        ("GPU_FLOAT_LAYER", "large"),
        ("GPU_FLOAT_LAYER", "large/1/MatMul"),  # a part of a layer that the plugin took apart
        *(("GPU_REFERENCE_KERNEL", each) for each in ("large", "small", "large/1/MatMul", "small/1/MatMul")),
    ]


@pytest.mark.parametrize(
    ("name", "precision", "kernel"),
    [
        ("large", "f16", "convolution_gpu"),
        ("large", "i8", "convolution_gpu_ref__i8"),
        ("large/part", "f16", "convolution_gpu"),  # taken apart
        ("attention", "i8", "sdpa_micro__i8"),  # fused into something else
    ],
)
def test_layer_that_the_driver_left_behind_does_not_count_at_the_peak_of_int8(
    name: str, precision: str, kernel: str, model: ov.Model, quantized: ov.Model, data: Dataset
):
    class Behind(FakeGpu):
        def compile(self, path: Path, spec: DeviceSpec, **options: Any) -> Build:
            build = super().compile(path, spec, **options)
            layer = LayerReport(name=name, type="Convolution", precision=precision, kernel=kernel)
            return build.model_copy(update={"layers": (layer, build.layers[1])})

    def slowed(yardstick: ModelledGpuYardstick) -> ModelledGpuYardstick:
        """So slow at computing that memory does not hide the difference."""
        peaks = {
            name: figure.model_copy(update={"value": figure.value / 1e3})
            for name, figure in yardstick.spec.peak_gops.items()
        }
        yardstick.spec = yardstick.spec.model_copy(update={"peak_gops": peaks})
        return yardstick

    well = slowed(gpu("alder-lake:GPU", model, data))
    ill = slowed(gpu("alder-lake:GPU", model, data))
    ill.toolchain = Behind()
    assert ill.measure(INT8, quantized).latency_p50_ms > 1.5 * well.measure(INT8, quantized).latency_p50_ms
    blind = slowed(gpu("alder-lake:GPU", model, data, ToolchainMissing("no driver")))
    assert blind.measure(INT8, quantized).latency_p50_ms == well.measure(INT8, quantized).latency_p50_ms


def test_shapes_that_depend_on_data_are_a_refusal_of_this_target(data: Dataset):
    images = ops.parameter(list(SHAPE), np.float32, name="images")
    images.output(0).set_names({"images"})
    places = ops.non_zero(images, "i64")
    open_ended = ov.Model([ops.result(ops.convert(places, np.float32))], [images], "open")
    with pytest.raises(
        ToolchainRefused, match=r'"alder-lake:GPU": its latency cannot be modelled.*fixed shapes'
    ):
        gpu("alder-lake:GPU", open_ended, data).require()


def test_driver_that_hangs_costs_its_time_limit_once(model: ov.Model, quantized: ov.Model, data: Dataset):
    class Hanging(FakeGpu):
        asked = 0

        def compile(self, path: Path, spec: DeviceSpec, **options: Any) -> Build:
            self.asked += 1
            raise ToolchainTimeout("did not end within 900 s")

    yardstick = gpu("alder-lake:GPU", model, data)
    yardstick.toolchain = driver = Hanging()
    yardstick.require()
    yardstick.check(INT8, quantized)
    assert yardstick.measure(INT8, quantized).latency_p50_ms > 0
    assert driver.asked == 1


@pytest.mark.parametrize("error", [ToolchainMissing("no driver"), ToolchainCrashed("SIGFPE")])
def test_missing_driver_fails_no_run(error: Exception, model: ov.Model, data: Dataset, tmp_path: Path):
    properties = RuntimeProperties.of({"PERFORMANCE_HINT": "LATENCY"})
    build = gpu("alder-lake:GPU", model, data, error).compile(tmp_path / "m.xml", properties, tmp_path / "b")
    assert build.evidence is Evidence.NOT_CHECKED
    assert build.properties == properties
    (told,) = build.diagnostics
    assert str(error) in told.message
    assert ("install the driver" in told.message) is isinstance(error, ToolchainMissing)


def test_refusal_of_the_gpu_compiler_is_not_hidden(model: ov.Model, data: Dataset, tmp_path: Path):
    yardstick = gpu("alder-lake:GPU", model, data, ToolchainRefused("Inverse is not supported"))
    with pytest.raises(ToolchainRefused, match="Inverse"):
        yardstick.compile(tmp_path / "m.xml", RuntimeProperties(), tmp_path / "b")


class NoQuantizers(FakeGpu):
    """A driver that refuses quantized models, as some do for products without INT8, and counts its work."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = 0

    def compile(self, path: Path, spec: DeviceSpec, **options: Any) -> Build:
        self.compiled += 1
        if "FakeQuantize" in path.read_text():
            raise ToolchainRefused("Weights/ifm mismatch")
        return super().compile(path, spec, **options)


def test_candidate_that_the_compiler_refuses_gives_way_to_the_next(
    model: ov.Model, data: Dataset, tmp_path: Path
):
    yardstick = gpu("alder-lake:GPU", model, data)
    yardstick.toolchain = driver = NoQuantizers()
    store = Store.open("selection", root=tmp_path)
    reference = yardstick.predict(FLOAT16, model, data)
    judge = Judge(
        workshop=Workshop(source=model, calibration=data, device=Device.GPU, store=store),
        yardstick=yardstick,
        metric=find_metric("cosine", outputs=(SCORES,), has_labels=False),
        budget=AccuracyBudget(metric="cosine", max_drop=0.1),
        data=data,
        reference=reference,
        seed=0,
        store=store,
    )
    judge.judge_anchors({"float": [FLOAT16], "plain INT8": [INT8]})
    assert [trial.state for trial in judge.trials] == [TrialState.COMPLETE, TrialState.COMPLETE]
    found = SearchResult(trials=tuple(judge.trials), damages={}, gains_us={}, reasons=())
    test = TestPart(data=data, reference=reference)
    choice = choose(judge, yardstick, found, test, say=lambda text: None)
    assert choice.plan == FLOAT16
    assert choice.budget_met  # INT8 was refused, not over budget
    assert [each.name for each in choice.bench.measurements] == ["float"]
    assert f"{INT8.title} was passed over: Weights/ifm mismatch" in choice.reasons
    assert driver.compiled == 1  # and not asked again


def test_what_was_compiled_is_not_compiled_again(model: ov.Model, data: Dataset, tmp_path: Path):
    yardstick = gpu("alder-lake:GPU", model, data)
    yardstick.toolchain = driver = NoQuantizers()
    yardstick.check(FLOAT16, model)
    ir = tmp_path / "model.xml"
    ov.save_model(model, ir, compress_to_fp16=False)
    properties = runtime_properties(FLOAT16, Device.GPU)
    assert yardstick.compile(ir, properties, tmp_path / "model.blob").layers
    assert driver.compiled == 1
    yardstick.compile(ir, RuntimeProperties(), tmp_path / "model.blob")
    assert driver.compiled == 2


@pytest.mark.offline
def test_gpu_end_to_end(model: ov.Model, quantized: ov.Model, data: Dataset, tmp_path: Path):
    yardstick = ModelledGpuYardstick(**given("alder-lake:GPU", model, data))
    found = GpuToolchain().probe(yardstick.spec)
    if not found.ok:
        pytest.skip(found.reason)
    ir = tmp_path / "model.xml"
    ov.save_model(quantized, ir, compress_to_fp16=False)
    build = yardstick.compile(ir, runtime_properties(INT8, Device.GPU), tmp_path / "model.blob")
    assert build.evidence is Evidence.COMPILED
    assert {layer.precision for layer in build.layers if layer.type == "Convolution"} <= {"i8", "u8"}
    names = {layer.name for layer in build.layers if layer.type == "Convolution"}
    assert len(names) == 2
    assert names <= set(known_as(quantized, ["large", "small"]))  # what the cost model knows them by


def test_host_is_measured_and_replayed_on_itself(model: ov.Model, data: Dataset):
    spec = detect_host().devices[Device.CPU]
    target = Target.parse("host:CPU")
    yardstick = HostYardstick(target=target, spec=spec, reference=model, samples=[data[0]])
    properties = RuntimeProperties.of({"NUM_STREAMS": 1})
    assert yardstick.replay_on(properties) == (Device.CPU, properties)
    assert yardstick.measure(CompressionPlan(), model).evidence is Evidence.MEASURED


# --------------------------------------------------------------------------- the whole job


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    cache, prepared = tmp_path_factory.mktemp("cache"), cache_folder() / "npu"
    if prepared.is_dir():
        (cache / "npu").symlink_to(prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VINOOPT_CACHE_DIR", str(cache))
        yield


def compile_demo(output: Path, *targets: str, **options: Any) -> Bundle:
    files = demo_files()
    return vinoopt.compile(
        files.model,
        targets=targets,
        data=str(files.data),
        labels="labels",
        preprocess=read_preprocess(files.preprocess),
        shape="images[1,1,32,32]",
        output=output,
        prune=False,
        effort="fast",
        **options,
    )


def test_float_wins_where_int8_gains_nothing(tmp_path: Path, own_cache: None):
    bundle = compile_demo(tmp_path / "out", "skylake:GPU")  # Gen9 has no INT8 arithmetic
    (result,) = bundle.manifest.targets
    assert result.plan == CompressionPlan(float_precision=Precision.F16)
    assert {each.evidence for each in result.measurements} == {Evidence.MODELLED}
    assert result.build.evidence in (Evidence.COMPILED, Evidence.NOT_CHECKED)
    properties = json.loads((bundle.path / "skylake-gpu" / "runtime.json").read_text())
    assert properties["INFERENCE_PRECISION_HINT"] == "f16"  # the GPU's, though the replay ran in f32


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("CPU", ToolchainMissing, "needs AVX512_CORE_AMX_FP16.*run on a machine"),
        ("GPU", TargetError, r"lacks peak_gops\.f16, peak_gops\.f32, bandwidth"),
    ],
)
def test_what_is_missing_is_told_before_the_first_search(
    kind: str, error: type, words: str, tmp_path: Path, own_cache: None
):
    if kind == "CPU" and ISAS["AVX512_CORE_AMX_FP16"].flags <= cpu_flags():
        pytest.skip("this machine has every instruction set there is")
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'schema = 1\ninherits = "family-core-avx2-gen9"\ntitle = "Mine"\nsources = ["a data sheet"]\n'
        'devices.CPU.offline = { isa_cap = "AVX512_CORE_AMX_FP16" }\n'
    )
    events: list[Event] = []
    with pytest.raises(error, match=words):
        compile_demo(tmp_path / "out", "host:CPU", f"{profile}:{kind}", on_event=events.append)
    assert not any(event.stage in ("search", "trial") for event in events)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.offline
def test_four_kinds_of_target_in_one_bundle(tmp_path: Path, own_cache: None):
    targets = ("host:CPU", "lunar-lake:NPU", "alder-lake:GPU", "skylake:CPU")
    if not NpuToolchain().probe(resolve(Target.parse("lunar-lake:NPU"))).ok:
        pytest.skip("no NPU compiler is here; run vinoopt doctor --install npu")
    bundle = compile_demo(tmp_path / "out", *targets)
    evidence = {str(r.target): r.measurements[0].evidence for r in bundle.manifest.targets}
    assert evidence == {
        "host:CPU": Evidence.MEASURED,
        "lunar-lake:NPU": Evidence.MODELLED,
        "alder-lake:GPU": Evidence.MODELLED,
        "skylake:CPU": Evidence.EMULATED,
    }
    assert (bundle.path / "lunar-lake-npu" / "model.blob").stat().st_size > 1000
    console = Console(width=100, record=True)
    render_manifest(bundle.manifest, "out", console=console)
    text = console.export_text()
    for target, each in evidence.items():
        assert any(target in line and each.value in line for line in text.splitlines())
