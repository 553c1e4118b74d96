"""Whether the measurement can be trusted: the same thing twice, and the same settings as benchmark_app.

    python scripts/bench_trust.py self                          # 20 runs of a model against itself, per hint
    python scripts/bench_trust.py apart                         # 20 pairs of separate runs of a model, per hint
    python scripts/bench_trust.py benchmark_app                 # side by side with OpenVINO's own tool
    python scripts/bench_trust.py self --device GPU

`self` measures two compilations of one model side by side, run after run: at least 19 of 20 must say "no
significant difference". `apart` does the same with pairs of runs that were not side by side, as `vinoopt compare`
takes them from two records. `benchmark_app` runs OpenVINO's benchmark_app and this package's measurement in turns,
each several times, on the same IR with the same properties; the ratio is given with the spread of the turns of each.
One JSON line per run goes to the output and to the terminal, a table at the end; what the output holds is not run
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from _cases import aligned, cases

import vinoopt
from vinoopt.bench import BenchRecord, Contestant, MeasureConfig, MeasureMode, Sample, compare_runs, measure
from vinoopt.bench.conditions import require_device
from vinoopt.errors import TargetError
from vinoopt.fleet import Job, measure_job
from vinoopt.frontend.parity import random_samples
from vinoopt.hardware.detect import fingerprint
from vinoopt.records import Comparison, Measurement

MODELS = ("cifar_resnet20", "squeezenet", "mobilenetv2")
HINTS = (MeasureMode.LATENCY, MeasureMode.THROUGHPUT)
SAMPLES = 16
REQUIRED = 0.95
SLACK_MS = 0.015
"""benchmark_app writes its median with two decimals and reads its clock inside the call; ours is outside, where a
Python program sees it, and a call takes up to 10 microseconds more there."""


def loaded(name: str) -> tuple[ov.Model, list[Sample]]:
    """The case's model as it is, without preprocessing, and random inputs for it."""
    case = cases()[name]
    source = vinoopt.load_model(case.model, shape=case.shape_at(1))
    return source.model, random_samples(source, SAMPLES)


# --------------------------------------------------------------------------- the same thing twice


def against_itself(options: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    for name, mode in product(options.model or MODELS[:1], options.hint or HINTS):
        wanted = [run for run in range(options.runs) if key("self", name, mode, run, options) not in known]
        model, samples = loaded(name) if wanted else (None, [])
        for run in wanted:
            pair = [Contestant(name=each, model=model, device=options.device) for each in ("one", "other")]
            config = MeasureConfig(mode=mode, seconds=options.seconds, seed=run)
            result = measure(pair, samples, config=config)
            row = {"key": key("self", name, mode, run, options), "what": "self", "model": name, "hint": mode.value}
            yield row | outcome(result.compare("one", "other"), result.of("one"), result.warnings)


def outcome(found: Comparison, subject: Measurement, warnings: Sequence[str]) -> dict[str, Any]:
    """What a run said, and of what."""
    return {
        "speedup": found.speedup,
        "low": found.low,
        "high": found.high,
        "is_significant": found.is_significant,
        "p50_ms": subject.latency_p50_ms,
        "rounds": len(subject.rounds_ms),
        "warnings": list(warnings),
    }


def self_table(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    lines: list[tuple[str, ...]] = [("model", "hint", "p50 ms", "runs", "no difference", "ratios", "widest interval")]
    good = True
    for name, hint in dict.fromkeys((row["model"], row["hint"]) for row in rows):
        own = [row for row in rows if (row["model"], row["hint"]) == (name, hint)]
        same = sum(not row["is_significant"] for row in own)
        good = good and same >= REQUIRED * len(own)
        ratios = [row["speedup"] for row in own]
        widest = max(own, key=lambda row: row["high"] / row["low"])
        lines.append(
            (
                name,
                hint,
                f"{np.median([row['p50_ms'] for row in own]):.3g}",
                str(len(own)),
                f"{same} of {len(own)}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{widest['low']:.3f} to {widest['high']:.3f}",
            )
        )
    return aligned(lines), good


def against_another_run(options: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    host = fingerprint()
    for name, mode in product(options.model or MODELS[:1], options.hint or HINTS):
        wanted = [run for run in range(options.runs) if key("apart", name, mode, run, options) not in known]
        model, samples = loaded(name) if wanted else (None, [])
        for run in wanted:
            records = []
            for seed in (2 * run, 2 * run + 1):
                config = MeasureConfig(mode=mode, seconds=options.seconds, seed=seed)
                only = Contestant(name="it", model=model, device=options.device)
                job = Job(name="it", contestants=(only,), samples=tuple(samples), config=config)
                measured = measure_job(job)
                records.append(BenchRecord.of(measured.result, host, pace=measured.pace))
            found = compare_runs(*records)
            row = {"key": key("apart", name, mode, run, options), "what": "apart", "model": name, "hint": mode.value}
            yield row | outcome(found.comparison, records[0].subject, found.warnings)


# --------------------------------------------------------------------------- benchmark_app


def beside_benchmark_app(options: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    program = find_benchmark_app()
    for name, mode in product(options.model or MODELS, options.hint or HINTS):
        wanted = [run for run in range(options.runs) if key("benchmark_app", name, mode, run, options) not in known]
        if not wanted:
            continue
        model, samples = loaded(name)
        with tempfile.TemporaryDirectory() as folder:
            ir = Path(folder) / "model.xml"
            ov.save_model(model, ir, compress_to_fp16=False)
            for run in wanted:
                theirs = run_benchmark_app(program, ir, mode, options)
                ours = run_here(ir, samples, mode, options)
                yield {
                    "key": key("benchmark_app", name, mode, run, options),
                    "what": "benchmark_app",
                    "model": name,
                    "hint": mode.value,
                    "benchmark_app": theirs,
                    "vinoopt": ours,
                }


def find_benchmark_app() -> str:
    """The one beside the Python that runs this, which need not be on the PATH, or any other."""
    beside = sysconfig.get_path("scripts")
    program = shutil.which("benchmark_app", path=beside) or shutil.which("benchmark_app")
    if program is None:
        raise SystemExit("benchmark_app is not installed; it comes with pip install openvino")
    return program


def run_benchmark_app(program: str, ir: Path, mode: MeasureMode, options: argparse.Namespace) -> dict[str, float]:
    """Median latency in ms and inferences per second, as it reports them."""
    element = str(ov.Core().read_model(ir).inputs[0].element_type.get_type_name())
    words = [program, "-m", str(ir), "-d", options.device, "-hint", mode.value, "-ip", element]
    words += ["-t", f"{max(options.seconds, 1):.0f}"]
    words += ["-json_stats", "-report_type", "no_counters", "-report_folder", str(ir.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    report = ir.parent / "benchmark_report.json"
    if done.returncode != 0 or not report.is_file():
        raise SystemExit(f"benchmark_app failed: {done.stderr[-500:] or done.stdout[-500:]}")
    results = json.loads(report.read_text())["execution_results"]
    report.unlink()
    return {"p50_ms": float(results["latency (ms)"]), "per_s": float(results["throughput"])}


def run_here(
    ir: Path, samples: list[Sample], mode: MeasureMode, options: argparse.Namespace
) -> dict[str, float]:
    config = MeasureConfig(mode=mode, seconds=options.seconds)
    found = measure([Contestant(name="it", model=ir, device=options.device)], samples, config=config).of("it")
    return {"p50_ms": found.latency_p50_ms, "per_s": found.throughput_per_s or 1000 / found.latency_p50_ms}


def app_table(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    lines: list[tuple[str, ...]] = [
        ("model", "hint", "figure", "benchmark_app", "its spread", "vinoopt", "its spread", "ratio", "they overlap")
    ]
    good = True
    for name, hint in dict.fromkeys((row["model"], row["hint"]) for row in rows):
        own = [row for row in rows if (row["model"], row["hint"]) == (name, hint)]
        figure = "p50_ms" if hint == MeasureMode.LATENCY.value else "per_s"
        theirs, ours = ([row[side][figure] for row in own] for side in ("benchmark_app", "vinoopt"))
        slack = SLACK_MS if figure == "p50_ms" else 0.0
        is_within = max(min(theirs) - slack, min(ours)) <= min(max(theirs) + slack, max(ours))
        good = good and is_within
        lines.append(
            (
                name,
                hint,
                {"p50_ms": "median ms", "per_s": "per second"}[figure],
                f"{np.median(theirs):.4g}",
                f"{min(theirs):.4g} to {max(theirs):.4g}",
                f"{np.median(ours):.4g}",
                f"{min(ours):.4g} to {max(ours):.4g}",
                f"{np.median(ours) / np.median(theirs):.3f}",
                "yes" if is_within else "no",
            )
        )
    return aligned(lines), good


# --------------------------------------------------------------------------- both


def key(what: str, model: str, mode: MeasureMode, run: int, options: argparse.Namespace) -> str:
    return f"{what}/{options.device}/{model}/{mode.value}/{run}"


WAYS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], Callable[..., tuple[str, bool]], int, float]] = {
    "self": (against_itself, self_table, 20, 4.0),
    "apart": (against_another_run, self_table, 20, 4.0),
    "benchmark_app": (beside_benchmark_app, app_table, 3, 5.0),
}
"""What is run, how it is shown, how often, and for how many seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(WAYS))
    parser.add_argument("--model", action="append", choices=tuple(cases()), help="repeatable")
    parser.add_argument("--hint", action="append", type=MeasureMode, choices=HINTS, help="repeatable; default: both")
    parser.add_argument("--device", default="CPU", help="as OpenVINO lists it; default: CPU")
    parser.add_argument("--runs", type=int, help="default: 20, 3 for benchmark_app")
    parser.add_argument("--seconds", type=float, help="of each measurement; default: 4, 5 for benchmark_app")
    parser.add_argument("--output", type=Path, default=Path("trust.jsonl"))
    options = parser.parse_args()
    try:
        require_device(options.device)
    except TargetError as exc:
        parser.error(str(exc))
    way, table, runs, seconds = WAYS[options.what]
    options.runs, options.seconds = options.runs or runs, options.seconds or seconds

    text = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    host = fingerprint()
    with options.output.open("a", encoding="utf-8") as stream:
        for row in way(options, {each["key"] for each in rows}):
            rows.append(
                {**row, "device": options.device, "host": host.cpu, "openvino": host.versions["openvino"]}
            )
            line = json.dumps(rows[-1])
            stream.write(line + "\n")
            stream.flush()
            print(line, flush=True)
    mine = [row for row in rows if row["what"] == options.what and row.get("device") == options.device]
    shown, good = table(mine)
    print(shown)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
