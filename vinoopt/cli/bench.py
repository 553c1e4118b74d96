"""`vinoopt bench` and `vinoopt compare`: models side by side on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from vinoopt.cli.options import preprocess_from, preprocess_options

if TYPE_CHECKING:
    from vinoopt.bench import BenchResult
    from vinoopt.records import Comparison, Measurement

SLOWER = 3
"""Exit code where `--fail-below` is not met."""
_HINTS = {
    "latency": "LATENCY",
    "throughput": "THROUGHPUT",
    "tput": "THROUGHPUT",
    "cumulative_throughput": "CUMULATIVE_THROUGHPUT",
    "ctput": "CUMULATIVE_THROUGHPUT",
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
        help="Measure one request at a time, or as many in flight as the device likes.",
    ),
    click.option("--nstreams", "-nstreams", help="NUM_STREAMS."),
    click.option("--nireq", "-nireq", type=click.IntRange(1), help="Requests the throughput hint plans for."),
    click.option("--nthreads", "-nthreads", type=click.IntRange(1), help="INFERENCE_NUM_THREADS."),
    click.option("--infer-precision", "-infer_precision", help="INFERENCE_PRECISION_HINT of the model."),
    click.option("-t", "--seconds", type=click.FloatRange(min=0.1), default=15.0, show_default=True,
                 help="Time for the whole measurement."),
    click.option("--shape", "-shape", help='Input shapes, as "x[1,3,224,224]".'),
    click.option("-b", "--batch", type=click.IntRange(1), help="Batch size."),
    click.option("--data", help="Real inputs: npz, npy, or a folder. Without: golden or random inputs."),
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
@measuring_options
def bench(model: str | None, model_option: str | None, against: tuple[str, ...], **options: Any) -> None:
    """Measure MODEL (bundle, IR, ONNX or blob) side by side with references."""
    if (model is None) == (model_option is None):
        raise click.UsageError("give the model once: as MODEL, or with -m")
    _run(model or model_option or "", against, **options)


@click.command("compare")
@click.argument("reference")
@click.argument("candidate")
@measuring_options
def compare(reference: str, candidate: str, **options: Any) -> None:
    """Say how much faster CANDIDATE is than REFERENCE: each a bundle, IR, ONNX file or blob."""
    _run(candidate, (reference,), **options)


def _run(
    model: str,
    against: tuple[str, ...],
    *,
    seconds: float,
    hint: str,
    fail_below: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    from vinoopt.bench import MeasureConfig, MeasureMode, measure
    from vinoopt.lineup import line_up

    lineup = line_up(_request(model, against, hint=hint, **options))
    mode = MeasureMode.LATENCY if hint == "latency" else MeasureMode.THROUGHPUT
    result = measure(lineup.contestants, lineup.samples, config=MeasureConfig(mode=mode, seconds=seconds))
    main = lineup.contestants[0].name
    comparisons = [result.compare(each.name, main) for each in lineup.contestants[1:]]
    for message in (*lineup.messages, *result.warnings):
        click.echo(message, err=True)
    click.echo(to_json(result, comparisons) if as_json else to_text(result, comparisons))
    slow = [each for each in comparisons if _is_slow(each, fail_below)]
    for each in slow:
        click.echo(
            f"{each.candidate} reaches {each.speedup:.3f}x of {each.reference}: below {fail_below}x", err=True
        )
    if slow:
        raise click.exceptions.Exit(SLOWER)


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
        data=options["data"],
        preprocess=preprocess_from(options),
        shape=options["shape"],
        batch=options["batch"],
        allow_code=options["allow_code"],
    )


def _is_slow(comparison: Comparison, fail_below: float | None) -> bool:
    return fail_below is not None and comparison.is_significant and comparison.speedup < fail_below


def to_json(result: BenchResult, comparisons: list[Comparison]) -> str:
    """The result and its comparisons as one JSON object."""
    import json

    whole = json.loads(result.model_dump_json())
    return json.dumps(
        {**whole, "comparisons": [each.model_dump(mode="json") for each in comparisons]}, indent=2
    )


def to_text(result: BenchResult, comparisons: list[Comparison]) -> str:
    """A table of measurements and a sentence per comparison."""
    header = ("", "p50 ms", "p90 ms", "p99 ms", "per s", "compile ms", "first ms", "weights kB")
    rows = [header, *(_row(each) for each in result.measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
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


def _row(m: Measurement) -> tuple[str, ...]:
    kilobytes = None if m.size_bytes is None else m.size_bytes / 1000
    figures = (
        m.latency_p50_ms,
        m.latency_p90_ms,
        m.latency_p99_ms,
        m.throughput_per_s,
        m.compile_ms,
        m.first_inference_ms,
        kilobytes,
    )
    return (m.name, *("-" if value is None else f"{value:.4g}" for value in figures))
