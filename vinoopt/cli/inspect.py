"""`vinoopt inspect`: what is in an ONNX model and what can be done with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vinoopt.cli.options import preprocess_from, preprocess_options

if TYPE_CHECKING:
    from vinoopt.inspection import Inspection

_SHOWN = 12


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--shape", help='Shapes in benchmark_app\'s spelling: "images[1,3,416,416],mask[1,?]".')
@click.option("--ignored-scope", multiple=True, help="NAME, re:PATTERN or type:OPERATOR; repeatable.")
@preprocess_options
@click.option("--all", "show_all", is_flag=True, help="Every group, and every layer that blocks one.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(**options: Any) -> None:
    """Say what is in an ONNX MODEL: its doors, its operators, what can be pruned and why the rest cannot."""
    from vinoopt.inspection import inspect_model
    from vinoopt.serde import to_json

    found = inspect_model(
        options["model"],
        shape=options["shape"],
        ignored_scope=options["ignored_scope"],
        preprocess=preprocess_from(options),
    )
    if options["as_json"]:
        click.echo(to_json(found, indent=2))
        return
    for line in _lines(found, show_all=options["show_all"]):
        click.echo(line)


def _lines(found: Inspection, *, show_all: bool) -> list[str]:
    limit = None if show_all else _SHOWN
    operators = ", ".join(f"{count} {kind}" for kind, count in list(found.operators.items())[:limit])
    lines = [f"{found.model}: opset {found.opset}, {found.parameters:,} parameters"]
    lines += [f"  input  {s.name} {list(s.shape)} {s.dtype} {s.layout or ''}".rstrip() for s in found.inputs]
    lines += [f"  output {s.name} {list(s.shape)} {s.dtype}" for s in found.outputs]
    lines.append(f"  operators: {operators}")
    if found.quantized:
        lines.append(f"  already quantized: {found.quantized}")
    if found.is_transformer:
        lines.append("  a transformer: quantized with NNCF's rules for transformers")
    lines += [f"  {message}" for message in found.messages]
    lines.append(f"{len(found.groups)} groups of channels can be pruned")
    lines += [
        f"  {g.name}: {g.units} {g.kind}, read by {len(g.consumers)} layers"
        + (", may vanish" if g.can_vanish else "")
        for g in found.groups[:limit]
    ]
    lines += _more(len(found.groups), limit)
    if found.stand_ins:
        lines.append(f"{len(found.stand_ins)} residual branches may become one layer")
        lines += [f"  ending in {end}" for end in list(found.stand_ins)[:limit]]
        lines += _more(len(found.stand_ins), limit)
    lines.append(f"{len(found.blocked)} groups cannot")
    lines += [f"  {g.name}: {g.units} {g.kind}: {g.reason}" for g in found.blocked[:limit]]
    lines += _more(len(found.blocked), limit)
    if found.frozen:
        lines.append(f"{len(found.frozen)} layers freeze what they touch")
        lines += [f"  {name}: {reason}" for name, reason in list(found.frozen.items())[:limit]]
        lines += _more(len(found.frozen), limit)
    return lines


def _more(count: int, limit: int | None) -> list[str]:
    return [f"  ... and {count - limit} more (--all shows them)"] if limit is not None and count > limit else []
