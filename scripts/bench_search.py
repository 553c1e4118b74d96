"""What the search does with other budgets, with less time, and for CPUs on which INT8 gains little.

    python scripts/bench_search.py budgets --case cifar_resnet20 --max-drop 0.02 --max-drop 0.01 --max-drop 0.001
    python scripts/bench_search.py budgets --all --effort fast --time-limit 240
    python scripts/bench_search.py stop --case cifar_resnet20 --share 0.3
    python scripts/bench_search.py cap --case cifar_resnet20 --target skylake:CPU

`budgets` compiles once for every budget, with shared tables, and measures float (in every precision that the CPU
has), plain `nncf.quantize` and all results side by side; with `--all`, for every model that is here, which shows
whether a result is ever slower than the best of those. `stop` compiles without a time limit, then, from an empty
cache, with a share of the time that this took. `cap` compiles for a CPU that is not here, under its instruction set:
times are this machine's, and only ratios count. Accuracy is judged on samples that no search saw. One JSON line per
result goes to the output, a table to the terminal. Development models are looked for in VINOOPT_SHARED, else in
../shared beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openvino as ov
from _cases import (
    F32,
    Case,
    aligned,
    cases,
    compiled,
    data_of,
    judged,
    ratio,
    ratio_cell,
    reference_for,
    say,
    whole_calls,
)
from bench_pruning import FLOAT, MEASURED_SAMPLES, PLAIN, outcome

import vinoopt
from vinoopt.bench import Contestant, MeasureConfig, measure
from vinoopt.compression.quantize import quantize
from vinoopt.records import Device, QuantizationPlan

HALF = "float bf16"


def run(
    case: Case,
    data: dict[str, Any],
    folder: Path,
    options: argparse.Namespace,
    *,
    max_drop: float,
    time_limit_s: float | None = None,
) -> vinoopt.Bundle:
    """One compilation for one target."""
    return compiled(
        case,
        data,
        1,
        max_drop=max_drop,
        time_limit_s=time_limit_s,
        targets=(options.target,),
        tune=False,
        effort=options.effort,
        output=folder,
        force=True,
        on_event=lambda event: say(f"{event.stage:8}{event.message}"),
    )


def told(bundle: vinoopt.Bundle) -> dict[str, Any]:
    """What came out."""
    (result,) = bundle.manifest.targets
    return {
        **outcome(bundle),
        "float_blocks": len(result.float_blocks),
        "seconds": round(bundle.manifest.seconds, 1),
        "over": {comparison.reference: ratio(comparison) for comparison in result.comparisons},
    }


def budgets(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Float, plain INT8 and the result of every budget, side by side."""
    case = cases()[name]
    source, data = case.source(1), data_of(case, 1)
    bundles = {
        f"{100 * drop:g}%": run(
            case, data, folder / f"{drop:g}", options, max_drop=drop, time_limit_s=options.time_limit
        )
        for drop in options.max_drop
    }
    calibration = whole_calls(data.get("calibration", data["search"]), None, source, 1)
    plain = source.model
    if not source.quantized:
        plain = quantize(source.model, QuantizationPlan(), calibration, device=Device.CPU)
    baselines = [
        Contestant(name=FLOAT, model=source.model, properties=F32),
        Contestant(name=PLAIN, model=plain),
    ]
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        baselines.append(Contestant(name=HALF, model=source.model, properties={"INFERENCE_PRECISION_HINT": "bf16"}))
    results = [
        Contestant(
            name=title,
            model=bundle.path / bundle.manifest.targets[0].target.slug / "model.xml",
            properties=bundle.manifest.targets[0].properties.as_dict(),
        )
        for title, bundle in bundles.items()
    ]
    contestants = [*baselines, *results]
    test, metric = whole_calls(data["test"], data.get("test_labels"), source, 1), case.metric_for(source)
    reference = reference_for(metric, source, test)
    samples = [test[i] for i in range(min(MEASURED_SAMPLES, len(test)))]
    measured = measure(contestants, samples, config=MeasureConfig(seconds=options.seconds * len(contestants)))
    best = min((each.name for each in baselines), key=lambda title: measured.of(title).latency_p50_ms)
    for each in contestants:
        over = {
            word: None if each.name == base else ratio(measured.compare(base, each.name))
            for word, base in (("over_int8", PLAIN), ("over_best", best))
        }
        row = {
            "case": name,
            "what": each.name,
            "accuracy": judged(each.model, each.properties, test, metric, reference).value,
            "p50_ms": measured.of(each.name).latency_p50_ms,
            **over,
        }
        yield {**row, **(told(bundles[each.name]) if each.name in bundles else {})}


def stop(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A run to its end, and one that has only a share of that time."""
    case = cases()[name]
    data = data_of(case, 1)
    limit_s: float | None = None
    for title, share in (("to the end", None), (f"{options.share:.0%} of the time", options.share)):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["VINOOPT_CACHE_DIR"] = cache
            bundle = run(
                case, data, folder / "stop", options, max_drop=options.max_drop[0], time_limit_s=limit_s
            )
        if share is None:
            limit_s = options.share * bundle.manifest.seconds
        yield {"case": name, "what": title, "limit_s": limit_s if share else None, **told(bundle)}


def cap(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The result for a CPU that is not here."""
    case = cases()[name]
    limit_s = options.time_limit
    bundle = run(case, data_of(case, 1), folder / "cap", options, max_drop=options.max_drop[0], time_limit_s=limit_s)
    yield {"case": name, "what": options.target, **told(bundle)}


WAYS = {"budgets": budgets, "stop": stop, "cap": cap}


def table(rows: list[dict[str, Any]]) -> str:
    """One line per result."""
    lines = [("case", "what", "plan", "accuracy", "drop [95%]", "inside", "times faster", "trials", "s")]
    for row in rows:
        drop = row.get("drop")
        over = {"int8": row["over_int8"], "best": row["over_best"]} if "over_best" in row else row["over"]
        faster = ", ".join(f"{base}: {ratio_cell(cell)}" for base, cell in over.items())
        lines.append(
            (
                row["case"],
                row["what"],
                row.get("plan", "-"),
                f"{row['accuracy']:.4f}" if "accuracy" in row else "-",
                f"{drop['value']:+.4f} [{drop['low']:+.4f} {drop['high']:+.4f}]" if drop else "-",
                {True: "yes", False: "NO"}.get(row.get("budget_met"), "-"),
                faster,
                str(row.get("trials", "-")),
                str(row.get("seconds", "-")),
            )
        )
    return aligned(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=tuple(WAYS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", choices=sorted(cases()), help="repeatable; default: digits")
    which.add_argument("--all", action="store_true", help="all models that are here")
    parser.add_argument("--time-limit", type=float, help="seconds of every run of `budgets` and `cap`")
    parser.add_argument("--max-drop", action="append", type=float, help="repeatable for `budgets`; default: 0.01")
    parser.add_argument("--share", type=float, default=0.3, help="of the time, for `stop`")
    parser.add_argument("--target", default="host:CPU", help="PROFILE:DEVICE, for `cap`")
    parser.add_argument("--effort", default="balanced", choices=("fast", "balanced", "thorough"))
    parser.add_argument("--seconds", type=float, default=4.0, help="of measurement per contestant of `budgets`")
    parser.add_argument("--output", type=Path, default=Path("search.jsonl"))
    options = parser.parse_args()
    options.max_drop = options.max_drop or [0.01]
    if options.time_limit is not None and options.way == "stop":
        parser.error("`stop` limits its second run itself, by --share of the first")
    if len(options.max_drop) > 1 and options.way != "budgets":
        parser.error(f"one --max-drop is what `{options.way}` can use; `budgets` takes several")
    if options.target != "host:CPU" and options.way != "cap":
        parser.error(f"--target is for `cap`; `{options.way}` measures on this machine's CPU")
    here = [name for name, case in cases().items() if case.model.is_file()]
    rows = []
    with tempfile.TemporaryDirectory() as folder, options.output.open("a", encoding="utf-8") as stream:
        os.environ["VINOOPT_CACHE_DIR"] = str(Path(folder) / "cache")
        for name in here if options.all else options.case or ["digits"]:
            for row in WAYS[options.way](name, options, Path(folder)):
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                rows.append(row)
    print(table(rows))
    return int(any(row.get("budget_met") is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
