"""Results kept by content: nothing is computed twice for the same model, data and versions.

Everything lies under one folder of the user's cache (`VINOOPT_CACHE_DIR`, else `XDG_CACHE_HOME/vinoopt`, else
`~/.cache/vinoopt`). An entry is written beside its place and renamed when complete, so an interrupted run
leaves nothing that a later one could mistake for a result. Failures are never kept.

The folder does not grow without bound: where the runs of other models take more than `VINOOPT_CACHE_GB` (10), those
that were used longest ago go, but none that was used within a day: it may belong to a run at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from vinoopt.errors import InputError

T = TypeVar("T")
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

LIMIT_GB = 10.0
_IN_USE_S = 86400.0


def cache_folder() -> Path:
    """Where results and prepared toolchains are kept for this user; not created here."""
    if own := os.environ.get("VINOOPT_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vinoopt"


def digest(*parts: object) -> str:
    """Hex digest of strings, numbers, and nestings of them; the order counts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def runs_folder() -> Path:
    """Where the entries of runs are; prepared toolchains lie elsewhere under the cache folder."""
    return cache_folder() / "runs"


def limit_bytes() -> float:
    """How much runs may take; raises `InputError` where `VINOOPT_CACHE_GB` is no number."""
    text = os.environ.get("VINOOPT_CACHE_GB", str(LIMIT_GB))
    try:
        return float(text) * 1e9
    except ValueError as exc:
        raise InputError(f'VINOOPT_CACHE_GB is "{text}", which is not a number of gigabytes') from exc


def clear_runs() -> int:
    """Forgets every run; gives the bytes that were freed."""
    folder = runs_folder()
    freed = _size(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return freed - _size(folder)


def trim(root: Path, *, limit: float, now: float) -> int:
    """Removes the entries of `root` used longest ago until the rest takes `limit` bytes; gives what was freed.

    An entry used within a day before `now` (seconds since the epoch) stays.
    """
    entries = sorted((each for each in root.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    sizes = {each: _size(each) for each in entries}
    total, freed = sum(sizes.values()), 0
    for each in entries:
        if total - freed <= limit or now - each.stat().st_mtime < _IN_USE_S:
            break
        shutil.rmtree(each, ignore_errors=True)
        freed += sizes[each]
    return freed


def _size(folder: Path) -> int:
    """Bytes of all files; of those that vanish meanwhile none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).stat().st_size
    return total


@dataclass(frozen=True, slots=True)
class Store:
    """The entries of one run: everything that depends on the same model, data and versions."""

    folder: Path

    @classmethod
    def open(cls, *key: object, root: Path | None = None) -> Store:
        """The store for `key`, made where it is new."""
        folder = (root or runs_folder()) / digest(*key)[:24]
        limit = limit_bytes()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            trim(folder.parent, limit=limit, now=time.time())
        except OSError as exc:
            raise InputError(
                f"{folder} cannot be made: {exc.strerror}; name a folder that can with VINOOPT_CACHE_DIR"
            ) from exc
        return cls(folder)

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value kept under `name`, else what `compute` gives, which is then kept."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        with self.writing(path.name) as part:
            part.write_text(json.dumps(value), encoding="utf-8")
        return value

    def arrays(self, name: str, compute: Callable[[], Arrays], *, most_bytes: int) -> Arrays:
        """The arrays kept under `name`, else what `compute` gives, which is then kept unless it is larger.

        A file that was cut off, as by a power failure, is made anew.
        """
        path = self.folder / f"{name}.npz"
        with suppress(FileNotFoundError, BadZipFile, EOFError, ValueError), np.load(path) as kept:
            return dict(kept)
        values = compute()
        if sum(array.nbytes for array in values.values()) <= most_bytes:
            with self.writing(path.name) as part:
                np.savez(part, **values)  # type: ignore[arg-type]  # its stub takes them for allow_pickle
        return values

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes `name` when the block ends without an error."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".part-") as folder:
            part = Path(folder) / name
            yield part
            part.replace(self.folder / name)

    def lines(self, name: str) -> list[str]:
        """Complete lines of the journal `name`; a last line that was cut off is dropped."""
        path = self.folder / name
        if not path.is_file():
            return []
        complete, _, _ = path.read_bytes().rpartition(b"\n")
        return [line for line in complete.decode().split("\n") if line]

    def append(self, name: str, line: str) -> None:
        """Add a line to the journal `name` and have it on disk when this returns.

        A last line that was cut off gives way, so that it does not become one with the new line.
        """
        with (self.folder / name).open("ab+") as journal:
            _drop_cut_line(journal)
            journal.write(line.replace("\n", " ").encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def memo(self, name: str) -> Memo:
        """The memo kept in the journal `name`."""
        return Memo(self, name)

    def clear(self, name: str) -> None:
        """Forget the journal or entry `name`."""
        (self.folder / name).unlink(missing_ok=True)


def _drop_cut_line(journal: BinaryIO) -> None:
    if not journal.seek(0, os.SEEK_END):
        return
    journal.seek(-1, os.SEEK_END)
    if journal.read(1) != b"\n":
        journal.seek(0)
        journal.truncate(journal.read().rfind(b"\n") + 1)


class Memo:
    """Small values by key, each computed once and on disk when it is handed out."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._values: dict[str, Any] = dict(json.loads(line) for line in store.lines(name))

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The JSON value under `key`, else what `make` gives; a key always stands for values of one type."""
        if key not in self._values:
            value = make()
            self._store.append(self._name, json.dumps([key, value]))
            self._values[key] = value
        return cast(T, self._values[key])
