from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.errors import ToolchainCrashed, ToolchainMissing, ToolchainRefused, ToolchainTimeout
from vinoopt.hardware.profile import load_profile
from vinoopt.records import Build, Device, DeviceSpec, Evidence, GpuOffline, RuntimeProperties
from vinoopt.toolchains.gpu import GpuToolchain
from vinoopt.toolchains.host import reason_of
from vinoopt.toolchains.process import ChildExit, ChildReply

NONE = RuntimeProperties()


def gpu_of(profile: str) -> DeviceSpec:
    return load_profile(profile).devices[Device.GPU]


def device(profile: str, **changes: Any) -> dict[str, Any]:
    """What a driver that knows the profile's GPU exactly would report."""
    offline = gpu_of(profile).offline
    assert isinstance(offline, GpuOffline)
    return {
        "name": f"Intel(R) Graphics [{offline.device_id}] (iGPU)",
        "architecture": f"{offline.architecture.replace('x', '0')}.4",
        "execution_units": offline.execution_units,
        "has_int8": offline.has_int8,
        "has_xmx": offline.has_xmx,
        "driver": "26.27.1",
        "openvino": "2026.4.1",
        **changes,
    }


def layer(kind: str, precision: str, kernel: str, name: str = "layer") -> dict[str, str]:
    return {"name": name, "type": kind, "precision": precision, "kernel": kernel}


class FakeDriver:
    """Answers like the child process: one script per family name, for identifying and for compiling."""

    def __init__(self, **families: Callable[[bool], dict[str, Any]]) -> None:
        self.families = families
        self.calls: list[tuple[str, bool, dict[str, str | None]]] = []

    def __call__(
        self,
        command: str,
        *,
        request: dict[str, Any],
        timeout_s: float,
        env: dict[str, str | None],
        memory_limit_bytes: int,
    ) -> ChildReply:
        family = str(env["ProductFamilyOverride"])
        is_compile = "model" in request
        assert memory_limit_bytes > 0
        self.calls.append((family, is_compile, env))
        values = self.families[family](is_compile)
        ended = ChildExit(name=command, returncode=0, seconds=0.1, peak_memory_bytes=0, stdout="", stderr="")
        return ChildReply(values=values, exit=ended)


def offers(reported: dict[str, Any], *layers: dict[str, str], is_quantized: bool = False):
    def answer(is_compile: bool) -> dict[str, Any]:
        if not is_compile:
            return {"device": reported}
        memory = {"usm_device": 1000, "usm_host": 24}
        return {
            "device": reported,
            "is_quantized": is_quantized,
            "seconds": 1.5,
            "layers": list(layers),
            "memory": memory,
        }

    return answer


def fails(error: Exception, *, when_compiling: bool = False, otherwise: dict[str, Any] | None = None):
    def answer(is_compile: bool) -> dict[str, Any]:
        if is_compile is when_compiling:
            raise error
        return {"device": otherwise}

    return answer


@pytest.fixture
def vendors(tmp_path: Path) -> Path:
    (tmp_path / "intel.icd").write_text("/usr/lib/intel-opencl/libigdrcl.so\n", encoding="utf-8")
    (tmp_path / "pocl.icd").write_text("/usr/lib/libpocl.so\n", encoding="utf-8")
    return tmp_path


def compile_with(driver: FakeDriver, vendors: Path, profile: str) -> Build:
    return GpuToolchain(vendors=vendors, run=driver).compile(
        vendors / "model.xml", gpu_of(profile), properties=NONE, output=vendors / "blob", timeout_s=9
    )


# --------------------------------------------------------------------------- which device is offered


def test_exact_device_is_available(vendors: Path):
    found = GpuToolchain(vendors=vendors, run=FakeDriver(adls=offers(device("alder-lake")))).probe(
        gpu_of("alder-lake")
    )
    assert (found.ok, found.version) == (True, "26.27.1")


def test_environment_captures_with_exactly_one_driver(vendors: Path):
    driver = FakeDriver(adls=offers(device("alder-lake")))
    GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("alder-lake"))
    ((_, _, env),) = driver.calls
    assert env["OCL_ICD_VENDORS"] == str(vendors / "intel.icd")
    assert env["NEOReadDebugKeys"] == env["SetCommandStreamReceiver"] == "1"
    assert env["UseAubStream"] == env["UseBindlessMode"] == "0"
    assert (env["HardwareInfoOverride"], env["ForceDeviceId"]) == ("1x2x16", "0x4680")
    assert env["AUBDumpCaptureFileName"] == "/dev/null"
    assert env["NEO_CACHE_PERSISTENT"] == "0"


def test_registration_that_leads_nowhere_is_passed_over(vendors: Path):
    (vendors / "a_removed.icd").symlink_to(vendors / "gone")
    driver = FakeDriver(adls=offers(device("alder-lake")))
    assert GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("alder-lake")).ok
    (vendors / "intel.icd").unlink()
    assert (
        "no Intel OpenCL driver" in GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("skylake")).reason
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architecture": "12.5.1"}, "architecture 12.5.1 instead of 12.2"),
        ({"architecture": "9.2.9"}, "architecture 9.2.9"),
        ({"architecture": "12.20.0"}, "architecture 12.20.0"),
        ({"execution_units": 96}, "execution units 96 instead of 32"),
        ({"has_int8": False}, "has int8 False instead of True"),
        ({"has_xmx": True}, "has xmx True instead of False"),
        ({"driver": "21.50.3"}, "driver 21.50.3 is older than 22.43"),
    ],
)
def test_another_device_is_refused(vendors: Path, changes: dict[str, Any], word: str):
    driver = FakeDriver(adls=offers(device("alder-lake", **changes)))
    found = GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("alder-lake"))
    assert not found.ok
    assert word in found.reason
    assert "intel-opencl-icd" in found.fix
    with pytest.raises(ToolchainMissing, match=word):
        compile_with(driver, vendors, "alder-lake")
    assert not any(is_compile for _, is_compile, _ in driver.calls)


@pytest.mark.parametrize(
    ("driver", "architecture", "ok"),
    [
        ("22.43.24595", "12.0.0", True),  # reports the whole of Gen12 as 12.0
        ("22.43.24595", "12.5.1", False),  # the device that it offers for unknown names
        ("22.43.24595", "9.0.0", False),
        ("23.43.1", "12.0.0", False),  # this one tells them apart
        ("23.43.1", "12.2.0", True),
    ],
)
def test_old_drivers_are_matched_by_major_version(vendors: Path, driver: str, architecture: str, ok: bool):
    reported = device("alder-lake", driver=driver, architecture=architecture)
    found = GpuToolchain(vendors=vendors, run=FakeDriver(adls=offers(reported))).probe(gpu_of("alder-lake"))
    assert found.ok is ok


@pytest.mark.parametrize(
    ("architecture", "ok"), [("12.70.4", True), ("12.71.4", True), ("12.7.0", False), ("12.700.0", False)]
)
def test_open_last_digit_of_an_architecture(vendors: Path, architecture: str, ok: bool):
    reported = device("meteor-lake-h", architecture=architecture)
    run = FakeDriver(**{"mtl-h": offers(reported), "mtl": offers(reported)})
    assert GpuToolchain(vendors=vendors, run=run).probe(gpu_of("meteor-lake-h")).ok is ok


def test_too_old_driver_never_claims_a_newer_product(vendors: Path):
    reported = device("lunar-lake", driver="22.43.24595", architecture="20.0.0")
    run = FakeDriver(**{"lnl-m": offers(reported), "lnl": offers(reported)})
    found = GpuToolchain(vendors=vendors, run=run).probe(gpu_of("lunar-lake"))
    assert not found.ok
    assert "older than 26.05" in found.reason


def test_no_intel_driver(tmp_path: Path):
    (tmp_path / "pocl.icd").write_text("/usr/lib/libpocl.so\n", encoding="utf-8")
    found = GpuToolchain(vendors=tmp_path, run=FakeDriver()).probe(gpu_of("skylake"))
    assert not found.ok
    assert "no Intel OpenCL driver is registered" in found.reason


def test_product_that_no_driver_serves(vendors: Path):
    toolchain = GpuToolchain(vendors=vendors, run=FakeDriver())
    found = toolchain.probe(gpu_of("arc-b580"))
    assert not found.ok
    assert "no driver is known" in found.reason


def test_all_drivers_are_tried(vendors: Path):
    (vendors / "intel_legacy.icd").write_text("/usr/lib/libigdrcl_legacy1.so\n", encoding="utf-8")
    used: list[str] = []

    def only_legacy(is_compile: bool) -> dict[str, Any]:
        used.append(str(driver.calls[-1][2]["OCL_ICD_VENDORS"]))
        if not used[-1].endswith("intel_legacy.icd"):
            raise ToolchainMissing("the driver offers no GPU for this family")
        return {"device": device("skylake")}

    driver = FakeDriver(skl=only_legacy)
    assert GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("skylake")).ok
    assert [Path(each).name for each in used] == ["intel.icd", "intel_legacy.icd"]


# --------------------------------------------------------------------------- failures of the driver


def test_family_that_crashes_gives_way_to_its_sibling(vendors: Path):
    reported = device("alder-lake-p", driver="22.43.24595", architecture="12.0.0")
    crash = fails(ToolchainCrashed("SIGFPE"), when_compiling=True, otherwise=reported)
    build = compile_with(FakeDriver(adlp=crash, tgllp=offers(reported)), vendors, "alder-lake-p")
    assert build.details["driver_family"] == "tgllp"


def test_crash_of_every_family_says_nothing_about_the_model(vendors: Path):
    crash = fails(ToolchainCrashed("SIGFPE"), when_compiling=True, otherwise=device("alder-lake"))
    with pytest.raises(ToolchainCrashed, match="UHD Graphics 770: SIGFPE"):
        compile_with(FakeDriver(adls=crash), vendors, "alder-lake")


def test_time_limit_ends_the_attempt(vendors: Path):
    late = fails(ToolchainTimeout("too late"), when_compiling=True, otherwise=device("alder-lake-p"))
    driver = FakeDriver(adlp=late, tgllp=offers(device("alder-lake-p")))
    with pytest.raises(ToolchainTimeout, match="as adlp: too late"):
        compile_with(driver, vendors, "alder-lake-p")


def test_refusal_is_the_last_word(vendors: Path):
    refused = fails(ToolchainRefused("Inverse"), when_compiling=True, otherwise=device("alder-lake-p"))
    driver = FakeDriver(adlp=refused, tgllp=offers(device("alder-lake-p")))
    with pytest.raises(ToolchainRefused, match="Inverse"):
        compile_with(driver, vendors, "alder-lake-p")
    assert [family for family, _, _ in driver.calls] == ["adlp", "adlp"]


def test_crash_while_identifying_is_no_support(vendors: Path):
    driver = FakeDriver(adls=fails(ToolchainCrashed("SIGSEGV")))
    found = GpuToolchain(vendors=vendors, run=driver).probe(gpu_of("alder-lake"))
    assert not found.ok
    assert "SIGSEGV" in found.reason


# --------------------------------------------------------------------------- what is reported


def test_layers_of_a_quantized_model(vendors: Path):
    layers = (
        layer("Convolution", "u8", "convolution_gpu_b_fs_zyx_fsv16_imad__u8", "a"),
        layer("Convolution", "f16", "convolution_gpu_bfyx_f16__f16", "b"),
        layer("FullyConnected", "i8", "fully_connected_gpu_bfyx_ref__i8", "c"),
        layer("Eltwise", "f16", "eltwise_ref__f16", "d"),
    )
    driver = FakeDriver(adls=offers(device("alder-lake"), *layers, is_quantized=True))
    build = compile_with(driver, vendors, "alder-lake")
    found = [(d.code, d.layer) for d in build.diagnostics]
    assert found == [
        ("GPU_FLOAT_LAYER", "b"),
        ("GPU_REFERENCE_KERNEL", "c"),
        ("GPU_REFERENCE_KERNELS", None),
    ]
    assert (build.details["mac_layers"], build.details["mac_layers_int8"]) == ("3", "2")
    assert build.details["mac_layers_reference"] == "1"
    assert build.memory_bytes == 1024


def test_quantized_model_without_a_single_int8_layer_gets_one_sentence(vendors: Path):
    layers = [layer("Convolution", "f32", "convolution_x", str(number)) for number in range(50)]
    driver = FakeDriver(adls=offers(device("alder-lake"), *layers, is_quantized=True))
    (found,) = compile_with(driver, vendors, "alder-lake").diagnostics
    assert (found.code, found.layer) == ("GPU_NO_INT8_LAYER", None)


def test_float_model_is_not_blamed_for_float_layers(vendors: Path):
    driver = FakeDriver(adls=offers(device("alder-lake"), layer("Convolution", "f16", "convolution_x")))
    assert compile_with(driver, vendors, "alder-lake").diagnostics == ()


def test_gpu_without_int8_gets_one_plain_sentence(vendors: Path):
    layers = [layer("Convolution", "f16", "convolution_x", str(number)) for number in range(50)]
    driver = FakeDriver(icllp=offers(device("ice-lake"), *layers, is_quantized=True))
    (found,) = compile_with(driver, vendors, "ice-lake").diagnostics
    assert found.code == "GPU_NO_INT8"
    assert "50 of 50 layers run in f16" in found.message


def test_nothing_measured_and_nothing_shipped(vendors: Path):
    build = compile_with(FakeDriver(adls=offers(device("alder-lake"))), vendors, "alder-lake")
    assert build.evidence is Evidence.COMPILED
    assert (build.blob, build.latency_ms, build.compile_ms) == (None, None, None)
    assert not (vendors / "blob").exists()
    assert all(layer.time_us is None for layer in build.layers)


def test_refusal_keeps_the_layer_and_the_figures_that_the_plugin_names():
    said = """Exception from src/inference/src/cpp/core.cpp:117:
Exception from src/inference/src/dev/plugin.cpp:54:
Error has occured for: convolution:block/depthwise
Weights feature maps number(=432) is not equal to: input feature maps number(=144)
Weights/ifm mismatch

"""
    assert reason_of(RuntimeError(said)) == (
        "convolution:block/depthwise; Weights feature maps number(=432) is not equal to: input feature maps "
        "number(=144); Weights/ifm mismatch"
    )


# --------------------------------------------------------------------------- the real driver


def quantized(path: Path) -> Path:
    """Two convolutions with 8-bit quantizers on activations and weights, as NNCF leaves them."""
    generator = np.random.default_rng(0)

    def levels(data: Any, low: float, high: float) -> Any:
        bounds = [ops.constant(np.full((1, 1, 1, 1), each, np.float32)) for each in (low, high)]
        return ops.fake_quantize(data, *bounds, *bounds, 256 if low == 0 else 255)

    data = ops.parameter([1, 32, 16, 16], np.float32, name="x")
    node: Any = data
    for _ in range(2):
        weights = levels(ops.constant(generator.normal(size=(32, 32, 3, 3)).astype(np.float32)), -2.54, 2.54)
        node = ops.convolution(levels(node, 0, 5.1), weights, [1, 1], [1, 1], [1, 1], [1, 1])
        node = ops.relu(node)
    ov.save_model(ov.Model([node], [data], "two"), path, compress_to_fp16=False)
    return path


def real(profile: str) -> GpuToolchain:
    toolchain = GpuToolchain()
    found = toolchain.probe(gpu_of(profile))
    if not found.ok:
        pytest.skip(f"{profile}: {found.reason}; {found.fix}")
    return toolchain


@pytest.mark.offline
@pytest.mark.parametrize(
    ("profile", "precisions"),
    [("skylake", {"f16"}), ("ice-lake", {"f16"}), ("tiger-lake", {"i8", "u8"}), ("alder-lake", {"i8", "u8"})],
)
def test_real_driver_runs_int8_where_the_product_has_it(
    tmp_path: Path, profile: str, precisions: set[str]
) -> None:
    build = real(profile).compile(
        quantized(tmp_path / "two.xml"),
        gpu_of(profile),
        properties=NONE,
        output=tmp_path / "blob",
        timeout_s=120,
    )
    convolutions = [layer for layer in build.layers if layer.type == "Convolution"]
    assert len(convolutions) == 2
    assert {layer.precision for layer in convolutions} <= precisions
    assert all(layer.kernel.startswith("convolution") for layer in convolutions)
    assert build.memory_bytes is not None
    assert build.memory_bytes > 0
    codes = {found.code for found in build.diagnostics}
    assert ("GPU_NO_INT8" in codes) is (precisions == {"f16"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.bin", "two.xml"]


@pytest.mark.offline
def test_real_driver_refuses_an_operation_it_lacks(tmp_path: Path):
    toolchain = real("alder-lake")
    data = ops.parameter([1, 4, 4], np.float32, name="x")
    inverse = ov.opset14.inverse(data, adjoint=False)
    ov.save_model(ov.Model([inverse], [data], "inverse"), tmp_path / "m.xml")
    with pytest.raises(ToolchainRefused, match="Inverse"):
        toolchain.compile(
            tmp_path / "m.xml",
            gpu_of("alder-lake"),
            properties=NONE,
            output=tmp_path / "blob",
            timeout_s=120,
        )


@pytest.mark.offline
def test_real_driver_is_not_trusted_with_a_name_it_does_not_know(tmp_path: Path):
    toolchain = real("alder-lake")
    spec = gpu_of("alder-lake")
    assert isinstance(spec.offline, GpuOffline)
    unknown = spec.model_copy(update={"offline": spec.offline.model_copy(update={"families": ("xyzzy",)})})
    assert not toolchain.probe(unknown).ok


@pytest.mark.offline
def test_real_driver_that_crashes_is_survived_and_the_sibling_asked(tmp_path: Path):
    toolchain = real("alder-lake-p")
    spec = gpu_of("alder-lake-p")
    build = toolchain.compile(
        quantized(tmp_path / "two.xml"), spec, properties=NONE, output=tmp_path / "blob", timeout_s=120
    )
    if not build.details["driver"].startswith("22.43"):
        pytest.skip(f"driver {build.details['driver']} knows adlp; 22.43 crashes")
    assert build.details["driver_family"] == "tgllp"
    assert isinstance(spec.offline, GpuOffline)
    crashing = spec.offline.model_copy(update={"families": ("adlp",)})
    with pytest.raises(ToolchainCrashed, match=r"SIGFPE.*says nothing about the model"):
        toolchain.compile(
            tmp_path / "two.xml",
            spec.model_copy(update={"offline": crashing}),
            properties=NONE,
            output=tmp_path / "blob",
            timeout_s=120,
        )


@pytest.mark.offline
def test_real_driver_is_ended_at_the_time_limit_and_compiles_the_same_twice(tmp_path: Path):
    toolchain, spec = real("alder-lake"), gpu_of("alder-lake")
    model = quantized(tmp_path / "two.xml")

    def build(timeout_s: float) -> Build:
        return toolchain.compile(model, spec, properties=NONE, output=tmp_path / "blob", timeout_s=timeout_s)

    with pytest.raises(ToolchainTimeout, match="says nothing about the model"):
        build(0.05)
    assert build(120).layers == build(120).layers
