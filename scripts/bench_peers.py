"""What the same model costs and keeps by every road: float, bf16, plain NNCF, ONNX Runtime, vinoopt.

    python scripts/bench_peers.py --output peers.jsonl                # all cases whose files are here
    python scripts/bench_peers.py --case digits --case cifar_resnet20 --max-drop 0.01

Per case: half of the data (or its calibration part) is for compression, the rest for judgement; all roads are
judged on the same images and measured side by side in one run. One JSON line per road goes to the output, and
a table to the terminal at the end. Cases that the output already holds are skipped. Development models are
looked for in VINOOPT_SHARED, else in ../shared beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import vinoopt
from vinoopt.accuracy.datasets import Dataset, from_arrays, load_dataset
from vinoopt.accuracy.evaluate import predict, score
from vinoopt.accuracy.metrics import find_metric
from vinoopt.bench import BenchResult, Contestant, Engine, MeasureConfig, measure
from vinoopt.compression.quantize import quantize
from vinoopt.demo import demo_files
from vinoopt.errors import VinooptError
from vinoopt.frontend.normalize import SourceModel
from vinoopt.frontend.preprocess import compute, read_preprocess, resolve
from vinoopt.records import AccuracyBudget, Device, PreprocessSpec, QuantizationPlan

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("VINOOPT_SHARED", ROOT.parent / "shared"))
SECONDS_PER_ROAD = 8.0
MEASURED_SAMPLES = 32
F32, BF16 = {"INFERENCE_PRECISION_HINT": "f32"}, {"INFERENCE_PRECISION_HINT": "bf16"}
CIFAR = {"mean": (123.675, 116.28, 103.53), "scale": (58.395, 57.12, 57.375)}


@dataclass(frozen=True)
class Parts:
    """Inputs and labels for compression and for judgement."""

    development: Any
    development_labels: Any
    test: Any
    test_labels: Any


@dataclass(frozen=True)
class Case:
    """A model with its data."""

    model: Path
    load: Callable[[SourceModel], Parts]
    preprocess: tuple[PreprocessSpec, ...] = ()
    shape: str | None = None
    metric_options: dict[str, int] = field(default_factory=dict)


def halves(images: np.ndarray, labels: np.ndarray) -> Parts:
    order = np.random.default_rng(0).permutation(len(images))
    first, second = np.array_split(order, 2)
    return Parts(images[first], labels[first], images[second], labels[second])


def digits(source: SourceModel) -> Parts:
    with np.load(demo_files().data) as data:
        return halves(data["images"], data["labels"])


def npz_parts(
    name: str, calibration: int | None = None, channel: bool = False
) -> Callable[[SourceModel], Parts]:
    """The calibration and test parts that a development file has."""

    def load(source: SourceModel) -> Parts:
        with np.load(SHARED / "data" / name) as data:
            images = {part: data[f"{part}_images"] for part in ("calib", "test")}
            labels = {part: data[f"{part}_labels"].astype(np.int64) for part in ("calib", "test")}
        if channel:
            images = {part: values[..., None] for part, values in images.items()}
        kept = slice(calibration)
        return Parts(images["calib"][kept], labels["calib"][kept], images["test"], labels["test"])

    return load


def imagenet(source: SourceModel) -> Parts:
    folder = SHARED / "data" / "imagenet_val"
    dataset = load_dataset(
        str(folder / "images"),
        inputs=source.inputs,
        labels=str(folder / "labels.csv"),
        preprocess=source.preprocess,
    )
    name = source.inputs[0].name
    images = np.concatenate([dataset[i][name] for i in range(len(dataset))])
    return halves(images, np.asarray(dataset.labels))


def magika(source: SourceModel) -> Parts:
    with np.load(SHARED / "data" / "magika_v2_1_dev.npz") as data:
        return halves(data["bytes"], data["labels"])


def cases() -> dict[str, Case]:
    models = SHARED / "models"
    demo = demo_files()
    preprocess = read_preprocess(demo.preprocess)
    one_digit = "images[1,1,32,32]"
    imagenet_rgb = (PreprocessSpec(mean=(127.5,), scale=(127.5,)),)
    imagenet_bgr = (PreprocessSpec(colour_order="BGR", mean=(104.0, 117.0, 123.0)),)
    cifar = (PreprocessSpec(**CIFAR),)
    return {
        "digits": Case(demo.model, digits, preprocess, one_digit),
        "digits_wide": Case(ROOT / "tests" / "data" / "digits_wide.onnx", digits, preprocess, one_digit),
        "mnist": Case(
            models / "mnist_cntk.onnx", npz_parts("mnist_dev.npz", channel=True), (PreprocessSpec(),)
        ),
        "cifar_resnet20": Case(
            models / "cifar_resnet20.onnx", npz_parts("cifar10_dev.npz", 1000), cifar, "x[1,3,32,32]"
        ),
        "cifar_resnet32": Case(
            models / "cifar10_resnet32_akamaster_op11.onnx",
            npz_parts("cifar10_dev.npz", 1000),
            cifar,
            "[1,3,32,32]",
        ),
        "magika": Case(models / "magika_standard_v2_1.onnx", magika, shape="bytes[1,4096]"),
        "squeezenet": Case(models / "squeezenet1.0_fp32.onnx", imagenet, imagenet_bgr),
        "mobilenetv2": Case(
            models / "mobilenetv2_1.0_224_qatdeq.onnx",
            imagenet,
            imagenet_rgb,
            "[1,3,224,224]",
            {"label_offset": 1},
        ),
    }


def run_case(name: str, case: Case, *, max_drop: float, effort: str, folder: Path) -> list[dict[str, Any]]:
    """One row per road."""
    source = vinoopt.load_model(case.model, shape=case.shape, preprocess=case.preprocess)
    parts = case.load(source)
    development = from_arrays(parts.development, inputs=source.inputs, labels=parts.development_labels)
    test = from_arrays(parts.test, inputs=source.inputs, labels=parts.test_labels)

    start = time.monotonic()
    bundle = vinoopt.compile(
        case.model,
        data=parts.development,
        labels=parts.development_labels,
        test_data=parts.test,
        test_labels=parts.test_labels,
        budget=AccuracyBudget(metric="top1", max_drop=max_drop),
        metric_options=case.metric_options,
        preprocess=case.preprocess,
        shape=case.shape,
        effort=effort,
        output=folder / name,
    )
    seconds = {"vinoopt": time.monotonic() - start}
    start = time.monotonic()
    plain = quantize(source.model, QuantizationPlan(), development, device=Device.CPU)
    seconds["nncf.quantize"] = time.monotonic() - start

    result = bundle.result("CPU")
    contestants = [
        Contestant(name="float f32", model=source.model, properties=F32),
        Contestant(name="float bf16", model=source.model, properties=BF16),
        Contestant(name="nncf.quantize", model=plain),
        onnxruntime_contestant(source, test),
        Contestant(
            name="vinoopt",
            model=folder / name / result.target.slug / "model.xml",
            properties=result.properties.as_dict(),
        ),
    ]
    samples = [test[i] for i in range(min(MEASURED_SAMPLES, len(test)))]
    config = MeasureConfig(seconds=SECONDS_PER_ROAD * len(contestants))
    measured = measure(contestants, samples, config=config)
    accuracies = {each.name: accuracy(each, source, test, case) for each in contestants}
    return [
        {**row(name, each.name, measured), "accuracy": accuracies[each.name], "test_samples": test.samples,
         "prep_seconds": seconds.get(each.name), "plan": result.plan.title if each.name == "vinoopt" else None}
        for each in contestants
    ]  # fmt: skip


def onnxruntime_contestant(source: SourceModel, test: Dataset) -> Contestant:
    specs = resolve(source.preprocess, source.model_inputs)
    tensors = {spec.name: spec for spec in source.model_inputs}
    own = [
        {
            key: compute(specs[key], value, tensors[key]) if key in specs else value
            for key, value in test[i].items()
        }
        for i in range(min(MEASURED_SAMPLES, len(test)))
    ]
    return Contestant(name="onnxruntime", model=source.path, engine=Engine.ONNXRUNTIME, samples=own)


def accuracy(contestant: Contestant, source: SourceModel, test: Dataset, case: Case) -> float | None:
    """Top-1 on the test part; None for ONNX Runtime, which is here for its speed only."""
    if contestant.engine is Engine.ONNXRUNTIME:
        return None
    import openvino as ov

    model = contestant.model
    loaded = ov.Core().read_model(model) if isinstance(model, Path) else model
    metric = find_metric("top1", outputs=source.outputs, has_labels=True, options=case.metric_options)
    properties = {k: v for k, v in contestant.properties.items() if k != "PERFORMANCE_HINT"}
    return score(metric, predict(loaded, test, properties=properties), test).value


def row(case: str, road: str, measured: BenchResult) -> dict[str, Any]:
    one = measured.of(road)
    found: dict[str, Any] = {
        "case": case,
        "road": road,
        "p50_ms": one.latency_p50_ms,
        "p90_ms": one.latency_p90_ms,
        "size_bytes": one.size_bytes,
        "compile_ms": one.compile_ms,
        "warnings": [*measured.warnings, *one.warnings],
    }
    for reference in ("float f32", "nncf.quantize"):
        comparison = measured.compare(reference, road) if road != reference else None
        found[f"speedup over {reference}"] = (
            None
            if comparison is None
            else [comparison.speedup, comparison.low, comparison.high, comparison.is_significant]
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    def speedup(cell: list[float] | None) -> str:
        return "-" if cell is None else f"{cell[0]:.2f}x{'' if cell[3] else ' (n.s.)'}"

    head = ("case", "road", "top-1", "p50 ms", "vs f32", "vs nncf int8", "kB", "prep s", "plan")
    lines = [head]
    for each in rows:
        lines.append(
            (
                each["case"],
                each["road"],
                "-" if each["accuracy"] is None else f"{each['accuracy']:.4f}",
                f"{each['p50_ms']:.3f}",
                speedup(each["speedup over float f32"]),
                speedup(each["speedup over nncf.quantize"]),
                "-" if each["size_bytes"] is None else f"{each['size_bytes'] / 1000:.0f}",
                "-" if each["prep_seconds"] is None else f"{each['prep_seconds']:.0f}",
                each["plan"] or "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=sorted(cases()), help="default: all that are here")
    parser.add_argument("--output", type=Path, default=Path("peers.jsonl"))
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--effort", default="balanced")
    options = parser.parse_args()

    known = (
        [json.loads(line) for line in options.output.read_text().splitlines()]
        if options.output.is_file()
        else []
    )
    done = {each["case"] for each in known}
    wanted = {name: case for name, case in cases().items() if not options.case or name in options.case}
    failed = False
    with tempfile.TemporaryDirectory() as folder, options.output.open("a") as stream:
        for name, case in wanted.items():
            if name in done or not case.model.is_file():
                print(f"{name}: {'already there' if name in done else 'no model here'}", file=sys.stderr)
                continue
            try:
                rows = run_case(
                    name, case, max_drop=options.max_drop, effort=options.effort, folder=Path(folder)
                )
            except VinooptError as exc:
                print(f"{name}: {type(exc).__name__}: {exc}", file=sys.stderr)
                failed = True
                continue
            stream.writelines(json.dumps(each) + "\n" for each in rows)
            stream.flush()
            known += rows
            print(table(rows), file=sys.stderr)
    print(table([each for each in known if each["case"] in wanted]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
