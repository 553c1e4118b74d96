"""What a bundle's user learns on the machine that runs it, with real blobs of a real device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

import vinoopt
from vinoopt import bundle as bundles
from vinoopt import serde
from vinoopt.bundle import Bundle
from vinoopt.cli.main import main
from vinoopt.errors import BundleError
from vinoopt.hardware.detect import detect_host, fingerprint
from vinoopt.records import (
    Build,
    CompileRequest,
    CompressionPlan,
    Device,
    Evidence,
    Manifest,
    Measurement,
    RuntimeProperties,
    Target,
    TargetResult,
    TensorSpec,
)
from vinoopt.replay import BLOB, differing_share, unmatched_share
from vinoopt.toolchains.host import RUNTIME_REQUIREMENTS, HostToolchain
from vinoopt.verification import Check, CheckState, Verification, _Visit, verify

TARGET = Target(profile="host", device=Device.CPU)
EXACT = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})


def network() -> ov.Model:
    rng = np.random.default_rng(0)
    x = ops.parameter([1, 64], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    first = ops.matmul(x, rng.normal(size=(64, 64)).astype(np.float32), False, False)
    first.set_friendly_name("first")
    second = ops.matmul(ops.relu(first), rng.normal(size=(64, 10)).astype(np.float32), False, False)
    second.set_friendly_name("second")
    return ov.Model([second], [x], "small")


def detector(order: tuple[int, int] = (0, 1)) -> ov.Model:
    """The two boxes that non-maximum suppression selects, in this order, and their scores."""
    x = ops.parameter([1, 64], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    columns = ops.split(x, 1, 2)
    boxes = ops.reshape(columns.output(0), np.array([1, 8, 4]), False)
    scores = ops.reshape(columns.output(1), np.array([1, 4, 8]), False)
    chosen = ops.non_max_suppression(boxes, scores, np.int64(2), np.float32(0.9), np.float32(-100.0))
    rows = ops.gather(chosen.output(1), np.array(order), np.int64(0))
    best = ops.topk(x, np.int64(3), 1, "max", "value").output(1)
    return ov.Model([ops.result(rows), ops.result(best)], [x], "boxes")


def write(
    path: Path, *, latency_ms: float, evidence: Evidence = Evidence.MEASURED, model: ov.Model | None = None
) -> Bundle:
    """A bundle of one target, put together as `compile` does it, without a search."""
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(size=(1, 64)).astype(np.float32)} for _ in range(3)]
    model, slug = network() if model is None else model, TARGET.slug
    with bundles.writing(path) as folder:
        ir = bundles.write_target(folder, slug, model, EXACT)
        spec = detect_host().devices[Device.CPU]
        build = HostToolchain().compile(
            ir, spec, properties=EXACT, output=ir.with_name(BLOB), timeout_s=60
        )
        compiled = ov.Core().compile_model(ir, "CPU", EXACT.as_dict())
        outputs = [[np.array(value) for value in compiled(sample).values()] for sample in samples]
        bundles.write_golden(folder, samples, {slug: outputs}, {slug: 1e-3})
        measured = Measurement(
            name="float", device="CPU", evidence=evidence, latency_p50_ms=latency_ms, properties=EXACT
        )
        result = TargetResult(
            target=TARGET,
            plan=CompressionPlan(),
            drop=None,
            budget_met=True,
            measurements=(measured,),
            comparisons=(),
            properties=EXACT,
            build=serde.replace(build, target=TARGET),
        )
        manifest = Manifest(
            request=CompileRequest(model="small.onnx", targets=(TARGET,)),
            host=fingerprint(),
            inputs=(TensorSpec(name="x", shape=(1, 64), dtype="float32"),),
            outputs=(TensorSpec(name="y", shape=(1, 10), dtype="float32"),),
            model_sha256="0" * 64,
            splits={},
            float_accuracy=None,
            targets=(result,),
            trials=0,
            seconds=0.0,
        )
        bundles.write_documents(folder, manifest, ())
    return vinoopt.open_bundle(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("verify") / "small.vinoopt", latency_ms=1000.0)


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may spoil."""
    return vinoopt.open_bundle(shutil.copytree(made.path, tmp_path / "copy"))


def rewritten(bundle: Bundle, build: Build) -> Bundle:
    """The bundle with another build, the checksums of its files as they are now."""
    manifest = bundle.manifest
    files = {name: serde.sha256_file(bundle.path / name) for name in manifest.files}
    if build.blob is not None:
        blob = f"{TARGET.slug}/{build.blob}"
        files[blob] = serde.sha256_file(bundle.path / blob)
    target = serde.replace(manifest.targets[0], build=build)
    changed = serde.replace(manifest, targets=(target,), files=files)
    (bundle.path / bundles.MANIFEST).write_text(serde.to_json(changed))
    return vinoopt.open_bundle(bundle.path)


def with_blob(bundle: Bundle, *, edit: tuple[bytes, bytes] | None = None) -> Bundle:
    """The bundle with a blob of this CPU, as devices have that ship one; `edit` makes it one of elsewhere."""
    place = bundle.path / TARGET.slug
    content = ov.Core().compile_model(place / "model.xml", "CPU", EXACT.as_dict()).export_model().getvalue()
    if edit is not None:
        assert edit[0] in content
        content = content.replace(*edit)
    (place / BLOB).write_bytes(content)
    build = bundle.manifest.targets[0].build
    return rewritten(bundle, serde.replace(build, blob=BLOB, blob_sha256=serde.sha256_file(place / BLOB)))


def check(found: Verification, name: str) -> Check:
    return next(each for each in found.checks if each.name.startswith(name))


def test_every_check_passes_where_the_bundle_was_made(bundle: Bundle) -> None:
    found = verify(bundle, seconds=0.3)
    assert found.verdict == "fit for this machine"
    assert found.ok
    assert not found.reasons
    names = [each.name.split()[0] for each in found.checks]
    assert names == ["files", "versions", "requirements", "replay", "speed"]
    speed = check(found, "speed")
    assert speed.now is not None
    assert speed.then is not None
    assert speed.now.latency_p50_ms < 10 < speed.then.latency_p50_ms
    assert "in the manifest of the same kind of machine" in speed.detail


def test_what_became_slower_on_the_same_machine_is_a_warning(tmp_path: Path) -> None:
    found = verify(write(tmp_path / "b", latency_ms=1e-6), seconds=0.3)
    assert found.ok
    assert check(found, "speed").state is CheckState.WARNING
    assert "times as long on the same kind of machine" in found.verdict


def test_a_figure_taken_with_other_properties_is_no_yardstick(tmp_path: Path) -> None:
    made = write(tmp_path / "b", latency_ms=1e-6)
    tuned = RuntimeProperties.of({**EXACT.as_dict(), "INFERENCE_NUM_THREADS": "1"})
    after = bundles.replace_properties(made, made.manifest.targets[0], tuned, reason="tuned again")
    found = verify(after, seconds=0.3)
    assert found.verdict == "fit for this machine"
    assert "taken with other properties" in check(found, "speed").detail


def test_other_properties_leave_the_bundle_whole(bundle: Bundle) -> None:
    tuned = RuntimeProperties.of({**EXACT.as_dict(), "NUM_STREAMS": "1"})
    after = bundles.replace_properties(bundle, bundle.result("CPU"), tuned, reason="so it was")
    assert bundles.damaged_files(after) == ()
    again = vinoopt.open_bundle(bundle.path)
    assert again.result("CPU").properties == tuned
    assert again.result("CPU").reasons[-1] == "so it was"
    assert json.loads((bundle.path / TARGET.slug / "runtime.json").read_text()) == tuned.as_dict()
    blobbed = with_blob(again)
    with pytest.raises(BundleError, match="has a blob"):
        bundles.replace_properties(blobbed, blobbed.result("CPU"), EXACT, reason="")


def test_a_measurement_that_breaks_off_is_a_warning(bundle: Bundle) -> None:
    golden = bundle.path / bundles.GOLDEN
    with np.load(golden) as arrays:
        kept = {key.replace("input/0/x", "input/0/y"): arrays[key] for key in arrays.files}
    visit = _Visit(bundle=bundle, result=bundle.result("CPU"), damaged=(), seconds=0.2, rebuild=False)
    np.savez(golden, **kept)
    told = visit._speed()
    assert told.state is CheckState.WARNING
    assert 'lack input "x"' in told.detail


def test_selected_rows_may_come_in_another_order(tmp_path: Path) -> None:
    made = write(tmp_path / "boxes", latency_ms=1.0, model=detector())
    place = made.path / TARGET.slug / "model.xml"
    assert verify(made, seconds=0).ok
    ov.save_model(detector((1, 0)), place, compress_to_fp16=False)
    turned = verify(rewritten(made, made.manifest.targets[0].build), seconds=0)
    assert turned.ok, turned.verdict
    ov.save_model(detector((0, 0)), place, compress_to_fp16=False)
    lost = verify(rewritten(made, made.manifest.targets[0].build), seconds=0)
    assert not lost.ok
    assert "0.5 of the ids or selected rows differ" in lost.verdict, lost.verdict


def test_ids_are_counted_and_rows_matched_once() -> None:
    ids = np.arange(10)
    assert differing_share(ids, np.where(ids == 3, 900, ids)) == pytest.approx(0.1)
    assert differing_share(ids, ids[:9]) == 1
    rows = np.array([[1.0, 100.0], [2.0, 200.0]])
    assert unmatched_share(rows, rows[::-1], 1e-3) == 0
    assert unmatched_share(rows, rows[[0, 0]], 1e-3) == 0.5
    assert unmatched_share(rows, rows[:1], 1e-3) == 0.5
    assert unmatched_share(rows, rows[:0], 1e-3) == 1


def test_a_target_that_is_another_machine_is_not_judged_here(bundle: Bundle) -> None:
    if fingerprint().cpu.startswith("Intel(R) Core(TM) Ultra"):
        pytest.skip("this may be one")
    other = Target(profile="lunar-lake", device=Device.CPU)
    target = serde.replace(bundle.manifest.targets[0], target=other)
    (bundle.path / TARGET.slug).rename(bundle.path / other.slug)
    files = {name.replace(TARGET.slug, other.slug): value for name, value in bundle.manifest.files.items()}
    manifest = serde.replace(bundle.manifest, targets=(target,), files=files)
    (bundle.path / bundles.MANIFEST).write_text(serde.to_json(manifest))
    found = verify(vinoopt.open_bundle(bundle.path), seconds=0)
    assert not found.ok
    assert found.verdict.startswith("not verified: replay lunar-lake:CPU: it is for lunar-lake, and this machine is")


def test_a_figure_of_another_machine_or_of_a_model_is_no_yardstick(bundle: Bundle, tmp_path: Path) -> None:
    host = serde.replace(bundle.manifest.host, cpu="Some Other CPU")
    (bundle.path / bundles.MANIFEST).write_text(serde.to_json(serde.replace(bundle.manifest, host=host)))
    found = verify(vinoopt.open_bundle(bundle.path), seconds=0.3)
    assert "of another machine: Some Other CPU" in check(found, "speed").detail
    modelled = write(tmp_path / "m", latency_ms=1e-6, evidence=Evidence.MODELLED)
    found = verify(modelled, seconds=0.3)
    assert check(found, "speed").state is CheckState.PASSED
    assert "(modelled) in the manifest" in check(found, "speed").detail


def test_requirements_of_another_machine_are_told(bundle: Bundle) -> None:
    build = bundle.manifest.targets[0].build
    assert build.details[RUNTIME_REQUIREMENTS].startswith("meta=")
    other = {RUNTIME_REQUIREMENTS: "meta=1.0;ov=2026.3.0;isa=something else"}
    found = verify(rewritten(bundle, serde.replace(build, details=other)), seconds=0)
    assert found.ok
    assert check(found, "requirements").state is CheckState.WARNING
    assert "isa=something else" in found.verdict


def test_a_blob_that_fits_is_imported_and_replayed(bundle: Bundle) -> None:
    found = verify(with_blob(bundle), seconds=0)
    assert found.verdict == "fit for this machine"
    assert check(found, "blob").detail.startswith("imported; outputs depart")


def test_a_blob_of_another_release_is_recompiled_from_ir(bundle: Bundle) -> None:
    version = ov.__version__.split("-")[0].encode()
    foreign = with_blob(bundle, edit=(b"ov=" + version, b"ov=" + b"9" * len(version)))
    found = verify(foreign, seconds=0)
    assert found.ok
    blob = check(found, "blob")
    assert blob.state is CheckState.WARNING
    assert "does not fit" in blob.detail
    assert "recompiled from IR here" in blob.detail
    assert "--rebuild" in found.verdict

    rebuilt = verify(foreign, seconds=0, rebuild=True)
    assert "the blob was replaced" in check(rebuilt, "blob").detail
    again = verify(vinoopt.open_bundle(foreign.path), seconds=0)
    assert again.verdict == "fit for this machine"


def test_a_damaged_blob_is_not_opened(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = with_blob(bundle)
    place = spoiled.path / TARGET.slug / BLOB
    place.write_bytes(place.read_bytes()[:-100] + bytes(100))
    found = verify(spoiled, seconds=0)
    assert not found.ok
    assert found.verdict == f"do not deploy: files: {TARGET.slug}/{BLOB}: changed since it was written"
    assert check(found, "replay").state is CheckState.NOT_CHECKED
    assert main(["verify", str(spoiled.path)]) == 1
    assert "do not deploy" in capsys.readouterr().out


def test_a_blob_and_an_ir_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    spoiled = with_blob(bundle)
    for name in (BLOB, "model.xml"):
        (spoiled.path / TARGET.slug / name).write_bytes(b"nothing that OpenVINO reads")
    found = verify(rewritten(spoiled, spoiled.manifest.targets[0].build), seconds=0)
    assert not found.ok
    assert "nor can the IR be compiled" in check(found, "blob").detail


@pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bf16"
)
def test_the_layer_that_departs_is_named(bundle: Bundle) -> None:
    half = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "bf16"})
    bundles.write_properties(bundle.path, TARGET.slug, half)
    target = serde.replace(bundle.manifest.targets[0], properties=half)
    changed = serde.replace(bundle.manifest, targets=(target,))
    (bundle.path / bundles.MANIFEST).write_text(serde.to_json(changed))
    found = verify(rewritten(vinoopt.open_bundle(bundle.path), target.build), seconds=0)
    assert not found.ok
    assert 'against f32 on the CPU it first departs at "' in check(found, "replay").detail


def test_a_device_that_is_not_here_is_not_checked(bundle: Bundle) -> None:
    target = serde.replace(
        bundle.manifest.targets[0], target=Target(profile="lunar-lake", device=Device.NPU)
    )
    (bundle.path / bundles.MANIFEST).write_text(
        serde.to_json(serde.replace(bundle.manifest, targets=(target,)))
    )
    found = verify(vinoopt.open_bundle(bundle.path))
    assert not found.ok
    assert found.verdict.startswith("not verified")


def test_json_holds_every_check(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle.path), "-t", "0", "--json"]) == 0
    found = serde.from_json(Verification, capsys.readouterr().out, where="stdout")
    assert [each.state for each in found.checks] == [CheckState.PASSED] * 4
