"""`vinoopt tune`: runtime properties for a model on a device of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vinoopt.cli.options import milliseconds_from, preprocess_from, preprocess_options

if TYPE_CHECKING:
    from vinoopt.tuning import SettingTrial, TuneResult

AUTO = "auto"
_GOALS = {"latency": "latency", "throughput": "throughput", "tput": "throughput"}


def _batch(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    """A number of samples per call, or `auto`; a usage error otherwise."""
    return value if value in (None, AUTO) else int(click.IntRange(1)(value, param, ctx))


@click.command("tune")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The same as MODEL.")
@click.option("-d", "--device", default="CPU", show_default=True, help="Device of this machine.")
@click.option("--goal", "--hint", type=click.Choice(list(_GOALS)), default="latency", show_default=True)
@click.option(
    "--latency-limit",
    "latency_limit",
    metavar="TIME",
    help="For throughput: the 90th percentile of latency that a setting may have, as 20ms.",
)
@click.option(
    "-t",
    "--seconds",
    type=click.FloatRange(min=1),
    help="About how long it may take. Ctrl-C ends the search with the best so far.",
)
@click.option("--min-cosine", type=float, default=0.999, show_default=True, help="Of outputs against f32.")
@click.option("--min-agreement", type=float, default=0.99, show_default=True, help="Of the top class.")
@click.option("--profile", help="Hardware profile whose values to try; default: the one that fits this machine.")
@click.option("--shape", "-shape", help='Input shapes, as "x[1,3,224,224]".')
@click.option(
    "-b",
    "--batch",
    callback=_batch,
    metavar="N|auto",
    help="Batch size. auto: try others too, for throughput; the model stays as it is, the best batch is told.",
)
@click.option("--data", help="Real inputs: npz, npy, or a folder.")
@preprocess_options
@click.option("--allow-code", is_flag=True, help="Let --data import module:attribute.")
@click.option(
    "--storage",
    type=click.Path(dir_okay=False, path_type=Path),
    help="SQLite file of optuna that keeps the trials; a later run resumes from it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the properties as JSON here.",
)
@click.option("--write", "writes", is_flag=True, help="Put the properties into MODEL, a bundle, checksums included.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")
def tune(model: str | None, model_option: str | None, **options: Any) -> None:
    """Find the OpenVINO properties that run MODEL (bundle, IR or ONNX) best on this machine."""
    if (model is None) == (model_option is None):
        raise click.UsageError("give the model once: as MODEL, or with -m")
    from vinoopt import tuning
    from vinoopt.cli.show import strict_json

    chosen = model or model_option or ""
    _check_output(chosen, options["output"], writes=options["writes"])

    goal = tuning.Goal(_GOALS[options["goal"]])
    is_auto = options["batch"] == AUTO
    if is_auto and goal is tuning.Goal.LATENCY:
        raise click.UsageError("--batch auto looks for throughput: give --goal throughput with it")
    limit = options["latency_limit"]
    limit_ms = None if limit is None else milliseconds_from(limit, "--latency-limit")
    task, base, messages = _task(chosen, **options)
    config = tuning.TuneConfig(
        goal=goal,
        latency_limit_ms=limit_ms,
        base=base,
        min_cosine=options["min_cosine"],
        min_agreement=options["min_agreement"],
        seconds=options["seconds"],
        batches=tuning.BATCHES if is_auto else (),
    )
    for message in messages:
        click.echo(message, err=True)
    result = tuning.tune(task, config=config, storage=options["storage"], progress=_show, keeps_best=True)
    if result.interrupted:
        click.echo("interrupted: this is the best of what was tried", err=True)
    for warning in result.warnings:
        click.echo(warning, err=True)
    if options["output"] is not None:
        options["output"].write_text(properties_json(result) + "\n", encoding="utf-8")
    if options["writes"]:
        _write(chosen, options["device"], result)
    if options["as_json"]:
        click.echo(strict_json(result))
    else:
        click.echo(to_text(result) + (f"\n{batch_text(result)}" if is_auto else ""))


def _check_output(model: str, output: Path | None, *, writes: bool) -> None:
    """Refuse, before any long work, what could not be written or would break a bundle's checksums."""
    from vinoopt.bundle import MANIFEST
    from vinoopt.errors import BundleError

    if writes and not Path(model, MANIFEST).is_file():
        raise click.UsageError(f'--write puts the properties into a bundle, and "{model}" is none; give -o FILE')
    folders = output.resolve().parents if output is not None else ()
    inside = next((each for each in folders if (each / MANIFEST).is_file()), None)
    if inside is not None:
        raise BundleError(f"{output} lies in the bundle {inside.name}, whose checksums it would break; give --write")


def _write(model: str, device: str, result: TuneResult) -> None:
    from vinoopt.bundle import open_bundle, replace_properties
    from vinoopt.lineup import target_of

    bundle = open_bundle(model)
    verdict = _verdict(result)
    replace_properties(bundle, target_of(bundle, device), result.properties, reason=f"tuned again: {verdict}")
    click.echo(f"{model}: properties and checksums were written", err=True)


def _task(model: str, **options: Any) -> Any:
    from vinoopt.hardware.detect import match_host
    from vinoopt.hardware.profile import load_profile
    from vinoopt.lineup import LineupRequest, tuning_task
    from vinoopt.records import Device

    request = LineupRequest(
        model=model,
        device=options["device"],
        data=options["data"],
        preprocess=preprocess_from(options),
        shape=options["shape"],
        batch=None if options["batch"] == AUTO else options["batch"],
        allow_code=options["allow_code"],
    )
    word = options["device"].partition(".")[0]
    kind = Device(word) if word in [each.value for each in Device] else None
    if options["profile"] and kind is None:
        raise click.UsageError(f'--profile goes with a --device of {", ".join(Device)}, not "{word}"')
    profile = options["profile"] or match_host()
    spec = load_profile(profile).devices.get(kind) if profile and kind else None
    return tuning_task(request, spec=spec)


def _show(trial: SettingTrial) -> None:
    setting = trial.setting.name or "default"
    click.echo(f"{trial.state!s:<10} {setting}{f': {trial.reason}' if trial.reason else ''}", err=True)


def properties_json(result: TuneResult) -> str:
    """The properties as `core.compile_model` takes them."""
    import json

    return json.dumps(result.properties.as_dict(), indent=2)


def to_text(result: TuneResult) -> str:
    """The properties, and the sentence that tells what they gain."""
    return f"{properties_json(result)}\n{_verdict(result)}"


def _verdict(result: TuneResult) -> str:
    from vinoopt.report import comparison_line

    if result.comparison is None:
        return "the default stays: no setting was faster"
    return comparison_line(result.comparison)


def batch_text(result: TuneResult) -> str:
    """The batch that brings more samples per second, what it gains and costs, and the properties at it."""
    import json

    from vinoopt.report import comparison_line

    choice = result.batched
    if choice is None:
        return "batch: the model's own; no other was shown to bring more samples per second"
    per_s, p90 = choice.measurement.throughput_per_s, choice.measurement.latency_p90_ms
    return (
        f"batch: {choice.batch} (the model keeps its own; for these properties compile it at this batch)\n"
        f"{json.dumps(choice.properties.as_dict(), indent=2)}\n"
        f"in samples, {comparison_line(choice.comparison)}: {per_s or 0:.4g} per s, p90 {p90 or 0:.3g} ms per call"
    )
