"""Arrays brought to exactly what the model's inputs take: names, shapes, dtypes, one call at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vinoopt.errors import DataError
from vinoopt.records import TensorSpec
from vinoopt.serde import nearest

Array = NDArray[Any]
Sample = dict[str, Array]
"""One call of the model: input name -> array, batch axis included."""

LABEL_KEYS = ("labels", "label", "targets", "target")
"""Arrays of these names hold labels unless a model input is called so."""


class Reader(Protocol):
    """Samples that are made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


# --------------------------------------------------------------------------- shapes


def admits(dimension: int | str, size: int) -> bool:
    """Whether a dimension of a `TensorSpec` (`3`, `"?"`, `"1..8"`, a symbol) takes this size."""
    if isinstance(dimension, int):
        return dimension == size
    low, dots, high = dimension.partition("..")
    if not dots:
        return True
    return (not low or size >= int(low)) and (not high or size <= int(high))


def fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    """Whether an array of this shape is one call of the input."""
    return len(shape) == len(spec.shape) and all(map(admits, spec.shape, shape))


def batch_size(spec: TensorSpec) -> int:
    """Samples in one call: the fixed first dimension, else the smallest that is allowed, at least 1."""
    if not spec.shape:
        return 1
    first = spec.shape[0]
    if isinstance(first, int):
        return max(first, 1)
    low = first.partition("..")[0] if ".." in first else ""
    return max(int(low), 1) if low.isdigit() else 1


def shape_text(shape: Sequence[int | str]) -> str:
    """A shape as `[1, 3, 224, 224]`."""
    return f"[{', '.join(map(str, shape))}]"


def _shape_hint(shape: Sequence[int], spec: TensorSpec) -> str:
    if len(shape) == 4 and fits((shape[0], shape[3], shape[1], shape[2]), spec):
        return (
            "; these look like NHWC images for an NCHW input: transpose them, or embed the preprocessing "
            "(image layout, --mean, --scale) so that the model takes NHWC images"
        )
    if len(shape) == 4 and fits((shape[0], shape[2], shape[3], shape[1]), spec):
        return "; these look like NCHW images for an NHWC input: transpose them"
    if len(shape) == len(spec.shape) - 1:
        return "; an axis is missing: is it the channel axis?"
    return ""


# --------------------------------------------------------------------------- dtypes


def fit_dtype(values: Array, dtype: str, where: str) -> Array:
    """`values` in the input's dtype, contiguous and finite.

    Integers may change width or become floats where no value changes; floats may change width. Raises
    `DataError` for anything else, and for NaN or infinity.
    """
    wanted = np.dtype(dtype)
    if values.dtype.kind not in "buif":
        raise DataError(f"{where}: holds {values.dtype}, the input takes {dtype}; store numbers")
    if values.dtype.kind == "f" and wanted.kind != "f":
        raise DataError(
            f"{where}: holds {values.dtype}, the input takes {dtype}; "
            + (
                "feed images as stored (0 to 255, uint8): their preprocessing is part of the model"
                if wanted == np.uint8
                else "store whole numbers of an integer type"
            )
        )
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(values, dtype=wanted).reshape(values.shape)
    if values.dtype.kind != "f" and values.dtype != wanted and not np.array_equal(cast, values):
        raise DataError(
            f"{where}: values from {values.min()} to {values.max()} ({values.dtype}) "
            f"do not fit the input's {dtype} without change"
        )
    if wanted.kind == "f" and not np.isfinite(cast).all():
        what = "NaN" if np.isnan(values).any() else "infinite values"
        raise DataError(f"{where}: holds {what} as {dtype}; repair or leave out this sample")
    return cast


def dtype_message(source: np.dtype[Any], spec: TensorSpec) -> str | None:
    """What the user should know about the cast from `source`, if anything."""
    if source == np.dtype(spec.dtype):
        return None
    note = ""
    if source == np.uint8 and np.dtype(spec.dtype).kind == "f":
        note = "; no mean or scale is applied, so the model sees values from 0 to 255"
    return f'input "{spec.name}": {source} values are fed as {spec.dtype}{note}'


def fit_call(values: Array, spec: TensorSpec, where: str) -> Array:
    """One call of the input from one sample's array; a missing batch axis of 1 is added.

    Raises `DataError` for another shape or dtype.
    """
    if len(values.shape) == len(spec.shape) - 1 and fits((1, *values.shape), spec):
        values = values[np.newaxis]
    if not fits(values.shape, spec):
        raise DataError(
            f'{where}: shape {shape_text(values.shape)}, input "{spec.name}" takes {shape_text(spec.shape)}'
            f"{_shape_hint(values.shape, spec)}"
        )
    return fit_dtype(values, spec.dtype, where)


# --------------------------------------------------------------------------- names


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Which array goes into which input."""

    keys: dict[str, str]
    """Input name -> array name."""
    labels: str | None = None
    unused: tuple[str, ...] = ()


def match_names(
    available: Sequence[str], inputs: Sequence[TensorSpec], where: str, *, labels: str | None = None
) -> Match:
    """Arrays matched to inputs by name; a single array for a single input may have any name.

    `labels` names the array that holds labels; without it, one of `LABEL_KEYS` is recognised. Raises
    `DataError` with the nearest name for an input that has no array.
    """
    names = [spec.name for spec in inputs]
    if labels is None:
        labels = next((key for key in LABEL_KEYS if key in available and key not in names), None)
    rest = [key for key in available if key != labels]
    if len(names) == 1 and names[0] not in rest and len(rest) == 1:
        return Match(keys={names[0]: rest[0]}, labels=labels)
    for name in names:
        if name not in rest:
            held = ", ".join(f'"{key}"' for key in rest) or "no array"
            raise DataError(f'{where}: nothing for input "{name}"; holds {held}{nearest(name, rest)}')
    unused = tuple(key for key in rest if key not in names)
    return Match(keys={name: name for name in names}, labels=labels, unused=unused)


def load_arrays(path: Path) -> Mapping[str, Array]:
    """The arrays of an npz (read on access), or of an npy (memory-mapped, under its stem).

    Pickled objects are never loaded. Raises `DataError` for what is not such a file.
    """
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as exc:
        raise _load_error(path, exc) from exc
    return {path.stem: loaded} if isinstance(loaded, np.ndarray) else loaded


def load_array(arrays: Mapping[str, Array], key: str, path: Path) -> Array:
    """One array of `load_arrays`; raises `DataError` where it is damaged or holds Python objects."""
    try:
        return arrays[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as exc:
        raise _load_error(path, exc, key) from exc


def _load_error(path: Path, exc: Exception, key: str = "") -> DataError:
    place = f'{path}, array "{key}"' if key else str(path)
    if "pickle" in str(exc) or "Python objects" in str(exc):
        return DataError(
            f"{place}: holds Python objects, or is no numpy file; pickled objects can run code and are never "
            "loaded: save plain number arrays of one shape with np.save or np.savez"
        )
    return DataError(f"{place}: cannot be read as a numpy file: {exc}")


# --------------------------------------------------------------------------- readers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Feed:
    """One input's array and how it is cut into calls."""

    spec: TensorSpec
    array: Array
    cut: str
    """`rows`: axis 0 is the batch axis; `calls`: each entry is a whole call; `constant`: fed to every call."""
    where: str

    @property
    def batch(self) -> int:
        """Samples in one call."""
        if self.cut == "calls":
            return int(self.array.shape[1]) if self.array.ndim > 1 else 1
        return batch_size(self.spec)

    @property
    def calls(self) -> int:
        return int(self.array.shape[0]) // (self.batch if self.cut == "rows" else 1)

    def __getitem__(self, index: int) -> Array:
        if self.cut == "constant":
            return fit_call(np.asarray(self.array), self.spec, self.where)
        size = self.batch if self.cut == "rows" else 1
        rows = np.asarray(self.array[index * size : (index + 1) * size])
        return fit_call(rows if self.cut == "rows" else rows[0], self.spec, f"{self.where}, sample {index}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArrayReader:
    """Calls cut from one array per input."""

    feeds: tuple[_Feed, ...]
    calls: int
    batch: int
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.calls

    def __getitem__(self, index: int) -> Sample:
        return {feed.spec.name: feed[index] for feed in self.feeds}


def array_reader(arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], where: str) -> ArrayReader:
    """Calls from `arrays` (input name -> array).

    An array of the input's rank is cut along axis 0 into calls of the model's batch size (1 where dynamic);
    an array of one rank more holds one whole call per entry; an array of rank 0 is fed to every call. Raises
    `DataError` for other ranks and shapes, or where the inputs disagree about the number of calls.
    """
    feeds = tuple(_feed(spec, arrays[spec.name], f'{where}, array for "{spec.name}"') for spec in inputs)
    varying = [feed for feed in feeds if feed.cut != "constant"]
    if not varying:
        raise DataError(f"{where}: every array is a single value; give one entry per sample")
    counts = {feed.spec.name: feed.calls for feed in varying}
    if len(set(counts.values())) > 1:
        text = ", ".join(f'"{name}" {count}' for name, count in counts.items())
        raise DataError(
            f"{where}: the inputs hold different numbers of calls: {text}; for an input whose first axis is "
            "not the batch, store one whole call per entry (one axis more than the input)"
        )
    messages = [dtype_message(feed.array.dtype, feed.spec) for feed in feeds]
    messages += [
        f'input "{f.spec.name}": the same value for every call' for f in feeds if f.cut == "constant"
    ]
    for feed in varying:
        left = feed.array.shape[0] - feed.calls * feed.batch
        if feed.cut == "rows" and left:
            messages.append(
                f'input "{feed.spec.name}": the last {left} rows do not fill a batch and are left out'
            )
    return ArrayReader(
        feeds=feeds,
        calls=varying[0].calls,
        batch=varying[0].batch,
        messages=tuple(message for message in messages if message),
    )


def _feed(spec: TensorSpec, array: Array, where: str) -> _Feed:
    rank, wanted = array.ndim, len(spec.shape)
    if rank == 0:
        return _Feed(spec=spec, array=array, cut="constant", where=where)
    if rank == wanted + 1 and fits(array.shape[1:], spec):
        return _Feed(spec=spec, array=array, cut="calls", where=where)
    batch = batch_size(spec)
    if rank == wanted and fits((batch, *array.shape[1:]), spec):
        return _Feed(spec=spec, array=array, cut="rows", where=where)
    raise DataError(
        f"{where}: shape {shape_text(array.shape)} holds no calls of {shape_text(spec.shape)}"
        f"{_shape_hint((batch, *array.shape[1:]), spec)}"
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleReader:
    """Calls from a sequence of samples: dictionaries, or arrays for a model with one input."""

    samples: Sequence[Any]
    inputs: tuple[TensorSpec, ...]
    where: str
    batch: int
    messages: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample, where = self.samples[index], f"{self.where}, sample {index}"
        if not isinstance(sample, Mapping):
            if len(self.inputs) != 1:
                raise DataError(
                    f"{where}: the model has {len(self.inputs)} inputs; give a dictionary by name"
                )
            sample = {self.inputs[0].name: sample}
        keys = match_names(list(sample), self.inputs, where).keys
        return {s.name: fit_call(np.asarray(sample[keys[s.name]]), s, where) for s in self.inputs}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FileReader:
    """Calls from a folder that holds one npy or npz file per call."""

    files: tuple[Path, ...]
    inputs: tuple[TensorSpec, ...]
    batch: int
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        arrays = load_arrays(path)
        keys = match_names(list(arrays), self.inputs, str(path)).keys
        return {s.name: fit_call(load_array(arrays, keys[s.name], path), s, str(path)) for s in self.inputs}
