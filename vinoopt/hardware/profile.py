"""Hardware profiles: TOML files of a product's devices, found by name or path, merged with their families."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from vinoopt import serde
from vinoopt.errors import ProfileError, TargetError
from vinoopt.hardware.isa import ISAS, saturates_int8
from vinoopt.records import (
    CpuOffline,
    DeviceSpec,
    Diagnostic,
    GpuOffline,
    HardwareProfile,
    NpuOffline,
    Precision,
    Record,
    Target,
)

SCHEMA = 1
HOST = "host"

_PACKAGE = Path(__file__).resolve().parent.parent
_FIGURE_KEYS = {"value", "source"}
_NPU_PLATFORMS = ("3720", "4000", "5010", "5020", "6010")
_OFFLINE: dict[str, type[Record]] = {"CPU": CpuOffline, "GPU": GpuOffline, "NPU": NpuOffline}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_GRID = re.compile(r"([1-9]\d?)x([1-9]\d?)x([1-9]\d?)")
_GRID_LIMITS = (16, 16, 16)
"""Far above every product; the driver takes any number."""
_MOST_UNITS = 1024
_PCI_ID = re.compile(r"0x[0-9a-f]{4}")
_ARCHITECTURE = re.compile(r"\d+\.\d+x?")
_RELEASE = re.compile(r"\d{2}\.\d{2}")


class DiffRow(Record):
    """One line in which two profiles differ; an empty side does not have the entry."""

    entry: str
    left: str
    right: str


def profiles_folder() -> Path:
    """The folder of the shipped profiles: inside an installed package, beside it in a checkout."""
    for folder in (_PACKAGE / "hw_profiles", _PACKAGE.parent / "hw_profiles"):
        if folder.is_dir():
            return folder
    raise ProfileError(f"no hw_profiles folder in or beside {_PACKAGE}; the installation is incomplete")


def load_profile(name_or_path: str) -> HardwareProfile:
    """The profile of a shipped product, of a user's TOML file (a path), or of this machine (`host`).

    A file may inherit from shipped products and families, or from files beside it. Raises `ProfileError` with
    the nearest name for an unknown one, and with file, key and reason for a malformed one.
    """
    if name_or_path == HOST:
        # Asking OpenVINO for its devices takes half a second, which other profiles need not pay.
        from vinoopt.hardware.detect import detect_host

        return detect_host()
    if _is_path(name_or_path):
        return _usable(Path(name_or_path).expanduser())
    return _shipped(name_or_path)


def list_profiles() -> tuple[HardwareProfile, ...]:
    """The shipped products, sorted by name; families are left out."""
    return tuple(_shipped(name) for name in _product_names())


def resolve(target: Target) -> DeviceSpec:
    """The device that `target` names.

    Raises `ProfileError` for an unknown profile, and `TargetError` where the profile has no such device or
    OpenVINO no longer serves it.
    """
    profile = load_profile(target.profile)
    spec = profile.devices.get(target.device)
    if spec is None:
        here = ", ".join(f"{target.profile}:{kind}" for kind in profile.devices)
        raise TargetError(f'target "{target}": {profile.title} has no {target.device}; it has {here}')
    if spec.last_openvino is not None:
        raise TargetError(
            f'target "{target}": OpenVINO {spec.last_openvino} was the last release for {spec.name}; '
            f"this version cannot compile for it. Deploy with that release, or choose another device"
        )
    return spec


def check_profile(path: str | Path) -> tuple[Diagnostic, ...]:
    """What is wrong (`error`) or missing (`warning`) in a profile file; empty for a complete one."""
    try:
        profile = _read(Path(path))
    except ProfileError as exc:
        return tuple(_error("PROFILE_INVALID", line) for line in str(exc).splitlines())
    return tuple(_profile_findings(profile))


def diff_profiles(left: HardwareProfile, right: HardwareProfile) -> tuple[DiffRow, ...]:
    """The entries in which two profiles differ, sorted by name; sources of equal figures are not compared."""
    sides = [dict(_flatten(side.model_dump(mode="json", exclude_none=True))) for side in (left, right)]
    return tuple(
        DiffRow(entry=entry, left=sides[0].get(entry, ""), right=sides[1].get(entry, ""))
        for entry in sorted(sides[0].keys() | sides[1].keys())
        if sides[0].get(entry) != sides[1].get(entry)
    )


# --------------------------------------------------------------------------- reading


def _is_path(text: str) -> bool:
    return text.endswith(".toml") or "/" in text or "\\" in text


@cache
def _product_names() -> tuple[str, ...]:
    files = sorted(profiles_folder().glob("*.toml"), key=lambda file: file.stem)
    return tuple(file.stem for file in files if not serde.read_toml(file, error=ProfileError).get("abstract"))


@cache
def _shipped(name: str) -> HardwareProfile:
    names = _product_names()
    if name not in names:
        raise ProfileError(
            f'no hardware profile "{name}"{serde.nearest(name, [*names, HOST]) or "."} '
            f"`vinoopt profiles list` names all {len(names)}; a profile of your own is given by its path"
        )
    return _usable(profiles_folder() / f"{name}.toml")


def _usable(path: Path) -> HardwareProfile:
    """The profile in a file; raises `ProfileError` with everything that `check_profile` calls an error."""
    profile = _read(path)
    errors = [found.message for found in _profile_findings(profile) if found.severity == "error"]
    if errors:
        raise ProfileError("\n".join(f"{path.name}: {message}" for message in errors))
    return profile


def _read(path: Path) -> HardwareProfile:
    mapping = _merged(path, chain=())
    if mapping.pop("abstract", False):
        raise ProfileError(f"{path.name}: a family (abstract = true) is for inheriting, not for compiling")
    for key, device in _tables(mapping.get("devices")):
        device.setdefault("kind", key)
        # Read alone first: as one of three alternatives, a slip in it would be reported three times.
        if "offline" in device and key in _OFFLINE:
            place = f"{path.name}: devices.{key}.offline"
            serde.from_mapping(_OFFLINE[key], device["offline"], where=place, error=ProfileError)
    mapping.setdefault("name", path.stem)
    profile = serde.from_mapping(HardwareProfile, mapping, where=path.name, error=ProfileError)
    for kind, spec in profile.devices.items():
        if spec.kind is not kind:
            raise ProfileError(f'{path.name}: devices.{kind} says kind = "{spec.kind}"; leave the kind out')
    return profile


def _tables(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((key, table) for key, table in value.items() if isinstance(table, dict))


def _merged(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The file's mapping over those it inherits from, without `schema` and `inherits`."""
    path = path.resolve()
    if path in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(path) :], path))
        raise ProfileError(f"{path.name}: inherits from itself: {circle}")
    try:
        mapping = serde.read_toml(path, error=ProfileError)
    except OSError as exc:  # a folder, or a file that may not be read
        raise ProfileError(f"{path.name}: cannot be read: {exc.strerror or exc}") from exc
    schema = mapping.pop("schema", None)
    if schema != SCHEMA:
        raise ProfileError(f"{path.name}: schema = {schema!r}; this version reads schema = {SCHEMA}")
    parent = mapping.pop("inherits", None)
    if parent is None:
        return mapping
    if not isinstance(parent, str):
        raise ProfileError(f"{path.name}: inherits must be one name or path, got {parent!r}")
    base = _merged(_parent_path(parent, path), (*chain, path))
    base.pop("abstract", None)
    base.pop("name", None)
    return _merge(base, mapping)


def _parent_path(parent: str, path: Path) -> Path:
    if parent.endswith(".toml"):
        return path.parent / parent
    names = [file.stem for file in sorted(profiles_folder().glob("*.toml"))]
    if parent not in names:
        raise ProfileError(
            f'{path.name}: inherits from "{parent}", which is unknown{serde.nearest(parent, names) or "."} '
            "A file of your own is named with its .toml ending"
        )
    return profiles_folder() / f"{parent}.toml"


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: tables merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        # A figure is replaced whole: a new value must not keep the old one's source.
        is_figure = isinstance(value, dict) and bool(value.keys() & _FIGURE_KEYS)
        if isinstance(value, dict) and isinstance(below, dict) and not is_figure:
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


# --------------------------------------------------------------------------- checking


def _error(code: str, message: str) -> Diagnostic:
    return Diagnostic(severity="error", code=code, message=message)


def _profile_findings(profile: HardwareProfile) -> Iterator[Diagnostic]:
    if not _NAME.fullmatch(profile.name):
        yield _error("PROFILE_NAME", f'name "{profile.name}": use small letters, digits and single hyphens')
    if not profile.devices:
        yield _error("PROFILE_EMPTY", "no devices")
    if not profile.sources:
        yield _error("PROFILE_SOURCES", "sources: name the data sheets that the product's facts come from")
    for pattern in profile.cpu_match:
        try:
            re.compile(pattern)
        except re.error as exc:
            yield _error("PROFILE_MATCH", f'cpu_match "{pattern}" is not a regular expression: {exc}')
    for spec in profile.devices.values():
        yield from _device_findings(spec)


def _device_findings(spec: DeviceSpec) -> Iterator[Diagnostic]:
    where = f"devices.{spec.kind}"
    if not spec.precisions or len(set(spec.precisions)) != len(spec.precisions):
        yield _error("PROFILE_PRECISIONS", f"{where}.precisions: name at least one, each once, fastest first")
    figures = {f"peak_gops.{name}": figure for name, figure in spec.peak_gops.items()}
    for key, figure in {
        **figures,
        "memory_bytes": spec.memory_bytes,
        "bandwidth_gb_per_s": spec.bandwidth_gb_per_s,
    }.items():
        if figure is not None and not (figure.value > 0 and math.isfinite(figure.value)):
            message = f"{where}.{key}: must be above zero and finite, got {figure.value}"
            yield _error("PROFILE_FIGURE", message)
    for name in spec.peak_gops:
        if name not in spec.precisions:
            yield _error("PROFILE_FIGURE", f"{where}.peak_gops.{name}: {name} is not among the precisions")
    if spec.cores is not None and spec.cores < 1:
        yield _error("PROFILE_FIGURE", f"{where}.cores: must be above zero, got {spec.cores}")
    if Precision.INT8 in spec.precisions and saturates_int8(spec):
        yield Diagnostic(
            severity="warning",
            code="PROFILE_INT8_SATURATES",
            message=f"{where}.precisions: int8 is named, but this instruction set has no VNNI: INT8 sums saturate "
            "at 16 bits and gain little; leave it out",
        )
    missing = [] if spec.peak_gops else ["peak_gops"]
    missing += [] if spec.bandwidth_gb_per_s else ["bandwidth_gb_per_s"]
    if missing and spec.last_openvino is None:
        yield Diagnostic(
            severity="warning",
            code="PROFILE_NO_ROOFLINE",
            message=f"{where}: without {' and '.join(missing)} no latency can be modelled",
        )
    if spec.offline is not None:
        yield from _offline_findings(spec.offline, f"{where}.offline")


def _offline_findings(offline: CpuOffline | GpuOffline | NpuOffline, where: str) -> Iterator[Diagnostic]:
    if isinstance(offline, CpuOffline):
        if offline.isa_cap not in ISAS:
            known = ", ".join(ISAS)
            yield _error(
                "PROFILE_ISA", f'{where}.isa_cap "{offline.isa_cap}": unknown to oneDNN; use {known}'
            )
    elif isinstance(offline, NpuOffline):
        if offline.platform not in _NPU_PLATFORMS:
            known = ", ".join(_NPU_PLATFORMS)
            yield _error("PROFILE_NPU", f'{where}.platform "{offline.platform}": the compiler knows {known}')
    else:
        yield from _gpu_findings(offline, where)


def _gpu_findings(offline: GpuOffline, where: str) -> Iterator[Diagnostic]:
    if not offline.families:
        yield _error("PROFILE_GPU", f"{where}.families: name at least one")
    grid = _GRID.fullmatch(offline.hardware)
    if grid is None:
        yield _error("PROFILE_GPU", f'{where}.hardware "{offline.hardware}": write slices x subslices x EUs')
    else:
        sizes = tuple(map(int, grid.groups()))
        if any(size > limit for size, limit in zip(sizes, _GRID_LIMITS, strict=True)):
            limits = "x".join(map(str, _GRID_LIMITS))
            yield _error("PROFILE_GPU", f"{where}.hardware: no GPU has {offline.hardware}; at most {limits}")
        elif math.prod(sizes) > _MOST_UNITS:
            message = (
                f"{where}.hardware: {offline.hardware} makes {math.prod(sizes)} units; at most {_MOST_UNITS}"
            )
            yield _error("PROFILE_GPU", message)
    for key, value, pattern, example in (
        ("device_id", offline.device_id, _PCI_ID, "0x46a6"),
        ("min_driver", offline.min_driver, _RELEASE, "23.43"),
        ("architecture", offline.architecture, _ARCHITECTURE, "12.3, or 12.7x for any last digit"),
    ):
        if not pattern.fullmatch(value):
            yield _error("PROFILE_GPU", f'{where}.{key} "{value}": write it as {example}')


def _flatten(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value.keys() != _FIGURE_KEYS:
        for key, inner in value.items():
            yield from _flatten(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, dict):
        yield place, f"{value['value']:g}"
    elif isinstance(value, list):
        yield place, ", ".join(str(item) for item in value)
    else:
        yield place, str(value)
