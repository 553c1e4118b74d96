"""Records to JSON and TOML and back: strict, canonical, hashable."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from vinoopt.errors import InputError
from vinoopt.records import Record

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its backport's name
    import tomli as tomllib

R = TypeVar("R", bound=Record)

CHUNK_BYTES = 1 << 20


def replace(record: R, **changes: Any) -> R:
    """A validated copy of `record` with fields changed; `TypeError` for a field it does not have."""
    unknown = sorted(set(changes) - set(type(record).model_fields))
    if unknown:
        raise TypeError(f"{type(record).__name__} has no field {', '.join(unknown)}")
    fields = {name: getattr(record, name) for name in type(record).model_fields}
    return type(record)(**{**fields, **changes})


def to_json(record: Record, *, indent: int | None = None) -> str:
    """Canonical JSON: fields in the record's order, no clock and no path of ours."""
    return record.model_dump_json(indent=indent)


def from_json(kind: type[R], text: str | bytes, *, where: str, error: type[InputError] = InputError) -> R:
    """The record in `text`. `where` names the source in messages; raises `error` with field and reason."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as exc:
        raise error("\n".join(f"{where}: {line}" for line in _explain(kind, exc))) from exc


def from_mapping(kind: type[R], mapping: Any, *, where: str, error: type[InputError] = InputError) -> R:
    """The record in a parsed TOML or JSON mapping; raises `error` with field and reason."""
    return from_json(kind, json.dumps(mapping), where=where, error=error)


def read_toml(path: Path, *, error: type[InputError] = InputError) -> dict[str, Any]:
    """The parsed TOML file; raises `error` where it is absent or malformed."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return table
    except FileNotFoundError as exc:
        raise error(f"{path}: no such file") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise error(f"{path}: not valid TOML: {exc}") from exc


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_record(record: Record) -> str:
    """Hex digest of a record's canonical JSON: the key of caches."""
    return hashlib.sha256(to_json(record).encode()).hexdigest()


def nearest(word: str, choices: list[str]) -> str:
    """`'; did you mean "x"?'` for the nearest choice, or an empty string."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def _explain(kind: type[BaseModel], exc: ValidationError) -> Iterator[str]:
    for problem in exc.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            yield f'unknown key "{place}"{nearest(key, _keys_at(kind, problem["loc"][:-1]))}'
        elif problem["type"] == "missing":
            yield f'"{place}" is missing'
        else:
            yield f'"{place}": {problem["msg"]} (got {problem["input"]!r:.80})'


def _keys_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the record that lies at `loc` inside `kind`."""
    current: list[type[BaseModel]] = [kind]
    for part in loc:
        found = [
            model
            for each in current
            if isinstance(part, str) and part in each.model_fields
            for model in _models_in(each.model_fields[part].annotation)
        ]
        current = found or [m for m in current if m.__name__ == part] or current
    return sorted({name for each in current for name in each.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
