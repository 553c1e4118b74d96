"""`vinoopt verify`: whether a bundle is fit for this machine."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-t",
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Measurement per target; 0 for none.",
)
@click.option("--rebuild", is_flag=True, help="Replace a blob that no longer fits by one compiled here.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON on stdout.")
@click.pass_context
def command(ctx: click.Context, /, bundle: Path, seconds: float, rebuild: bool, as_json: bool) -> None:
    """Check a BUNDLE on the machine that will run it.

    Checksums, versions, what the device says to the requirements the model was compiled with, blobs (recompiled from
    IR where they no longer fit), golden outputs, and the latency now beside the one in the manifest.

    Exit codes: 0 fit for this machine (warnings included), 1 not fit or nothing could be checked, 2 not a bundle.
    """
    from vinoopt.bundle import open_bundle
    from vinoopt.cli.show import strict_json
    from vinoopt.verification import verify

    found = verify(open_bundle(bundle), seconds=seconds, rebuild=rebuild)
    if as_json:
        click.echo(strict_json(found))
    else:
        for check in found.checks:
            click.echo(f"{check.state!s:12s} {check.name}: {check.detail}")
        click.echo(found.verdict)
    ctx.exit(0 if found.ok else 1)
