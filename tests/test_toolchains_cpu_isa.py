from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openvino import opset13 as ops

from vinoopt.errors import ToolchainCrashed, ToolchainMissing, ToolchainRefused, ToolchainTimeout
from vinoopt.hardware.detect import cpu_flags
from vinoopt.hardware.isa import ISAS
from vinoopt.hardware.profile import load_profile
from vinoopt.records import Device, DeviceSpec, Evidence, RuntimeProperties
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.cpu_isa import BlockTimesJob, CpuIsaToolchain, LatencyJob, PredictJob
from vinoopt.toolchains.process import ChildExit, ChildReply

ALL = frozenset().union(*(isa.flags for isa in ISAS.values()))
NONE = RuntimeProperties()
ONE_THREAD = RuntimeProperties.of({"INFERENCE_NUM_THREADS": 1})


def cpu_of(profile: str) -> DeviceSpec:
    return load_profile(profile).devices[Device.CPU]


def real(profile: str) -> CpuIsaToolchain:
    toolchain = CpuIsaToolchain()
    found = toolchain.probe(cpu_of(profile))
    if not found.ok:
        pytest.skip(found.reason)
    return toolchain


def levels(data: Any, low: float, high: float) -> Any:
    bounds = [ops.constant(np.full((1,) * 4, each, np.float32)) for each in (low, high)]
    return ops.fake_quantize(data, *bounds, *bounds, 256 if low == 0 else 255)


def save(node: Any, data: Any, path: Path) -> Path:
    ov.save_model(ov.Model([node], [data], path.stem), path, compress_to_fp16=False)
    return path


def convolution(path: Path, *, quantized: bool, channels: int = 64) -> Path:
    data = ops.parameter([1, channels, 16, 16], np.float32, name="x")
    values = np.random.default_rng(0).normal(size=(channels, channels, 3, 3)).astype(np.float32)
    weights: Any = ops.constant(values)
    fed: Any = data
    if quantized:
        fed, weights = levels(data, 0, 5.1), levels(weights, -2.54, 2.54)
    node = ops.convolution(fed, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    node.output(0).set_names({"y"})
    return save(node, data, path)


def saturating(path: Path) -> Path:
    """Weights at the ends of their range, so that two products together leave 16 bits."""
    signs = np.where(np.random.default_rng(1).random((32, 64, 1, 1)) < 0.7, 1.27, -1.27).astype(np.float32)
    data = ops.parameter([1, 64, 8, 8], np.float32, name="x")
    node = ops.convolution(
        levels(data, 0, 2.55), levels(ops.constant(signs), -1.27, 1.27), [1, 1], [0, 0], [0, 0], [1, 1]
    )
    node.output(0).set_names({"y"})
    return save(node, data, path)


class FakeChild:
    """Answers with what `answer` makes of the request, and keeps requests and environments."""

    def __init__(self, answer: Callable[[dict[str, Any], str | None], dict[str, Any]]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []

    def __call__(
        self,
        command: str,
        *,
        request: dict[str, Any],
        timeout_s: float,
        env: dict[str, str | None],
        memory_limit_bytes: int,
    ) -> ChildReply:
        self.requests.append(request)
        assert memory_limit_bytes < psutil.virtual_memory().total
        assert env["ONEDNN_MAX_CPU_ISA"] == env["DNNL_MAX_CPU_ISA"]
        ended = ChildExit(name=command, returncode=0, seconds=0.1, peak_memory_bytes=0, stdout="", stderr="")
        return ChildReply(values=self.answer(request, env["ONEDNN_MAX_CPU_ISA"]), exit=ended)


def kernels(*found: tuple[str, str, str], is_quantized: bool = True) -> dict[str, Any]:
    layers = [{"name": f"n{i}", "type": t, "precision": p, "kernel": k} for i, (t, p, k) in enumerate(found)]
    return {"layers": [layers], "is_quantized": is_quantized}


def compile_with(child: FakeChild, profile: str, properties: RuntimeProperties = NONE):
    return CpuIsaToolchain(flags=ALL, run=child).compile(
        Path("m.xml"), cpu_of(profile), properties=properties, output=Path("blob"), timeout_s=9
    )


# --------------------------------------------------------------------------- what this host can run


def test_cap_that_the_host_lacks_is_refused_by_name():
    toolchain = CpuIsaToolchain(flags=ISAS["AVX512_CORE_BF16"].flags)
    found = toolchain.probe(cpu_of("sapphire-rapids"))
    assert not found.ok
    assert found.reason.startswith("CPU_ISA_NOT_ON_HOST")
    assert "amx_tile" in found.reason
    with pytest.raises(ToolchainMissing, match="CPU_ISA_NOT_ON_HOST"):
        toolchain.compile(
            Path("m.xml"), cpu_of("sapphire-rapids"), properties=NONE, output=Path("b"), timeout_s=9
        )


def test_a_weaker_set_with_the_same_sums_stands_in_for_one_that_the_host_lacks():
    weaker = CpuIsaToolchain(flags=ISAS["AVX2_VNNI"].flags)
    assert weaker.probe(cpu_of("lunar-lake")).version == "AVX2_VNNI"
    assert weaker.environment(cpu_of("lunar-lake"))["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"
    assert CpuIsaToolchain(flags=ALL).probe(cpu_of("lunar-lake")).version == "AVX2_VNNI_2"
    assert "avx_vnni" in CpuIsaToolchain(flags=ISAS["AVX2"].flags).probe(cpu_of("lunar-lake")).reason


def test_cap_that_onednn_would_ignore_is_refused():
    spec = cpu_of("skylake")
    assert spec.offline is not None
    odd = spec.model_copy(update={"offline": spec.offline.model_copy(update={"isa_cap": "AVX3"})})
    found = CpuIsaToolchain(flags=ALL).probe(odd)
    assert not found.ok
    assert '"AVX3" is not an instruction set' in found.reason


def test_profile_without_instruction_set():
    spec = cpu_of("skylake").model_copy(update={"offline": None})
    assert "names no instruction set" in CpuIsaToolchain(flags=ALL).probe(spec).reason


# --------------------------------------------------------------------------- how the child is asked


@pytest.mark.parametrize(
    ("profile", "cap", "forced"),
    [
        ("skylake", "AVX2", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}),
        (
            "skylake-sp",
            "AVX512_CORE",
            {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
        ),
        ("alder-lake", "AVX2_VNNI", {"INFERENCE_PRECISION_HINT": "f32"}),
        ("cascade-lake", "AVX512_CORE_VNNI", {"INFERENCE_PRECISION_HINT": "f32"}),
        ("sapphire-rapids", "AVX512_CORE_AMX", {"INFERENCE_PRECISION_HINT": "bf16"}),
    ],
)
def test_what_openvino_would_take_from_this_host_is_forced(profile: str, cap: str, forced: dict[str, str]):
    seen: list[str | None] = []

    def answer(request: dict[str, Any], isa_cap: str | None) -> dict[str, Any]:
        seen.append(isa_cap)
        return kernels()

    child = FakeChild(answer)
    wanted = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "bf16", "NUM_STREAMS": "1"})
    build = compile_with(child, profile, wanted)
    assert seen == [cap]
    assert child.requests[0]["properties"] == {"NUM_STREAMS": "1", **forced}
    assert build.properties.as_dict() == {"NUM_STREAMS": "1", **forced}


def test_cap_without_effect_is_noticed():
    child = FakeChild(lambda request, cap: kernels(("Convolution", "u8", "brgconv_avx512_I8")))
    with pytest.raises(ToolchainMissing, match="does not obey the cap AVX2: n0 runs brgconv_avx512_I8"):
        compile_with(child, "skylake")


@pytest.mark.parametrize("profile", ["skylake", "alder-lake"])
def test_own_kernels_of_openvino_may_be_wider(profile: str):
    found = (("MVN", "f32", "jit_avx512_f32"), ("Convolution", "u8", "jit_avx2_I8"))
    assert compile_with(FakeChild(lambda request, cap: kernels(*found)), profile).diagnostics == ()


def test_layers_outside_the_cap_are_told():
    child = FakeChild(
        lambda request, cap: kernels(("FullyConnected", "f32", "gemm_mlas_f32"), is_quantized=False)
    )
    (found,) = compile_with(child, "skylake").diagnostics
    assert found.code == "CPU_ISA_NOT_CAPPED"
    assert compile_with(child, "cascade-lake").diagnostics == ()


def test_float_and_reference_layers_of_a_quantized_model_are_named():
    child = FakeChild(
        lambda request, cap: kernels(
            ("Convolution", "u8", "jit_avx2_I8"),
            ("Convolution", "f32", "jit_avx2_dw_f32"),
            ("MatMul", "u8", "ref_any_I8"),
        )
    )
    build = compile_with(child, "skylake")
    assert [(d.code, d.layer) for d in build.diagnostics] == [
        ("CPU_FLOAT_LAYER", "n1"),
        ("CPU_REFERENCE_KERNEL", "n2"),
    ]
    assert build.details["mac_layers_int8"] == "2"


def test_quantized_model_without_a_single_int8_layer_gets_one_sentence():
    layers = [("Convolution", "f32", "brgconv_avx2_f32")] * 30
    (found,) = compile_with(FakeChild(lambda request, cap: kernels(*layers)), "skylake").diagnostics
    assert (found.code, found.layer) == ("CPU_NO_INT8_LAYER", None)
    plain = FakeChild(lambda request, cap: kernels(*layers, is_quantized=False))
    assert compile_with(plain, "skylake").diagnostics == ()


def test_error_under_the_cap_alone_is_an_artefact():
    def answer(request: dict[str, Any], cap: str | None) -> dict[str, Any]:
        return kernels() if cap is None else {"compile_error": "bad combination"}

    build = compile_with(FakeChild(answer), "elkhart-lake")
    (found,) = build.diagnostics
    assert found.code == "CPU_ISA_CAP_ARTEFACT"
    assert "bad combination" in found.message
    assert build.evidence is Evidence.NOT_CHECKED
    job = LatencyJob(models=(Path("a.xml"),), properties=(NONE,))
    with pytest.raises(ToolchainCrashed, match="CPU_ISA_CAP_ARTEFACT"):
        CpuIsaToolchain(flags=ALL, run=FakeChild(answer)).run_capped(cpu_of("elkhart-lake"), job, timeout_s=9)


def test_error_with_and_without_the_cap_is_a_refusal():
    def answer(request: dict[str, Any], cap: str | None) -> dict[str, Any]:
        return {"compile_error": "unsupported operation"}

    with pytest.raises(ToolchainRefused, match="unsupported operation"):
        compile_with(FakeChild(answer), "skylake")


# --------------------------------------------------------------------------- the real child


@pytest.mark.parametrize(
    ("profile", "word"),
    [("skylake", "avx2"), ("alder-lake", "avx2"), ("skylake-sp", "avx512"), ("elkhart-lake", "sse42")],
)
def test_kernels_are_those_of_the_cap(tmp_path: Path, profile: str, word: str):
    build = real(profile).compile(
        convolution(tmp_path / "m.xml", quantized=True),
        cpu_of(profile),
        properties=ONE_THREAD,
        output=tmp_path / "blob",
        timeout_s=60,
    )
    (layer,) = [layer for layer in build.layers if layer.type == "Convolution"]
    assert word in layer.kernel
    assert layer.precision in ("u8", "i8")
    assert build.evidence is Evidence.COMPILED
    assert (build.blob, build.latency_ms) == (None, None)


def test_latencies_come_raw_and_interleaved(tmp_path: Path):
    models = (
        convolution(tmp_path / "small.xml", quantized=False, channels=16),
        convolution(tmp_path / "large.xml", quantized=False, channels=128),
    )
    job = LatencyJob(models=models, rounds=4, round_ms=4.0, warmup=3, properties=(ONE_THREAD, ONE_THREAD))
    run = real("skylake").run_capped(cpu_of("skylake"), job, timeout_s=60)
    small, large = ([each for rounds in model for each in rounds] for model in run.samples_ms)
    assert [len(model) for model in run.samples_ms] == [4, 4]
    assert min(small + large) > 0
    assert len(small) > len(large)  # as many as fit into a round
    # 64 times the products; a factor of 4 leaves room for a busy machine.
    assert np.median(large) > 4 * np.median(small)
    assert run.isa_cap == "AVX2"
    assert len(run.layers) == 2


def test_time_limit_ends_the_child_and_outputs_are_the_same_in_every_run(tmp_path: Path):
    model = convolution(tmp_path / "m.xml", quantized=True)
    calls = tmp_path / "calls.npz"
    write_calls(calls, [{"x": np.random.default_rng(0).random((1, 64, 16, 16), dtype=np.float32)}])

    def outputs(name: str, timeout_s: float) -> np.ndarray:
        job = PredictJob(model=model, calls=calls, outputs=tmp_path / name, properties=ONE_THREAD)
        real("skylake").run_capped(cpu_of("skylake"), job, timeout_s=timeout_s)
        return next(iter(read_calls(tmp_path / name)))["y"]

    with pytest.raises(ToolchainTimeout, match="says nothing about the model"):
        outputs("none.npz", 0.05)
    np.testing.assert_array_equal(outputs("one.npz", 60), outputs("two.npz", 60))


def test_outputs_under_the_cap_are_those_of_the_model(tmp_path: Path):
    path = convolution(tmp_path / "m.xml", quantized=False)
    generator = np.random.default_rng(2)
    calls = [{"x": generator.random((1, 64, 16, 16), dtype=np.float32)} for _ in range(3)]
    write_calls(tmp_path / "in.npz", calls)
    job = PredictJob(model=path, calls=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    run = real("skylake").run_capped(cpu_of("skylake"), job, timeout_s=60)
    assert run.calls == 3
    here = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for call, found in zip(calls, read_calls(tmp_path / "out.npz"), strict=True):
        # Sums of 576 products in another order: a few units in the last place of the largest.
        np.testing.assert_allclose(found["y"], here(call)["y"], atol=1e-3)


def test_int8_saturates_without_vnni_and_only_there(tmp_path: Path):
    path = saturating(tmp_path / "m.xml")
    inputs = np.random.default_rng(3).uniform(1.5, 2.5, (1, 64, 8, 8)).astype(np.float32)
    write_calls(tmp_path / "in.npz", [{"x": inputs}])
    outputs = {}
    for profile in ("skylake", "alder-lake"):
        out = tmp_path / f"{profile}.npz"
        job = PredictJob(model=path, calls=tmp_path / "in.npz", outputs=out)
        real(profile).run_capped(cpu_of(profile), job, timeout_s=60)
        outputs[profile] = next(iter(read_calls(out)))["y"]
    data, weights = np.round(inputs / 0.01) * 0.01, _weights_of(path)
    exact = np.einsum("oc,nchw->nohw", weights, data)
    np.testing.assert_allclose(outputs["alder-lake"], exact, atol=0.02)  # one step of the quantizer
    assert np.abs(outputs["skylake"] - exact).max() > 1.0


def _weights_of(path: Path) -> Any:
    model = ov.Core().read_model(path)
    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    return next(op.data for op in constants if op.data.shape == (32, 64, 1, 1))[:, :, 0, 0]


def test_blocks_are_timed_under_the_cap(tmp_path: Path):
    data = ops.parameter([1, 32, 16, 16], np.float32, name="x")
    node: Any = data
    for name, kernel in (("small", 1), ("large", 5)):
        weights = ops.constant(np.ones((32, 32, kernel, kernel), np.float32))
        pad = [kernel // 2, kernel // 2]
        node = ops.convolution(node, weights, [1, 1], pad, pad, [1, 1], name=name)
    path = save(node, data, tmp_path / "m.xml")
    write_calls(tmp_path / "in.npz", [{"x": np.ones((1, 32, 16, 16), np.float32)}])
    job = BlockTimesJob(
        model=path, calls=tmp_path / "in.npz", blocks=("small", "large"), properties=ONE_THREAD
    )
    times = real("skylake").run_capped(cpu_of("skylake"), job, timeout_s=60).times_us
    assert set(times) == {"small", "large"}
    assert times["large"] > 2 * times["small"] > 0  # 25 times the products


def test_dynamic_input_needs_samples(tmp_path: Path):
    data = ops.parameter([-1, 8], np.float32, name="x")
    path = save(ops.relu(data), data, tmp_path / "m.xml")
    toolchain, spec = real("skylake"), cpu_of("skylake")
    with pytest.raises(ToolchainRefused, match="has no fixed shape"):
        toolchain.run_capped(spec, LatencyJob(models=(path,), properties=(NONE,)), timeout_s=60)
    write_calls(tmp_path / "in.npz", [{"x": np.ones((3, 8), np.float32)}])
    job = LatencyJob(models=(path,), properties=(NONE,), rounds=1, round_ms=0.0, calls=tmp_path / "in.npz")
    ((samples,),) = toolchain.run_capped(spec, job, timeout_s=60).samples_ms
    assert len(samples) == 1


def test_this_host_is_the_reason_for_every_skip():
    if not cpu_flags():
        pytest.skip("this system lists no CPU flags")
    toolchain = CpuIsaToolchain()
    for name in ("skylake", "alder-lake", "skylake-sp", "sapphire-rapids"):
        found = toolchain.probe(cpu_of(name))
        assert found.ok or found.reason.startswith("CPU_ISA_NOT_ON_HOST")


def test_model_that_no_cpu_plugin_compiles_is_refused(tmp_path: Path):
    (tmp_path / "m.xml").write_text("<net/>", encoding="utf-8")
    with pytest.raises(ToolchainRefused, match=r"cannot compile m\.xml"):
        real("skylake").compile(
            tmp_path / "m.xml", cpu_of("skylake"), properties=NONE, output=tmp_path / "blob", timeout_s=60
        )


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path):
    path = convolution(tmp_path / "m.xml", quantized=False)
    write_calls(tmp_path / "in.npz", [{"x": np.ones((1, 3, 16, 16), np.float32)}])
    job = PredictJob(model=path, calls=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    with pytest.raises(ToolchainRefused, match="cannot run the model"):
        real("skylake").run_capped(cpu_of("skylake"), job, timeout_s=60)


# --------------------------------------------------------------------------- files of calls


@given(
    calls=st.lists(
        st.dictionaries(
            st.sampled_from(["x", "a/b", "0", "x:1"]),
            # An OpenVINO model compiled earlier in this process may have switched subnormal numbers off.
            hnp.arrays(
                np.float32, hnp.array_shapes(min_dims=0), elements=st.floats(width=32, allow_subnormal=False)
            )
            | hnp.arrays(st.sampled_from([np.int64, np.bool_]), hnp.array_shapes(min_dims=0)),
            min_size=1,
        ),
        max_size=12,
    )
)
def test_calls_come_back_in_order(tmp_path_factory: pytest.TempPathFactory, calls: list[dict[str, Any]]):
    path = tmp_path_factory.mktemp("calls") / "calls.npz"
    assert write_calls(path, calls) == len(calls)
    back = list(read_calls(path))
    assert [set(call) for call in back] == [set(call) for call in calls]
    for call, found in zip(calls, back, strict=True):
        for name in call:
            np.testing.assert_array_equal(found[name], call[name])
