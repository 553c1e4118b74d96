"""`vinoopt bench` and `vinoopt compare`: models side by side on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from vinoopt.cli.options import preprocess_from, preprocess_options

if TYPE_CHECKING:
    from vinoopt.bench import BenchRecord, BenchResult
    from vinoopt.fleet import FleetReport, Job
    from vinoopt.lineup import Lineup, LineupRequest
    from vinoopt.records import Comparison, Measurement, Range

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
        "--hint", "-hint", type=click.Choice(list(_HINTS)),
        help="Measure one request at a time, or as many in flight as the device likes; none: in flight, without a "
        "performance hint, so that --nstreams, --nireq and --nthreads count alone.  [default: the hint that a bundle "
        "was tuned with, else latency]",
    ),
    click.option("--nstreams", "-nstreams", help="NUM_STREAMS."),
    click.option("--nireq", "-nireq", type=click.IntRange(1),
                 help="Requests in flight, which a hint plans for."),
    click.option("--nthreads", "-nthreads", type=click.IntRange(1), help="INFERENCE_NUM_THREADS."),
    click.option(
        "--infer-precision", "-infer_precision", help="INFERENCE_PRECISION_HINT of the model and of files beside it."
    ),
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
                 help="Exit with 3 where the whole 95% interval of the speed-up, so its upper end, lies below this."),
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
    from vinoopt.bench import compare_runs
    from vinoopt.cli.show import strict_json
    from vinoopt.report import comparison_line

    records = [_record(name) for name in (reference, candidate)]
    found = compare_runs(*records, names=(reference, candidate))
    for warning in found.warnings:
        click.echo(warning, err=True)
    if as_json:
        click.echo(strict_json(found))
    else:
        through = f", relative to {', '.join(found.through)} of each run" if found.through else ""
        click.echo(f"{comparison_line(found.comparison)}{through}")
    _end([found.comparison], fail_below)


def _record(name: str) -> BenchRecord:
    """The run in a file of `vinoopt bench --json`, or the only one in a fleet's."""
    import json
    from pathlib import Path

    from vinoopt import serde
    from vinoopt.bench import BenchRecord
    from vinoopt.errors import InputError

    if not Path(name).is_file():
        raise InputError(f"{name}: no such file")
    text = Path(name).read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as exc:
        raise InputError(f"{name}: not JSON: {exc}") from exc
    if isinstance(whole, dict) and "unmeasured" in whole:
        runs = whole.get("measured", [])
        if len(runs) != 1:
            raise InputError(f"{name} holds {len(runs)} runs: compare files of one run each, as with one --on")
        (whole,) = runs
    return serde.from_mapping(BenchRecord, whole, where=name)


def _run(
    model: str, against: tuple[str, ...], *, fail_below: float | None, as_json: bool, **options: Any
) -> None:
    from vinoopt.bench import BenchRecord
    from vinoopt.cli.show import strict_json
    from vinoopt.fleet import measure_job

    lineup, (job,) = _jobs(model, against, (None,), **options)
    measured = measure_job(job)
    for message in (*lineup.messages, *measured.result.warnings):
        click.echo(message, err=True)
    record = BenchRecord.of(measured.result, measured.host, inputs=lineup.origin, pace=measured.pace)
    click.echo(strict_json(record) if as_json else to_text(measured.result))
    _end(record.comparisons, fail_below)


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
    click.echo(_fleet_json(report, lineup.origin) if as_json else _fleet_text(report))
    for lack in report.unmeasured:
        click.echo(f"not measured: {lack.job}: {lack.reason}", err=True)
    _end([c for each in report.measured for c in each.result.comparisons()], fail_below)
    if report.unmeasured:
        raise click.exceptions.Exit(1)


def _jobs(
    model: str,
    against: tuple[str, ...],
    places: Sequence[str | None],
    *,
    seconds: float,
    hint: str | None,
    start_up: bool,
    **options: Any,
) -> tuple[Lineup, list[Job]]:
    """The line-up, and a job of it for each place."""
    from vinoopt.bench import MeasureConfig, MeasureMode
    from vinoopt.fleet import Job
    from vinoopt.lineup import line_up

    lineup = line_up(_request(model, against, hint=hint, **options))
    tuned_for = lineup.contestants[0].properties.get("PERFORMANCE_HINT", "LATENCY")
    is_latency = hint == "latency" or (hint is None and tuned_for == "LATENCY")
    mode = MeasureMode.LATENCY if is_latency else MeasureMode.THROUGHPUT
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


def _end(comparisons: Sequence[Comparison], fail_below: float | None) -> None:
    """Exit code 3 where a speed-up is below the threshold beyond doubt: even the upper end of its interval is."""
    slow = [] if fail_below is None else [each for each in comparisons if each.high < fail_below]
    for each in slow:
        click.echo(
            f"{each.candidate} reaches {each.speedup:.3f}x of {each.reference}, at most {each.high:.3f}x: "
            f"below {fail_below}x",
            err=True,
        )
    if slow:
        raise click.exceptions.Exit(SLOWER)


def _fleet_json(report: FleetReport, inputs: str) -> str:
    from vinoopt.bench import BenchRecord
    from vinoopt.cli.show import strict_json

    records = [
        BenchRecord.of(
            each.result, each.host, inputs=inputs, pace=each.pace, job=each.job, worker=each.worker
        )
        for each in report.measured
    ]
    whole = {"measured": records, "unmeasured": report.unmeasured}
    return strict_json({key: [each.model_dump(mode="json") for each in part] for key, part in whole.items()})


def _fleet_text(report: FleetReport) -> str:
    return "\n\n".join(
        "\n".join(
            (
                f"{each.job}: {each.host.cpu} ({each.worker}), OpenVINO {each.host.versions['openvino']}",
                to_text(each.result),
                *each.result.warnings,
            )
        )
        for each in report.measured
    )


def _request(model: str, against: tuple[str, ...], *, hint: str | None, **options: Any) -> LineupRequest:
    from vinoopt.lineup import LineupRequest
    from vinoopt.records import RuntimeProperties

    properties = {
        "PERFORMANCE_HINT": None if hint is None else _HINTS[hint],
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
        is_hinted=hint != "none",
        requests=options["nireq"],
        data=options["data"],
        preprocess=preprocess_from(options),
        shape=options["shape"],
        batch=options["batch"],
        allow_code=options["allow_code"],
    )


def to_text(result: BenchResult) -> str:
    """A table of measurements and a sentence per comparison."""
    from vinoopt.report import comparison_line

    rows = [_COLUMNS, *(_row(each) for each in result.measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", *(comparison_line(each) for each in result.comparisons())]
    lines += [warning for each in result.measurements for warning in each.warnings]
    return "\n".join(lines).rstrip()


_COLUMNS = (
    "", "p50 ms (95%)", "p90 ms", "p99 ms", "per s",
    "compile ms", "(cached)", "first ms", "(cached)", "peak MB", "weights kB",
)  # fmt: skip


def _row(m: Measurement) -> tuple[str, ...]:
    timed = (
        _with_range(m.latency_p50_ms, m.latency_p50_range_ms),
        _with_range(m.latency_p90_ms, m.latency_p90_range_ms),
        _with_range(m.latency_p99_ms, m.latency_p99_range_ms),
        _with_range(m.throughput_per_s, m.throughput_range_per_s),
    )
    figures = (
        m.compile_ms,
        m.cached_compile_ms,
        m.first_inference_ms,
        m.cached_first_inference_ms,
        None if m.peak_memory_bytes is None else m.peak_memory_bytes / 1e6,
        None if m.size_bytes is None else m.size_bytes / 1000,
    )
    return (m.name, *timed, *(_with_range(value, None) for value in figures))


def _with_range(value: float | None, ends: Range | None) -> str:
    """`2.31 (2.28-2.4)`: a figure and its 95% interval."""
    if value is None:
        return "-"
    return f"{value:.4g}" if ends is None else f"{value:.4g} ({ends.low:.4g}-{ends.high:.4g})"
