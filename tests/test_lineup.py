"""Who runs in a benchmark, and the commands that measure, compare and tune."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import click
import numpy as np
import openvino as ov
import pytest
from click.testing import CliRunner, Result
from openvino import opset13 as ops

from vinoopt import bundle, serde
from vinoopt.bench import Engine, MeasureConfig, MeasureMode, measure
from vinoopt.cli.bench import _end, bench, compare
from vinoopt.cli.options import milliseconds_from
from vinoopt.cli.show import strict_json
from vinoopt.cli.tune import tune
from vinoopt.demo import demo_files
from vinoopt.errors import BundleError, DataError, InputError, ModelError, ShapeError
from vinoopt.frontend.normalize import load_model
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.lineup import LineupRequest, line_up, tuning_task
from vinoopt.records import (
    Build,
    Comparison,
    CompileRequest,
    CompressionPlan,
    Evidence,
    HostFingerprint,
    Manifest,
    RuntimeProperties,
    Target,
    TargetResult,
)
from vinoopt.tuning import Parity

DEMO = demo_files()
PREPROCESS = read_preprocess(DEMO.preprocess)
FED = {"data": str(DEMO.data), "preprocess": PREPROCESS}
SHORT = MeasureConfig(rounds=5, min_round_ms=0.5, warmup_ms=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo as `compile` leaves it, with the float model in it."""
    folder = tmp_path_factory.mktemp("bundles") / "build"
    source = load_model(DEMO.model, shape="images[1,1,32,32]", preprocess=PREPROCESS)
    target = Target.parse("host:CPU")
    properties = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
    images = np.load(DEMO.data)["images"][:3]
    samples = [{"images": image[None]} for image in images]
    compiled = ov.Core().compile_model(source.model, "CPU", properties.as_dict())
    outputs = {target.slug: [list(compiled(sample).values()) for sample in samples]}
    folder.mkdir()
    bundle.write_target(folder, target.slug, source.model, properties)
    bundle.write_golden(folder, samples, outputs, {target.slug: 1e-3})
    result = TargetResult(
        target=target,
        plan=CompressionPlan(),
        drop=None,
        budget_met=True,
        measurements=(),
        comparisons=(),
        properties=properties,
        build=Build(target=target, toolchain="openvino", evidence=Evidence.MEASURED),
    )
    request = CompileRequest(
        model=str(DEMO.model), targets=(target,), shape="images[1,1,32,32]", preprocess=PREPROCESS
    )
    host = HostFingerprint(cpu="", cores=1, memory_bytes=1, os="", python="", versions={}, devices={})
    manifest = Manifest(
        request=request,
        host=host,
        inputs=source.inputs,
        outputs=source.outputs,
        model_sha256=source.sha256,
        splits={},
        float_accuracy=None,
        targets=(result,),
        trials=0,
        seconds=0.0,
    )
    (folder / bundle.MANIFEST).write_text(serde.to_json(manifest))
    return folder


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ir") / "digits_ir.xml"
    ov.save_model(ov.Core().read_model(DEMO.model), path, compress_to_fp16=False)
    return path


# --------------------------------------------------------------------------- line-ups


def test_an_onnx_file_meets_all_its_references() -> None:
    words = ("fp32", "bf16", "int8", "onnxruntime")
    lineup = line_up(LineupRequest(model=str(DEMO.model), against=words, **FED))
    assert [each.name for each in lineup.contestants] == ["digits", *words]
    assert len(lineup.samples) == 64
    assert lineup.samples[0]["images"].dtype == np.uint8

    result = measure(lineup.contestants, lineup.samples, config=SHORT)
    sizes = {each.name: each.size_bytes for each in result.measurements}
    assert sizes["int8"] < 0.3 * sizes["fp32"]


def test_the_plain_quantized_reference_is_accurate() -> None:
    lineup = line_up(LineupRequest(model=str(DEMO.model), against=("int8",), **FED))
    compiled = ov.Core().compile_model(lineup.contestants[1].model, "CPU")
    labels = np.load(DEMO.data)["labels"]
    hits = [compiled(s)[0].argmax() == label for s, label in zip(lineup.samples, labels, strict=False)]
    assert np.mean(hits) > 0.95


def test_onnxruntime_gets_what_the_embedded_preprocessing_computes() -> None:
    lineup = line_up(LineupRequest(model=str(DEMO.model), against=("onnxruntime",), **FED))
    own = lineup.contestants[1].samples
    assert lineup.contestants[1].engine is Engine.ONNXRUNTIME
    expected = (lineup.samples[5]["images"].astype(np.float32) - 79.5) / 91.0
    np.testing.assert_allclose(own[5]["images"], expected.transpose(0, 3, 1, 2), rtol=1e-6)


def test_a_bundle_runs_with_its_properties_on_its_golden_inputs(built: Path) -> None:
    request = LineupRequest(model=str(built), against=("fp32", "onnxruntime"))
    lineup = line_up(request)
    assert lineup.contestants[0].properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert len(lineup.samples) == 3
    assert lineup.messages[0] == "inputs are the bundle's golden ones"
    assert "outside for onnxruntime" in lineup.messages[1]
    measure(lineup.contestants, lineup.samples, config=SHORT)


def test_an_ir_and_a_blob_run_side_by_side(ir: Path, tmp_path: Path) -> None:
    model = ov.Core().read_model(ir)
    model.reshape([1, 1, 32, 32])
    blob = tmp_path / "digits.blob"
    blob.write_bytes(ov.Core().compile_model(model, "CPU").export_model().getvalue())
    properties = RuntimeProperties.of({"PERFORMANCE_HINT": "LATENCY"})
    lineup = line_up(LineupRequest(model=str(ir), against=(str(blob),), properties=properties))
    assert lineup.messages == ("inputs are random numbers; give --data for real ones",)
    measure(lineup.contestants, lineup.samples, config=SHORT)
    turned = line_up(LineupRequest(model=str(blob), against=(str(ir),), properties=properties))
    assert [each.name for each in turned.contestants] == ["digits", "digits_ir"]


def test_the_batch_is_fed_whole(ir: Path) -> None:
    for model in (ir, DEMO.model):
        lineup = line_up(LineupRequest(model=str(model), batch=4))
        assert lineup.samples[0]["images"].shape == (4, 1, 32, 32)


def test_thread_counts_reach_everyone_and_precision_only_the_model() -> None:
    properties = RuntimeProperties.of({"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    lineup = line_up(
        LineupRequest(
            model=str(DEMO.model), against=("int8", "bf16", "onnxruntime"), properties=properties, **FED
        )
    )
    assert [dict(each.properties) for each in lineup.contestants] == [
        {"INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32"},
        {"INFERENCE_NUM_THREADS": "1"},
        {"INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "bf16"},
        {"INFERENCE_NUM_THREADS": "1"},
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"against": ("int4",)}, InputError, 'against "int4"'),
        ({"against": ("int8",)}, InputError, "needs --data"),
        ({"model": "absent.onnx"}, ModelError, "no such file"),
        ({"model": "absent.txt"}, InputError, "neither a bundle nor one of"),
        ({"model": "."}, BundleError, "is not a bundle"),
        ({"data": "absent.npz"}, DataError, "no such file"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        line_up(LineupRequest(**{"model": str(DEMO.model), **changes}))


def test_references_get_the_batch_and_the_shape_of_the_model(ir: Path) -> None:
    for words in ({"batch": 4}, {"shape": "images[4,1,32,32]"}):
        lineup = line_up(LineupRequest(model=str(DEMO.model), against=(str(ir), "fp32"), **words))
        assert [each.model.input().shape for each in lineup.contestants] == [ov.Shape([4, 1, 32, 32])] * 3
        turned = line_up(LineupRequest(model=str(ir), against=(str(DEMO.model),), **words))
        assert [each.model.input().shape for each in turned.contestants] == [ov.Shape([4, 1, 32, 32])] * 2


def test_a_reference_that_cannot_take_the_batch_is_refused(tmp_path: Path) -> None:
    model = ov.Core().read_model(DEMO.model)
    model.reshape([1, 1, 32, 32])
    ov.save_model(model, tmp_path / "one.xml")
    with pytest.raises(ShapeError, match="dimension 0 is 1 in the model and cannot become 4"):
        line_up(LineupRequest(model=str(DEMO.model), against=(str(tmp_path / "one.xml"),), batch=4))


def test_namesakes_are_told_apart(ir: Path, built: Path, tmp_path: Path) -> None:
    for place in "ab":
        (tmp_path / place).mkdir()
        for suffix in (".xml", ".bin"):
            (tmp_path / place / f"digits{suffix}").write_bytes(ir.with_suffix(suffix).read_bytes())
    files = [str(tmp_path / place / "digits.xml") for place in "ab"]
    names = [each.name for each in line_up(LineupRequest(model=str(DEMO.model), against=tuple(files))).contestants]
    assert names == ["digits", *files]
    twice = line_up(LineupRequest(model=str(built), against=(str(built),))).contestants
    assert [each.name for each in twice] == ["build", str(built)]


def test_sizes_that_nobody_named_are_not_invented(tmp_path: Path) -> None:
    x = ops.parameter([1, 3, -1, -1], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    ov.save_model(ov.Model([ops.relu(x)], [x], "open"), tmp_path / "open.xml")
    request = LineupRequest(model=str(tmp_path / "open.xml"))
    with pytest.raises(ShapeError, match=r"open \(x\[1,3,\?,\?\]\): name them with --shape, or give real inputs"):
        line_up(request)
    lineup = line_up(serde.replace(request, shape="x[1,3,64,48]"))
    assert lineup.samples[0]["x"].shape == (1, 3, 64, 48)


def test_int8_is_quantized_for_a_device_and_not_for_several() -> None:
    with pytest.raises(InputError, match='"AUTO" stands for several'):
        line_up(LineupRequest(model=str(DEMO.model), against=("int8",), device="AUTO", **FED))


def test_a_second_device_of_a_kind_runs_the_bundle_of_that_kind(built: Path) -> None:
    assert line_up(LineupRequest(model=str(built), device="CPU.1")).contestants[0].device == "CPU.1"
    files = line_up(LineupRequest(model=str(built), device="host:CPU", against=(str(DEMO.model),))).contestants
    assert [each.device for each in files] == ["CPU", "CPU"]


def test_a_bundle_cannot_be_reshaped(built: Path) -> None:
    with pytest.raises(InputError, match="were fixed when it was compiled"):
        line_up(LineupRequest(model=str(built), batch=2))


def test_an_ir_does_not_know_its_float_model(ir: Path) -> None:
    with pytest.raises(InputError, match="does not tell its ONNX file; name the float model"):
        line_up(LineupRequest(model=str(ir), against=("fp32",)))


def test_a_bundle_is_tuned_at_its_own_precision_against_its_float_model(built: Path) -> None:
    task, base, _ = tuning_task(LineupRequest(model=str(built)))
    assert base.as_dict() == {"INFERENCE_PRECISION_HINT": "f32"}
    assert task.reference is not None


# --------------------------------------------------------------------------- commands


def _invoke(command: object, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)  # type: ignore[arg-type]


def test_bench_prints_a_table_on_stdout_and_remarks_on_stderr(built: Path) -> None:
    found = _invoke(bench, built, "--against", "fp32", "-t", 0.5)
    assert found.exit_code == 0
    assert found.stdout.splitlines()[1].startswith("build")
    assert "fp32 (95% interval" in found.stdout or "fp32: no significant difference" in found.stdout
    assert "golden" in found.stderr
    assert "golden" not in found.stdout


def test_bench_writes_json() -> None:
    words = ("--against", "fp32", "-t", 0.5, "--json", "--nthreads", 1, "--no-start-up")
    found = _invoke(bench, "-m", DEMO.model, *words)
    whole = json.loads(found.stdout)
    assert [each["name"] for each in whole["measurements"]] == ["digits", "fp32"]
    assert whole["comparisons"][0]["reference"] == "fp32"
    assert whole["measurements"][0]["evidence"] == "measured"
    assert whole["inputs"] == "random"
    assert whole["measurements"][0]["latency_p90_range_ms"]["low"] > 0


def _hint_of(built: Path, *words: object) -> tuple[str, str]:
    whole = json.loads(_invoke(bench, built, *words, "-t", 0.3, "--json", "--no-start-up").stdout)
    return whole["mode"], dict(whole["measurements"][0]["properties"]["items"])["PERFORMANCE_HINT"]


def test_a_bundle_keeps_the_hint_it_was_tuned_with_unless_another_is_given(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    bundle.write_properties(copy, "host-cpu", RuntimeProperties.of({"PERFORMANCE_HINT": "THROUGHPUT"}))
    assert _hint_of(copy) == ("throughput", "THROUGHPUT")
    assert _hint_of(copy, "--hint", "latency") == ("latency", "LATENCY")
    assert _hint_of(built) == ("latency", "LATENCY")


def _told(*intervals: tuple[float, float, float]) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            reference="old",
            candidate="new",
            speedup=speedup,
            low=low,
            high=high,
            is_significant=low > 1 or high < 1,
            evidence=Evidence.MEASURED,
        )
        for low, speedup, high in intervals
    )


@pytest.mark.parametrize(
    ("interval", "threshold", "fails"),
    [
        ((0.97, 1.0, 1.03), 1.2, True),
        ((0.90, 0.94, 0.999), 0.95, False),
        ((0.88, 0.90, 0.92), 0.95, True),
        ((1.25, 1.3, 1.35), 1.2, False),
        ((0.5, 0.6, 0.7), None, False),
    ],
)
def test_the_gate_fails_where_even_the_upper_end_is_below(
    interval: tuple[float, float, float], threshold: float | None, fails: bool
) -> None:
    with pytest.raises(click.exceptions.Exit) if fails else nullcontext():
        _end(_told(interval), threshold)


def test_throughput_is_asked_for_in_benchmark_apps_words() -> None:
    words = ("-hint", "tput", "-nstreams", 1, "-nireq", 2, "-t", 0.5, "--json", "--no-start-up")
    found = _invoke(bench, DEMO.model, *words)
    assert json.loads(found.stdout)["measurements"][0]["throughput_per_s"] > 0


def test_without_a_hint_streams_requests_and_threads_count_alone(built: Path) -> None:
    core = ov.Core()
    own = RuntimeProperties.of({"NUM_STREAMS": 2, "PERFORMANCE_HINT_NUM_REQUESTS": 3})
    request = LineupRequest(
        model=str(built), against=("fp32", str(built), "onnxruntime"), properties=own, is_hinted=False, requests=3
    )
    for each in line_up(request).contestants:
        assert "PERFORMANCE_HINT" not in each.properties
        assert (each.requests, each.is_hinted) == (3, False)
        if each.engine is Engine.OPENVINO:
            asked = each.hinted(MeasureMode.THROUGHPUT)
            assert asked["NUM_STREAMS"] == "2"
            assert core.compile_model(each.model, "CPU", asked).get_property("NUM_STREAMS") == 2


def test_no_hint_is_asked_for_in_benchmark_apps_words() -> None:
    """Asynchronous, with one request as with many."""
    for count in (1, 3):
        words = ("-hint", "none", "-nstreams", 1, "-nireq", count, "-nthreads", 1)
        found = json.loads(_invoke(bench, DEMO.model, *words, "-t", 0.3, "--json", "--no-start-up").stdout)
        assert found["mode"] == "throughput"
        assert found["measurements"][0]["throughput_per_s"] > 0


def test_the_throughput_of_a_batch_counts_its_samples() -> None:
    words = ("-hint", "tput", "-b", 4, "-t", 0.3, "--json", "--no-start-up")
    each = json.loads(_invoke(bench, DEMO.model, *words).stdout)["measurements"][0]
    assert each["batch"] == 4
    assert each["throughput_per_s"] == pytest.approx(1000 / np.median(each["rounds_ms"]))
    assert np.median(each["rounds_ms"]) < each["latency_p50_ms"]  # of a sample, and of a call in company


def test_a_model_that_became_slower_fails_the_gate() -> None:
    wide = Path(__file__).parent / "data" / "digits_wide.onnx"
    slow = ("--nthreads", 1, "--infer-precision", "f32", "-t", 2, "--no-start-up")
    found = _invoke(compare, DEMO.model, wide, "--fail-below", 0.95, *slow)
    assert found.exit_code == 3
    assert "below 0.95x" in found.stderr
    assert _invoke(compare, wide, DEMO.model, "--fail-below", 0.95, *slow).exit_code == 0


def test_records_of_two_runs_are_compared(tmp_path: Path) -> None:
    names = []
    for model in (DEMO.model, Path(__file__).parent / "data" / "digits_wide.onnx"):
        found = _invoke(bench, model, "--against", "fp32", "-t", 1, "--no-start-up", "--nthreads", 1, "--json")
        names.append(tmp_path / f"{model.stem}.json")
        names[-1].write_text(found.stdout)
    told = _invoke(compare, *names)
    assert told.exit_code == 0
    assert "relative to fp32 of each run" in told.stdout
    whole = json.loads(_invoke(compare, *names, "--json").stdout)
    assert whole["through"] == ["fp32"]
    spoiled = tmp_path / "spoiled.json"
    spoiled.write_text("{}")
    with pytest.raises(InputError, match="spoiled"):
        _invoke(compare, names[0], spoiled)
    with pytest.raises(InputError, match="no such file"):
        _invoke(compare, names[0], tmp_path / "gone.json")


@pytest.mark.parametrize(("text", "limit"), [("20", 20.0), ("20ms", 20.0), ("0.5s", 500.0), ("250us", 0.25)])
def test_a_latency_limit_has_a_unit(text: str, limit: float) -> None:
    assert milliseconds_from(text, "--latency-limit") == pytest.approx(limit)


@pytest.mark.parametrize("text", ["fast", "-1ms", "nan", "0", "3m"])
def test_a_limit_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="20ms"):
        milliseconds_from(text, "--latency-limit")


def test_json_holds_nothing_that_is_no_json() -> None:
    found = Parity(cosine=(float("nan"), 1.0), agreement=None, error=(float("inf"), 0.0))
    whole = json.loads(strict_json(found), parse_constant=pytest.fail)
    assert whole["cosine"] == [None, 1.0]
    assert whole["error"] == [None, 0.0]


def test_the_model_is_given_once() -> None:
    assert _invoke(bench).exit_code == 2
    assert _invoke(bench, DEMO.model, "-m", DEMO.model).exit_code == 2
    assert _invoke(tune).exit_code == 2


def test_a_bundle_keeps_its_batch_and_is_told_a_better_one(built: Path) -> None:
    place = built / Target.parse("host:CPU").slug / "runtime.json"
    before = place.read_text()
    found = _invoke(tune, built, "--goal", "throughput", "--batch", "auto", "-t", 1, "--json")
    whole = json.loads(found.stdout)
    assert {each["batch"] for each in whole["trials"]} == {None, 2}  # three golden calls fill one of two
    assert whole["trials"][-1]["batch"] is None
    assert whole["batched"] is None or whole["batched"]["batch"] == 2
    assert "batch 4 was not tried: there are 3 samples" in found.stderr
    assert place.read_text() == before


def test_tune_puts_properties_into_a_bundle_and_leaves_it_whole(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    files = {name: serde.sha256_file(copy / name) for name in ("host-cpu/runtime.json", "golden.npz")}
    manifest = serde.replace(bundle.open_bundle(copy).manifest, files=files)
    (copy / bundle.MANIFEST).write_text(serde.to_json(manifest))
    found = _invoke(tune, copy, "-t", 2, "--goal", "throughput", "--write", "--json")
    assert found.exit_code == 0
    after = bundle.open_bundle(copy)
    assert bundle.damaged_files(after) == ()
    properties = after.result("CPU").properties
    assert properties.as_dict()["PERFORMANCE_HINT"] == "THROUGHPUT"
    assert json.loads(found.stdout)["properties"]["items"] == [list(pair) for pair in properties.items]
    assert after.result("CPU").reasons[-1].startswith("tuned again: ")


def test_tune_refuses_to_break_a_bundles_checksums(built: Path, tmp_path: Path) -> None:
    place = built / "host-cpu" / "runtime.json"
    before = place.read_text()
    with pytest.raises(BundleError, match="whose checksums it would break; give --write"):
        _invoke(tune, built, "-o", place)
    assert place.read_text() == before
    assert _invoke(tune, DEMO.model, "--write").exit_code == 2


def test_tune_writes_properties_that_compile(tmp_path: Path) -> None:
    output = tmp_path / "runtime.json"
    found = _invoke(
        tune, DEMO.model, "--data", DEMO.data, "--preprocess", DEMO.preprocess, "-t", 1, "-o", output
    )
    assert found.exit_code == 0
    properties = json.loads(output.read_text())
    assert properties["PERFORMANCE_HINT"] == "LATENCY"
    ov.Core().compile_model(DEMO.model, "CPU", properties)
    assert found.stdout.startswith(json.dumps(properties, indent=2))
