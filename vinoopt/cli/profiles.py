"""`vinoopt profiles`: hardware profiles, shipped and of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from vinoopt.records import DeviceSpec, HardwareProfile

F = TypeVar("F", bound=Callable[..., Any])


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


@click.group()
def profiles() -> None:
    """Hardware profiles: what a target can do, and where each figure comes from."""


@profiles.command("list")
@_json_option
def list_command(as_json: bool) -> None:
    """List the shipped profiles."""
    from vinoopt.hardware.profile import list_profiles

    found = list_profiles()
    if as_json:
        return _echo(
            [profile.model_dump(mode="json", include={"name", "title", "family"}) for profile in found]
        )
    rows = [(p.name, p.title, ", ".join(str(kind) for kind in p.devices)) for p in found]
    return _table(("profile", "product", "devices"), rows)


@profiles.command("show")
@click.argument("name")
@_json_option
def show_command(name: str, as_json: bool) -> None:
    """Show a profile: a shipped NAME, the path of a TOML file, or `host`."""
    from vinoopt.hardware.profile import load_profile

    profile = load_profile(name)
    if as_json:
        return _echo(profile.model_dump(mode="json"))
    return _show(profile)


@profiles.command("check")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_json_option
def check_command(paths: tuple[Path, ...], as_json: bool) -> None:
    """Check the profile files at PATH...; exit code 2 where one cannot be used."""
    from vinoopt.hardware.profile import check_profile

    findings = {path: check_profile(path) for path in paths}
    if as_json:
        _echo(
            [
                {"file": str(path), **finding.model_dump(mode="json", exclude_none=True)}
                for path, found in findings.items()
                for finding in found
            ]
        )
    else:
        for path, found in findings.items():
            click.echo(f"{path}: {'to be looked at' if found else 'complete'}")
            if found:
                _table(("", "code", "finding"), [(f.severity, f.code, f.message) for f in found])
    if any(finding.severity == "error" for found in findings.values() for finding in found):
        raise SystemExit(2)


@profiles.command("detect")
@_json_option
def detect_command(as_json: bool) -> None:
    """Show what this machine has, and which shipped profile fits it."""
    from vinoopt.hardware.detect import detect_host, fingerprint, match_host

    profile, matched = detect_host(), match_host()
    if as_json:
        return _echo(
            {
                "profile": profile.model_dump(mode="json"),
                "matches": matched,
                "fingerprint": fingerprint().model_dump(mode="json"),
            }
        )
    _show(profile)
    return click.echo(f"fits the shipped profile: {matched or 'none'}")


@profiles.command("diff")
@click.argument("left")
@click.argument("right")
@_json_option
def diff_command(left: str, right: str, as_json: bool) -> None:
    """Show in what two profiles differ."""
    from vinoopt.hardware.profile import diff_profiles, load_profile

    rows = diff_profiles(load_profile(left), load_profile(right))
    if as_json:
        return _echo([row.model_dump(mode="json") for row in rows])
    return _table(("entry", left, right), [(row.entry, row.left, row.right) for row in rows])


# --------------------------------------------------------------------------- printing


def _echo(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in names are no markup
    Console().print(table)


def _show(profile: HardwareProfile) -> None:
    click.echo(f"{profile.name}: {profile.title} ({profile.family})")
    for kind, spec in profile.devices.items():
        click.echo(f"\n{kind}: {spec.name}")
        _table(("entry", "value", "source"), list(_device_rows(spec)))
    for note in profile.notes:
        click.echo(f"note: {note}")
    for source in profile.sources:
        click.echo(f"source: {source}")


def _device_rows(spec: DeviceSpec) -> Sequence[tuple[str, str, str]]:
    figures = {
        "memory (GiB)": (spec.memory_bytes, 2.0**30),
        "bandwidth (GB/s)": (spec.bandwidth_gb_per_s, 1.0),
        **{f"peak {name} (GOPS)": (figure, 1.0) for name, figure in spec.peak_gops.items()},
    }
    return [
        ("architecture", spec.architecture, ""),
        ("precisions", ", ".join(map(str, spec.precisions)), ""),
        ("channel multiple", str(spec.channel_multiple), ""),
        *([("cores", str(spec.cores), "")] if spec.cores is not None else []),
        *((k, f"{f.value / unit:.1f}", f.source) for k, (f, unit) in figures.items() if f is not None),
        *((key, ", ".join(values), "tuning space") for key, values in spec.tuning.items()),
        *((f"offline {key}", _plain(value), "") for key, value in _offline_items(spec)),
        *([("last OpenVINO", spec.last_openvino, "")] if spec.last_openvino is not None else []),
    ]


def _offline_items(spec: DeviceSpec) -> Sequence[tuple[str, object]]:
    return [] if spec.offline is None else list(spec.offline.model_dump(mode="json").items())


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
