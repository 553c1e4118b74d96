"""What tuned runtime properties bring over OpenVINO's `latency` and `throughput` hints, model by model.

    python scripts/bench_tuning.py                                       # all models whose files are here
    python scripts/bench_tuning.py --model squeezenet --goal throughput --device GPU

Every model is tuned on real inputs for least latency, for throughput, and for throughput under a latency limit (the
sweet spot: a multiple of the latency hint's median). The tuned setting then meets both hints in fresh interleaved
rounds that chose nothing. One JSON line per model and goal goes to the output and to the terminal, a table at the
end, and the exit code is 1 where a tuned setting loses to its hint, or breaks its latency limit, beyond noise; what
the output already holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from _cases import Case, aligned, cases, ratio, ratio_cell, say

from vinoopt.bench import Contestant, MeasureConfig, MeasureMode, Sample, measure
from vinoopt.bench.conditions import require_device
from vinoopt.errors import TargetError, VinooptError
from vinoopt.frontend.normalize import SourceModel
from vinoopt.hardware.detect import detect_host, fingerprint
from vinoopt.tuning import Goal, TuneConfig, TuneTask, tune

MODELS = ("cifar_resnet20", "squeezenet", "mobilenetv2", "magika", "mnist", "digits")
GOALS = ("latency", "throughput", "sweet spot")
SAMPLES = 32
LIMIT = 1.5
"""The sweet spot's 90th percentile of latency, as a multiple of the latency hint's median."""
TUNED, LATENCY, THROUGHPUT = "tuned", "latency hint", "throughput hint"
HINTS = {LATENCY: "LATENCY", THROUGHPUT: "THROUGHPUT"}


def inputs_of(case: Case, source: SourceModel) -> list[Sample]:
    """The first images that the case is judged by."""
    name = source.inputs[0].name
    return [{name: each[None]} for each in case.load(source).test[:SAMPLES]]


def compare_hints(
    source: SourceModel, samples: list[Sample], goal: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Tuning for the goal, then the tuned setting against both hints."""
    contestants = [
        Contestant(
            name=name, model=source.model, device=options.device, properties={"PERFORMANCE_HINT": hint}
        )
        for name, hint in HINTS.items()
    ]
    limit = None
    if goal == "sweet spot":
        alone = measure(contestants[:1], samples, config=MeasureConfig(seconds=2.0))
        limit = LIMIT * alone.of(LATENCY).latency_p50_ms
    kind = Goal.LATENCY if goal == "latency" else Goal.THROUGHPUT
    started = time.monotonic()
    result = tune(
        TuneTask(
            model=source.model,
            samples=samples,
            device=options.device,
            spec=detect_host().devices.get(require_device(options.device)),
        ),
        config=TuneConfig(goal=kind, latency_limit_ms=limit, seconds=options.tune_seconds),
    )
    seconds = time.monotonic() - started
    properties = result.properties.as_dict()
    contestants.append(
        Contestant(name=TUNED, model=source.model, device=options.device, properties=properties)
    )
    config = MeasureConfig(mode=MeasureMode(kind.value), seconds=options.seconds * len(contestants))
    measured = measure(contestants, samples, config=config)
    return {
        "properties": properties,
        "is_default": result.is_default,
        "tried": len(result.trials),
        "tune_seconds": seconds,
        "limit_ms": limit,
        "p50_ms": {m.name: m.latency_p50_ms for m in measured.measurements},
        "p90_ms": {m.name: m.latency_p90_ms for m in measured.measurements},
        "p90_range_ms": {
            m.name: r and [r.low, r.high] for m in measured.measurements for r in [m.latency_p90_range_ms]
        },
        "per_s": {m.name: m.throughput_per_s for m in measured.measurements},
        "over": {name: ratio(measured.compare(name, TUNED)) for name in HINTS},
        "warnings": [*result.warnings, *measured.warnings],
    }


def loses(row: dict[str, Any]) -> bool:
    """Whether a tuned setting is slower beyond noise than the hint it was tuned from.

    A latency limit excuses that, and a default that stayed is the hint itself.
    """
    hint = LATENCY if row["goal"] == "latency" else THROUGHPUT
    is_rival = row["limit_ms"] is None and not row["is_default"]
    return bool(is_rival and row["over"][hint][2] < 1 and row["over"][hint][3])


def breaks_limit(row: dict[str, Any]) -> bool:
    """Whether the sweet spot's latency is beyond the limit in the fresh run, its whole interval.

    Where no setting keeps the limit, the default stays, and tuning has said so.
    """
    ends = row.get("p90_range_ms", {}).get(TUNED)
    return bool(row["limit_ms"] is not None and ends and not row["is_default"] and ends[0] > row["limit_ms"])


def table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [
        ("model", "goal", "p50/p90 ms", "limit", "per s", f"over {LATENCY}", f"over {THROUGHPUT}", "s", "setting")
    ]
    for row in rows:
        rate, limit = row["per_s"][TUNED], row["limit_ms"]
        own = {key: value for key, value in row["properties"].items() if key != "PERFORMANCE_HINT"}
        lines.append(
            (
                row["model"],
                row["goal"],
                f"{row['p50_ms'][TUNED]:.3g}/{row['p90_ms'][TUNED]:.3g}",
                "-" if limit is None else f"{limit:.3g}{' broken' if breaks_limit(row) else ''}",
                "-" if rate is None else f"{rate:.4g}",
                *(ratio_cell(row["over"][name]) for name in HINTS),
                f"{row['tune_seconds']:.0f}",
                " ".join(f"{key}={value}" for key, value in own.items()) if not row["is_default"] else "default",
            )
        )
    return aligned(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(cases()), help="repeatable")
    parser.add_argument("--goal", action="append", choices=GOALS, help="repeatable; default: all three")
    parser.add_argument("--device", default="CPU", help="as OpenVINO lists it; default: CPU")
    parser.add_argument("--tune-seconds", type=float, default=60.0, help="of one tuning, final and duel included")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the final measurement, per contestant")
    parser.add_argument("--output", type=Path, default=Path("tuning.jsonl"))
    options = parser.parse_args()
    try:
        require_device(options.device)
    except TargetError as exc:
        parser.error(str(exc))

    text = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    rows = [row for row in map(json.loads, text.splitlines()) if row.get("device", "CPU") == options.device]
    known = {(row["model"], row["goal"]) for row in rows}
    host, failed = fingerprint(), False
    with options.output.open("a", encoding="utf-8") as stream:
        for name, goal in product(options.model or MODELS, options.goal or GOALS):
            case = cases()[name]
            if (name, goal) in known or not case.model.is_file():
                say(f"{name}, {goal}: {'already there' if (name, goal) in known else 'no model here'}")
                continue
            say(f"{name}, {goal} ...")
            try:
                source = case.source(1)
                found = compare_hints(source, inputs_of(case, source), goal, options)
            except VinooptError as exc:
                say(f"{name}, {goal}: {type(exc).__name__}: {exc}")
                failed = True
                continue
            about = {"host": host.cpu, "openvino": host.versions["openvino"]}
            rows.append({"model": name, "goal": goal, "device": options.device, **found, **about})
            line = json.dumps(rows[-1])
            stream.write(line + "\n")
            stream.flush()
            print(line, flush=True)
    if rows:
        print(table(rows))
    return int(failed or any(loses(row) or breaks_limit(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
