"""What label-free distillation brings: faster models inside a budget, and INT8 that calibration damaged, healed.

    python scripts/bench_distill.py search --case cifar_resnet20 --case cifar_resnet32 --minutes 28
    python scripts/bench_distill.py search --case cifar_resnet32 --target cascade-lake:CPU
    python scripts/bench_distill.py recover --case magika --case yolox_nano --case mobilenetv2
    python scripts/bench_distill.py curve --case cifar_resnet20 --images 300 --images 1000 --images 3000

`search` compiles with effort `distill` and measures the float model, plain `nncf.quantize` and the result in
interleaved rounds; for a CPU that is not here, under its instruction set, what the bundle says of both is told.
`recover` trains the output of `nncf.quantize`, no block in float, by NNCF's own recipe or another
(`--preset`, `--ranges`); with `--both` a second time, from the test part and judged on the search part, so that every
sample is judged by a model that has not seen it; with `--more` further images are learned from. `curve` keeps half of
the channels (`--kept`) inside every residual branch, quantizes, and trains, all with so many images. Nothing sees a
label before judgement, and judgement is on samples that nothing else saw; drops of `recover` and `curve` have their
95% intervals. One JSON line per run goes to the output and is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from _cases import (
    F32,
    SHARED,
    Case,
    cases,
    compiled,
    data_of,
    further_photographs,
    judged,
    ratio,
    reference_for,
    whole_calls,
)
from bench_pruning import outcome, side_by_side

import vinoopt
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Scores, paired_drop
from vinoopt.accuracy.metrics import Metric, find_metric
from vinoopt.bench import Contestant, MeasureConfig, measure
from vinoopt.compression.quantize import quantize
from vinoopt.compression.widths import prepare
from vinoopt.frontend.normalize import SourceModel
from vinoopt.records import AccuracyBudget, Device, Event, Preset, QuantizationPlan

HOST = "host:CPU"
"""The target that is here, whose result is measured beside the others anew."""


def lessons(
    case: Case, source: SourceModel, *, images: int | None = None, both: bool = False
) -> list[tuple[Dataset, Dataset]]:
    """Inputs to calibrate and learn from, and the test part with its labels; with `both` also the other way round."""
    parts = case.load(source)
    learn = parts.search if parts.calibration is None else parts.calibration
    if case.model.name.startswith("cifar"):
        learn = _unlabelled()
    halves = [(learn[:images], parts.test, parts.test_labels)]
    if both:
        halves.append((parts.test, parts.search, parts.search_labels))
    return [
        (whole_calls(own, None, source, 1), whole_calls(test, labels, source, 1)) for own, test, labels in halves
    ]


def recover(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """INT8 throughout before and after distillation, beside the float model; by the recipe that is asked for."""
    case = cases()[name]
    source = case.source(1)
    preset = None if options.preset is None else Preset(options.preset)
    recipe = QuantizationPlan(preset=preset, activation_range=options.ranges)
    plain: list[tuple[ov.Model, Dataset]] = []

    def student(learn: Dataset, test: Dataset) -> ov.Model:
        if recipe != QuantizationPlan():
            plain.append((quantize(source.model, QuantizationPlan(), learn, device=Device.CPU), test))
        return quantize(source.model, recipe, learn, device=Device.CPU)

    more = further_photographs(case, source, options.more) if options.more else None
    row = _trained(case, source, student, lessons(case, source, both=options.both), options, more=more)
    if plain:
        row["plain"] = round(_standing(case, source, plain).value, 4)
    return {"preset": options.preset, "ranges": options.ranges, "more": options.more, **row}


def curve(name: str, images: int, options: argparse.Namespace) -> dict[str, Any]:
    """A pruned INT8 model that knows so many images, before and after distillation on them."""
    case = cases()[name]
    source = case.source(1)
    ((learn, test),) = lessons(case, source, images=images)
    kit = prepare(source.model, learn, ignored=(), seed=0, say=lambda text: None)
    if kit is None:
        raise SystemExit(f"{name} has no channels to remove")
    inner = [group for group in kit.coupling.groups if group.can_vanish]
    widths = kit.widths({group.name: int(group.units * options.kept) for group in inner})
    student = kit.corrected(
        widths, quantize(kit.thoroughly(widths), QuantizationPlan(), learn, device=Device.CPU)
    )
    plain = quantize(source.model, QuantizationPlan(), learn, device=Device.CPU)
    speeds = {f"over_int8 at batch {n}": _speed(plain, student, test, n, options.seconds) for n in (1, 8)}
    top1 = _standing(case, source, [(plain, test)]).value
    row = _trained(case, source, lambda learn, test: student, [(learn, test)], options)
    return {"images": images, "kept": options.kept, "plain": round(top1, 4), **speeds, **row}


def _speed(plain: ov.Model, student: ov.Model, test: Dataset, batch: int, seconds: float) -> list[float | bool]:
    """How many times faster the student is, in interleaved rounds, where the model's batch can be chosen."""
    contestants = []
    for title, model in (("nncf.quantize", plain), ("student", student)):
        sized = model.clone()
        shape = sized.inputs[0].get_partial_shape()
        shape[0] = batch
        sized.reshape(shape)
        contestants.append(Contestant(name=title, model=sized))
    (name,) = test[0]
    calls = [{name: np.concatenate([test[n * batch + i][name] for i in range(batch)])} for n in range(8)]
    measured = measure(contestants, calls, config=MeasureConfig(seconds=2 * seconds))
    return ratio(measured.compare("nncf.quantize", "student"))


def _trained(
    case: Case,
    source: SourceModel,
    student: Callable[[Dataset, Dataset], ov.Model],
    halves: Sequence[tuple[Dataset, Dataset]],
    options: argparse.Namespace,
    *,
    more: np.ndarray | None = None,
) -> dict[str, Any]:
    """The student of each half's inputs before and after distillation on them, judged on all test parts together.

    `more` are inputs that are learned from beside each half, and that calibration has not seen.
    """
    results, seconds = [], 0.0
    models: dict[str, list[tuple[ov.Model, Dataset]]] = {"before": [], "after": []}
    for learn, test in halves:
        given = student(learn, test)
        started = time.monotonic()
        result = vinoopt.distill(
            given,
            teacher=source.model,
            data=learn if more is None else _with(learn, more, source),
            steps=options.steps,
            batch=options.batch,
            peak_rate=options.rate,
            inner_weight=options.inner,
            threads=options.threads,
            time_limit_s=60.0 * options.minutes,
            on_event=_say,
        )
        seconds += time.monotonic() - started
        results.append(result)
        models["before"].append((given, test))
        models["after"].append((result.model, test))
    metric = case.metric_for(source)
    whole = _standing(case, source, [(source.model, test) for _, test in halves], F32)
    scores = {"float": whole, **{title: _standing(case, source, each) for title, each in models.items()}}
    like = find_metric("auto", outputs=source.outputs, has_labels=False)
    likeness = {title: _standing(case, source, each, by=like).value for title, each in models.items()}
    limits = AccuracyBudget(metric=metric.name, max_drop=options.max_drop)
    drops = {t: paired_drop(metric, whole, scores[t], budget=limits, seed=0) for t in ("before", "after")}
    return {
        "metric": metric.name,
        "learned_from": [len(learn) + (0 if more is None else len(more)) for learn, _ in halves],
        "judged_on": len(whole.statistics),
        **{title: round(each.value, 4) for title, each in scores.items()},
        "drops": {title: [round(x, 4) for x in (drop.value, drop.low, drop.high)] for title, drop in drops.items()},
        f"{like.name} with float": {title: round(value, 4) for title, value in likeness.items()},
        "divergence": [[result.before, result.after] for result in results],
        "is_better": [result.is_better for result in results],
        "steps": [result.outcome.steps for result in results],
        "seconds": round(seconds),
        "reason": [result.reason for result in results],
    }


def _with(learn: Dataset, more: np.ndarray, source: SourceModel) -> Dataset:
    """Calls of one sample each, and more of them."""
    (name,) = learn[0]
    return whole_calls(np.concatenate([*(call[name] for call in learn), more]), None, source, 1)


def _standing(
    case: Case,
    source: SourceModel,
    models: Sequence[tuple[ov.Model, Dataset]],
    properties: Mapping[str, str] | None = None,
    *,
    by: Metric | None = None,
) -> Scores:
    """The case's metric, or another, over several parts, each as its own model answers it."""
    metric = by or case.metric_for(source)
    parts = [
        judged(model, properties or {}, test, metric, reference_for(metric, source, test)) for model, test in models
    ]
    if len(parts) == 1:
        return parts[0]
    statistics = [each for part in parts for each in part.statistics]
    accuracy = parts[0].accuracy.model_copy(
        update={"value": float(metric.value(statistics)), "samples": len(statistics)}
    )
    return Scores(statistics=statistics, accuracy=accuracy)


def search(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The whole search with distillation, and its result beside float and plain `nncf.quantize`."""
    case = cases()[name]
    source, data = case.source(batch), data_of(case, batch)
    if case.model.name.startswith("cifar"):
        images = _unlabelled()
        data["calibration"] = images[: len(images) // batch * batch]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VINOOPT_CACHE_DIR"] = str(Path(folder) / "cache")  # nothing that an earlier run has learnt
        bundle = compiled(
            case,
            data,
            batch,
            max_drop=options.max_drop,
            output=Path(folder) / "out",
            effort=options.effort,
            time_limit_s=60.0 * options.minutes,
            targets=(options.target,),
            tune=False,
            on_event=_say,
        )
        row = {"batch": batch, "max_drop": options.max_drop, "target": options.target, **outcome(bundle)}
        if options.target == HOST:
            return {**row, **side_by_side(bundle, case, source, data, seconds=options.seconds)}
        (result,) = bundle.manifest.targets
        return {**row, "over": {each.reference: ratio(each) for each in result.comparisons}}


def _unlabelled() -> np.ndarray:
    with np.load(SHARED / "data" / "cifar10_dev.npz") as data:
        return data["calib_images"]


def _say(event: Event) -> None:
    print(f"{time.strftime('%H:%M:%S')} {event.stage:7} {event.message}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["search", "recover", "curve"])
    parser.add_argument("--case", action="append", required=True, choices=sorted(cases()))
    parser.add_argument("--images", action="append", type=int, help="of `curve`, repeatable")
    parser.add_argument("--kept", type=float, default=0.5, help="share of inner channels that stay in `curve`")
    parser.add_argument("--batch-size", action="append", type=int, help="of `search`, repeatable")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--effort", default="distill")
    parser.add_argument("--target", default=HOST, help="of `search`: this CPU, or one of another profile")
    parser.add_argument("--minutes", type=float, default=28.0, help="time limit of each run; `--both` has two")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measurement per contestant of `search`")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, help="samples per step; by default what suits the inputs")
    parser.add_argument("--rate", type=float, help="peak rate; by default what suits the model")
    parser.add_argument("--preset", choices=("performance", "mixed"), help="of the INT8 model of `recover`")
    parser.add_argument("--ranges", choices=("minmax", "histogram"), help="of its activations")
    parser.add_argument("--both", action="store_true", help="of `recover`: learn from each half, judge on the other")
    parser.add_argument(
        "--more", type=int, default=0, help="of `recover` with COCO's images: so many of ImageNet's beside them"
    )
    parser.add_argument("--inner", type=float, default=1.0)
    parser.add_argument("--threads", type=int, help="of PyTorch; fewer where the machine is shared")
    parser.add_argument("--output", type=Path, default=Path("distill.jsonl"))
    options = parser.parse_args()
    of_recover = {name: getattr(options, name) for name in ("both", "more", "preset", "ranges")}
    if any(of_recover.values()) and options.kind != "recover":
        parser.error(f"{', '.join(f'--{name}' for name, value in of_recover.items() if value)}: of `recover` alone")
    return options


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of a case, each as soon as it is there."""
    if options.kind == "recover":
        yield recover(name, options)
    elif options.kind == "curve":
        for images in options.images or (300, 1000, 3000):
            yield curve(name, images, options)
    else:
        for batch in options.batch_size or (1,):
            yield search(name, batch, options)


def main() -> None:
    options = parsed()
    for name in options.case:
        for row in rows_of(name, options):
            line = json.dumps({"kind": options.kind, "case": name, **row})
            print(line, flush=True)
            with options.output.open("a") as output:
                output.write(line + "\n")


if __name__ == "__main__":
    main()
