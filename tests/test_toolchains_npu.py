"""The NPU toolchain with compilers that answer, refuse, crash, hang or lie; none of them needs an NPU."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops

from vinoopt.errors import (
    ModelError,
    ShapeError,
    TargetError,
    ToolchainCrashed,
    ToolchainError,
    ToolchainMissing,
    ToolchainRefused,
    ToolchainTimeout,
)
from vinoopt.records import (
    Availability,
    Device,
    DeviceSpec,
    Evidence,
    NpuOffline,
    Precision,
    RuntimeProperties,
)
from vinoopt.toolchains import npu_preflight
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS
from vinoopt.toolchains.npu import NpuToolchain
from vinoopt.toolchains.npu_routes import (
    NpuPlaces,
    Route,
    RouteOption,
    find_routes,
    harness_sha256,
    openvino_version,
)
from vinoopt.toolchains.npu_setup import prepare
from vinoopt.toolchains.npu_tuning import tune_npu

NONE = RuntimeProperties()
SPARSITY_OFF = RuntimeProperties.of({"NPU_COMPILATION_MODE_PARAMS": "enable-weights-sparsity=false"})

# A compiler that takes the real one's command line. `behave` says what it does.
FAKE = """
import json, os, sys, time
from pathlib import Path

options = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
blob = Path(sys.argv[sys.argv.index("-o") + 1])
runs = Path({runs!r})
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
run = len(runs.read_text())
params = options.get("NPU_COMPILATION_MODE_PARAMS", "")

def schedule(total_us, name, engine):
    statistics = {{"total duration": total_us, "DPU duration": total_us, "SW duration": 0, "DMA duration": 0,
                  "DMA duration without overlaps": 0}}
    task = {{"name": name, "cat": engine, "ph": "X", "ts": 0, "dur": total_us,
            "args": {{"Input tensors": "[1x16x8x8xf16]"}}}}
    Path("compileTimeScheduleTrace.json").write_text(json.dumps(
        {{"traceEvents": [task], "taskStatistics": statistics, "workpoint": {{"freq": 1850.0}}}}))

def answer(**values):
    print("@@" + json.dumps(values), flush=True)

def succeed(total_us=100.0, sparse=0, unmodelled="", tiles=4, integers=300,
            task=("conv?t_Convolution/cluster_0", "DPU")):
    assert Path(sys.argv[1]).read_bytes(), "no model"
    blob.write_bytes(b"blob of " + json.dumps(sorted(options.items())).encode())
    schedule(total_us, *task)
    print("[INFO] 22:00:00.1 [x] Current compiler ID: 2026.5.0-1")
    print(f"[INFO] 22:00:00.1 [x]   Sparse weights - {{sparse}} ops")
    print("[INFO] 22:00:00.1 [x]   Total number of FPOps: 100")
    print(f"[INFO] 22:00:00.1 [x]   Total number of INTOps: {{integers}}")
    if unmodelled:
        print(f"[WARNING] SHAVE operations are unsupported by VPUNN, which can: [builtin_{{unmodelled}}]")
    answer(ok=True, openvino="2026.4.1", compile_ms=12, properties={{
        "RUNTIME_REQUIREMENTS": f"desc=[compiler=8.4;npu={{options['NPU_PLATFORM']}};t={{tiles}}]"}})

{behave}
"""


@pytest.fixture
def fake(tmp_path: Path):
    """Builds a toolchain around a fake compiler; `runs()` counts its runs."""
    runs_file = tmp_path / "runs"

    def make(behave: str, **changes) -> NpuToolchain:
        script = tmp_path / "fake_compiler.py"
        script.write_text(FAKE.format(runs=str(runs_file), behave=behave), encoding="utf-8")
        route = Route(
            name="fake", version="1.0", command=(sys.executable, str(script)), links_model=True, **changes
        )
        option = RouteOption(
            availability=Availability(ok=True, name=route.name, version=route.version), route=route
        )
        return NpuToolchain(
            places=NpuPlaces(cache=tmp_path / "cache"), find=lambda platform, places: (option,)
        )

    make.runs = lambda: len(runs_file.read_text()) if runs_file.exists() else 0
    return make


@pytest.fixture
def ir(tmp_path: Path) -> Path:
    return save(convolution(), tmp_path / "model.xml")


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


def convolution(shape=(1, 16, 8, 8)) -> ov.Model:
    image = ops.parameter(list(shape), np.float32, name="image")
    image.output(0).set_names({"image"})
    weights = ops.constant(np.full((16, 16, 1, 1), 0.1, np.float32))
    node = ops.convolution(image, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    node.set_friendly_name("conv")
    return ov.Model([ops.result(node)], [image], "small")


def save(model: ov.Model, path: Path) -> Path:
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def compile_with(toolchain: NpuToolchain, ir: Path, properties=NONE, timeout_s=60.0, platform="4000"):
    return toolchain.compile(
        ir,
        npu(platform),
        properties=properties,
        output=ir.with_name("model.blob"),
        timeout_s=timeout_s,
    )


# --------------------------------------------------------------------------- answers


def test_build_says_what_was_modelled_and_by_what(fake, ir):
    build = compile_with(fake("succeed(unmodelled='TopK')"), ir)
    assert build.evidence is Evidence.MODELLED
    assert build.latency_ms == 0.1
    assert build.is_lower_bound
    assert [layer.name for layer in build.layers] == ["conv"]
    assert build.blob == "model.blob"
    assert ir.with_name("model.blob").read_bytes().startswith(b"blob of")
    assert build.details["tiles"] == "4"
    assert build.details["int_share"] == "0.7500"
    assert "compiler=8.4;npu=4000" in build.details[RUNTIME_REQUIREMENTS]
    assert "VPUNN" in build.details["source"]
    assert "2 to 3 times higher" in build.details["source"]
    [warning] = build.diagnostics
    assert warning.code == "NPU_ESTIMATE_INCOMPLETE"
    assert "TopK" in warning.message


def test_properties_reach_the_compiler_beside_the_trace_options(fake, ir):
    properties = RuntimeProperties.of(
        {"NPU_TILES": "2", "NPU_COMPILATION_MODE_PARAMS": "optimization-level=3"}
    )
    build = compile_with(fake("succeed()"), ir, properties, platform="5010")
    seen = dict(json.loads(ir.with_name("model.blob").read_bytes().removeprefix(b"blob of ")))
    assert seen["NPU_PLATFORM"] == "5010"
    assert seen["NPU_TILES"] == "2"
    assert seen["NPU_COMPILATION_MODE_PARAMS"].startswith("optimization-level=3 enable-schedule-trace=true")
    assert build.properties == properties


def test_driver_route_models_no_latency(fake, ir):
    build = compile_with(fake("options['NPU_PLATFORM'] = 'here'\nsucceed()", has_cost_model=False), ir)
    assert build.evidence is Evidence.COMPILED
    assert build.latency_ms is None
    assert build.layers == ()
    with pytest.raises(ToolchainMissing, match="models no latency"):
        fake("succeed()", has_cost_model=False).estimate_latency(ir, npu(), NONE)


@pytest.mark.parametrize(("integers", "told"), [(300, False), (20, True)])
def test_quantized_model_that_runs_in_float_is_told(fake, tmp_path, integers, told):
    image = ops.parameter([1, 16, 8, 8], np.float32, name="image")
    bounds = [ops.constant(np.float32(value)) for value in (0, 1, 0, 1)]
    quantized = ops.fake_quantize(image, *bounds, 256)
    ir = save(ov.Model([ops.result(quantized)], [image], "q"), tmp_path / "q.xml")
    build = compile_with(fake(f"succeed(integers={integers})"), ir)
    assert [each.code for each in build.diagnostics] == (["NPU_NOT_INT8"] if told else [])


def test_float_model_is_not_asked_for_integers(fake, ir):
    assert compile_with(fake("succeed(integers=0)"), ir).diagnostics == ()


def test_quantizers_that_run_on_their_own_are_told(fake, ir):
    build = compile_with(fake("succeed(task=('Relu_1/fq_output_0?t_FakeQuantize/x', 'Shave'))"), ir)
    [warning] = build.diagnostics
    assert warning.code == "NPU_LOOSE_QUANTIZERS"
    assert "1 quantizers" in warning.message
    assert "100% of the latency" in warning.message
    assert "preset performance" in warning.message


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        ("answer(ok=False, stage='compile', message='Unique is not supported')", ToolchainRefused, "Unique"),
        ("answer(ok=False, stage='properties', message='no such key')", ToolchainRefused, "no such key"),
        ("answer(ok=False, stage='core', message='no plugin')", ToolchainCrashed, "could not be started"),
        (
            "answer(ok=False, stage='compile', message='VCL compiler loading failed, aborting')",
            ToolchainMissing,
            "library cannot be used",
        ),
        (
            "print('[ERROR] 1:2 [x] Upper bounds are not specified', flush=True); os._exit(5)",
            ToolchainRefused,
            "exit code 5 after complaining: Upper bounds",
        ),
        (
            "print('[ERROR] 1:2 [x] Upper bounds are not specified', flush=True); os.abort()",
            ToolchainCrashed,
            "died with SIGABRT after complaining: Upper bounds",
        ),
        ("os._exit(0)", ToolchainCrashed, "exit code 0 and no answer.*twice"),
        ("os.abort()", ToolchainCrashed, "SIGABRT and no answer"),
        ("print('@@{broken', flush=True)", ToolchainCrashed, "no answer"),
        ("sys.stderr.write('x' * 3_000_000); os._exit(3)", ToolchainCrashed, "exit code 3"),
        (
            "succeed(); os.remove('compileTimeScheduleTrace.json')",
            ToolchainCrashed,
            "left no readable compileTimeScheduleTrace",
        ),
        ("succeed(); blob.unlink()", ToolchainCrashed, "wrote no blob"),
        ("time.sleep(600)", ToolchainTimeout, "within 3 s"),
    ],
)
def test_failures_of_the_compiler(fake, ir, behave, error, message):
    with pytest.raises(error, match=message):
        compile_with(fake(behave), ir, timeout_s=3 if "sleep" in behave else 60)
    assert not ir.with_name("model.blob").exists()


def test_silent_end_is_tried_once_more(fake, ir):
    build = compile_with(fake("os._exit(0) if run == 1 else succeed()"), ir)
    assert build.latency_ms == 0.1
    assert fake.runs() == 2


def test_refusal_is_not_tried_again(fake, ir):
    with pytest.raises(ToolchainRefused):
        compile_with(fake("answer(ok=False, stage='compile', message='no')"), ir)
    assert fake.runs() == 1


def test_one_bad_model_does_not_stop_the_next(fake, ir):
    toolchain = fake("os.abort() if run <= 2 else succeed()")
    with pytest.raises(ToolchainCrashed):
        compile_with(toolchain, ir)
    assert compile_with(toolchain, ir).latency_ms == 0.1


# --------------------------------------------------------------------------- weight sparsity

SPARSE_COSTS_MORE = "succeed(60.0) if 'sparsity=false' in params else succeed(100.0, sparse=4)"
SPARSE_COSTS_LESS = "succeed(140.0) if 'sparsity=false' in params else succeed(100.0, sparse=4)"


def test_dense_weights_are_kept_where_they_are_modelled_faster(fake, ir):
    build = compile_with(fake(SPARSE_COSTS_MORE), ir)
    assert build.latency_ms == 0.06
    assert build.properties == SPARSITY_OFF
    assert b"sparsity=false" in ir.with_name("model.blob").read_bytes()
    [note] = [each for each in build.diagnostics if each.code == "NPU_SPARSITY_OFF"]
    assert "0.06 ms instead of 0.1 ms" in note.message


def test_sparse_weights_are_kept_where_they_are_modelled_faster(fake, ir):
    build = compile_with(fake(SPARSE_COSTS_LESS), ir)
    assert build.latency_ms == 0.1
    assert build.properties == NONE
    assert b"sparsity=false" not in ir.with_name("model.blob").read_bytes()


def test_sparse_build_stands_where_the_dense_one_fails(fake, ir):
    behave = "os._exit(1) if 'sparsity=false' in params else succeed(100.0, sparse=4)"
    build = compile_with(fake(behave), ir)
    assert build.latency_ms == 0.1
    assert [each.code for each in build.diagnostics] == ["NPU_SPARSITY_UNDECIDED"]


def test_explicit_weight_sparsity_is_obeyed(fake, ir):
    wanted = RuntimeProperties.of({"NPU_COMPILATION_MODE_PARAMS": "enable-weights-sparsity=true"})
    build = compile_with(fake(SPARSE_COSTS_MORE), ir, wanted)
    assert build.latency_ms == 0.1
    assert fake.runs() == 1


# --------------------------------------------------------------------------- estimates


def test_estimate_is_kept_by_content(fake, ir, tmp_path):
    toolchain = fake("succeed()")
    first = toolchain.estimate_latency(ir, npu(), NONE)
    assert first.latency_ms == 0.1
    assert first.layer_us["conv"] == 100.0
    assert toolchain.estimate_latency(ir, npu(), NONE) == first
    assert fake.runs() == 1
    toolchain.estimate_latency(ir, npu("5010"), NONE)
    toolchain.estimate_latency(ir, npu(), RuntimeProperties.of({"NPU_TILES": "2"}))
    assert fake.runs() == 3
    save(convolution((1, 16, 9, 9)), ir)
    toolchain.estimate_latency(ir, npu(), NONE)
    assert fake.runs() == 4


def test_estimates_of_another_library_under_the_same_version_are_made_anew(fake, ir):
    fake("succeed()", compiler_stamp="1-1").estimate_latency(ir, npu(), NONE)
    fake("succeed()", compiler_stamp="1-1").estimate_latency(ir, npu(), NONE)
    assert fake.runs() == 1
    fake("succeed()", compiler_stamp="1-2").estimate_latency(ir, npu(), NONE)
    assert fake.runs() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="routes of Linux")
def test_stamp_follows_the_library(tmp_path):
    names = ("libopenvino_intel_npu_compiler.so", "libopenvino_intel_npu_compiler_loader.so")
    stamps = []
    for content in (b"one", b"another"):
        for name in names:
            (tmp_path / name).write_bytes(content)
        places = NpuPlaces(cache=tmp_path, compiler_folder=tmp_path)
        (route,) = [o.route for o in find_routes("9999", places) if o.route and o.route.shadowed_library]
        stamps.append(route.compiler_stamp)
    assert stamps[0] != stamps[1]


def test_failed_estimate_is_not_kept(fake, ir):
    toolchain = fake("os._exit(1) if run <= 2 else succeed()")
    with pytest.raises(ToolchainCrashed):
        toolchain.estimate_latency(ir, npu(), NONE)
    assert toolchain.estimate_latency(ir, npu(), NONE).latency_ms == 0.1


def test_estimate_tells_what_it_was_made_with(fake, ir):
    assert fake(SPARSE_COSTS_MORE).estimate_latency(ir, npu(), NONE).properties == SPARSITY_OFF


# --------------------------------------------------------------------------- tuning


def test_tuning_combines_what_helps(fake, ir):
    behave = (
        "us = {'1': 90.0, '2': 70.0, '3': 80.0}.get(options.get('NPU_TILES'), 100.0)\n"
        "succeed(us - 5 * ('activation-sparsity=true' in params))"
    )
    tuning = tune_npu(fake(behave), ir, npu(tiles=("1", "2", "3")))
    assert tuning.properties == RuntimeProperties.of(
        {"NPU_TILES": "2", "NPU_COMPILATION_MODE_PARAMS": "enable-activation-sparsity=true"}
    )
    assert tuning.estimate.latency_ms == pytest.approx(0.065)
    assert tuning.speedup == pytest.approx(100 / 65)
    assert [trial.option for trial in tuning.trials][:4] == ["default", "tiles", "tiles", "tiles"]


def test_default_wins_ties(fake, ir):
    tuning = tune_npu(fake("succeed()"), ir, npu(tiles=("1", "2")))
    assert tuning.properties == NONE
    assert tuning.speedup == 1.0


def test_refused_option_is_recorded_and_passed_over(fake, ir):
    behave = (
        "answer(ok=False, stage='compile', message='bad tiles') if options.get('NPU_TILES') == '9'\n"
        "else succeed(50.0 if 'NPU_TILES' in options else 100.0)"
    ).replace("\n", " ")
    tuning = tune_npu(fake(behave), ir, npu(tiles=("9", "2")))
    assert tuning.properties == RuntimeProperties.of({"NPU_TILES": "2"})
    assert "bad tiles" in tuning.trials[1].error


def test_variant_that_leaves_more_uncounted_cannot_win(fake, ir):
    behave = "succeed(10.0, unmodelled='TopK') if 'NPU_TILES' in options else succeed(100.0)"
    assert tune_npu(fake(behave), ir, npu(tiles=("2",))).properties == NONE


def test_failure_of_the_default_is_the_callers(fake, ir):
    with pytest.raises(ToolchainRefused):
        tune_npu(fake("answer(ok=False, stage='compile', message='no')"), ir, npu(tiles=("2",)))


# --------------------------------------------------------------------------- pre-flight


def test_open_dimensions_are_named_with_the_flag_that_fixes_them(fake, tmp_path):
    ir = save(convolution((-1, 16, -1, 8)), tmp_path / "open.xml")
    with pytest.raises(
        ShapeError, match=r'input "image" is open in dimensions 0.*--shape "image\[1,16,\d+,8\]"'
    ):
        compile_with(fake("succeed()"), ir)
    assert fake.runs() == 0


def test_known_refusal_names_layer_and_fix_and_spares_the_compiler(fake, tmp_path):
    values = ops.parameter([4, 16], np.float32, name="values")
    node = ops.unique(values)
    node.set_friendly_name("distinct")
    ir = save(ov.Model([ops.result(node.output(0))], [values], "u"), tmp_path / "u.xml")
    with pytest.raises(ToolchainRefused, match=r'layer "distinct".*no Unique.*CPU'):
        compile_with(fake("succeed()"), ir)
    assert fake.runs() == 0


def findings(model: ov.Model, platform: str = "4000"):
    return [(each.code, each.severity, each.layer) for each in npu_preflight.check(model, platform)]


def test_operator_known_to_one_platform_only():
    values = ops.parameter([4, 16], np.float32, name="values")
    node = ops.tan(values)
    node.set_friendly_name("tan")
    model = ov.Model([ops.result(node)], [values], "t")
    assert findings(model, "4000") == [("NPU_OPERATOR", "error", "tan")]
    assert findings(model, "5010") == []


def test_operator_of_a_set_that_the_compiler_does_not_read():
    values = ops.parameter([1, 4, 8, 8], np.float32, name="values")
    node = ov.opset14.max_pool(values, [1, 1], [1, 1], [0, 0], [0, 0], [2, 2])
    node.set_friendly_name("pool")
    model = ov.Model([ops.result(node.output(0))], [values], "p")
    found = npu_preflight.check(model, "4000", newest_opset=13)
    assert [(each.code, each.severity, each.layer) for each in found] == [("NPU_OPSET", "error", "pool")]
    assert "up to opset13" in found[0].message
    assert npu_preflight.check(model, "4000") == ()


def test_pooling_that_rounds_as_torch_does_is_refused():
    values = ops.parameter([1, 4, 8, 8], np.float32, name="values")
    found = {}
    for rounding in ("ceil", "ceil_torch"):
        node = ov.opset14.avg_pool(values, [2, 2], [0, 0], [0, 0], [3, 3], False, rounding)
        found[rounding] = [each[0] for each in findings(ov.Model([ops.result(node)], [values], "p"))]
    assert found == {"ceil": [], "ceil_torch": ["NPU_OPERATOR"]}


def test_scattering_that_adds_up_is_refused():
    values = ops.parameter([4, 4], np.float32, name="values")
    rows, news = ops.constant(np.array([[1], [2]], np.int32)), ops.constant(np.ones((2, 4), np.float32))
    found = {}
    for reduction in ("none", "sum"):
        node = ops.scatter_nd_update(values, rows, news, reduction)
        found[reduction] = [each[0] for each in findings(ov.Model([ops.result(node)], [values], "s"))]
    assert found == {"none": [], "sum": ["NPU_OPERATOR"]}


def test_operator_refused_in_one_form_only():
    values = ops.parameter([4, 16], np.float32, name="values")
    edges = ops.constant(np.array([0.0, 1.0], np.float32))
    forms = {kind: ops.bucketize(values, edges, kind) for kind in ("i32", "i64")}
    models = {kind: ov.Model([ops.result(node)], [values], kind) for kind, node in forms.items()}
    assert findings(models["i32"]) == []
    assert [each[0] for each in findings(models["i64"])] == ["NPU_OPERATOR"]


@pytest.mark.parametrize("rank", [0, 1, 5, 6])
def test_rank_of_inputs_and_outputs(rank):
    values = ops.parameter([2] * rank, np.float32, name="values")
    values.output(0).set_names({"values"})
    found = findings(ov.Model([ops.result(ops.relu(values))], [values], "r"))
    assert [each[0] for each in found] == (["NPU_RANK"] * 2 if rank > 5 else [])


def test_formats_of_inputs_and_outputs():
    values = ops.parameter([2, 2], np.uint32, name="values")
    wide = ov.Model([ops.result(ops.convert(values, "f64"))], [values], "f")
    assert [each[0] for each in findings(wide, "3720")] == ["NPU_FORMAT", "NPU_FORMAT"]
    assert [each[0] for each in findings(wide, "4000")] == ["NPU_FORMAT"]


@pytest.mark.parametrize(
    ("element", "zero_points", "groups", "words"),
    [
        (ov.Type.u4, True, 4, "per group"),
        (ov.Type.u8, True, 1, "per channel"),
        (ov.Type.i4, False, 4, None),
        (ov.Type.i8, False, 1, None),
    ],
)
def test_asymmetric_weights_are_warned_of(element, zero_points, groups, words):
    model = compressed(element, zero_points=zero_points, groups=groups)
    found = npu_preflight.check(model, "4000")
    npu_preflight.refuse(found)  # a warning does not stop the compilation
    assert [each.code for each in found] == (["NPU_ASYMMETRIC_WEIGHTS"] if words else [])
    if words:
        assert words in found[0].message


def test_zero_points_of_a_convolution_are_per_channel():
    x = ops.parameter([1, 4, 8, 8], np.float32, name="x")
    weights = ops.convert(ops.constant(np.full((8, 4, 3, 3), 130, np.uint8)), np.float32)
    zeros = ops.convert(ops.constant(np.full((8, 1, 1, 1), 128, np.uint8)), np.float32)
    scaled = ops.multiply(ops.subtract(weights, zeros), ops.constant(np.float32(0.1)))
    node = ops.convolution(x, scaled, [1, 1], [1, 1], [1, 1], [1, 1])
    (found,) = npu_preflight.check(ov.Model([ops.result(node)], [x], "c"), "4000")
    assert "zero points per channel" in found.message


def compressed(element: ov.Type, *, zero_points: bool, groups: int) -> ov.Model:
    """A matrix product with compressed weights, as `nncf.compress_weights` leaves it."""
    inputs, outputs = 64, 32
    shape = [outputs, groups, inputs // groups] if groups > 1 else [outputs, inputs]
    scale_shape = [outputs, groups, 1] if groups > 1 else [outputs, 1]
    x = ops.parameter([1, inputs], np.float32, name="x")
    values = [int(value) for value in np.arange(np.prod(shape)) % 7]
    weights = ops.convert(ov.op.Constant(element, ov.Shape(shape), values), "f16")
    if zero_points:
        zeros = ov.op.Constant(element, ov.Shape(scale_shape), [3] * int(np.prod(scale_shape)))
        weights = ops.subtract(weights, ops.convert(zeros, "f16"))
    scaled = ops.multiply(weights, ops.constant(np.full(scale_shape, 0.1, np.float16)))
    flat = ops.reshape(scaled, ops.constant(np.array([outputs, inputs])), False)
    product = ops.matmul(x, ops.convert(flat, "f32"), False, True)
    return ov.Model([ops.result(product)], [x], "compressed")


def test_unreadable_ir_is_a_model_error(fake, tmp_path):
    broken = tmp_path / "broken.xml"
    broken.write_text("<net>", encoding="utf-8")
    with pytest.raises(ModelError, match=r"broken\.xml: OpenVINO cannot read"):
        compile_with(fake("succeed()"), broken)


def test_profile_without_a_platform_is_a_target_error(fake, ir):
    spec = npu().model_copy(update={"offline": None})
    with pytest.raises(TargetError, match="names no NPU platform"):
        fake("succeed()").probe(spec)


# --------------------------------------------------------------------------- routes and installation

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="routes of Linux")


@linux_only
def test_nothing_here_names_every_way(tmp_path, ir):
    toolchain = NpuToolchain(places=NpuPlaces(cache=tmp_path))
    availability = toolchain.probe(npu("9999"))
    assert not availability.ok
    assert "wine is not installed" in availability.reason
    assert "VINOOPT_NPU_COMPILER_DIR is not set" in availability.reason
    assert "doctor --install npu" in availability.fix
    assert len(toolchain.routes(npu())) == 4
    with pytest.raises(ToolchainMissing, match="doctor --install npu"):
        compile_with(toolchain, ir, platform="9999")


def wine_availability(places: NpuPlaces) -> Availability:
    return find_routes("9999", places)[-1].availability


@linux_only
def test_wine_route_needs_an_installation_of_this_version(tmp_path):
    places = NpuPlaces(cache=tmp_path, wine=Path("/usr/bin/wine"))
    assert "not installed for OpenVINO" in wine_availability(places).reason
    places.installation.mkdir(parents=True)
    ready = places.installation / "ready.json"
    ready.write_text(json.dumps({"wine": "wine-8.0", "harness_sha256": "other"}))
    assert "another version of vinoopt" in wine_availability(places).reason
    ready.write_text(json.dumps({"wine": "wine-8.0", "harness_sha256": harness_sha256()}))
    assert wine_availability(places).ok
    assert "wine-8.0" in wine_availability(places).version


@linux_only
def test_compiler_folder_must_hold_both_libraries(tmp_path):
    availability = find_routes("9999", NpuPlaces(cache=tmp_path, compiler_folder=tmp_path))[2].availability
    assert "does not hold libopenvino_intel_npu_compiler.so" in availability.reason


@linux_only
def test_library_from_a_folder_is_opened_without_touching_openvino(tmp_path, ir):
    """The plugin must come as far as opening the very file, here one that is no compiler."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    for name in ("libopenvino_intel_npu_compiler.so", "libopenvino_intel_npu_compiler_loader.so"):
        (folder / name).write_bytes(b"not a library")
    before = sorted(path.name for path in (Path(ov.__file__).parent / "libs").iterdir())
    toolchain = NpuToolchain(places=NpuPlaces(cache=tmp_path, compiler_folder=folder))
    assert toolchain.probe(npu("9999")).name.endswith("VINOOPT_NPU_COMPILER_DIR")
    with pytest.raises(ToolchainMissing, match=r"could not be loaded|cannot be used"):
        compile_with(toolchain, ir)
    assert sorted(path.name for path in (Path(ov.__file__).parent / "libs").iterdir()) == before


@linux_only
def test_prepare_without_wine_says_how_to_get_it(tmp_path):
    with pytest.raises(ToolchainMissing, match="apt-get install"):
        prepare(NpuPlaces(cache=tmp_path))


@linux_only
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("openvino-2020.1.0-cp311-cp311-win_amd64.whl", b"", "must be of the release"),
        ("openvino-{version}-cp311-manylinux_x86_64.whl", b"", "must be of the release"),
        ("openvino-{version}-cp311-cp311-win_amd64.whl", b"not a zip", "cannot be read"),
        ("openvino-{version}-cp311-cp311-win_amd64.whl", None, "does not hold openvino/libs/openvino.dll"),
    ],
)
def test_prepare_refuses_a_wheel_that_is_not_the_right_one(tmp_path, name, content, message):
    wheel = tmp_path / name.format(version=openvino_version())
    if content is None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("openvino/__init__.py", "")
    else:
        wheel.write_bytes(content)
    places = NpuPlaces(cache=tmp_path / "cache", wine=Path("/usr/bin/wine"))
    with pytest.raises(ToolchainError, match=f"{message}|no C compiler for Windows"):
        prepare(places, wheel=wheel)
    assert not wine_availability(places).ok
