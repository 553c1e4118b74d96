"""Samples and labels, ready to be fed: from files, folders, images or arrays, and split once, seeded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vinoopt.accuracy.arrays import (
    Array,
    ArrayReader,
    FileReader,
    Reader,
    Sample,
    SampleReader,
    array_reader,
    batch_size,
    dtype_message,
    load_array,
    load_arrays,
    match_names,
)
from vinoopt.accuracy.images import IMAGE_SUFFIXES, ImageReader, image_reader
from vinoopt.accuracy.labels import BoxLabels, Labels, group_labels, read_labels
from vinoopt.accuracy.user_code import import_attribute, is_code
from vinoopt.errors import DataError
from vinoopt.records import PreprocessSpec, TensorSpec

MIN_SAMPLES = 10
"""With fewer, neither calibration nor a judgement means anything."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """Samples, one call of the model each, made when they are asked for."""

    reader: Reader
    labels: Labels | None = None
    """One per call: a whole number, boxes, or, in calls of several samples, one per sample."""
    title: str = "samples"
    batch: int = 1
    """Samples in one call, as the model's inputs want it."""
    messages: tuple[str, ...] = ()
    """What the user should know: casts, arrays that are not used, samples left out."""
    indices: Array | None = None
    """The calls of the reader that belong to this set, in order; None: all."""

    def __len__(self) -> int:
        return len(self.reader) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        """Input name -> array for one call, batch axis included."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"sample {index} of {size}")
        index %= size
        return self.reader[index if self.indices is None else int(self.indices[index])]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def samples(self) -> int:
        """Samples in all calls together."""
        return len(self) * self.batch

    def subset(self, indices: Sequence[int] | Array) -> Dataset:
        """The calls at these places, in this order; raises `IndexError` beyond the end."""
        chosen = np.asarray(indices, dtype=np.int64)
        own = np.arange(len(self)) if self.indices is None else self.indices
        return replace(
            self, indices=own[chosen], labels=None if self.labels is None else _take(self.labels, chosen)
        )

    def describe(self) -> str:
        """One line: what it is, how many, with labels or without."""
        calls = f" in {len(self)} calls of {self.batch}" if self.batch > 1 else ""
        kind = "without labels" if self.labels is None else _label_kind(self.labels)
        return f"{self.title}: {self.samples} samples{calls}, {kind}"


    def held(self, limit_bytes: int) -> Dataset:
        """The same set with its samples in memory, read and decoded once, where they need no more than that."""
        if not len(self):
            return self
        size = sum(array.nbytes for array in self[0].values())
        if size * len(self) > limit_bytes:
            return self
        return replace(self, reader=_Held(samples=tuple(self)), indices=None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Held:
    """Samples that lie in memory as the model takes them."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _take(labels: Labels, chosen: Array) -> Labels:
    return labels[chosen] if isinstance(labels, np.ndarray) else tuple(labels[int(i)] for i in chosen)


def _label_kind(labels: Labels) -> str:
    if isinstance(labels, np.ndarray) and labels.size:
        return f"labels {labels.min()} to {labels.max()}"
    boxes = [label for label in labels if isinstance(label, BoxLabels)]
    return f"{sum(len(label.boxes) for label in boxes)} labelled boxes" if boxes else "labels"


# --------------------------------------------------------------------------- in memory


def from_arrays(
    data: Mapping[str, Array] | Array | Sequence[Any],
    *,
    inputs: Sequence[TensorSpec],
    labels: Any = None,
    title: str = "arrays",
) -> Dataset:
    """A dataset of arrays in memory, read through once and checked.

    `data` is a dictionary of arrays by input name, one array for a model with one input, or a sequence of
    samples (each a dictionary, or an array). Arrays of the input's rank are cut along axis 0 into calls of
    the model's batch size; arrays of one rank more hold one call per entry. `labels` has one entry per sample.
    Raises `DataError` for wrong names, shapes, dtypes, counts, for values that are not finite, and for fewer
    than 10 samples.
    """
    messages: tuple[str, ...] = ()
    reader: ArrayReader | SampleReader
    if isinstance(data, np.ndarray):
        data = {inputs[0].name if len(inputs) == 1 else title: data}
    if isinstance(data, Mapping):
        named = {str(key): np.asarray(value) for key, value in data.items()}
        match = match_names(list(named), inputs, title, labels=None)
        labels = named[match.labels] if labels is None and match.labels else labels
        messages = _match_messages(match.labels, match.unused)
        reader = array_reader({name: named[key] for name, key in match.keys.items()}, inputs, title)
    else:
        reader = SampleReader(samples=data, inputs=tuple(inputs), where=title, batch=_common_batch(inputs))
    return _finish(reader, labels, title=title, messages=messages)


def _common_batch(inputs: Sequence[TensorSpec]) -> int:
    return batch_size(inputs[0]) if inputs else 1


def _match_messages(labels: str | None, unused: Sequence[str]) -> tuple[str, ...]:
    found = (f'labels are taken from the array "{labels}"',) if labels else ()
    return found + ((f"arrays that no input takes are left out: {', '.join(unused)}",) if unused else ())


def _finish(
    reader: ArrayReader | SampleReader | FileReader | ImageReader,
    labels: Any,
    *,
    title: str,
    messages: tuple[str, ...] = (),
) -> Dataset:
    """The dataset over a reader, after reading every array sample once: bad data ends a run at its start."""
    calls, batch = len(reader), reader.batch
    if calls * batch < MIN_SAMPLES or calls < 3:
        amount = f"{calls * batch} samples" + (f" in {calls} calls of {batch}" if batch > 1 else "")
        raise DataError(
            f"{title}: {amount} is too little; "
            f"give at least {max(MIN_SAMPLES, 3 * batch)}, better 300 or more"
        )
    if not isinstance(reader, ImageReader):
        for index in range(calls):
            reader[index]
    grouped = None
    if labels is not None:
        grouped, batch = group_labels(labels, calls=calls, batch=batch, where=f"{title}: labels")
    return Dataset(
        reader=reader, labels=grouped, title=title, batch=batch, messages=messages + reader.messages
    )


# --------------------------------------------------------------------------- from files


def load_dataset(
    source: str,
    *,
    inputs: Sequence[TensorSpec],
    labels: str | None = None,
    preprocess: Sequence[PreprocessSpec] = (),
    allow_code: bool = False,
) -> Dataset:
    """The samples at `source`, checked against the model's inputs before any long work.

    `source` is an npz (an array per input; held in memory), an npy (memory-mapped), a folder of npy or npz
    files (one call each), a folder of images (searched recursively, sorted by path), or `module:attribute`,
    which runs code and needs `allow_code`. `inputs` describe what is fed, after embedding of preprocessing.
    `labels` is a npy or csv file, an array of the npz, or a folder of YOLO txt files. Raises `DataError`.
    """
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, inputs, labels, preprocess)
    if path.is_file():
        if path.suffix not in (".npz", ".npy"):
            raise DataError(
                f"{path}: data is a .npz or .npy file, or a folder of images, .npy or .npz files"
                + ("; give the folder of this image" if path.suffix.lower() in IMAGE_SUFFIXES else "")
            )
        return _load_file(path, inputs, labels)
    if is_code(source):
        return _load_code(source, inputs, labels, allow_code)
    raise DataError(f"{source}: no such file or folder")


def _load_file(path: Path, inputs: Sequence[TensorSpec], labels: str | None) -> Dataset:
    arrays = load_arrays(path)
    key = labels if labels in arrays else None
    match = match_names(list(arrays), inputs, str(path), labels=key)
    named = {name: load_array(arrays, held, path) for name, held in match.keys.items()}
    reader = array_reader(named, inputs, str(path))
    found: Any = None
    if labels is not None and key is None:
        if not Path(labels).exists():
            raise DataError(f"{labels}: neither an array of {path} ({', '.join(arrays)}) nor a labels file")
        found = read_labels(Path(labels), files=(), root=path.parent, images=None)
    elif match.labels is not None:
        found = load_array(arrays, match.labels, path)
    messages = _match_messages(match.labels if labels is None else None, match.unused)
    return _finish(reader, found, title=path.name, messages=messages)


def _load_folder(
    path: Path, inputs: Sequence[TensorSpec], labels: str | None, preprocess: Sequence[PreprocessSpec]
) -> Dataset:
    everything = sorted((file for file in path.rglob("*") if file.is_file()), key=Path.as_posix)
    images = [file for file in everything if file.suffix.lower() in IMAGE_SUFFIXES]
    arrays = [file for file in everything if file.suffix.lower() in (".npy", ".npz")]
    if images and arrays:
        raise DataError(
            f"{path}: holds {len(images)} images and {len(arrays)} array files; give a folder of one kind"
        )
    if not images and not arrays:
        raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}), .npy or .npz file")
    reader: ImageReader | FileReader
    if images:
        reader = image_reader(path, images, inputs, preprocess)
    else:
        batch = _common_batch(inputs)
        reader = FileReader(
            files=tuple(arrays), inputs=tuple(inputs), batch=batch, messages=_casts(arrays[0], inputs)
        )
    found = None
    if labels is not None:
        by_image = reader if isinstance(reader, ImageReader) else None
        found = read_labels(Path(labels), files=reader.files, root=path, images=by_image)
    return _finish(reader, found, title=path.name)


def _casts(first: Path, inputs: Sequence[TensorSpec]) -> tuple[str, ...]:
    arrays = load_arrays(first)
    match = match_names(list(arrays), inputs, str(first))
    notes = [dtype_message(load_array(arrays, match.keys[s.name], first).dtype, s) for s in inputs]
    return tuple(note for note in notes if note) + _match_messages(None, match.unused)


def _load_code(source: str, inputs: Sequence[TensorSpec], labels: str | None, allow_code: bool) -> Dataset:
    found = import_attribute(source, allow_code=allow_code, error=DataError)
    data = found() if callable(found) else found
    read = None if labels is None else read_labels(Path(labels), files=(), root=Path(), images=None)
    if isinstance(data, Dataset):
        if read is None:
            return data
        grouped, batch = group_labels(read, calls=len(data), batch=data.batch, where=f"{source}: labels")
        return replace(data, labels=grouped, batch=batch)
    if not isinstance(data, (Mapping, np.ndarray, Sequence)):
        raise DataError(
            f"{source}: is {type(data).__name__}; give a dictionary of arrays, an array, or a list"
        )
    return from_arrays(data, inputs=inputs, labels=read, title=source)


# --------------------------------------------------------------------------- splits

CALIBRATION_SHARE = 0.3
TEST_SHARE = 0.4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Splits:
    """The three parts of the data: none of them shares a call with another."""

    calibration: Dataset
    search: Dataset
    test: Dataset

    @property
    def sizes(self) -> dict[str, int]:
        """Samples per part, as the manifest keeps them."""
        return {part: getattr(self, part).samples for part in ("calibration", "search", "test")}

    def describe(self) -> str:
        """One line with the sizes; says so where a part is small."""
        text = ", ".join(f"{part} {size}" for part, size in self.sizes.items())
        if min(self.search.samples, self.test.samples) < 30:
            text += "; with so few samples the search is coarse and hardly any drop can be proven"
        return text


def split(
    dataset: Dataset,
    *,
    subset_size: int,
    seed: int,
    calibration: Dataset | None = None,
    test: Dataset | None = None,
) -> Splits:
    """The dataset cut once into calibration, search and test parts by a seeded permutation.

    One pool: calibration takes `subset_size` calls but at most 30 %, test 40 %, search the rest. With
    `calibration` given the pool gives 40 % to search and 60 % to test; with `test` given, calibration takes
    at most half and search the rest; with both, all of it is for the search. Nothing is stratified. Every part
    gets at least one call; raises `DataError` where the pool is too small for that.
    """
    count = len(dataset)
    parts = 1 + (calibration is None) + (test is None)
    if count < parts:
        raise DataError(f"{dataset.title}: {count} calls cannot be split into {parts} parts; give more data")
    for_test = 0 if test is not None else round(count * (TEST_SHARE if calibration is None else 0.6))
    share = CALIBRATION_SHARE if test is None else 0.5
    for_calibration = 0 if calibration is not None else min(subset_size, int(count * share))
    for_test = for_test if test is not None else max(for_test, 1)
    for_calibration = for_calibration if calibration is not None else max(for_calibration, 1)
    order = np.random.default_rng(seed).permutation(count)
    drawn = np.split(order, [for_calibration, count - for_test])
    return Splits(
        calibration=calibration if calibration is not None else dataset.subset(drawn[0]),
        search=dataset.subset(drawn[1]),
        test=test if test is not None else dataset.subset(drawn[2]),
    )
