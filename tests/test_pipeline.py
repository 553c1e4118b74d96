"""The whole job on the package's own model and images, through the public API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

import vinoopt
from vinoopt import serde
from vinoopt.bundle import Bundle, damaged_files
from vinoopt.demo import demo_files
from vinoopt.errors import BundleError, DataError, InputError, MetricError, PlanError, TargetError
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.records import AccuracyBudget, Event, Evidence, Precision, Trial, TrialState, Verdict
from vinoopt.verification import CheckState, verify

FILES = demo_files()
BUDGET = AccuracyBudget(metric="top1", max_drop=0.02)


def images() -> tuple[np.ndarray, np.ndarray]:
    with np.load(FILES.data) as arrays:
        return arrays["images"], arrays["labels"]


def compile_demo(output: Path, **options: object) -> Bundle:
    return vinoopt.compile(
        FILES.model,
        **{
            "data": str(FILES.data),
            "labels": "labels",
            "budget": BUDGET,
            "preprocess": read_preprocess(FILES.preprocess),
            "tune": False,
            "effort": "fast",
            "output": output,
            **options,
        },
    )


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VINOOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> Bundle:
    output = tmp_path_factory.mktemp("out") / "digits"
    return compile_demo(output, tune=True, effort="balanced", time_limit_s=100.0, on_event=events.append)


def test_the_result_is_inside_the_budget_and_faster_than_float(bundle: Bundle) -> None:
    result = bundle.result("CPU")
    assert result.budget_met
    assert result.drop is not None
    assert result.drop.verdict is not Verdict.OUTSIDE
    assert result.drop.low <= result.drop.value <= result.drop.high
    against_float = next(c for c in result.comparisons if c.reference == "float")
    assert against_float.is_significant
    assert against_float.speedup > 1
    assert all(m.evidence is Evidence.MEASURED for m in result.measurements)


def test_float_accuracy_is_that_of_a_trained_model(bundle: Bundle) -> None:
    assert bundle.manifest.float_accuracy is not None
    assert bundle.manifest.float_accuracy.value > 0.95


def test_the_parts_do_not_overlap_and_are_told(bundle: Bundle, events: list[Event]) -> None:
    splits = bundle.manifest.splits
    assert sum(splits.values()) == len(images()[0])
    assert any("calibration" in e.message and "test" in e.message for e in events if e.stage == "data")


def test_runtime_settings_were_raced_and_told(bundle: Bundle) -> None:
    assert any("runtime setting" in reason for reason in bundle.result("CPU").reasons)
    properties = json.loads((bundle.path / "host-cpu" / "runtime.json").read_text())
    assert properties == bundle.result("CPU").properties.as_dict()
    assert "INFERENCE_PRECISION_HINT" in properties


def test_the_report_is_one_page_with_every_trial_and_no_network(bundle: Bundle) -> None:
    page = (bundle.path / "report.html").read_text()
    assert page.count("<circle") == sum(t.latency is not None for t in _trials(bundle))
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert bundle.result("CPU").plan.title in page


def test_every_candidate_is_in_the_journal(bundle: Bundle) -> None:
    lines = (bundle.path / "trials.jsonl").read_text().splitlines()
    trials = [serde.from_json(Trial, line, where="trials.jsonl") for line in lines]
    assert len(trials) == bundle.manifest.trials
    assert {t.state for t in trials} <= set(TrialState)
    assert any(t.plan.widths for t in trials), "the search offered no pruned candidate"
    plain = next(t for t in trials if t.plan.quantization is not None and not t.plan.widths)
    assert plain.plan.float_precision is Precision.F32


def test_plain_openvino_runs_it_with_the_readme_s_lines(bundle: Bundle) -> None:
    readme = (bundle.path / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0].replace("...", "np.zeros((1, 32, 32, 1), np.uint8)")
    script = f"import numpy as np\n{code}\nprint(list(outputs.values())[0].shape)"
    told = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=bundle.path, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "(1, 10)"


def test_the_bundle_classifies_raw_images(bundle: Bundle) -> None:
    pictures, labels = images()
    model = vinoopt.open_bundle(bundle.path).load("host:CPU")
    assert isinstance(model, ov.CompiledModel)
    hits = [np.argmax(model(pictures[i : i + 1])[0]) == labels[i] for i in range(100)]
    assert np.mean(hits) > 0.9


def test_every_file_has_its_checksum_and_damage_is_found(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    assert damaged_files(vinoopt.open_bundle(copy)) == ()
    with (copy / "host-cpu" / "model.bin").open("r+b") as weights:
        weights.write(b"\xff" * 64)
    (copy / "golden.npz").unlink()
    found = damaged_files(vinoopt.open_bundle(copy))
    assert found == ("golden.npz: missing", "host-cpu/model.bin: changed since it was written")


def test_a_bundle_verifies_on_the_machine_that_made_it(bundle: Bundle) -> None:
    found = verify(bundle)
    assert found.ok, found.verdict
    assert {c.name.split()[0] for c in found.checks} == {"files", "versions", "requirements", "replay", "speed"}
    assert {c.state for c in found.checks} <= {CheckState.PASSED, CheckState.WARNING}  # the machine may be busy


def test_weights_that_were_changed_do_not_verify(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    weights = copy / "host-cpu" / "model.bin"
    weights.write_bytes(np.random.default_rng(0).bytes(weights.stat().st_size))
    found = verify(vinoopt.open_bundle(copy))
    assert not found.ok
    assert found.verdict.startswith("do not deploy")


def test_resume_repeats_no_trial(tmp_path: Path) -> None:
    first: list[Event] = []
    before = compile_demo(tmp_path / "a", prune=False, on_event=first.append)
    again: list[Event] = []
    bundle = compile_demo(tmp_path / "b", prune=False, resume=True, on_event=again.append)
    trials = [e for e in first if e.stage == "trial"]
    taken = next(e.message for e in again if "taken over" in e.message)
    assert taken == f"host:CPU: {len(trials)} finished trials taken over"
    assert bundle.manifest.trials == len(trials)
    # A trial that was run again would have taken other seconds.
    journals = [(each.path / "trials.jsonl").read_text(encoding="utf-8").splitlines() for each in (before, bundle)]
    took = [[json.loads(line)["seconds"] for line in journal] for journal in journals]
    assert took[0] == took[1]


def test_inputs_of_one_class_are_judged_by_values(tmp_path: Path) -> None:
    pictures, labels = images()
    three = pictures[labels == 3][:1].astype(np.int64)
    noise = np.random.default_rng(0).integers(-8, 9, size=(80, *three.shape[1:]))
    threes = {"images": (three + noise).clip(0, 255).astype(np.uint8)}
    bundle = compile_demo(
        tmp_path / "o", data=threes, labels=None, budget=AccuracyBudget(max_drop=0.05), prune=False
    )
    assert bundle.result("CPU").drop.metric == "cosine"
    assert any("agreement says nothing" in m for m in bundle.manifest.messages)


def test_without_labels_agreement_is_judged_and_said(tmp_path: Path) -> None:
    events: list[Event] = []
    bundle = compile_demo(
        tmp_path / "o",
        data={"images": images()[0][:120]},
        labels=None,
        budget=AccuracyBudget(max_drop=0.05),
        prune=False,
        on_event=events.append,
    )
    result = bundle.result("CPU")
    assert result.drop is not None
    assert result.drop.metric == "agreement"
    assert result.drop.reference == 1.0
    assert any("no labels: judged by agreement" in m for m in bundle.manifest.messages)


def test_a_budget_that_nothing_meets_gives_the_float_model(tmp_path: Path) -> None:
    class Impossible:
        """Only outputs equal to the float model's to the last bit count."""

        name, unit = "identical", "share"
        higher_is_better, needs_labels, needs_reference, is_mean = True, False, True, True

        def statistic(self, outputs: dict, label: object, reference: dict) -> float:
            return float(all(np.array_equal(outputs[k], reference[k]) for k in reference))

        def value(self, statistics: list[float]) -> float:
            return float(np.mean(statistics))

    bundle = compile_demo(
        tmp_path / "o", metric=Impossible(), budget=AccuracyBudget(max_drop=0.0), effort="fast", prune=False
    )
    result = bundle.result("CPU")
    assert result.plan.quantization is None
    assert result.plan.float_precision is Precision.F32
    assert not result.budget_met


def test_a_search_that_is_interrupted_keeps_its_best(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "trial" and event.message.startswith("#2"):
            raise KeyboardInterrupt

    bundle = compile_demo(tmp_path / "o", on_event=interrupt)
    assert bundle.manifest.interrupted
    assert bundle.manifest.trials == 3
    assert bundle.result("CPU").budget_met


def test_a_limit_that_is_far_too_short_still_gives_a_result_without_pruning(tmp_path: Path) -> None:
    bundle = compile_demo(tmp_path / "o", time_limit_s=0.1)
    assert bundle.result("CPU").drop is not None
    assert not any(t.plan.widths for t in _trials(bundle))


def _trials(bundle: Bundle) -> list[Trial]:
    text = (bundle.path / "trials.jsonl").read_text()
    return [serde.from_json(Trial, line, where="trials") for line in text.splitlines()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["hosst:CPU"]}, InputError, "did you mean"),
        ({"targets": []}, InputError, "no target"),
        ({"effort": "heroic"}, InputError, "fast, balanced, thorough"),
        ({"targets": ["host:CPU", "host"]}, InputError, "name each target once"),
        ({"targets": ["host:TPU"]}, TargetError, "CPU, GPU, NPU"),
        ({"data": "nowhere.npz"}, DataError, "no such file"),
        ({"labels": "lables"}, DataError, "labels"),
        ({"budget": AccuracyBudget(metric="topp1")}, MetricError, 'did you mean "top1"'),
        ({"ignored_scope": ["blocks.0.conv9"]}, PlanError, "did you mean"),
        ({"data": {"images": np.full((50, 32, 32, 1), np.nan, np.float32)}, "labels": None}, DataError, "images"),
        ({"data": {"images": np.zeros((5, 32, 32, 1), np.uint8)}, "labels": None}, DataError, "too little"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_ends_before_any_work_and_leaves_nothing(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_demo(tmp_path / "o", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked_and_only_if_it_is_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="other things than a bundle"):
        compile_demo(folder, force=True)
    assert (folder / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BundleError, match="--force"):
        compile_demo(bundle.path)
    with pytest.raises(BundleError, match="is a file"):
        compile_demo(folder / "thesis.txt")


def test_force_replaces_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    (copy / "leftover").write_text("old")
    compile_demo(copy, force=True, prune=False, effort="fast")
    assert not (copy / "leftover").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_target_that_the_bundle_lacks_is_named(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r'has no target "GPU"; it has host:CPU'):
        bundle.load("GPU")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        vinoopt.open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        vinoopt.open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(BundleError, match="schema version 99"):
        vinoopt.open_bundle(tmp_path)


def test_an_already_quantized_model_is_compiled_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    import onnx
    from onnx import parser

    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4] x) => (float[1, 3] y)
        <float s = {0.02}, uint8 z = {128}, float[4, 3] w = {1, 0, 2, 1, 1, 0, 3, 1, 0, 2, 2, 1}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            y = MatMul(d, w)
        }"""
    )
    path = tmp_path / "qdq.onnx"
    onnx.save(model, path)
    data = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    made = vinoopt.compile(path, data=data, output=tmp_path / "o")
    assert any(m.startswith("not quantized again") for m in made.manifest.messages)
    assert made.result("CPU").plan.quantization is None
    assert made.result("CPU").budget_met


def test_compress_gives_the_model_and_its_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = vinoopt.compress(
        FILES.model,
        data=str(FILES.data),
        labels="labels",
        preprocess=tuple(read_preprocess(FILES.preprocess)),
        budget=BUDGET,
        quantize=False,
        max_pruning=0.6,
        effort="fast",
        time_limit_s=45.0,
    )
    assert made.plan.quantization is None
    assert made.plan.widths, made.reasons
    assert made.drop.verdict is not Verdict.OUTSIDE
    kinds = {node.get_type_name() for node in made.model.get_ops()}
    assert "FakeQuantize" not in kinds
    pictures, _ = images()
    compiled = ov.Core().compile_model(made.model, "CPU")
    assert compiled(pictures[:1])[0].shape == (1, 10)
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there() -> None:
    assert all(getattr(vinoopt, name) is not None for name in vinoopt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        vinoopt.complie  # noqa: B018
