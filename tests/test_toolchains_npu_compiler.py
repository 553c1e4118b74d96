"""Intel's real NPU compiler on small networks; skipped, with the reason, where it is not installed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops

from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainRefused, ToolchainTimeout
from vinoopt.records import Device, DeviceSpec, Evidence, NpuOffline, Precision, RuntimeProperties
from vinoopt.toolchains import npu_preflight
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS
from vinoopt.toolchains.npu import NpuToolchain
from vinoopt.toolchains.npu_compiler import CompilerCall, call_compiler
from vinoopt.toolchains.npu_routes import NpuPlaces, Route, find_routes
from vinoopt.toolchains.npu_tuning import tune_npu

pytestmark = pytest.mark.offline

PLATFORMS = ("3720", "4000", "5010")
NONE = RuntimeProperties()


def npu(platform: str = "4000", tiles: tuple[str, ...] = ()) -> DeviceSpec:
    return DeviceSpec(
        kind=Device.NPU,
        name="Intel AI Boost",
        architecture="NPU",
        precisions=(Precision.INT8, Precision.F16),
        channel_multiple=16,
        offline=NpuOffline(platform=platform),
        tuning={"NPU_TILES": tiles} if tiles else {},
    )


@pytest.fixture(scope="module")
def route() -> Route:
    options = find_routes("4000", NpuPlaces.from_environment())
    ready = next((option.route for option in options if option.route and option.route.has_cost_model), None)
    if ready is None:
        reasons = "; ".join(f"{each.availability.name}: {each.availability.reason}" for each in options)
        pytest.skip(f"no NPU compiler here: {reasons}")
    return ready


@pytest.fixture
def toolchain(route: Route, tmp_path: Path) -> NpuToolchain:
    """The installed compiler with a cache of results of its own."""
    places = NpuPlaces.from_environment()
    (tmp_path / "npu").symlink_to(places.cache / "npu")
    return NpuToolchain(places=replace(places, cache=tmp_path))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small convolutional network, float and quantized."""
    folder = tmp_path_factory.mktemp("models")
    network = convolutional()
    samples = np.random.default_rng(0).standard_normal((8, 1, 3, 64, 64), dtype=np.float32)
    quantized = nncf.quantize(
        network, nncf.Dataset(list(samples)), preset=nncf.QuantizationPreset.PERFORMANCE, subset_size=8
    )
    paths = {"float": folder / "float.xml", "int8": folder / "int8.xml"}
    ov.save_model(network, paths["float"])
    ov.save_model(quantized, paths["int8"])
    return paths


def convolutional() -> ov.Model:
    rng = np.random.default_rng(1)
    image = ops.parameter([1, 3, 64, 64], np.float32, name="image")
    node, channels = image, 3
    for index, width in enumerate((32, 64, 128, 128)):
        kernel = rng.standard_normal((width, channels, 3, 3), dtype=np.float32) / (3 * channels**0.5)
        node = ops.convolution(
            node, ops.constant(kernel), [2, 2] if index else [1, 1], [1, 1], [1, 1], [1, 1]
        )
        node.set_friendly_name(f"conv{index}")
        node = ops.relu(node)
        channels = width
    pooled = ops.reduce_mean(node, ops.constant(np.array([2, 3])), False)
    head = ops.matmul(
        pooled, ops.constant(rng.standard_normal((10, channels), dtype=np.float32)), False, True
    )
    head.set_friendly_name("head")
    return ov.Model([ops.result(head)], [image], "convolutional")


def build_for(toolchain: NpuToolchain, model: Path, output: Path, platform="4000", properties=NONE):
    return toolchain.compile(model, npu(platform), properties=properties, output=output, timeout_s=300)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_blob_and_modelled_latency_without_an_npu(toolchain, models, tmp_path, platform):
    build = build_for(toolchain, models["float"], tmp_path / "model.blob", platform)
    assert build.evidence is Evidence.MODELLED
    assert not build.is_lower_bound
    assert f"npu={platform};" in build.details[RUNTIME_REQUIREMENTS]
    assert build.latency_ms == pytest.approx(sum(each.time_us for each in build.layers) / 1000, rel=0.01)
    layers = {each.name: each for each in build.layers}
    assert {"conv0", "conv1", "conv2", "conv3"} <= set(layers)
    assert layers["conv3"].type == "Convolution"
    assert layers["conv3"].precision == "f16"
    assert layers["conv3"].busy_us["DPU"] > 0
    blob = (tmp_path / "model.blob").read_bytes()
    assert len(blob) == int(build.details["blob_bytes"]) > 400_000  # 0.24 million weights in f16


@pytest.mark.parametrize("platform", PLATFORMS)
def test_int8_runs_in_integers_and_is_modelled_faster(toolchain, models, tmp_path, platform):
    plain = build_for(toolchain, models["float"], tmp_path / "float.blob", platform)
    quantized = build_for(toolchain, models["int8"], tmp_path / "int8.blob", platform)
    assert quantized.latency_ms < plain.latency_ms
    assert [each.code for each in quantized.diagnostics if each.severity == "warning"] == []
    layers = {each.name: each for each in quantized.layers}
    assert layers["conv3"].precision in ("u8", "i8")
    if platform != "3720":  # which reports no counts
        assert float(quantized.details["int_share"]) > 0.9 > float(plain.details["int_share"])


def test_same_model_and_options_give_the_same_blob_and_estimate(toolchain, models, tmp_path):
    with ThreadPoolExecutor(max_workers=2) as pool:
        outputs = [tmp_path / f"{index}.blob" for index in range(3)]
        builds = list(pool.map(lambda output: build_for(toolchain, models["int8"], output), outputs))
    assert len({build.blob_sha256 for build in builds}) == 1
    assert len({build.latency_ms for build in builds}) == 1
    assert builds[0].layers == builds[1].layers == builds[2].layers


def test_estimate_equals_the_builds(toolchain, models, tmp_path):
    estimate = toolchain.estimate_latency(models["int8"], npu(), NONE)
    build = build_for(toolchain, models["int8"], tmp_path / "model.blob")
    assert estimate.latency_ms == build.latency_ms
    assert estimate.layer_us["conv2"] > 0
    assert toolchain.estimate_latency(models["int8"], npu(), NONE) == estimate


def test_fewer_tiles_are_modelled_slower(toolchain, models, tmp_path):
    one = RuntimeProperties.of({"NPU_TILES": "1"})
    build = build_for(toolchain, models["float"], tmp_path / "one.blob", properties=one)
    assert build.details["tiles"] == "1"
    assert build.latency_ms > build_for(toolchain, models["float"], tmp_path / "all.blob").latency_ms


def test_tuning_is_never_slower_than_the_default(toolchain, models):
    tuning = tune_npu(toolchain, models["int8"], npu(tiles=("2",)))
    assert tuning.speedup >= 1
    assert len(tuning.trials) >= 5
    assert all(trial.error == "" for trial in tuning.trials)
    assert tuning.estimate.latency_ms == min(trial.estimate.latency_ms for trial in tuning.trials)


def test_program_without_a_cost_makes_a_lower_bound(toolchain, tmp_path):
    values = ops.parameter([1, 64], np.float32, name="values")
    best = ops.topk(values, ops.constant(np.int64(3)), 1, "max", "value")
    model = tmp_path / "topk.xml"
    ov.save_model(ov.Model([ops.result(best.output(0))], [values], "topk"), model)
    build = build_for(toolchain, model, tmp_path / "topk.blob")
    assert build.is_lower_bound
    assert any("TopK" in each.message for each in build.diagnostics)


def test_path_beyond_ascii(toolchain, models, tmp_path):
    folder = tmp_path / "Größe 模型"
    folder.mkdir()
    model = folder / "модель.xml"
    for suffix in (".xml", ".bin"):
        model.with_suffix(suffix).write_bytes(models["float"].with_suffix(suffix).read_bytes())
    assert build_for(toolchain, model, folder / "blob für 4000.blob").latency_ms > 0


def test_wrong_option_is_refused_in_the_compilers_words(toolchain, models, tmp_path):
    wrong = RuntimeProperties.of({"NPU_COMPILATION_MODE_PARAMS": "no-such-option=1"})
    with pytest.raises(ToolchainRefused, match=r"no-such-option|COMPILATION_MODE_PARAMS"):
        build_for(toolchain, models["float"], tmp_path / "x.blob", properties=wrong)
    assert not (tmp_path / "x.blob").exists()


def test_unknown_platform_is_refused(toolchain, models, tmp_path):
    with pytest.raises(ToolchainError, match="9999"):
        build_for(toolchain, models["float"], tmp_path / "x.blob", platform="9999")


def test_time_limit_ends_the_compiler_and_the_next_run_works(toolchain, models, tmp_path):
    with pytest.raises(ToolchainTimeout):
        toolchain.compile(models["float"], npu(), properties=NONE, output=tmp_path / "x.blob", timeout_s=0.05)
    assert build_for(toolchain, models["float"], tmp_path / "y.blob").latency_ms > 0


def test_memory_limit_ends_the_compiler_and_the_next_run_works(toolchain, models, tmp_path):
    small = replace(toolchain, memory_limit_bytes=1 << 20)
    with pytest.raises(ToolchainCrashed, match="memory limit of 1 MiB"):
        build_for(small, models["float"], tmp_path / "x.blob")
    assert build_for(toolchain, models["float"], tmp_path / "y.blob").latency_ms > 0


def test_open_dimension_that_reaches_the_compiler_is_an_error_of_ours(route, tmp_path):
    image = ops.parameter([-1, 3, 32, 32], np.float32, name="image")
    kernel = ops.constant(np.ones((8, 3, 3, 3), np.float32))
    node = ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    model = tmp_path / "open.xml"
    ov.save_model(ov.Model([ops.result(node)], [image], "open"), model)
    with pytest.raises(ToolchainError):
        call_compiler(route, CompilerCall(model=model, platform="4000", properties={}, timeout_s=120))


def _unary(build) -> ov.Model:
    values = ops.parameter([4, 16], np.float32, name="values")
    node = build(values)
    return ov.Model([ops.result(node.output(0))], [values], "unary")


REFUSED = {
    "Unique": lambda x: ops.unique(x),
    "Multinomial": lambda x: ops.multinomial(x, ops.constant(np.array([1])), "i32", True, False),
    "Bucketize": lambda x: ops.bucketize(x, ops.constant(np.array([0.0, 1.0], np.float32))),
    "SearchSorted": lambda x: ops.search_sorted(ops.constant(np.zeros((4, 3), np.float32)), x),
    "rank": lambda x: ops.reshape(x, ops.constant(np.array([2] * 6)), False),
    "i16": lambda x: ops.convert(x, "i16"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_preflight_refuses_the_compiler_refuses(route, tmp_path, name):
    """The tables must not keep back what would compile: after an update of OpenVINO this says so."""
    model = _unary(REFUSED[name])
    with pytest.raises(ToolchainRefused):
        npu_preflight.refuse(npu_preflight.check(model, "4000"))
    path = tmp_path / "refused.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    with pytest.raises(ToolchainRefused):
        call_compiler(route, CompilerCall(model=path, platform="4000", properties={}, timeout_s=120))


def _padded(ending: str) -> ov.Model:
    """Channels of zeros around quantized ones, as the shortcuts of ResNet for CIFAR have them."""

    def quantized(data, high: float, low: float = 0.0, levels: int = 256):
        ends = np.float32(low), np.float32(high)
        return ops.fake_quantize(data, *ends, *ends, levels)

    def convolution(data, count: int, channels: int):
        kernel = np.random.default_rng(0).standard_normal((count, channels, 1, 1)).astype(np.float32)
        weights = quantized(ops.constant(kernel), 3.0, -3.0, 255)
        return quantized(ops.relu(ops.convolution(data, weights, [1, 1], [0, 0], [0, 0], [1, 1])), 4.0)

    image = ops.parameter([1, 16, 16, 16], np.float32, name="image")
    data = quantized(image, 4.0)
    wider = ops.pad(convolution(data, 16, 16), [0, 8, 0, 0], [0, 8, 0, 0], "constant", np.float32(0))
    wider.set_friendly_name("shortcut")
    last = (
        convolution(wider, 8, 32)
        if ending == "convolution"
        else quantized(ops.add(wider, convolution(data, 32, 16)), 8.0)
    )
    return ov.Model([ops.result(last)], [image], "padded")


@pytest.mark.parametrize(("platform", "ending"), [("3720", "add"), ("4000", "convolution")])
def test_padded_channels_compile_only_in_our_form(route, toolchain, tmp_path, platform, ending):
    """Once the compiler takes the plain form, the rewrite is to go."""
    path = tmp_path / "padded.xml"
    ov.save_model(_padded(ending), path, compress_to_fp16=False)
    with pytest.raises(ToolchainRefused):
        call_compiler(route, CompilerCall(model=path, platform=platform, properties={}, timeout_s=120))
    build = build_for(toolchain, path, tmp_path / "model.blob", platform)
    assert "NPU_REWRITTEN" in [each.code for each in build.diagnostics]
    (copy,) = [layer for layer in build.layers if layer.name == "shortcut"]
    assert (copy.type, copy.precision in ("u8", "i8")) == ("Convolution", True)
