"""`vinoopt doctor`: which devices and toolchains are here, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vinoopt.toolchains.survey import Reach, Survey

_HOW = {"CPU": "emulated", "GPU": "compiled", "NPU": "compiled and modelled"}


@click.command("doctor")
@click.option(
    "--install", type=click.Choice(["npu"]), help="Install a toolchain into the user's cache folder."
)
@click.option(
    "--wheel", type=click.Path(), help="OpenVINO's Windows wheel for --install, instead of a download."
)
@click.option("--clear-cache", is_flag=True, help="Forget the results that are kept of earlier runs.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(install: str | None, wheel: str | None, clear_cache: bool, as_json: bool) -> None:
    """Say which devices are here, for which others this machine can compile, and what is missing."""
    if wheel is not None and install is None:
        raise click.UsageError("--wheel goes with --install npu")
    if clear_cache:
        _clear_cache()
    if install is not None:
        _install(wheel)
    from vinoopt.toolchains.survey import survey

    found = survey()
    if as_json:
        from vinoopt.serde import to_json

        click.echo(to_json(found, indent=2))
        return
    for line in _lines(found):
        click.echo(line)


def _install(wheel: str | None) -> None:
    from pathlib import Path

    from vinoopt.toolchains.npu_routes import NpuPlaces
    from vinoopt.toolchains.npu_setup import prepare

    path = None if wheel is None else Path(wheel)
    ready = prepare(NpuPlaces.from_environment(), wheel=path, say=lambda text: click.echo(text, err=True))
    click.echo(f"{ready.name}: ready ({ready.version})", err=True)


def _clear_cache() -> None:
    from vinoopt.store import clear_runs, runs_folder

    click.echo(f"{runs_folder()}: {clear_runs() / 1e6:.1f} MB freed", err=True)


def _lines(found: Survey) -> Iterator[str]:
    host = found.host
    versions = ", ".join(f"{name} {host.versions[name]}" for name in ("vinoopt", "openvino", "nncf"))
    yield f"{versions}, Python {host.python}, {host.os}"
    yield "devices of this machine (targets host:...)"
    for name, title in host.devices.items():
        yield f"  {name}: {title}"
    yield f"  shipped profile: {found.matched_profile or 'none fits'}"
    for kind, how in _HOW.items():
        yield f"{kind}s that are not here ({how})"
        for each in found.reach:
            if each.kind.value == kind:
                yield from reach_lines(each)
    if found.missing:
        yield "how to get what is missing"
        fixes = dict.fromkeys(f"  {each.kind}: {each.availability.fix}" for each in found.missing)
        yield from fixes


def reach_lines(each: Reach) -> Iterator[str]:
    """Whether devices are in reach, and every way that was tried, in order."""
    state = each.availability
    mark = "yes" if state.ok else "no "
    yield f"  {mark} {each.what}: {', '.join(each.profiles)}"
    word = "by"
    for route in each.routes or (state,):
        if route.ok:
            yield f"      {word} {route.name} {route.version or ''}".rstrip()
            word = "else by"
        else:
            yield f"      not by {route.name}: {route.reason}"
