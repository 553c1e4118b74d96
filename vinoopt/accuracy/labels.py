"""Labels for classification (whole numbers) and detection (boxes), matched to the calls of a dataset."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vinoopt.accuracy.arrays import Array, load_arrays
from vinoopt.accuracy.images import ImageReader, Placement
from vinoopt.errors import DataError
from vinoopt.serde import nearest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BoxLabels:
    """The objects of one image, in pixels of what is fed to the model."""

    boxes: Array
    """float64 [n, 4]: left, top, right, bottom."""
    classes: Array
    """int64 [n]."""
    size: tuple[int, int]
    """Height and width of what is fed."""


Label = Any
"""One sample's label: a number, `BoxLabels`, or what a metric of one's own understands."""

Labels = Array | Sequence[Label]
"""Labels of all calls: numbers [calls] or [calls, batch], int64 where they are whole, or one object per call."""


def group_labels(labels: Any, *, calls: int, batch: int, where: str) -> tuple[Labels, int]:
    """Labels per call, and how many samples of a call have one of their own: 1 or `batch`.

    One number per sample becomes an array [calls] or [calls, batch], int64 where all are whole: class indices.
    Anything else, as rows of numbers or words, stays as it is, in a tuple, for a metric that understands it. The
    labels of a last, partial batch are left out. Raises `DataError` for a wrong count.
    """
    if not isinstance(labels, np.ndarray):
        labels = list(labels)
        if not labels or isinstance(labels[0], (int, float, np.number, np.bool_)):
            labels = np.asarray(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf":
        if labels.ndim < 2 or (labels.ndim == 2 and _fits(labels.size, calls, batch)):
            labels = _as_indices(labels.reshape(-1))
    elif isinstance(labels, np.ndarray):
        labels = labels.tolist()
    count = len(labels)
    if count == calls:
        return (labels if isinstance(labels, np.ndarray) and labels.ndim == 1 else tuple(labels)), 1
    if not _fits(count, calls, batch):
        text = f" in {calls} calls of {batch}" if batch > 1 else ""
        raise DataError(f"{where}: {count} labels for {calls * batch} samples{text}")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        return labels[: calls * batch].reshape(calls, batch), batch
    return tuple(tuple(labels[call * batch : (call + 1) * batch]) for call in range(calls)), batch


def _fits(count: int, calls: int, batch: int) -> bool:
    """Whether so many labels are one per sample, those of a last, partial batch perhaps included."""
    return calls * batch <= count < (calls + 1) * batch


def _as_indices(labels: Array) -> Array:
    """As int64 where all are whole numbers, else as they are."""
    is_whole = labels.dtype.kind != "f" or (np.isfinite(labels).all() and (labels == np.floor(labels)).all())
    return labels.astype(np.int64) if is_whole else labels


# --------------------------------------------------------------------------- files


def read_labels(path: Path, *, files: Sequence[Path], root: Path, images: ImageReader | None) -> Any:
    """The labels in a npy or csv file, or boxes from a folder of YOLO txt files.

    `files` are the samples' files, where the samples are files: a csv with two columns is matched to them by
    name, everything else by order. Raises `DataError`.
    """
    if path.is_dir():
        if images is None:
            raise DataError(f"{path}: a folder of labels holds boxes and needs a folder of images as data")
        return read_boxes(path, images)
    if not path.exists():
        raise DataError(f"{path}: no such labels file")
    if path.suffix == ".npy":
        return np.asarray(load_arrays(path)[path.stem])
    if path.suffix in (".csv", ".txt", ".tsv"):
        return _read_csv(path, files, root)
    raise DataError(
        f"{path}: labels are a .npy file, a .csv file (file,label), or a folder of YOLO .txt files"
    )


def _read_csv(path: Path, files: Sequence[Path], root: Path) -> Array:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read: {exc}") from exc
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=delimiter)]
    rows = [row for row in rows if any(row)]
    if rows and not _is_number(rows[0][-1]):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path}: holds no labels")
    for number, row in enumerate(rows):
        if not _is_number(row[-1]):
            raise DataError(
                f'{path}: label {number} is "{row[-1]}", not a whole number; give class indices from 0'
            )
    if files and all(len(row) >= 2 for row in rows):
        return _by_name({row[0]: float(row[-1]) for row in rows}, files, root, path)
    return np.asarray([float(row[-1]) for row in rows])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _by_name(table: dict[str, float], files: Sequence[Path], root: Path, path: Path) -> Array:
    """Labels in the order of `files`, by path below the root, else by name, else by stem."""
    by_stem: dict[str, float] = {}
    for name, label in table.items():
        stem = Path(name.replace("\\", "/")).stem
        by_stem[stem] = label if by_stem.get(stem, label) == label else float("nan")
    found = []
    for file in files:
        for key in (file.relative_to(root).as_posix(), file.name):
            if key in table:
                found.append(table[key])
                break
        else:
            found_label = by_stem.get(file.stem)
            if found_label is None:
                raise DataError(f'{path}: no label for "{file.name}"{nearest(file.name, list(table)[:1000])}')
            if np.isnan(found_label):
                raise DataError(
                    f'{path}: several different labels for "{file.stem}"; give paths below the folder'
                )
            found.append(found_label)
    return np.asarray(found)


# --------------------------------------------------------------------------- boxes


def read_boxes(folder: Path, images: ImageReader) -> tuple[BoxLabels, ...]:
    """Boxes of every image, from YOLO txt files (`class cx cy w h`, shares of width and height) of its stem.

    An image without a file has no objects. Raises `DataError` for a malformed line, or where no file belongs
    to any image.
    """
    found = {path.stem: path for path in sorted(folder.rglob("*.txt"), key=Path.as_posix)}
    stems = {path.stem for path in images.files}
    if not stems & found.keys():
        raise DataError(f"{folder}: no .txt file has the name of an image in {images.root}")
    return tuple(
        _boxes_of(found.get(path.stem), images.placement(number)) for number, path in enumerate(images.files)
    )


def _boxes_of(path: Path | None, place: Placement) -> BoxLabels:
    lines = path.read_text(encoding="utf-8").split("\n") if path is not None else []
    rows = [_box_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
    centre, extent = table[:, 1:3], table[:, 3:5]
    scale = np.asarray([place.original[1] * place.scale[1], place.original[0] * place.scale[0]])
    offset = np.asarray([place.offset[1], place.offset[0]])
    limit = np.asarray([place.fed[1], place.fed[0]], dtype=np.float64)
    low = np.clip((centre - extent / 2) * scale + offset, 0, limit)
    high = np.clip((centre + extent / 2) * scale + offset, 0, limit)
    seen = ((high - low) > 0).all(axis=1)
    boxes = np.concatenate([low, high], axis=1)[seen]
    return BoxLabels(boxes=boxes, classes=table[seen, 0].astype(np.int64), size=place.fed)


def _box_row(line: str, where: str) -> list[float]:
    try:
        row = [float(cell) for cell in line.split()]
    except ValueError as exc:
        raise DataError(f"{where}: not numbers: {line[:60]!r}") from exc
    if len(row) != 5 or row[0] != int(row[0]) or row[0] < 0 or not all(-0.01 <= v <= 1.01 for v in row[1:]):
        raise DataError(
            f"{where}: not `class cx cy w h` with a class index from 0 and shares of width and height: "
            f"{line[:60]!r}"
        )
    return row
