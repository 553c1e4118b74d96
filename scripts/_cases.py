"""Models with data and labels that the benchmarks share, and what they do with them alike.

Development models are looked for in VINOOPT_SHARED, else in ../shared beside the checkout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

import vinoopt
from vinoopt.accuracy.datasets import Dataset, from_arrays, load_dataset
from vinoopt.accuracy.evaluate import Predictions, Scores, predict, score
from vinoopt.accuracy.labels import BoxLabels
from vinoopt.accuracy.metrics import Metric, find_metric
from vinoopt.demo import demo_files
from vinoopt.frontend.normalize import SourceModel
from vinoopt.frontend.parity import random_samples
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.records import AccuracyBudget, Comparison, PreprocessSpec

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("VINOOPT_SHARED", ROOT.parent / "shared"))
CIFAR = (PreprocessSpec(mean=(123.675, 116.28, 103.53), scale=(58.395, 57.12, 57.375)),)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
CALIBRATION = 1000
"""Most images that calibration and refit may see where a model's data has a part for them."""
NOISE = 200
"""Samples of random values for a model whose kind of data is not here: they tell times, and hardly accuracy."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Inputs and labels: for calibration (None: a part of the search's), for the search, for judgement.

    Labels are None where the float model alone says what is right.
    """

    calibration: Any = None
    search: Any
    search_labels: Any
    test: Any
    test_labels: Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its data; `shape` holds `{}` where the batch size goes."""

    model: Path
    load: Callable[[SourceModel], Parts]
    preprocess: tuple[PreprocessSpec, ...] = ()
    shape: str | None = None
    metric: str = "top1"
    """`auto` where there are no labels."""
    metric_options: Mapping[str, str | int | float] = field(default_factory=dict)

    def shape_at(self, batch: int) -> str | None:
        """The shape text for this batch size."""
        return None if self.shape is None else self.shape.format(batch)

    def source(self, batch: int) -> SourceModel:
        """The float model."""
        return vinoopt.load_model(self.model, shape=self.shape_at(batch), preprocess=self.preprocess)

    def metric_for(self, source: SourceModel) -> Metric:
        """What the case is judged by."""
        has_labels = self.metric != "auto"
        return find_metric(self.metric, outputs=source.outputs, has_labels=has_labels, options=self.metric_options)


def cases() -> dict[str, Case]:
    """Every case by name, whether its files are here or not."""
    models, demo = SHARED / "models", demo_files()
    digit = "images[{},1,32,32]"
    imagenet_rgb = (PreprocessSpec(mean=(127.5,), scale=(127.5,)),)
    photos = (CIFAR[0].model_copy(update={"fit": "squash"}),)
    imagenet_bgr = (PreprocessSpec(colour_order="BGR", mean=(104.0, 117.0, 123.0)),)
    return {
        "digits": Case(
            model=demo.model, load=_digits, preprocess=read_preprocess(demo.preprocess), shape=digit
        ),
        "digits_wide": Case(
            model=ROOT / "tests" / "data" / "digits_wide.onnx",
            load=_digits,
            preprocess=read_preprocess(demo.preprocess),
            shape=digit,
        ),
        "mnist": Case(model=models / "mnist_cntk.onnx", load=_mnist, preprocess=(PreprocessSpec(),)),
        "cifar_resnet20": Case(
            model=models / "cifar_resnet20.onnx", load=_cifar, preprocess=CIFAR, shape="x[{},3,32,32]"
        ),
        "cifar_resnet32": Case(
            model=models / "cifar10_resnet32_akamaster_op11.onnx",
            load=_cifar,
            preprocess=CIFAR,
            shape="[{},3,32,32]",
        ),
        "magika": Case(model=models / "magika_standard_v2_1.onnx", load=_magika, shape="bytes[{},4096]"),
        "squeezenet": Case(model=models / "squeezenet1.0_fp32.onnx", load=_imagenet, preprocess=imagenet_bgr),
        "mobilenetv2": Case(
            model=models / "mobilenetv2_1.0_224_qatdeq.onnx",
            load=_imagenet,
            preprocess=imagenet_rgb,
            shape="[{},3,224,224]",
            metric_options={"label_offset": 1},
        ),
        "vww": Case(
            model=models / "tiny_vww96_mlperf.onnx",
            load=_people,
            preprocess=(PreprocessSpec(scale=(255.0,), fit="squash"),),
            shape="[{},3,96,96]",
        ),
        "yolox_nano": Case(
            model=models / "yolox_nano.onnx",
            load=_objects,
            preprocess=(PreprocessSpec(colour_order="BGR", fit="letterbox"),),
            metric="map",
            metric_options={"decoding": "yolox"},
        ),
        "squeezenet_fp16": Case(
            model=models / "squeezenet1.0_fp16.onnx", load=_imagenet, preprocess=imagenet_bgr
        ),
        "mobilenetv2_qdq": Case(
            model=models / "mobilenetv2_1.0_224_qat_qdq_u8.onnx", load=_imagenet, metric_options={"label_offset": 1}
        ),
        "ultraface": Case(
            model=models / "ultraface_rfb_320.onnx",
            load=_photographs,
            preprocess=(PreprocessSpec(mean=(127.0,), scale=(128.0,), fit="squash"),),
            metric="auto",
        ),
        "ppocr_cls": Case(
            model=models / "ppocr_cls.onnx",
            load=_photographs,
            preprocess=(PreprocessSpec(mean=(127.5,), scale=(127.5,), fit="squash"),),
            shape="x[{},3,48,192]",
            metric="auto",
        ),
        "external_resnet": Case(
            model=models / "external_data_resnet" / "model.onnx", load=_photographs, preprocess=photos, metric="auto"
        ),
        "dtln_1": Case(model=models / "dtln_1.onnx", load=_noise, metric="auto"),
        "dtln_2": Case(model=models / "dtln_2.onnx", load=_noise, metric="auto"),
        "silero_vad": Case(model=models / "silero_vad_openvino_16k.onnx", load=_noise, metric="auto"),
    }


# --------------------------------------------------------------------------- data


def _divided(images: Any, labels: Any, share: float = 0.5) -> Parts:
    """A seeded permutation cut in two: the first part for calibration and search."""
    order = np.random.default_rng(0).permutation(len(images))
    first, second = order[: int(share * len(order))], order[int(share * len(order)) :]

    def of(values: Any, chosen: np.ndarray) -> Any:
        if values is None:
            return None
        return values[chosen] if isinstance(values, np.ndarray) else [values[i] for i in chosen]

    return Parts(
        search=of(images, first),
        search_labels=of(labels, first),
        test=of(images, second),
        test_labels=of(labels, second),
    )


def _digits(source: SourceModel) -> Parts:
    with np.load(demo_files().data) as data:
        return _divided(data["images"], data["labels"])


def _mnist(source: SourceModel) -> Parts:
    return _calibrated("mnist_dev.npz", lambda images: images[..., None])


def _cifar(source: SourceModel) -> Parts:
    return _calibrated("cifar10_dev.npz", lambda images: images)


def _calibrated(name: str, shaped: Callable[[np.ndarray], np.ndarray]) -> Parts:
    """Calibration from the file's own part; the search sees half of its test part, the judgement the rest.

    Models of these files know their calibration part from training, so that drops on it would be too small.
    """
    with np.load(SHARED / "data" / name) as data:
        parts = _divided(shaped(data["test_images"]), data["test_labels"].astype(np.int64))
        calibration = shaped(data["calib_images"][:CALIBRATION])
    return Parts(calibration=calibration, **{k: v for k, v in vars(parts).items() if k != "calibration"})


def _pictures(folder: str, labels: str, source: SourceModel) -> tuple[np.ndarray, Any]:
    """All images of a folder as they are fed, and what their labels are."""
    dataset = _images(folder, source, labels=str(SHARED / "data" / folder / labels))
    return _fed(dataset, source), dataset.labels


def _images(folder: str, source: SourceModel, *, labels: str | None = None) -> Dataset:
    return load_dataset(
        str(SHARED / "data" / folder / "images"), inputs=source.inputs, labels=labels, preprocess=source.preprocess
    )


def _fed(dataset: Dataset, source: SourceModel) -> np.ndarray:
    """All samples of the first input in one array."""
    return np.concatenate([sample[source.inputs[0].name] for sample in dataset])


def _imagenet(source: SourceModel) -> Parts:
    images, labels = _pictures("imagenet_val", "labels.csv", source)
    return _divided(images, np.asarray(labels).ravel(), share=0.6)


def _objects(source: SourceModel) -> Parts:
    return _divided(*_pictures("coco_train128", "labels", source))


def _people(source: SourceModel) -> Parts:
    """Whether a person takes half a percent of the image or more: Visual Wake Words (arXiv 1906.05721)."""
    images, boxes = _pictures("coco_train128", "labels", source)
    return _divided(images, np.asarray([_has_person(each) for each in boxes], np.int64))


def _photographs(source: SourceModel) -> Parts:
    """Images without labels."""
    return _divided(_fed(_images("coco_train128", source), source), None)


def further_photographs(case: Case, source: SourceModel, count: int) -> np.ndarray:
    """Further images as the model takes them, without labels: some of ImageNet's, for a case that has COCO's few."""
    if case.load not in (_objects, _people, _photographs):
        raise SystemExit(f"{case.model.name} has no images of COCO, which images of ImageNet could stand beside")
    images = _images("imagenet_val", source)
    return _fed(images.subset(np.random.default_rng(0).permutation(len(images))[:count]), source)


def _noise(source: SourceModel) -> Parts:
    return _divided(random_samples(source, NOISE), None)


def _has_person(objects: BoxLabels) -> bool:
    left, top, right, bottom = objects.boxes.T
    share = (right - left) * (bottom - top) / (objects.size[0] * objects.size[1])
    return bool(((objects.classes == 0) & (share >= 0.005)).any())


def _magika(source: SourceModel) -> Parts:
    with np.load(SHARED / "data" / "magika_v2_1_dev.npz") as data:
        return _divided(data["bytes"], data["labels"])


# --------------------------------------------------------------------------- what they do alike


def data_of(case: Case, batch: int) -> dict[str, Any]:
    """The parts that the case has, as arguments of `compiled`; samples that fill no call are left out."""
    parts = {part: values for part, values in vars(case.load(case.source(1))).items() if values is not None}
    return {part: values[: len(values) // batch * batch] for part, values in parts.items()}


def compiled(case: Case, data: Mapping[str, Any], batch: int, *, max_drop: float, **options: Any) -> vinoopt.Bundle:
    """The case's bundle; `options` are arguments of `vinoopt.compile`."""
    return vinoopt.compile(
        case.model,
        data=data["search"],
        labels=data.get("search_labels"),
        calibration_data=data.get("calibration"),
        test_data=data["test"],
        test_labels=data.get("test_labels"),
        budget=AccuracyBudget(metric=case.metric, max_drop=max_drop),
        metric_options=case.metric_options,
        preprocess=case.preprocess,
        shape=case.shape_at(batch),
        **options,
    )


def whole_calls(data: Any, labels: Any, source: SourceModel, batch: int) -> Dataset:
    """The data as calls of the model's batch size; samples that fill no call are left out."""
    count = len(data) // batch * batch
    kept = None if labels is None else labels[:count]
    return from_arrays(data[:count], inputs=source.inputs, labels=kept)


def reference_for(metric: Metric, source: SourceModel, test: Dataset) -> Predictions | None:
    """The float model's outputs in f32, where the metric compares with them."""
    return predict(source.model, test, properties=F32) if metric.needs_reference else None


def judged(
    model: ov.Model | Path,
    properties: Mapping[str, str],
    test: Dataset,
    metric: Metric,
    reference: Predictions | None = None,
    *,
    device: str = "CPU",
) -> Scores:
    """The metric of a model as it is run, on the test part; `reference` where the float model's outputs count."""
    loaded = ov.Core().read_model(model) if isinstance(model, Path) else model
    kept = {key: value for key, value in properties.items() if key != "PERFORMANCE_HINT"}
    return score(metric, predict(loaded, test, properties=kept, device=device), test, reference)


def ratio(comparison: Comparison) -> list[float | bool]:
    """How many times faster, the ends of the 95% interval, and whether it is significant; for a JSON line."""
    return [comparison.speedup, comparison.low, comparison.high, comparison.is_significant]


def ratio_cell(cell: Sequence[Any] | None) -> str:
    """`1.31x 1.28-1.34`, with `n.s.` where the interval holds 1."""
    if cell is None:
        return "-"
    return f"{cell[0]:.2f}x {cell[1]:.2f}-{cell[2]:.2f}{'' if cell[3] else ' n.s.'}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def say(text: str) -> None:
    """Talk goes to stderr; stdout belongs to the table."""
    print(text, file=sys.stderr, flush=True)
