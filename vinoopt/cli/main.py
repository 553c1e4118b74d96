"""`vinoopt`: commands are imported when they are called, so that help answers at once."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from vinoopt import __version__
from vinoopt.alarm import make_interrupts_safe
from vinoopt.errors import VinooptError
from vinoopt.serde import nearest

INTERRUPTED = 130

_COMMANDS = {
    "compile": ("vinoopt.cli.compile:command", "Compile an ONNX model for its targets, inside an accuracy budget."),
    "inspect": ("vinoopt.cli.inspect:command", "Say what is in an ONNX model and what can be done with it."),
    "verify": ("vinoopt.cli.verify:command", "Check a bundle on the machine that will run it."),
    "bench": ("vinoopt.cli.bench:bench", "Measure models side by side on this machine."),
    "compare": ("vinoopt.cli.bench:compare", "Say whether one model is faster than another."),
    "tune": ("vinoopt.cli.tune:tune", "Find the runtime properties that suit a model and a device."),
    "profiles": ("vinoopt.cli.profiles:profiles", "List, show, check, detect and compare hardware profiles."),
    "doctor": ("vinoopt.cli.doctor:command", "Say which devices and toolchains are here, and what is missing."),
}
"""Command -> where it is, and its line in the help."""


class _Commands(click.Group):
    """The command group, which knows its members by name and imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f'no command "{args[0]}"{nearest(args[0], list(_COMMANDS))}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vinoopt")
def cli() -> None:
    """The deployment compiler for Intel CPUs, iGPUs and NPUs.

    Takes an ONNX model, some data and an accuracy budget; gives back the fastest OpenVINO model that stays
    inside the budget, compiled and tuned for each target, with the evidence.
    """


def main(args: list[str] | None = None) -> Any:
    """Run the command line; errors of this package end with their exit code and one message."""
    make_interrupts_safe()
    try:
        return cli.main(args=args, prog_name="vinoopt", standalone_mode=False) or 0
    except VinooptError as exc:
        click.echo(f"error: {exc}", err=True)
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
