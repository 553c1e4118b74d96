"""What the same model costs and keeps by every road: float, bf16, NNCF, ONNX Runtime, vinoopt.

    python scripts/bench_peers.py --output peers.jsonl                # all models whose files are here
    python scripts/bench_peers.py --models cifar_resnet20,yolox_nano --max-drop 0.01 --time-limit 1800 --device GPU

Per model: one part of the data is for calibration and search, another for judgement; all roads are judged on the
same images and measured side by side in one run, first one request at a time, then for throughput. Every road is
prepared in a process of its own with a time limit and an empty cache, so that seconds and peak memory are its own
(libraries included); a road that fails or is late has a line that says so. vinoopt goes twice: as long as it likes,
and with a time limit of what NNCF's accuracy control took, where that came to an end. ONNX Runtime runs on the CPU
whatever the device. One JSON line per road goes to the output and to the terminal, a table at the end. Models that
the output already holds for the device are skipped. Development models are looked for in VINOOPT_SHARED, else in
../shared beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from _cases import Case, Parts, aligned, cases, judged, ratio, ratio_cell, reference_for, say, whole_calls

import vinoopt
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, output_names, score
from vinoopt.bench import (
    BenchResult,
    Contestant,
    Engine,
    MeasureConfig,
    MeasureMode,
    Sample,
    measure,
    open_runner,
)
from vinoopt.bench.conditions import require_device
from vinoopt.bench.memory import peak_bytes
from vinoopt.compression.quantize import quantize
from vinoopt.errors import DataError, TargetError, VinooptError
from vinoopt.frontend.normalize import SourceModel
from vinoopt.frontend.preprocess import compute, resolve
from vinoopt.records import AccuracyBudget, Device, QuantizationPlan, Range

MEASURED_SAMPLES = 32
SUBSET = 300
"""Samples that every quantizer calibrates on at most."""
PER_CHANNEL_OPSET = 13
"""The first in which QuantizeLinear knows channels."""
FLOATS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}
"""What a device can compute in -> the word for it; the first that it has is the reference."""
PLAIN, RESULT, HURRIED = "nncf.quantize", "vinoopt", "vinoopt in control's time"
CONTROL, ORT, ORT_INT8 = "nncf accuracy control", "onnxruntime", "onnxruntime int8"


@dataclass(frozen=True)
class Task:
    """A model with its data, and how it is to be prepared."""

    case: Case
    source: SourceModel
    parts: Parts
    max_drop: float
    effort: str
    folder: Path
    device: str
    limit_s: float | None = None
    """What a road that knows time limits is given."""

    @property
    def kind(self) -> Device:
        """What the device is."""
        return Device(self.device.partition(".")[0])

    @property
    def calibration(self) -> Dataset:
        """What quantizers see."""
        given = self.parts.calibration
        return whole_calls(self.parts.search if given is None else given, None, self.source, 1)


@dataclass(frozen=True)
class Prepared:
    """A road that can be run; what it cost where it had to be prepared."""

    name: str
    model: Path
    properties: Mapping[str, str] = field(default_factory=dict)
    engine: Engine = Engine.OPENVINO
    seconds: float | None = None
    peak_bytes: int | None = None
    plan: str | None = None


# --------------------------------------------------------------------------- one road, in a process of its own


def plain_int8(task: Task) -> dict[str, Any]:
    model = quantize(task.source.model, QuantizationPlan(subset_size=SUBSET), task.calibration, device=task.kind)
    return {"model": saved(model, task.folder / "plain")}


def accuracy_control(task: Task) -> dict[str, Any]:
    """`nncf.quantize_with_accuracy_control` with the same budget; it validates on the search part."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # NNCF then uses its own stub
    import nncf

    validation = whole_calls(task.parts.search, task.parts.search_labels, task.source, 1)
    metric, names = task.case.metric_for(task.source), output_names(task.source.model)
    outputs = reference_for(metric, task.source, validation)

    def validate(compiled: ov.CompiledModel, chosen: Any) -> tuple[float, list[float] | None]:
        part, found, wanted = validation.subset(np.asarray(list(chosen))), Predictions(), Predictions()
        for i, sample in zip(chosen, part, strict=True):
            values = (np.array(value) for value in compiled(sample).values())
            found.append(dict(zip(names, values, strict=True)))
            if outputs is not None:
                wanted.append(outputs[i])
        try:
            scores = score(metric, found, part, None if outputs is None else wanted)
        except DataError:  # a single image without objects has no mAP; whole parts have
            return 0.0, None
        return scores.value, [float(each) for each in scores.statistics] if metric.is_mean else None

    calibration = task.calibration
    count = min(SUBSET, len(calibration))
    model = nncf.quantize_with_accuracy_control(
        task.source.model.clone(),
        calibration_dataset=nncf.Dataset(range(count), calibration.__getitem__),
        validation_dataset=nncf.Dataset(range(len(validation)), validation.__getitem__),
        validation_fn=validate,
        max_drop=task.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        target_device=nncf.TargetDevice[task.kind.value],
        subset_size=count,
    )
    return {"model": saved(model, task.folder / "control")}


def onnxruntime_int8(task: Task) -> dict[str, Any]:
    """ONNX Runtime's static quantization to QDQ with INT8 weights per channel, as its guide advises for VNNI."""
    import onnx.version_converter
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            calibration = task.calibration
            self.rest = iter([own_inputs(task.source, calibration[i]) for i in range(min(SUBSET, len(calibration)))])

        def get_next(self) -> Sample | None:
            return next(self.rest, None)

    place, clean = task.folder / "ort.onnx", task.folder / "ort-clean.onnx"
    model = onnx.load(task.source.path)
    if max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")) < PER_CHANNEL_OPSET:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    onnx.save(model, clean)
    quant_pre_process(clean, clean, skip_symbolic_shape=True)
    quantize_static(
        clean,
        place,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return {"model": str(place), "engine": Engine.ONNXRUNTIME.value}


def compiled_bundle(task: Task) -> dict[str, Any]:
    parts, folder = task.parts, task.folder / ("bundle" if task.limit_s is None else "hurried")
    bundle = vinoopt.compile(
        task.case.model,
        targets=(f"host:{task.kind}",),
        data=parts.search,
        labels=parts.search_labels,
        calibration_data=parts.calibration,
        test_data=parts.test,
        test_labels=parts.test_labels,
        budget=AccuracyBudget(metric=task.case.metric, max_drop=task.max_drop),
        metric_options=task.case.metric_options,
        preprocess=task.case.preprocess,
        shape=task.case.shape_at(1),
        effort=task.effort,
        time_limit_s=task.limit_s,
        output=folder,
        force=True,
    )
    result = bundle.result(task.kind.value)
    return {
        "model": str(bundle.path / result.target.slug / "model.xml"),
        "properties": result.properties.as_dict(),
        "plan": result.plan.title,
    }


ROADS: dict[str, Callable[[Task], dict[str, Any]]] = {
    PLAIN: plain_int8,
    CONTROL: accuracy_control,
    ORT_INT8: onnxruntime_int8,
    RESULT: compiled_bundle,
    HURRIED: compiled_bundle,
}
"""Roads that have to be prepared, in this order."""


def saved(model: ov.Model, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return str(folder / "model.xml")


def own_inputs(source: SourceModel, sample: Sample) -> dict[str, Any]:
    """A sample as the ONNX file takes it, preprocessed outside."""
    specs = resolve(source.preprocess, source.model_inputs)
    tensors = {spec.name: spec for spec in source.model_inputs}
    return {
        name: compute(specs[name], value, tensors[name]) if name in specs else value for name, value in sample.items()
    }


def prepare(road: str, task: Task) -> dict[str, Any]:
    started = time.monotonic()
    found = ROADS[road](task)
    return {**found, "name": road, "seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}


# --------------------------------------------------------------------------- one model, in a process of its own


def run_case(name: str, task: Task, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per road: prepared, judged, and measured with the others."""
    roads = float_roads(task)
    order, rows = [*(road.name for road in roads), *ROADS], []
    for road in ROADS:
        words = ["--prepare", road]
        if road == HURRIED:
            control = next((each for each in roads if each.name == CONTROL), None)
            if control is None or control.seconds is None:
                continue
            words += ["--limit", str(control.seconds)]
        found = in_child(words, name, task.folder, options)
        if isinstance(found, str):
            rows.append({"case": name, "road": road, "failed": found})
        else:
            engine, model = Engine(found.pop("engine", Engine.OPENVINO.value)), Path(found.pop("model"))
            roads.append(Prepared(**found, model=model, engine=engine))
    for prepared in list(roads):
        if why := refusal_of(prepared, task):
            roads.remove(prepared)
            rows.append({"case": name, "road": prepared.name, "failed": why})
    test = whole_calls(task.parts.test, task.parts.test_labels, task.source, 1)
    results = [side_by_side(roads, task, test, mode, options.seconds) for mode in MeasureMode]
    for road in roads:
        try:
            value = accuracy_of(road, task, test)
        except VinooptError as exc:
            rows.append({"case": name, "road": road.name, "failed": str(exc).splitlines()[0]})
            continue
        rows.append(row(name, road, value, results, test, reference=order[0]))
    for each in sorted(rows, key=lambda each: order.index(each["road"])):
        yield {**each, "device": task.device}


def contestant(road: Prepared, task: Task, **changes: Any) -> Contestant:
    device = task.device if road.engine is Engine.OPENVINO else "CPU"
    given = {"properties": road.properties, **changes}
    return Contestant(name=road.name, model=road.model, device=device, engine=road.engine, **given)


def refusal_of(road: Prepared, task: Task) -> str:
    """Why a road's model cannot be opened here; empty where it can."""
    try:
        open_runner(contestant(road, task))
    except VinooptError as exc:
        return " ".join(str(exc).split())[:300]
    return ""


def float_roads(task: Task) -> list[Prepared]:
    """The float model in every format that the device has, and by ONNX Runtime."""
    ir = Path(saved(task.source.model, task.folder / "float"))
    capabilities = ov.Core().get_property(task.device, "OPTIMIZATION_CAPABILITIES")
    hinted = task.kind is not Device.NPU  # which takes f16 alone, and no hint
    roads = [
        Prepared(f"float {word}", ir, {"INFERENCE_PRECISION_HINT": word} if hinted else {})
        for capability, word in FLOATS.items()
        if capability in capabilities
    ]
    return [*roads, Prepared(ORT, task.source.path, engine=Engine.ONNXRUNTIME)]


def side_by_side(
    roads: list[Prepared], task: Task, test: Dataset, mode: MeasureMode, seconds: float
) -> BenchResult:
    samples = [test[i] for i in range(min(MEASURED_SAMPLES, len(test)))]
    own = [own_inputs(task.source, sample) for sample in samples]
    contestants = [
        contestant(
            road,
            task,
            properties={**road.properties, **hint_for(road, mode)},
            samples=own if road.engine is Engine.ONNXRUNTIME else None,
        )
        for road in roads
    ]
    return measure(contestants, samples, config=MeasureConfig(mode=mode, seconds=seconds * len(contestants)))


def hint_for(road: Prepared, mode: MeasureMode) -> dict[str, str]:
    """A bundle's properties were tuned for latency; for throughput it gets the hint that all others get."""
    return {"PERFORMANCE_HINT": mode.name} if "PERFORMANCE_HINT" in road.properties else {}


def accuracy_of(road: Prepared, task: Task, test: Dataset) -> float:
    metric = task.case.metric_for(task.source)
    reference = reference_for(metric, task.source, test)
    if road.engine is Engine.OPENVINO:
        return judged(road.model, road.properties, test, metric, reference, device=task.device).value
    import onnxruntime

    session = onnxruntime.InferenceSession(str(road.model), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    found = Predictions()
    for i in range(len(test)):
        values = session.run(None, own_inputs(task.source, test[i]))
        found.append({key: np.asarray(value) for key, value in zip(names, values, strict=True)})
    return score(metric, found, test, reference).value


def row(
    case: str, road: Prepared, accuracy: float, results: list[BenchResult], test: Dataset, *, reference: str
) -> dict[str, Any]:
    alone, stream = results
    one = alone.of(road.name)
    found: dict[str, Any] = {
        "case": case,
        "road": road.name,
        "accuracy": accuracy,
        "test_samples": test.samples,
        "p50_ms": one.latency_p50_ms,
        "p90_ms": one.latency_p90_ms,
        "p50_range_ms": ends(one.latency_p50_range_ms),
        "per_s": stream.of(road.name).throughput_per_s,
        "range_per_s": ends(stream.of(road.name).throughput_range_per_s),
        "size_bytes": one.size_bytes,
        "compile_ms": one.compile_ms,
        "prep_seconds": road.seconds,
        "prep_peak_bytes": road.peak_bytes,
        "plan": road.plan,
        "warnings": [*alone.warnings, *stream.warnings],
    }
    known = {each.name for each in alone.measurements}
    for word, other in (("float", reference), (PLAIN, PLAIN)):
        is_other = other in known and road.name != other
        found[f"over {word}"] = ratio(alone.compare(other, road.name)) if is_other else None
        found[f"stream over {word}"] = ratio(stream.compare(other, road.name)) if is_other else None
    return found


def ends(interval: Range | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


# --------------------------------------------------------------------------- processes


def in_child(words: list[str], name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """The answer of this script run again with these words, or why there is none."""
    command = [sys.executable, str(Path(__file__).resolve()), "--models", name, "--folder", str(folder), *words]
    command += ["--max-drop", str(options.max_drop), "--effort", options.effort, "--seconds", str(options.seconds)]
    command += ["--time-limit", str(options.time_limit), "--device", options.device]
    with tempfile.TemporaryDirectory() as cache, (folder / "stderr.log").open("w+") as log:
        env = {**os.environ, "VINOOPT_CACHE_DIR": cache}
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
                timeout=options.time_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {options.time_limit:g} s"
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-1:]
    if done.returncode != 0:
        return f"ended with {done.returncode}: {' '.join(last)[:300]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(options: argparse.Namespace) -> int:
    """One road prepared, or one model run; JSON on the last line of stdout."""
    (name,) = options.models
    case = cases()[name]
    source = case.source(1)
    task = Task(
        case,
        source,
        case.load(source),
        options.max_drop,
        options.effort,
        options.folder,
        options.device,
        options.limit,
    )
    print(json.dumps(prepare(options.prepare, task)))
    return 0


def all_rows(name: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source = case.source(1)
        parts, place = case.load(source), Path(folder)
        task = Task(case, source, parts, options.max_drop, options.effort, place, options.device)
        return list(run_case(name, task, options))


def table(rows: list[dict[str, Any]]) -> str:
    head = ("case", "road", "accuracy", "p50 ms", "over float", "over nncf int8", "per s", "kB", "prep s", "peak MB")
    lines: list[tuple[str, ...]] = [(*head, "plan")]
    for each in rows:
        if "failed" in each:
            lines.append((each["case"], each["road"], *["-"] * (len(head) - 2), f"failed: {each['failed']}"))
            continue
        lines.append(
            (
                each["case"],
                each["road"],
                f"{each['accuracy']:.4f}",
                f"{each['p50_ms']:.3g}",
                ratio_cell(each.get("over float")),
                ratio_cell(each.get(f"over {PLAIN}")),
                f"{each['per_s']:.4g}",
                "-" if each["size_bytes"] is None else f"{each['size_bytes'] / 1000:.0f}",
                "-" if each["prep_seconds"] is None else f"{each['prep_seconds']:.0f}",
                "-" if each["prep_peak_bytes"] is None else f"{each['prep_peak_bytes'] / 1e6:.0f}",
                each["plan"] or "",
            )
        )
    return aligned(lines)


def listed(text: str) -> list[str]:
    """`a,b` as names of models."""
    names = text.split(",")
    for name in names:
        if name not in cases():
            raise argparse.ArgumentTypeError(f'no model "{name}"; there are {", ".join(cases())}')
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=listed, default=list(cases()), help="comma-separated; default: all here")
    parser.add_argument("--device", default="CPU", help="as OpenVINO lists it; default: CPU")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--effort", default="balanced", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of two measurements, per road")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds to prepare one road")
    parser.add_argument("--output", type=Path, default=Path("peers.jsonl"))
    parser.add_argument("--prepare", choices=tuple(ROADS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        require_device(options.device)
    except TargetError as exc:
        parser.error(str(exc))
    if options.prepare is not None:
        return child(options)

    text = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    known = [row for row in map(json.loads, text.splitlines()) if row.get("device", "CPU") == options.device]
    done, failed = {each["case"] for each in known}, False
    with options.output.open("a", encoding="utf-8") as stream:
        for name in options.models:
            case = cases()[name]
            if name in done or not case.model.is_file():
                say(f"{name}: {'already there' if name in done else 'no model here'}")
                continue
            say(f"{name} ...")
            try:
                rows = all_rows(name, case, options)
            except VinooptError as exc:
                say(f"{name}: {type(exc).__name__}: {exc}")
                failed = True
                continue
            lines = [json.dumps(each) for each in rows]
            stream.writelines(f"{line}\n" for line in lines)
            stream.flush()
            print("\n".join(lines), flush=True)
            known += rows
    with suppress(BrokenPipeError):
        print(table([each for each in known if each["case"] in options.models]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
