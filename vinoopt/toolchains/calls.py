"""Inputs or outputs of many inferences in one npz file, written and read one array at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Call = Mapping[str, NDArray[Any]]


def write_calls(path: Path, calls: Iterable[Call]) -> int:
    """Write each call's arrays as `<number>:<name>`; the number of calls."""
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for count, call in enumerate(calls, start=1):
            for name, values in call.items():
                with archive.open(f"{count - 1}:{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)
    return count


def read_calls(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The calls in the order in which they were written, each name -> array."""
    with np.load(path, allow_pickle=False) as archive:
        names: dict[int, list[str]] = {}
        for key in archive.files:
            names.setdefault(int(key.partition(":")[0]), []).append(key)
        for number in sorted(names):
            yield {key.partition(":")[2]: archive[key] for key in names[number]}
