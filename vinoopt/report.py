"""What a manifest says, for people: text on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vinoopt.records import Comparison, Evidence, Manifest, Measurement, TargetResult

_MODELLED = frozenset({Evidence.MODELLED, Evidence.EMULATED})


def render_manifest(manifest: Manifest, path: str, *, console: Console | None = None) -> None:
    """Print accuracy, latency and reasons of every target, and where the bundle lies."""
    out = console or Console(highlight=False, soft_wrap=True)
    for result in manifest.targets:
        out.print()
        out.print(f"{result.target}: {result.plan.title}", style="bold", markup=False)
        out.print(latency_table(result))
        for comparison in result.comparisons:
            out.print(comparison_line(comparison), markup=False)
        for reason in result.reasons:
            out.print(f"- {reason}", markup=False)
        if not result.budget_met:
            out.print("- nothing but the float model was inside the budget: the bundle holds the float model")
    versions = manifest.host.versions
    out.print()
    out.print(
        f"{manifest.trials} trials in {manifest.seconds:.0f} s"
        + (f", peak memory {manifest.peak_memory_bytes / 2**20:.0f} MiB" if manifest.peak_memory_bytes else "")
        + f"; {manifest.host.cpu}, {manifest.host.cores} cores, OpenVINO {versions.get('openvino', '?')}, "
        f"NNCF {versions.get('nncf', '?')}",
        markup=False,
    )
    out.print(f"bundle: {path}", markup=False)


def latency_table(result: TargetResult) -> Table:
    """Latency, size and evidence of every contestant."""
    table = Table(box=None, pad_edge=False)
    for title in ("contestant", "p50 ms", "p90 ms", "weights kB", "evidence"):
        table.add_column(title, justify="left" if title in ("contestant", "evidence") else "right")
    for each in result.measurements:
        table.add_row(each.name, _ms(each), _number(each.latency_p90_ms), _kilobytes(each), _evidence(each))
    return table


def comparison_line(comparison: Comparison) -> str:
    """`vinoopt is 1.31x faster than float f32 (95% interval 1.27 to 1.36, measured)`."""
    if not comparison.is_significant:
        return (
            f"{comparison.candidate} against {comparison.reference}: no significant difference "
            f"({comparison.speedup:.2f}x, 95% interval {comparison.low:.2f} to {comparison.high:.2f}, "
            f"{comparison.evidence})"
        )
    word = "faster" if comparison.speedup >= 1 else "as fast (slower)"
    return (
        f"{comparison.candidate} is {comparison.speedup:.2f}x {word} than {comparison.reference} "
        f"(95% interval {comparison.low:.2f} to {comparison.high:.2f}, {comparison.evidence})"
    )


def _ms(measurement: Measurement) -> str:
    prefix = "~" if measurement.evidence in _MODELLED else ""
    return f"{prefix}{_number(measurement.latency_p50_ms)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _kilobytes(measurement: Measurement) -> str:
    return "" if measurement.size_bytes is None else f"{measurement.size_bytes / 1000:.0f}"


def _evidence(measurement: Measurement) -> str:
    return f"{measurement.evidence}{f' ({measurement.source})' if measurement.source else ''}"
