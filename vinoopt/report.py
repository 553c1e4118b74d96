"""What a manifest says, for people: text on a terminal and a page for a browser."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vinoopt.records import (
    Build,
    Comparison,
    Evidence,
    Manifest,
    Measurement,
    TargetResult,
    Trial,
    TrialState,
)

_MODELLED = frozenset({Evidence.MODELLED, Evidence.EMULATED})
_SHOWN = 4
"""Diagnostics of a build that are printed; the manifest holds all."""


def render_manifest(manifest: Manifest, path: str, *, console: Console | None = None) -> None:
    """Print accuracy, latency and reasons of every target, and where the bundle lies."""
    out = console or Console(highlight=False, soft_wrap=True)
    for result in manifest.targets:
        out.print()
        out.print(f"{result.target}: {result.plan.title}", style="bold", markup=False)
        out.print(latency_table(result))
        for source in dict.fromkeys(f"{m.evidence}: {m.source}" for m in result.measurements if m.source):
            out.print(source, markup=False)
        for comparison in result.comparisons:
            out.print(comparison_line(comparison), markup=False)
        for reason in result.reasons:
            out.print(f"- {reason}", markup=False)
        if not result.budget_met:
            out.print("- every compressed model was over the budget: the bundle holds the float model")
        for line in build_lines(result.build):
            out.print(f"- {line}", markup=False)
    if len(manifest.targets) > 1:
        out.print()
        out.print(targets_table(manifest))
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


def targets_table(manifest: Manifest) -> Table:
    """The result of every target, one per row, with what stands behind its latency and its compilation."""
    table = Table(box=None, pad_edge=False)
    for title in ("target", "result", "drop", "p50 ms", "x float", "times", "compiler"):
        is_number = title in ("drop", "p50 ms", "x float")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=title != "result")
    for each in manifest.targets:
        best = chosen(each)
        table.add_row(
            str(each.target),
            each.plan.title,
            "" if each.drop is None else f"{each.drop.value:+.4f}",
            _ms(best),
            f"{speedup_over_float(each):.2f}",
            best.evidence.value,
            compilation(each.build),
        )
    return table


def speedup_over_float(result: TargetResult) -> float:
    """How many times faster the result is than the float model, which is the first contestant; 1 for itself."""
    reference = result.measurements[0].name
    return next((each.speedup for each in result.comparisons if each.reference == reference), 1.0)


def chosen(result: TargetResult) -> Measurement:
    """The measurement of what the bundle holds: comparisons name it as their candidate."""
    name = result.comparisons[0].candidate if result.comparisons else result.measurements[0].name
    return next(each for each in result.measurements if each.name == name)


def compilation(build: Build) -> str:
    """`blob written`, `compiled`, or `not checked`: how far the target's own compiler got."""
    if build.evidence is Evidence.NOT_CHECKED:
        return Evidence.NOT_CHECKED.value
    return "blob written" if build.blob else Evidence.COMPILED.value


def build_lines(build: Build) -> Iterator[str]:
    """What compiled it, and what the compiler wants the user to know, the worst first."""
    yield f"{build.toolchain}: {compilation(build)}"
    ordered = sorted(build.diagnostics, key=lambda each: ("error", "warning", "info").index(each.severity))
    for each in ordered[:_SHOWN]:
        yield f"{each.severity}: {f'{each.layer}: ' if each.layer else ''}{each.message}"
    if len(ordered) > _SHOWN:
        yield f"{len(ordered) - _SHOWN} more diagnostics in manifest.json"


def latency_table(result: TargetResult) -> Table:
    """Latency, size and evidence of every contestant."""
    table = Table(box=None, pad_edge=False)
    for title in ("contestant", "p50 ms", "p90 ms", "weights kB", "evidence"):
        table.add_column(title, justify="left" if title in ("contestant", "evidence") else "right")
    for each in result.measurements:
        table.add_row(each.name, _ms(each), _number(each.latency_p90_ms), _kilobytes(each), each.evidence.value)
    return table


def comparison_line(comparison: Comparison) -> str:
    """`vinoopt is 1.31x faster than float (95% interval 1.27 to 1.36, measured)`; no interval where modelled."""
    if comparison.low == comparison.high:
        word = "faster than" if comparison.speedup >= 1 else "as fast as"
        ratio = f"{comparison.speedup:.2f}x {word}" if comparison.is_significant else "as fast as"
        return f"{comparison.candidate} is {ratio} {comparison.reference} ({comparison.evidence})"
    if not comparison.is_significant:
        return (
            f"{comparison.candidate} against {comparison.reference}: no significant difference "
            f"({comparison.speedup:.2f}x, 95% interval {comparison.low:.2f} to {comparison.high:.2f}, "
            f"{comparison.evidence})"
        )
    word = "faster than" if comparison.speedup >= 1 else "as fast as"
    return (
        f"{comparison.candidate} is {comparison.speedup:.2f}x {word} {comparison.reference} "
        f"(95% interval {comparison.low:.2f} to {comparison.high:.2f}, {comparison.evidence})"
    )


def _ms(measurement: Measurement) -> str:
    prefix = "~" if measurement.evidence in _MODELLED else ""
    return f"{prefix}{_number(measurement.latency_p50_ms)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _kilobytes(measurement: Measurement) -> str:
    return "" if measurement.size_bytes is None else f"{measurement.size_bytes / 1000:.0f}"


# --------------------------------------------------------------------------- the page

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48
_COLOURS = {TrialState.COMPLETE: "#0068b5", TrialState.OVER_BUDGET: "#c0504d", TrialState.FAILED: "#999999",
            TrialState.SLOWER: "#999999"}  # fmt: skip
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .8rem .15rem 0;text-align:left}
th{border-bottom:1px solid #bbb}h2{margin-top:2rem}svg{max-width:100%;height:auto}small,.axis{color:#666;fill:#666}
"""


def render_html(manifest: Manifest, trials: Sequence[Trial]) -> str:
    """The report as one self-contained page: results, reasons and every trial, without scripts or network."""
    name = html.escape(Path(manifest.request.model).name)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{name}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1>",
        f"<p>{html.escape(_budget_words(manifest))}</p>",
        "<ul>" + "".join(f"<li>{html.escape(message)}</li>" for message in manifest.messages) + "</ul>",
    ]
    for result in manifest.targets:
        own = [trial for trial in trials if trial.target == str(result.target)]
        parts += _target_section(result, own)
    host = manifest.host
    versions = ", ".join(f"{package} {version}" for package, version in host.versions.items())
    parts.append(
        f"<p><small>{html.escape(host.cpu)}, {host.cores} cores; {html.escape(versions)}; "
        f"{manifest.trials} trials in {manifest.seconds:.0f} s</small></p></body></html>\n"
    )
    return "\n".join(parts)


def _budget_words(manifest: Manifest) -> str:
    budget = manifest.request.budget
    splits = ", ".join(f"{part} {size}" for part, size in manifest.splits.items())
    metric = manifest.float_accuracy.metric if manifest.float_accuracy is not None else budget.metric
    return f"Budget: {budget.max_drop:g} {budget.drop_type} of {metric}. Samples: {splits}."


def _target_section(result: TargetResult, trials: Sequence[Trial]) -> Iterator[str]:
    yield f"<h2>{html.escape(str(result.target))}: {html.escape(result.plan.title)}</h2>"
    rows = [
        (each.name, _ms(each), _number(each.latency_p90_ms), _kilobytes(each), each.evidence.value)
        for each in result.measurements
    ]
    yield _html_table(("contestant", "p50 ms", "p90 ms", "weights kB", "evidence"), rows)
    lines = [*map(comparison_line, result.comparisons), *result.reasons, *build_lines(result.build)]
    yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
    if result.float_blocks:
        yield "<h3>Blocks that stay float</h3>"
        yield _html_table(
            ("block", "why", "damage in INT8", "saved by INT8, us"),
            [(b.name, b.reason, _number(b.damage), _number(b.gain_us)) for b in result.float_blocks],
        )
    yield _scatter(trials, result)
    yield "<h3>Trials</h3>"
    yield _html_table(
        ("#", "plan", "what", "state", "drop (search part)", "expected", "ms"),
        [
            (
                str(t.number),
                t.plan.title,
                t.note,
                t.state.value.replace("_", " "),
                "" if t.drop is None else f"{t.drop:+.4f}",
                "" if t.expected_drop is None else f"{t.expected_drop:+.4f}",
                t.error if t.latency is None else _ms(t.latency),
            )
            for t in trials
        ],
    )


def _html_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _scatter(trials: Sequence[Trial], result: TargetResult) -> str:
    """Drop against latency of the trials that have both; the chosen plan has a ring."""
    seen = [(t, t.latency.latency_p50_ms, t.drop) for t in trials if t.latency is not None and t.drop is not None]
    if not seen:
        return ""
    right = 1.05 * max(ms for _, ms, _ in seen)
    low, high = min(0.0, *(d for *_, d in seen)), max(0.0, *(d for *_, d in seen))
    span = (high - low) or 1e-6

    def place(ms: float, drop: float) -> tuple[float, float]:
        x = _MARGIN + ms / right * (_WIDTH - 2 * _MARGIN)
        return x, _HEIGHT - _MARGIN - (drop - low) / span * (_HEIGHT - 2 * _MARGIN)

    dots = []
    for trial, ms, drop in seen:
        x, y = place(ms, drop)
        ring = " stroke='#222' stroke-width='2'" if trial.plan == result.plan else ""
        label = html.escape(f"#{trial.number} {trial.plan.title}: {ms:.3g} ms, drop {drop:+.4f}")
        dots.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{_COLOURS[trial.state]}'{ring}>"
            f"<title>{label}</title></circle>"
        )
    _, zero = place(0, 0)
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='drop against latency'>"
        f"<line x1='{_MARGIN}' y1='{zero:.1f}' x2='{_WIDTH - _MARGIN}' y2='{zero:.1f}' stroke='#ccc'/>"
        f"<text class='axis' x='{_WIDTH / 2}' y='{_HEIGHT - 8}'>latency, 0 to {right:.3g} ms</text>"
        f"<text class='axis' x='4' y='16'>drop on the search part, {low:+.4f} to {high:+.4f}</text>"
        + "".join(dots)
        + "</svg>"
    )
