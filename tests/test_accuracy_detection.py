"""Detectors: decodings, suppression, matching, and mAP equal to the library's however it is resampled."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino.preprocess import ColorFormat, PrePostProcessor

from vinoopt.accuracy.datasets import Dataset, load_dataset
from vinoopt.accuracy.detection import (
    DECODINGS,
    Detections,
    ImageMatches,
    box_iou,
    find_decoding,
    library_map,
    match,
    resampled_map,
    select,
)
from vinoopt.accuracy.evaluate import check_fit, paired_drop, predict, score
from vinoopt.accuracy.labels import BoxLabels
from vinoopt.accuracy.metrics import Metric, find_metric, metric_names
from vinoopt.errors import DataError, MetricError
from vinoopt.records import AccuracyBudget, PreprocessSpec, TensorSpec

pytest.importorskip("faster_coco_eval", reason="mAP needs the extra vinoopt[detection]")

SIZE = (64, 96)
CELLS = sum((SIZE[0] // s) * (SIZE[1] // s) for s in (8, 16, 32))
OUTPUT = TensorSpec(name="boxes", shape=(1, CELLS, 5 + 4), dtype="float32")


def objects(boxes: list[list[float]], classes: list[int]) -> BoxLabels:
    return BoxLabels(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        classes=np.asarray(classes, np.int64),
        size=SIZE,
    )


def detections(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Detections:
    return Detections(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        scores=np.asarray(scores, dtype=np.float64),
        classes=np.asarray(classes, np.int64),
    )


def map_metric(decoding: str = "yolov5", output: TensorSpec = OUTPUT, **options: float) -> Metric:
    return find_metric("map", outputs=[output], has_labels=True, options={"decoding": decoding, **options})


# --------------------------------------------------------------------------- decodings

BOX = [20.0, 10.0, 60.0, 42.0]  # centre 40, 26; extent 40, 32


def test_yolox_is_decoded_on_its_grid() -> None:
    raw = np.full((CELLS, 9), -9.0)
    raw[:, 4:] = 0
    place = (64 // 8) * (96 // 8) + 1 * (96 // 16) + 2  # stride 16, row 1, column 2
    raw[place] = [40 / 16 - 2, 26 / 16 - 1, np.log(40 / 16), np.log(32 / 16), 0.5, 0, 0, 0.8, 0]
    found = DECODINGS["yolox"].decode(raw, SIZE)
    np.testing.assert_allclose(found.boxes[place], BOX)
    assert (found.scores[place], found.classes[place]) == (pytest.approx(0.4), 2)
    with pytest.raises(MetricError, match="do not match the grids"):
        DECODINGS["yolox"].decode(raw[:-1], SIZE)


@pytest.mark.parametrize(
    ("decoding", "raw"),
    [
        ("yolov5", np.array([[40, 26, 40, 32, 0.5, 0, 0, 0.8, 0]])),
        ("yolov8", np.array([[40, 26, 40, 32, 0, 0, 0.4, 0]]).T),
        ("yolov10", np.array([[*BOX, 0.4, 2]])),
    ],
)
def test_decoded_outputs_give_the_same_box(decoding: str, raw: np.ndarray) -> None:
    found = find_decoding(decoding).decode(raw, SIZE)
    np.testing.assert_allclose(found.boxes, [BOX])
    assert (found.scores[0], found.classes[0]) == (pytest.approx(0.4), 2)


def test_overlaps_are_suppressed_within_a_class() -> None:
    shifted = [BOX[0] + 2, BOX[1], BOX[2] + 2, BOX[3]]
    found = detections([shifted, BOX, BOX, [0, 0, 5, 5]], [0.8, 0.9, 0.7, 0.005], [1, 1, 2, 1])
    kept = select(found, score_threshold=0.01, nms_threshold=0.65)
    assert kept.scores.tolist() == [0.9, 0.7]
    assert kept.classes.tolist() == [1, 2]
    assert select(found, score_threshold=0.01, nms_threshold=None).scores.tolist() == [0.9, 0.8, 0.7]


def test_boxes_that_are_not_finite_or_inside_out_are_no_detections() -> None:
    found = detections([BOX, [0, 0, np.inf, 5], BOX, [5, 5, 3, 9]], [0.9, 0.8, np.nan, 0.7], [1, 1, 1, 1])
    assert len(select(found, score_threshold=0.01, nms_threshold=0.65).scores) == 1


def test_overlap_is_intersection_over_union() -> None:
    one = np.array([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    other = np.array([[5.0, 0, 15, 10], [20, 20, 30, 30], [5, 5, 5, 5]])
    np.testing.assert_allclose(box_iou(one, other), [[1 / 3, 0, 0], [0, 0, 0]])


# --------------------------------------------------------------------------- average precision


def random_images(seed: int, count: int, classes: int = 3) -> list[ImageMatches]:
    """Objects, and detections that scatter around them or lie anywhere."""
    random, images = np.random.default_rng(seed), []
    for _ in range(count):
        number = int(random.integers(0, 5))
        low = random.uniform(0, 40, (number, 2))
        truth = np.concatenate([low, low + random.uniform(4, 24, (number, 2))], axis=1)
        kinds = random.integers(0, classes, number)
        near = np.repeat(truth, 2, axis=0) + random.normal(0, 2, (2 * number, 4))
        low = random.uniform(0, 40, (3, 2))
        far = np.concatenate([low, low + random.uniform(4, 24, (3, 2))], axis=1)
        boxes = np.concatenate([near, far])
        found_kinds = np.concatenate([np.repeat(kinds, 2), random.integers(0, classes, 3)])
        found = detections(boxes.tolist(), random.uniform(0.02, 1, len(boxes)).tolist(), found_kinds.tolist())
        found = select(found, score_threshold=0.01, nms_threshold=0.9)
        images.append(match(found, objects(truth.tolist(), kinds.tolist())))
    return images


@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_our_map_is_the_library_map(seed: int, count: int) -> None:
    images = random_images(seed, count)
    ours = float(resampled_map(images, np.ones((1, count)))[0])
    np.testing.assert_allclose(ours, library_map(images), rtol=0, atol=1e-12, equal_nan=True)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_counts_are_repeated_images(seed: int) -> None:
    images = random_images(seed, 8)
    counts = np.random.default_rng(seed).multinomial(8, [1 / 8] * 8, size=3)
    repeated = [library_map([images[i] for i in np.repeat(np.arange(8), row)]) for row in counts]
    np.testing.assert_allclose(resampled_map(images, counts), repeated, rtol=0, atol=1e-12, equal_nan=True)


def test_a_perfect_detector_scores_one_and_a_blind_one_zero() -> None:
    truth = objects([BOX, [0, 0, 10, 10]], [0, 1])
    perfect = [match(detections(truth.boxes.tolist(), [0.9, 0.8], [0, 1]), truth)] * 3
    blind = [match(detections([], [], []), truth)] * 3
    assert library_map(perfect) == resampled_map(perfect, np.ones((1, 3)))[0] == 1.0
    assert library_map(blind) == resampled_map(blind, np.ones((1, 3)))[0] == 0.0


def test_each_object_is_found_once() -> None:
    truth = objects([BOX], [0])
    found = match(detections([BOX, BOX], [0.9, 0.8], [0, 0]), truth)
    assert found.hits.tolist() == [[True] * 10, [False] * 10]
    assert not match(detections([BOX], [0.9], [1]), truth).hits.any()


# --------------------------------------------------------------------------- the metric


def test_it_is_a_metric() -> None:
    metric = map_metric()
    assert isinstance(metric, Metric)
    assert metric.name == "map"
    assert "map" in metric_names()
    assert metric.needs_labels
    assert not metric.needs_reference


def test_outputs_are_judged_by_their_boxes() -> None:
    raw = np.zeros((1, CELLS, 9))
    raw[0, 7] = [40, 26, 40, 32, 0.9, 0, 0, 0.8, 0]
    found = map_metric().statistic({"boxes": raw}, objects([BOX], [2]), None)
    assert map_metric().value([found]) == 1.0
    assert map_metric(score_threshold=0.9).value([found, found]) == 1.0
    strict = map_metric(score_threshold=0.9).statistic({"boxes": raw}, objects([BOX], [2]), None)
    assert map_metric().value([strict]) == 0.0


@pytest.mark.parametrize(
    ("options", "output", "words"),
    [
        ({}, OUTPUT, "decoding=NAME, one of yolox"),
        ({"decoding": "yolo8"}, OUTPUT, 'unknown decoding "yolo8"; did you mean "yolov8"'),
        (
            {"decoding": "yolox", "nms_treshold": 0.5},
            OUTPUT,
            'no option "nms_treshold"; did you mean "nms_threshold"',
        ),
        ({"decoding": "yolox", "output": "box"}, OUTPUT, 'no output "box"; did you mean "boxes"'),
        (
            {"decoding": "yolox"},
            TensorSpec(name="y", shape=(1, 10), dtype="float32"),
            "no output has the shape",
        ),
        (
            {"decoding": "yolox"},
            TensorSpec(name="y", shape=(1, 9, 5), dtype="float32"),
            "does not fit output",
        ),
    ],
)
def test_choices_that_cannot_be_are_explained(
    options: dict[str, object], output: TensorSpec, words: str
) -> None:
    with pytest.raises(MetricError, match=words):
        find_metric("map", outputs=[output], has_labels=True, options=options)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MetricError, match=r'pip install "vinoopt\[detection\]"'):
        map_metric()


def test_labels_must_be_boxes_of_known_classes() -> None:
    metric = map_metric()
    metric.check_labels((objects([BOX], [3]), objects([], [])))
    metric.check_labels(((objects([BOX], [3]), objects([], [])),))
    with pytest.raises(DataError, match="class 4, the model has classes 0 to 3"):
        metric.check_labels((objects([BOX], [4]),))
    with pytest.raises(DataError, match="no image of this part"):
        metric.check_labels((objects([], []),))
    with pytest.raises(DataError, match=r"folder of YOLO \.txt files"):
        metric.check_labels(np.arange(3))


# --------------------------------------------------------------------------- a real detector


def yolox(shared: Path) -> tuple[ov.Model, Dataset]:
    """The detector fed with uint8 RGB images, and the images with their boxes."""
    builder = PrePostProcessor(ov.Core().read_model(shared / "models" / "yolox_nano.onnx"))
    tensor = builder.input().tensor()
    tensor.set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_color_format(ColorFormat.RGB)
    builder.input().model().set_layout(ov.Layout("NCHW"))
    builder.input().preprocess().convert_element_type(ov.Type.f32).convert_color(ColorFormat.BGR)
    root = shared / "data" / "coco_train128"
    dataset = load_dataset(
        str(root / "images"),
        inputs=[TensorSpec(name="images", shape=(1, 416, 416, 3), dtype="uint8", layout="NHWC")],
        labels=str(root / "labels"),
        preprocess=[PreprocessSpec(fit="letterbox", colour_order="BGR")],
    )
    return builder.build(), dataset


@pytest.mark.slow
def test_a_real_detector_reaches_its_known_map(shared: Path) -> None:
    model, dataset = yolox(shared)
    output = TensorSpec(name="output", shape=(1, 3549, 85), dtype="float32")
    metric = map_metric("yolox", output)
    check_fit(metric, dataset)
    scores = {
        precision: score(
            metric, predict(model, dataset, properties={"INFERENCE_PRECISION_HINT": precision}), dataset
        )
        for precision in ("f32", "bf16")
    }
    # Measured on these 128 training images; a score threshold of 0.001 gives 33.5.
    assert scores["f32"].value == pytest.approx(0.333, abs=0.005)
    ours = metric.values(scores["f32"].statistics, np.ones((1, len(dataset))))[0]
    assert ours == pytest.approx(scores["f32"].value, abs=1e-12)
    drop = paired_drop(metric, scores["f32"], scores["bf16"], budget=AccuracyBudget(metric="map"), seed=0)
    assert drop.low < drop.value < drop.high
    assert abs(drop.value) < 0.02
