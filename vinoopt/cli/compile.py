"""`vinoopt compile`: the whole pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from vinoopt.cli.options import metric_options_from, preprocess_from, preprocess_options, seconds_from
from vinoopt.errors import InputError, VinooptError
from vinoopt.records import AccuracyBudget, DropType, Manifest, Preset

BUDGET_NOT_MET = 3
INTERRUPTED = 130


@click.command("compile")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--demo", is_flag=True, help="Compile the small classifier that the package carries.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle folder.  [default: MODEL.vinoopt]")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option(
    "-t", "--target", "targets", multiple=True, help="PROFILE:DEVICE, repeatable.  [default: host:CPU]"
)
@click.option("--data", help="npz, npy, folder of arrays or images, or module:attribute.")
@click.option("--labels", help="npy, csv, key of the npz, or folder of YOLO boxes.")
@click.option("--calibration-data", help="Inputs for calibration only; labels are not needed.")
@click.option("--test-data", help="Data for the final judgement only.")
@click.option("--test-labels", help="Labels of --test-data.")
@click.option("--metric", default="auto", show_default=True, help="top1, top5, agreement, cosine, sqnr, mse, map ...")
@click.option("--metric-option", "metric_pairs", multiple=True, help="KEY=VALUE for the metric, repeatable.")
@click.option("--label-offset", type=int, help="Added to labels: 1 where the model has a background class.")
@click.option("--max-drop", type=click.FloatRange(min=0), default=0.01, show_default=True)
@click.option("--drop-type", type=click.Choice([str(d) for d in DropType]), default="absolute", show_default=True)
@click.option("--subset-size", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--preset", type=click.Choice([str(p) for p in Preset]), help="NNCF's preset.")
@click.option("--ignored-scope", multiple=True, help="NAME, re:PATTERN or type:OPERATOR to leave alone; repeatable.")
@click.option("--no-quantize", is_flag=True, help="Keep the model in float.")
@click.option("--no-prune", is_flag=True, help="Keep all channels.")
@click.option("--no-tune", is_flag=True, help="Keep the latency hint; race no other runtime properties.")
@click.option("--max-pruning", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True)
@click.option(
    "--effort",
    type=click.Choice(["fast", "balanced", "thorough", "distill"]),
    default="balanced",
    show_default=True,
    help="distill: train faster candidates on the calibration data, without labels; needs PyTorch.",
)
@click.option("--time-limit", help="Stop searching after 90s, 15m, 2h and take the best so far.")
@click.option("--resume", is_flag=True, help="Take over the trials of an earlier run with the same model and data.")
@click.option("--scheduler", metavar="tcp://HOST:PORT",
              help="Measure targets that workers of this dask scheduler announce on those workers.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--shape", help='Shapes in benchmark_app\'s spelling: "images[1,3,416,416],mask[1,?]".')
@preprocess_options
@click.option("--allow-code", is_flag=True, help="Let --data module:attribute run code.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Compile an ONNX MODEL for its targets, inside an accuracy budget.

    Exit codes: 0 done, 1 our error (of several targets, the bundle holds those that came to a result), 2 bad input,
    3 every compressed model was over budget, 130 interrupted (the best candidate so far is in the bundle).
    """
    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    arguments = _arguments(options)
    from vinoopt.cli.show import Console
    from vinoopt.pipeline import compile

    try:
        with Console(quiet=quiet or as_json) as console:
            bundle = compile(on_event=console.on_event, **arguments)
    except KeyboardInterrupt:
        click.echo("no bundle was written; --resume takes over the trials that are finished", err=True)
        raise
    from vinoopt.report import render_manifest
    from vinoopt.serde import to_json

    if as_json:
        click.echo(to_json(bundle.manifest, indent=2))
    else:
        render_manifest(bundle.manifest, str(arguments["output"] or bundle.path))
    ctx.exit(_exit_code(bundle.manifest))


def _exit_code(manifest: Manifest) -> int:
    if manifest.interrupted:
        return INTERRUPTED
    if len(manifest.targets) < len(manifest.request.targets):  # the messages say why one has no result
        return VinooptError.exit_code
    return 0 if all(result.budget_met for result in manifest.targets) else BUDGET_NOT_MET


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `pipeline.compile` that the flags ask for."""
    if options.pop("demo"):
        options = _demo(options)
    if options["model"] is None:
        raise InputError("no MODEL; give an ONNX file, or --demo for the one that the package carries")
    if options["data"] is None:
        raise InputError("no --data; give a few hundred inputs (an npz, or a folder of arrays or images)")
    if math.isnan(options["max_drop"]):
        raise InputError("--max-drop nan is not a number; give one that is not negative, as 0.01")
    preprocess = options.pop("preprocess", None)
    from_flags = preprocess_from(options)
    return {
        "model": options["model"],
        "targets": options["targets"] or ("host:CPU",),
        "data": options["data"],
        "labels": options["labels"],
        "calibration_data": options["calibration_data"],
        "test_data": options["test_data"],
        "test_labels": options["test_labels"],
        "budget": AccuracyBudget(
            metric=options["metric"], max_drop=options["max_drop"], drop_type=DropType(options["drop_type"])
        ),
        "metric_options": metric_options_from(options["metric_pairs"], options["label_offset"]),
        "output": options["output"],
        "force": options["force"],
        "preprocess": from_flags or preprocess or (),
        "shape": options["shape"],
        "preset": None if options["preset"] is None else Preset(options["preset"]),
        "subset_size": options["subset_size"],
        "ignored_scope": options["ignored_scope"],
        "quantize": not options["no_quantize"],
        "prune": not options["no_prune"],
        "max_pruning": options["max_pruning"],
        "effort": options["effort"],
        "time_limit_s": seconds_from(options["time_limit"]),
        "seed": options["seed"],
        "scheduler": options["scheduler"],
        "allow_code": options["allow_code"],
        "tune": not options["no_tune"],
        "resume": options["resume"],
    }


def _demo(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the demo's model, images, labels and preprocessing filled in."""
    if options["model"] is not None or options["data"] is not None:
        raise InputError("--demo brings its own MODEL and --data; leave them out")
    from vinoopt.demo import demo_files
    from vinoopt.frontend.preprocess import read_preprocess

    files = demo_files()
    return {
        **options,
        "model": files.model,
        "data": str(files.data),
        "labels": "labels",
        "output": options["output"] or Path("digits.vinoopt"),
        "preprocess": read_preprocess(files.preprocess),
    }

