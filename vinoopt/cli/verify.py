"""`vinoopt verify`: whether a bundle is fit for this machine."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON on stdout.")
@click.pass_context
def command(ctx: click.Context, /, bundle: Path, as_json: bool) -> None:
    """Check a BUNDLE on the machine that will run it: files, versions, golden outputs.

    Exit codes: 0 fit for this machine, 1 not, 2 not a bundle.
    """
    from vinoopt.bundle import open_bundle
    from vinoopt.serde import to_json
    from vinoopt.verification import verify

    found = verify(open_bundle(bundle))
    if as_json:
        click.echo(to_json(found, indent=2))
    else:
        for check in found.checks:
            click.echo(f"{check.state!s:12s} {check.name}: {check.detail}")
        click.echo(found.verdict)
    ctx.exit(0 if found.ok else 1)
