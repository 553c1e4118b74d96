"""`vinoopt bench` and `vinoopt compare`: models side by side on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from vinoopt.cli.options import preprocess_from, preprocess_options

if TYPE_CHECKING:
    from vinoopt.bench import BenchResult
    from vinoopt.fleet import FleetReport, Job, Measured
    from vinoopt.lineup import Lineup
    from vinoopt.records import Comparison, Measurement

SLOWER = 3
"""Exit code where `--fail-below` is not met."""
_HINTS: dict[str, str | None] = {
    "latency": "LATENCY",
    "throughput": "THROUGHPUT",
    "tput": "THROUGHPUT",
    "cumulative_throughput": "CUMULATIVE_THROUGHPUT",
    "ctput": "CUMULATIVE_THROUGHPUT",
    "none": None,
}


def measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """benchmark_app's spellings, shared by the commands that measure."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option("-d", "--device", default="CPU", show_default=True, help="Device, or a bundle's target."),
    click.option(
        "--hint", "-hint", type=click.Choice(list(_HINTS)), default="latency", show_default=True,
        help="Measure one request at a time, or as many in flight as the device likes; none: in flight, without a "
        "performance hint, so that --nstreams, --nireq and --nthreads count alone.",
    ),
    click.option("--nstreams", "-nstreams", help="NUM_STREAMS."),
    click.option("--nireq", "-nireq", type=click.IntRange(1),
                 help="Requests in flight, which a hint plans for."),
    click.option("--nthreads", "-nthreads", type=click.IntRange(1), help="INFERENCE_NUM_THREADS."),
    click.option("--infer-precision", "-infer_precision", help="INFERENCE_PRECISION_HINT of the model."),
    click.option("-t", "--seconds", type=click.FloatRange(min=0.1), default=15.0, show_default=True,
                 help="Time for all rounds."),
    click.option("--start-up/--no-start-up", default=True, show_default=True,
                 help="Open each model in fresh processes too: compile time cold and cached, peak memory."),
    click.option("--shape", "-shape", help='Input shapes, as "x[1,3,224,224]".'),
    click.option("-b", "--batch", type=click.IntRange(1), help="Batch size; throughput then counts samples."),
    click.option("--data", "-i", help="Real inputs: npz, npy, or a folder. Without: golden or random inputs."),
    preprocess_options,
    click.option("--allow-code", is_flag=True, help="Let --data import module:attribute."),
    click.option("--fail-below", type=click.FloatRange(min=0), metavar="FACTOR",
                 help="Exit with 3 where the model is significantly slower, and below this speed-up."),
    click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout."),
)  # fmt: skip


@click.command("bench")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The same as MODEL.")
@click.option(
    "--against",
    multiple=True,
    help="fp32, bf16, int8 (plain nncf.quantize), onnxruntime, or a path. Repeatable.",
)
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Measure on workers of this dask scheduler.")
@click.option("--on", "places", multiple=True, metavar="NAME",
              help="With --scheduler: a worker that announces this profile. Repeatable: one run on each.")
@measuring_options
def bench(
    model: str | None,
    model_option: str | None,
    against: tuple[str, ...],
    scheduler: str | None,
    places: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure MODEL (bundle, IR, ONNX or blob) side by side with references."""
    if (model is None) == (model_option is None):
        raise click.UsageError("give the model once: as MODEL, or with -m")
    if scheduler is None and places:
        raise click.UsageError("--on names workers of a fleet and needs --scheduler")
    chosen = model or model_option or ""
    if scheduler is None:
        _run(chosen, against, **options)
    else:
        _run_on_fleet(chosen, against, scheduler=scheduler, places=places, **options)


@click.command("compare")
@click.argument("reference")
@click.argument("candidate")
@measuring_options
def compare(reference: str, candidate: str, **options: Any) -> None:
    """Say how much faster CANDIDATE is than REFERENCE.

    Each a bundle, IR, ONNX file or blob, which are measured side by side now; or two JSON records that `vinoopt bench
    --json` wrote, of which the first contestants are compared.
    """
    if reference.endswith(".json") and candidate.endswith(".json"):
        _compare_records(reference, candidate, fail_below=options["fail_below"], as_json=options["as_json"])
    else:
        _run(candidate, (reference,), **options)


def _compare_records(reference: str, candidate: str, *, fail_below: float | None, as_json: bool) -> None:
    from pathlib import Path

    from vinoopt import serde
    from vinoopt.bench import BenchRecord, compare_runs
    from vinoopt.errors import InputError

    records = []
    for name in (reference, candidate):
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file")
        records.append(serde.from_json(BenchRecord, Path(name).read_text(encoding="utf-8"), where=name))
    found = compare_runs(*records, names=(reference, candidate))
    for warning in found.warnings:
        click.echo(warning, err=True)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        through = f", relative to {', '.join(found.through)} of each run" if found.through else ""
        click.echo(f"{sentence(found.comparison)}{through}")
    _end([found.comparison], fail_below)


def _run(
    model: str, against: tuple[str, ...], *, fail_below: float | None, as_json: bool, **options: Any
) -> None:
    from vinoopt.fleet import measure_job

    lineup, (job,) = _jobs(model, against, (None,), **options)
    measured = measure_job(job)
    result, comparisons = measured.result, comparisons_of(measured.result)
    for message in (*lineup.messages, *result.warnings):
        click.echo(message, err=True)
    click.echo(to_json(measured) if as_json else to_text(result, comparisons))
    _end(comparisons, fail_below)


def _run_on_fleet(
    model: str,
    against: tuple[str, ...],
    *,
    scheduler: str,
    places: tuple[str, ...],
    fail_below: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    from vinoopt.fleet import run

    lineup, jobs = _jobs(model, against, places or (None,), **options)
    report = run(jobs, scheduler=scheduler, on_outcome=lambda each: click.echo(f"done: {each.job}", err=True))
    for message in lineup.messages:
        click.echo(message, err=True)
    click.echo(_fleet_json(report) if as_json else _fleet_text(report))
    for lack in report.unmeasured:
        click.echo(f"not measured: {lack.job}: {lack.reason}", err=True)
    _end([c for each in report.measured for c in comparisons_of(each.result)], fail_below)
    if report.unmeasured:
        raise click.exceptions.Exit(1)


def _jobs(
    model: str,
    against: tuple[str, ...],
    places: Sequence[str | None],
    *,
    seconds: float,
    hint: str,
    start_up: bool,
    **options: Any,
) -> tuple[Lineup, list[Job]]:
    """The line-up, and a job of it for each place."""
    from vinoopt.bench import MeasureConfig, MeasureMode
    from vinoopt.fleet import Job
    from vinoopt.lineup import line_up

    lineup = line_up(_request(model, against, hint=hint, **options))
    mode = MeasureMode.LATENCY if hint == "latency" else MeasureMode.THROUGHPUT
    name = lineup.contestants[0].name
    jobs = [
        Job(
            name=f"{name} on {place or options['device']}",
            contestants=lineup.contestants,
            samples=lineup.samples,
            config=MeasureConfig(mode=mode, seconds=seconds, start_up=start_up),
            profile=place,
        )
        for place in dict.fromkeys(places)
    ]
    return lineup, jobs


def comparisons_of(result: BenchResult) -> list[Comparison]:
    """The main model, which comes first, against every other one."""
    main, *others = (each.name for each in result.measurements)
    return [result.compare(other, main) for other in others]


def _end(comparisons: Sequence[Comparison], fail_below: float | None) -> None:
    slow = [each for each in comparisons if _is_slow(each, fail_below)]
    for each in slow:
        click.echo(
            f"{each.candidate} reaches {each.speedup:.3f}x of {each.reference}: below {fail_below}x", err=True
        )
    if slow:
        raise click.exceptions.Exit(SLOWER)


def _fleet_json(report: FleetReport) -> str:
    import json

    def whole(each: Measured) -> dict[str, Any]:
        comparisons = [c.model_dump(mode="json") for c in comparisons_of(each.result)]
        return {**each.model_dump(mode="json"), "comparisons": comparisons}

    lacks = [each.model_dump(mode="json") for each in report.unmeasured]
    return json.dumps({"measured": [whole(each) for each in report.measured], "unmeasured": lacks}, indent=2)


def _fleet_text(report: FleetReport) -> str:
    return "\n\n".join(
        "\n".join(
            (
                f"{each.job}: {each.host.cpu} ({each.worker}), OpenVINO {each.host.versions['openvino']}",
                to_text(each.result, comparisons_of(each.result)),
                *each.result.warnings,
            )
        )
        for each in report.measured
    )


def _request(model: str, against: tuple[str, ...], *, hint: str, **options: Any) -> Any:
    from vinoopt.lineup import LineupRequest
    from vinoopt.records import RuntimeProperties

    properties = {
        "PERFORMANCE_HINT": _HINTS[hint],
        "NUM_STREAMS": options["nstreams"],
        "PERFORMANCE_HINT_NUM_REQUESTS": options["nireq"],
        "INFERENCE_NUM_THREADS": options["nthreads"],
        "INFERENCE_PRECISION_HINT": options["infer_precision"],
    }
    given = {key: value for key, value in properties.items() if value is not None}
    return LineupRequest(
        model=model,
        against=against,
        device=options["device"],
        properties=RuntimeProperties.of(given),
        is_hinted=_HINTS[hint] is not None,
        requests=None if hint == "latency" else options["nireq"],
        data=options["data"],
        preprocess=preprocess_from(options),
        shape=options["shape"],
        batch=options["batch"],
        allow_code=options["allow_code"],
    )


def _is_slow(comparison: Comparison, fail_below: float | None) -> bool:
    return fail_below is not None and comparison.is_significant and comparison.speedup < fail_below


def to_json(measured: Measured) -> str:
    """The run as the record that `vinoopt compare` reads."""
    from vinoopt.bench import BenchRecord

    return BenchRecord.of(measured.result, measured.host).model_dump_json(indent=2)


def to_text(result: BenchResult, comparisons: list[Comparison]) -> str:
    """A table of measurements and a sentence per comparison."""
    rows = [_COLUMNS, *(_row(each) for each in result.measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", *(sentence(each) for each in comparisons)]
    lines += [warning for each in result.measurements for warning in each.warnings]
    return "\n".join(lines).rstrip()


def sentence(comparison: Comparison) -> str:
    """`a is 1.31x as fast as b (95% interval 1.28 to 1.34)`, or that there is no significant difference."""
    c = comparison
    interval = f"95% interval {c.low:.3f} to {c.high:.3f}"
    if not c.is_significant:
        return (
            f"{c.candidate} against {c.reference}: no significant difference ({c.speedup:.3f}x, {interval})"
        )
    return f"{c.candidate} is {c.speedup:.3f}x as fast as {c.reference} ({interval}, {c.evidence})"


_COLUMNS = (
    "", "p50 ms", "p90 ms", "p99 ms", "per s",
    "compile ms", "(cached)", "first ms", "(cached)", "peak MB", "weights kB",
)  # fmt: skip


def _row(m: Measurement) -> tuple[str, ...]:
    figures = (
        m.latency_p50_ms,
        m.latency_p90_ms,
        m.latency_p99_ms,
        m.throughput_per_s,
        m.compile_ms,
        m.cached_compile_ms,
        m.first_inference_ms,
        m.cached_first_inference_ms,
        None if m.peak_memory_bytes is None else m.peak_memory_bytes / 1e6,
        None if m.size_bytes is None else m.size_bytes / 1000,
    )
    return (m.name, *("-" if value is None else f"{value:.4g}" for value in figures))
