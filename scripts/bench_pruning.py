"""What joint pruning and INT8 brings over plain `nncf.quantize`, model by model, side by side in one run.

    python scripts/bench_pruning.py                                        # all cases at their budgets
    python scripts/bench_pruning.py --case cifar_resnet20 --max-drop 0.01 --max-drop 0.02 --batch 1 --batch 8

Every case is compiled for this machine's CPU with an empty cache in a process of its own, so that minutes and peak
memory are those of the whole search. Calibration sees at most 1000 images, the search others, and all contestants
are judged on images that neither saw. The float model (f32), plain `nncf.quantize` and the result are then measured
in interleaved rounds at the batch size that they were compiled for. One JSON line per case, budget and batch size
goes to the output, a table to the terminal; what the output already holds is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Nothing heavy up here: on Linux a child's high-water mark begins with its parent's size.

BUDGETS = {
    "cifar_resnet20": (0.01, 0.02),
    "cifar_resnet32": (0.01, 0.02),
    "mobilenetv2": (0.01,),
    "squeezenet": (0.01,),
    "digits_wide": (0.01,),
}
"""Case -> absolute drops of top-1 that are asked for where none is given."""
FLOAT, PLAIN, RESULT = "float", "nncf.quantize", "vinoopt"
MEASURED_SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the output."""

    case: str
    max_drop: float
    batch: int
    effort: str
    tune: bool


# --------------------------------------------------------------------------- in the child


def perform(run: Run, *, seconds: float, keep: Path) -> dict[str, Any]:
    """The case compiled, judged and measured."""
    from _cases import cases, compiled, data_of

    case = cases()[run.case]
    source, data = case.source(run.batch), data_of(case, run.batch)
    bundle = compiled(
        case,
        data,
        run.batch,
        max_drop=run.max_drop,
        effort=run.effort,
        tune=run.tune,
        output=keep / f"{run.case}-{run.max_drop:g}-{run.batch}",
        force=True,
        on_event=lambda event: print(f"{event.stage:8s}{event.message}", file=sys.stderr, flush=True),
    )
    return {**asdict(run), **outcome(bundle), **side_by_side(bundle, case, source, data, seconds=seconds)}


def outcome(bundle: Any) -> dict[str, Any]:
    """What the search chose and what it cost."""
    manifest, result = bundle.manifest, bundle.result("CPU")
    return {
        "plan": result.plan.title,
        "pruned_groups": len(result.plan.widths),
        "budget_met": result.budget_met,
        "drop": result.drop.model_dump(mode="json"),
        "splits": manifest.splits,
        "trials": manifest.trials,
        "search_minutes": manifest.seconds / 60,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "reasons": list(result.reasons),
        "host": manifest.host.cpu,
        "versions": manifest.host.versions,
    }


def side_by_side(bundle: Any, case: Any, source: Any, data: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """Accuracy, size, latency of the float model, plain INT8 and the result, and how many times faster it is."""
    from _cases import F32, judged, ratio, whole_calls

    from vinoopt.bench import Contestant, MeasureConfig, measure
    from vinoopt.compression.quantize import quantize
    from vinoopt.records import Device, QuantizationPlan

    batch = bundle.manifest.inputs[0].shape[0]
    test = whole_calls(data["test"], data["test_labels"], source, batch)
    calibration = whole_calls(data.get("calibration", data["search"]), None, source, batch)
    started = time.monotonic()
    plain = quantize(source.model, QuantizationPlan(), calibration, device=Device.CPU)
    plain_seconds = time.monotonic() - started
    result = bundle.result("CPU")
    contestants = [
        Contestant(name=FLOAT, model=source.model, properties=F32),
        Contestant(name=PLAIN, model=plain),
        Contestant(
            name=RESULT,
            model=bundle.path / result.target.slug / "model.xml",
            properties=result.properties.as_dict(),
        ),
    ]
    metric = case.metric_for(source)
    accuracy = {c.name: judged(c.model, c.properties, test, metric).value for c in contestants}
    samples = [test[i] for i in range(min(MEASURED_SAMPLES, len(test)))]
    measured = measure(contestants, samples, config=MeasureConfig(seconds=seconds * len(contestants)))
    return {
        "accuracy": accuracy,
        "test_samples": test.samples,
        "p50_ms": {m.name: m.latency_p50_ms for m in measured.measurements},
        "weight_bytes": {m.name: m.size_bytes for m in measured.measurements},
        "over_int8": ratio(measured.compare(PLAIN, RESULT)),
        "over_float": ratio(measured.compare(FLOAT, RESULT)),
        "int8_over_float": ratio(measured.compare(FLOAT, PLAIN)),
        "plain_int8_seconds": plain_seconds,
        "warnings": [*measured.warnings, *(w for m in measured.measurements for w in m.warnings)],
    }


def child(text: str, seconds: float, keep: Path) -> int:
    from vinoopt.errors import VinooptError

    with tempfile.TemporaryDirectory() as cache:
        os.environ["VINOOPT_CACHE_DIR"] = cache
        try:
            row = perform(Run(**json.loads(text)), seconds=seconds, keep=keep)
        except VinooptError as exc:
            print(f"{text}: {type(exc).__name__}: {exc}", file=sys.stderr)
            return exc.exit_code
    print(json.dumps(row))
    return 0


# --------------------------------------------------------------------------- in the parent


def wanted(options: argparse.Namespace) -> Iterator[Run]:
    for case in options.case or BUDGETS:
        for max_drop in options.max_drop or BUDGETS[case]:
            for batch in options.batch or [1]:
                yield Run(
                    case=case, max_drop=max_drop, batch=batch, effort=options.effort, tune=options.tune
                )


def in_child(run: Run, options: argparse.Namespace, keep: Path) -> dict[str, Any] | None:
    text = json.dumps(asdict(run))
    print(f"{text} ...", file=sys.stderr, flush=True)
    words = [sys.executable, str(Path(__file__).resolve()), "--child", text, "--seconds", str(options.seconds)]
    words += ["--keep", str(keep)]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, timeout=options.time_limit)
    except subprocess.TimeoutExpired:
        print(f"{text}: stopped after {options.time_limit:g} s", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(f"{text}: ended with {done.returncode}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    from _cases import aligned, ratio_cell

    head = ("case", "budget", "batch", "float", "INT8", "vinoopt", "drop [95%]", "ms float/INT8/vinoopt")
    lines: list[tuple[str, ...]] = [(*head, "over INT8", "over float", "kB INT8", "kB", "min", "peak MB", "plan")]
    for row in rows:
        drop, names = row["drop"], (FLOAT, PLAIN, RESULT)
        lines.append(
            (
                row["case"],
                f"{row['max_drop']:.1%}",
                str(row["batch"]),
                *(f"{row['accuracy'][name]:.4f}" for name in names),
                f"{drop['value']:+.4f} [{drop['low']:+.4f} {drop['high']:+.4f}]",
                "/".join(f"{row['p50_ms'][name]:.3g}" for name in names),
                ratio_cell(row["over_int8"]),
                ratio_cell(row["over_float"]),
                f"{row['weight_bytes'][PLAIN] / 1000:.0f}",
                f"{row['weight_bytes'][RESULT] / 1000:.0f}",
                f"{row['search_minutes']:.1f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{row['plan']} ({row['pruned_groups']} groups)",
            )
        )
    return aligned(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=tuple(BUDGETS), help="repeatable; default: all")
    parser.add_argument("--max-drop", action="append", type=float, help="repeatable; default: the case's own")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default: 1")
    parser.add_argument("--effort", default="balanced", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--tune", action="store_true", help="tune runtime properties of the result too")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measurement per contestant")
    parser.add_argument("--time-limit", type=float, default=2400.0, help="seconds that one run may take")
    parser.add_argument("--keep", type=Path, help="folder for the bundles; else they are thrown away")
    parser.add_argument("--output", type=Path, default=Path("pruning.jsonl"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.seconds, options.keep)

    text = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    known = {tuple(row[key] for key in Run.__annotations__) for row in rows}
    failed = False
    with tempfile.TemporaryDirectory() as folder, options.output.open("a", encoding="utf-8") as stream:
        for run in wanted(options):
            if tuple(asdict(run).values()) in known:
                print(f"{asdict(run)}: already there", file=sys.stderr)
                continue
            row = in_child(run, options, options.keep or Path(folder))
            failed = failed or row is None
            if row is not None:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                rows.append(row)
    if rows:
        print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
