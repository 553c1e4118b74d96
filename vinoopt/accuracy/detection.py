"""COCO mean average precision: raw detector outputs decoded, matched once per image, quick to resample."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vinoopt.accuracy.labels import BoxLabels
from vinoopt.accuracy.metrics import Outputs, check_options
from vinoopt.errors import DataError, MetricError
from vinoopt.records import TensorSpec
from vinoopt.serde import nearest

Array = NDArray[Any]

GROUP = "vinoopt.decodings"
"""Entry-point group of decodings: name -> `Decoding`."""

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_PER_CLASS = 100
"""COCO judges so many detections per image and class."""
MAX_PER_IMAGE = 300
_MAX_BEFORE_NMS = 1000
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Detections:
    """Boxes of one image in pixels of what was fed, best first after selection."""

    boxes: Array
    """[n, 4]: left, top, right, bottom."""
    scores: Array
    """[n]."""
    classes: Array
    """int64 [n]."""

    def take(self, places: Array) -> Detections:
        """The detections at these places, in this order."""
        return Detections(boxes=self.boxes[places], scores=self.scores[places], classes=self.classes[places])


# --------------------------------------------------------------------------- decodings


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How a detector's raw output becomes boxes."""

    decode: Callable[[Array, tuple[int, int]], Detections]
    """From the output without its batch axis, and height and width of the input."""
    classes: Callable[[tuple[int, int]], int]
    """Number of classes from the output's last two sizes."""
    needs_nms: bool = True


def _best_class(boxes: Array, scores: Array) -> Detections:
    classes = scores.argmax(axis=1)
    return Detections(boxes=boxes, scores=scores[np.arange(len(scores)), classes], classes=classes)


def _corners(centre: Array, extent: Array) -> Array:
    return np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)


def _yolox(raw: Array, size: tuple[int, int]) -> Detections:
    """[N, 5 + C]: offsets to a grid cell, log extents in strides, objectness, class scores.

    Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv 2107.08430; exported without its own decoding.
    """
    for strides in ((8, 16, 32), (8, 16, 32, 64)):
        grids = [_grid(size, stride) for stride in strides]
        if sum(map(len, grids)) == len(raw):
            break
    else:
        raise MetricError(f"yolox: {len(raw)} boxes do not match the grids of a {size[0]} x {size[1]} input")
    cells = np.concatenate(grids)
    stride = cells[:, 2:]
    with np.errstate(over="ignore"):
        boxes = _corners((raw[:, :2] + cells[:, :2]) * stride, np.exp(raw[:, 2:4]) * stride)
    return _best_class(boxes, raw[:, 4:5] * raw[:, 5:])


def _grid(size: tuple[int, int], stride: int) -> Array:
    """Rows of column, row, stride; row by row."""
    rows, columns = np.mgrid[: size[0] // stride, : size[1] // stride]
    return np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], axis=1).astype(np.float64)


def _yolov5(raw: Array, size: tuple[int, int]) -> Detections:
    """[N, 5 + C]: centre and extent in pixels, objectness, class scores."""
    return _best_class(_corners(raw[:, :2], raw[:, 2:4]), raw[:, 4:5] * raw[:, 5:])


def _yolov8(raw: Array, size: tuple[int, int]) -> Detections:
    """[4 + C, N]: centre and extent in pixels, class scores."""
    table = raw.T
    return _best_class(_corners(table[:, :2], table[:, 2:4]), table[:, 4:])


def _yolov10(raw: Array, size: tuple[int, int]) -> Detections:
    """[N, 6]: corners in pixels, score, class; non-maximum suppression is not needed."""
    return Detections(boxes=raw[:, :4], scores=raw[:, 4], classes=np.rint(raw[:, 5]).astype(np.int64))


DECODINGS: dict[str, Decoding] = {
    "yolox": Decoding(decode=_yolox, classes=lambda sizes: sizes[1] - 5),
    "yolov5": Decoding(decode=_yolov5, classes=lambda sizes: sizes[1] - 5),
    "yolov8": Decoding(decode=_yolov8, classes=lambda sizes: sizes[0] - 4),
    "yolov10": Decoding(decode=_yolov10, classes=lambda sizes: 1 << 31, needs_nms=False),
}


def find_decoding(name: str) -> Decoding:
    """The decoding of this name, ours or from the entry-point group `vinoopt.decodings`.

    Raises `MetricError` for an unknown name, with the nearest.
    """
    if name in DECODINGS:
        return DECODINGS[name]
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        known = sorted({*DECODINGS, *(point.name for point in entry_points(group=GROUP))})
        raise MetricError(f'unknown decoding "{name}"{nearest(name, known)}; known: {", ".join(known)}')
    try:
        found = points[0].load()
    except (ImportError, AttributeError) as exc:
        raise MetricError(f'decoding "{name}" ({points[0].value}) cannot be loaded: {exc}') from exc
    if not isinstance(found, Decoding):
        raise MetricError(f'decoding "{name}" ({points[0].value}) is {type(found).__name__}, not a Decoding')
    return found


# --------------------------------------------------------------------------- selection and matching


def box_iou(one: Array, other: Array) -> Array:
    """Intersection over union of boxes [n, 4] and [m, 4] -> [n, m]; 0 where both are empty."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    iou: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def select(found: Detections, *, score_threshold: float, nms_threshold: float | None) -> Detections:
    """Detections above the score threshold, after greedy suppression per class, best first, at most 300."""
    # COCO has no rule of its own for boxes turned inside out: they are none here.
    is_box = np.isfinite(found.boxes).all(axis=1) & (found.boxes[:, 2:] > found.boxes[:, :2]).all(axis=1)
    places = np.flatnonzero(is_box & (found.scores > score_threshold))
    places = places[np.argsort(-found.scores[places], kind="stable")][:_MAX_BEFORE_NMS]
    found = found.take(places)
    if nms_threshold is None:
        return found.take(np.arange(len(found.scores))[:MAX_PER_IMAGE])
    same = found.classes[:, None] == found.classes[None, :]
    rivals = same & (box_iou(found.boxes, found.boxes) > nms_threshold)
    stays = np.ones(len(found.scores), dtype=bool)
    for place in range(len(stays)):
        if stays[place]:
            stays[place + 1 :] &= ~rivals[place, place + 1 :]
    return found.take(np.flatnonzero(stays)[:MAX_PER_IMAGE])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageMatches:
    """One image's detections against its objects: all that average precision needs of it."""

    found: Detections
    hits: Array
    """bool [n, 10]: whether the detection is matched to an object at each IoU threshold."""
    objects: BoxLabels


def match(found: Detections, objects: BoxLabels) -> ImageMatches:
    """Greedy matching, best score first, as the COCO evaluation does it (no crowds, all areas)."""
    hits = np.zeros((len(found.scores), len(IOU_THRESHOLDS)), dtype=bool)
    judged = []
    for kind in np.unique(found.classes):
        places = np.flatnonzero(found.classes == kind)
        places = places[np.argsort(-found.scores[places], kind="stable")][:MAX_PER_CLASS]
        judged.append(places)
        own = objects.boxes[objects.classes == kind]
        if len(own):
            hits[places] = _match_class(box_iou(found.boxes[places], own))
    kept = np.sort(np.concatenate(judged)) if judged else np.zeros(0, dtype=np.int64)
    return ImageMatches(found=found.take(kept), hits=hits[kept], objects=objects)


def _match_class(overlap: Array) -> Array:
    """Hits [n, 10] from the IoU [n, m] of one class, detections best first."""
    hits = np.zeros((len(overlap), len(IOU_THRESHOLDS)), dtype=bool)
    is_free = np.ones((len(IOU_THRESHOLDS), overlap.shape[1]), dtype=bool)
    for place in np.flatnonzero(overlap.max(axis=1) >= IOU_THRESHOLDS[0]):
        offered = np.where(is_free, overlap[place][None, :], -1.0)
        # Of equal overlaps COCO takes the last object.
        best = offered.shape[1] - 1 - offered[:, ::-1].argmax(axis=1)
        rows = np.flatnonzero(offered[np.arange(len(best)), best] >= IOU_THRESHOLDS)
        hits[place, rows] = True
        is_free[rows, best[rows]] = False
    return hits


# --------------------------------------------------------------------------- the metric


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanAveragePrecision:
    """COCO mAP over IoU 0.50:0.95, all areas, 100 detections per image and class.

    Boxes are compared in pixels of what is fed; IoU is the same there as in the original image, because every
    fit scales each axis as a whole. Lin et al., "Microsoft COCO", arXiv 1405.0312, and the rules of its evaluation.
    """

    output: str
    decoding: Decoding
    classes: int
    score_threshold: float = 0.01
    nms_threshold: float = 0.65

    name = "map"
    higher_is_better = True
    needs_labels = True
    needs_reference = False
    unit = "share"
    is_mean = False

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> ImageMatches:
        """The image's detections, matched to its objects."""
        if self.output not in outputs:
            raise MetricError(
                f'the model gave no output "{self.output}"{nearest(self.output, list(outputs))}'
            )
        if not isinstance(label, BoxLabels):
            raise DataError(_LABELS_HINT)
        raw = np.asarray(outputs[self.output][0], dtype=np.float64)
        found = select(
            self.decoding.decode(raw, label.size),
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold if self.decoding.needs_nms else None,
        )
        return match(found, label)

    def check_labels(self, labels: Any) -> None:
        """Raises `DataError` for labels that are no boxes, or of classes that the model does not have."""
        images = [image for label in labels for image in (label if isinstance(label, tuple) else (label,))]
        if not all(isinstance(image, BoxLabels) for image in images):
            raise DataError(_LABELS_HINT)
        kinds = np.concatenate([image.classes for image in images])
        if not kinds.size:
            raise DataError("map: no image of this part has a labelled box")
        if kinds.max() >= self.classes:
            raise DataError(f"box of class {kinds.max()}, the model has classes 0 to {self.classes - 1}")

    def value(self, statistics: Sequence[Any]) -> float:
        """mAP by faster-coco-eval; NaN where no image has an object."""
        return library_map(statistics)

    def values(self, statistics: Sequence[Any], counts: Array) -> Array:
        """mAP [R] where image i counts `counts[r, i]` times."""
        return resampled_map(statistics, counts)


_LABELS_HINT = "map needs boxes as labels: give --labels a folder of YOLO .txt files, and images as data"


def mean_average_precision(
    *, outputs: Sequence[TensorSpec], options: Mapping[str, Any]
) -> MeanAveragePrecision:
    """The metric for a detector's output; options `decoding`, `output`, `score_threshold`, `nms_threshold`.

    Raises `MetricError` where faster-coco-eval is missing, the decoding is not named, or no output fits.
    """
    check_options("map", options, ("decoding", "output", "score_threshold", "nms_threshold"))
    if find_spec("faster_coco_eval") is None:
        raise MetricError('map needs faster-coco-eval: pip install "vinoopt[detection]"')
    spec = _boxes_output(outputs, options.get("output"))
    name = options.get("decoding")
    if name is None:
        raise MetricError(
            f'map needs to know what output "{spec.name}" [{", ".join(map(str, spec.shape))}] holds; '
            f"give --metric-option decoding=NAME, one of {', '.join(DECODINGS)}"
        )
    decoding = find_decoding(str(name))
    sizes = spec.shape[1:]
    classes = decoding.classes(tuple(s if isinstance(s, int) else 1 << 31 for s in sizes))  # type: ignore[arg-type]
    if classes < 1:
        raise MetricError(f'decoding "{name}" does not fit output "{spec.name}" {spec.shape}')
    return MeanAveragePrecision(
        output=spec.name,
        decoding=decoding,
        classes=classes,
        score_threshold=float(options.get("score_threshold", 0.01)),
        nms_threshold=float(options.get("nms_threshold", 0.65)),
    )


def _boxes_output(outputs: Sequence[TensorSpec], wanted: str | None) -> TensorSpec:
    fitting = [spec for spec in outputs if len(spec.shape) == 3 and wanted in (None, spec.name)]
    if len(fitting) == 1:
        return fitting[0]
    if wanted is not None and wanted not in [spec.name for spec in outputs]:
        raise MetricError(f'no output "{wanted}"{nearest(wanted, [spec.name for spec in outputs])}')
    what = "several outputs have" if fitting else "no output has"
    raise MetricError(
        f"map: {what} the shape of boxes, [1, N, values]"
        + ("; name one with --metric-option output=NAME" * bool(fitting))
    )


# --------------------------------------------------------------------------- average precision


def library_map(images: Sequence[ImageMatches]) -> float:
    """mAP of these images by faster-coco-eval; NaN where none has an object."""
    from faster_coco_eval import (
        COCO,
        COCOeval_faster,
    )  # an extra; its absence is reported when the metric is made

    truth, found = _coco_tables(images)
    if not truth["annotations"]:
        return float("nan")
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(truth)
        evaluation = COCOeval_faster(reference, reference.loadRes(found), iouType="bbox")
        evaluation.params.maxDets = [MAX_PER_CLASS]
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])
    return float(precision[precision > -1].mean())


def _coco_tables(images: Sequence[ImageMatches]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        for box, kind in zip(_as_xywh(image.objects.boxes), image.objects.classes, strict=True):
            entry: dict[str, Any] = {"image_id": number, "category_id": int(kind) + 1, "bbox": box}
            truth.append({**entry, "id": len(truth) + 1, "area": box[2] * box[3], "iscrowd": 0})
        own = image.found
        for box, kind, score in zip(_as_xywh(own.boxes), own.classes, own.scores, strict=True):
            entry = {"image_id": number, "category_id": int(kind) + 1, "bbox": box}
            found.append({**entry, "score": float(score)})
    kinds = sorted({row["category_id"] for row in (*truth, *found)})
    sizes = [image.objects.size for image in images]
    return {
        "info": {},
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes, 1)],
        "annotations": truth,
        "categories": [{"id": kind, "name": str(kind)} for kind in kinds],
    }, found


def _as_xywh(boxes: Array) -> list[list[float]]:
    rows: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return rows


def resampled_map(images: Sequence[ImageMatches], counts: Array) -> Array:
    """mAP [R] where image i counts `counts[r, i]` times: the rules of `library_map`, from matches made once."""
    owner = np.repeat(np.arange(len(images)), [len(image.found.scores) for image in images])
    scores = np.concatenate([image.found.scores for image in images])
    classes = np.concatenate([image.found.classes for image in images])
    hits = np.concatenate([image.hits for image in images])
    kinds = np.unique(np.concatenate([image.objects.classes for image in images]))
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for kind in kinds:
        objects = np.asarray([np.count_nonzero(image.objects.classes == kind) for image in images])
        places = np.flatnonzero(classes == kind)
        places = places[np.argsort(-scores[places], kind="stable")]
        rows = max(1, _CHUNK_CELLS // max(len(places), 1))
        for start in range(0, len(counts), rows):
            part = slice(start, start + rows)
            positives = counts[part] @ objects
            total[part] += _average_precision(counts[part][:, owner[places]], hits[places], positives)
            present[part] += positives > 0
    mean: Array = np.divide(total, present, out=np.full(len(counts), np.nan), where=present > 0)
    return mean


def _average_precision(weights: Array, hits: Array, positives: Array) -> Array:
    """AP [R] of one class, meaned over the IoU thresholds; 0 where there is no object.

    `weights` [R, n]: how often each detection counts, best first. Precision is read at 101 recalls, made
    monotone first; only hits matter for that, since a miss never raises precision.
    """
    seen = np.cumsum(weights, axis=1, dtype=np.float64)
    total = np.zeros(len(weights))
    for threshold in range(hits.shape[1]):
        columns = np.flatnonzero(hits[:, threshold])
        if not len(columns):
            continue
        right = np.cumsum(weights[:, columns], axis=1, dtype=np.float64)
        precision = np.divide(right, seen[:, columns], out=np.zeros_like(right), where=right > 0)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = np.divide(right, positives[:, None], out=np.zeros_like(right), where=positives[:, None] > 0)
        reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")
        # Before the first hit of weight the recall is 0, which alone reaches nothing.
        reached[right == 0] = 0
        steps = np.diff(reached, axis=1, prepend=0)
        total += (precision * steps).sum(axis=1) / len(RECALL_THRESHOLDS)
    mean: Array = total / hits.shape[1]
    return mean
