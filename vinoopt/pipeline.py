"""The whole job, from an ONNX file to a bundle, as one straight function."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from pydantic import ValidationError

from vinoopt import bundle as bundles
from vinoopt.accuracy.datasets import Dataset, Splits, from_arrays, load_dataset, split
from vinoopt.accuracy.evaluate import Predictions, check_fit, predict, score
from vinoopt.accuracy.metrics import SQNR_CEILING_DB, Metric, find_metric, never_decides
from vinoopt.alarm import make_interrupts_safe
from vinoopt.bench.memory import peak_bytes
from vinoopt.bundle import Bundle
from vinoopt.compiler import yardstick_for
from vinoopt.compression.build import Workshop
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge, Shared, first_line
from vinoopt.compression.options import DISTILL, EFFORTS, without_training
from vinoopt.compression.quantize import import_nncf
from vinoopt.compression.scope import resolve_ignored
from vinoopt.compression.search import SearchOptions, search
from vinoopt.compression.widths import refit_calls
from vinoopt.compression.workload import refit_workload
from vinoopt.distillation.needs import require_torch
from vinoopt.distillation.stage import STAGE_S, StageOptions, distill_beyond
from vinoopt.errors import DataError, DeviceError, DistillationError, InputError, MetricError, ToolchainError
from vinoopt.fleet import Line, connected
from vinoopt.forecast import Forecast
from vinoopt.frontend.normalize import SourceModel, load_model, require_static
from vinoopt.frontend.parity import check_parity
from vinoopt.hardware.detect import fingerprint, free_bytes
from vinoopt.hardware.isa import saturates_int8
from vinoopt.hardware.profile import HOST, resolve
from vinoopt.lab import needs_of
from vinoopt.records import (
    AccuracyBudget,
    Build,
    CompileRequest,
    CompressionPlan,
    Device,
    DeviceSpec,
    Drop,
    DropType,
    Event,
    Manifest,
    PreprocessSpec,
    Preset,
    QuantizationPlan,
    RuntimeProperties,
    Target,
    TargetResult,
    Trial,
)
from vinoopt.schedule import TUNING_S, Deadlines, Facts, announce, divide, final_seconds
from vinoopt.selection import Choice, TestPart, choose, trial_line
from vinoopt.store import Store, digest
from vinoopt.tuning import TuneConfig, TuneTask, Variant, first_departure
from vinoopt.yardsticks import HostYardstick, TargetYardstick

Listener = Callable[[Event], None]
Array = np.ndarray[Any, Any]

GOLDEN_SAMPLES = 4
PARITY_SAMPLES = 4
MEASURED_SAMPLES = 16
_HURRY_S = 1.0
"""Behind the end of its time, a search had none beyond its baselines."""
_LEAST_TUNING_S = 4.0
"""Below this, tuning is left out."""
_CONTRACTIONS = frozenset(
    {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul", "LSTMSequence", "GRUSequence"}
)
_LEARNT = 5000
"""Samples that training learns from at most, of data that are not given for calibration."""
SEARCH_SHARE = 0.35
"""Of a time limit, what the training-free search has where candidates are distilled after it."""
HELD_BYTES = 512 << 20
"""Of each part of the data that may be held in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What every target of a run shares."""

    request: CompileRequest
    source: SourceModel
    splits: Splits
    metric: Metric
    search_reference: Predictions
    test_reference: Predictions
    store: Store
    shared: Shared
    messages: tuple[str, ...]
    """What the user should know about model and data."""
    say: Listener
    forecast: Forecast
    facts: Facts


def compile(
    model: str | Path,
    *,
    targets: Sequence[str | Target] = ("host:CPU",),
    data: str | Path | Mapping[str, Array] | Array | Sequence[Any],
    labels: Any = None,
    calibration_data: Any = None,
    test_data: Any = None,
    test_labels: Any = None,
    budget: AccuracyBudget = AccuracyBudget(),  # noqa: B008 - frozen
    metric: Metric | None = None,
    metric_options: Mapping[str, str | int | float] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    preprocess: Sequence[PreprocessSpec] = (),
    shape: str | None = None,
    preset: Preset | None = None,
    subset_size: int = 300,
    ignored_scope: Sequence[str] = (),
    quantize: bool = True,
    prune: bool = True,
    max_pruning: float = 0.5,
    effort: str = "balanced",
    time_limit_s: float | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    allow_code: bool = False,
    resume: bool = False,
    tune: bool = True,
    on_event: Listener | None = None,
) -> Bundle:
    """A bundle with the fastest model inside the accuracy budget for every target, and the evidence.

    `model` is an ONNX file. `data` is a path (npz, npy, folder of arrays or images) or arrays in memory: a
    dictionary by input name or one array [N, ...]; `labels` a path, a key of the npz, or an array [N].
    `calibration_data` and `test_data` (with `test_labels`) replace the parts that are else split from `data`.
    `targets` are `"PROFILE:DEVICE"`. `output` is the bundle's folder, by default `<model>.vinoopt` in the
    working directory; an existing bundle is replaced only with `force`.

    `scheduler` is the address of a dask scheduler: a target whose product one of its workers announces is measured
    there, candidate by candidate, instead of being emulated or modelled here.

    `tune` races OpenVINO's runtime properties on devices that are there (not with effort `fast`).

    `time_limit_s` holds for the whole run. What must follow the search is reserved for: the judgement on the test
    part, the final comparison (shorter under a short limit), writing. Reading model and data and running the
    float model on the search and test parts come before it and are not cut short; a search keeps 40% of
    the limit in any case. So a limit below about twice those stages is overrun. What the search has when its
    time is up is used, at the least the float model.

    A target of several that comes to nothing late (its compiler crashes on the result, a worker is lost) does not
    take the others with it: the bundle holds those that are left, and its messages say what happened.

    An interrupt (Ctrl-C) during the search, the choice or the tuning keeps the best so far and still writes the
    bundle; `bundle.manifest.interrupted` is then set. A second one, or one at any other stage, passes through, and
    nothing is written.

    Raises the classes of `vinoopt.errors`: `ModelError`, `ShapeError`, `DataError`, `MetricError`, `TargetError`,
    `BundleError` for what was handed in, before any long work.
    """
    make_interrupts_safe()
    started = time.monotonic()
    forecast = Forecast()
    say = _with_forecast(on_event, forecast)
    place = Path(output) if output is not None else Path(f"{Path(model).stem}.vinoopt")
    request = _request(
        model=str(model),
        targets=tuple(t if isinstance(t, Target) else Target.parse(t) for t in targets),
        output=str(place),
        data=_named(data),
        labels=_named(labels),
        calibration_data=_named(calibration_data),
        test_data=_named(test_data),
        test_labels=_named(test_labels),
        budget=budget,
        metric_options=dict(metric_options or {}),
        preprocess=tuple(preprocess),
        shape=shape,
        preset=preset,
        subset_size=subset_size,
        ignored_scope=tuple(ignored_scope),
        quantize=quantize,
        prune=prune,
        max_pruning=max_pruning,
        effort=effort,
        time_limit_s=time_limit_s,
        seed=seed,
        scheduler=scheduler,
        allow_code=allow_code,
    )
    bundles.check_output(place, force=force)
    handed = Handed(data, labels, calibration_data, test_data, test_labels, metric)
    is_tuned = tune and effort != "fast"
    clock = Clock(started=started, forecast=forecast, is_tuned=is_tuned)
    with _line(request) as line:
        material, choices = _search_all(request, handed, clock=clock, line=line, resume=resume, say=say)
        if is_tuned:
            with forecast.stage("tune"):
                choices = _all_tuned(material, choices, _deadlines(material, started, targets=1))
        say(Event(stage="write", message=f"writing {place}"))
        with forecast.stage("write"):
            return _write(material, choices, place, started=started)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """When a run began, and what is told about its end."""

    started: float
    forecast: Forecast
    is_tuned: bool


@contextmanager
def _line(request: CompileRequest) -> Iterator[Line | None]:
    """To the fleet that the request names, if any."""
    if request.scheduler is None:
        yield None
        return
    with connected(request.scheduler) as client:
        yield Line(client)


def _with_forecast(listener: Listener | None, forecast: Forecast) -> Listener:
    """Hands events on with the seconds that are left."""
    if listener is None:
        return lambda event: None
    return lambda event: listener(event.model_copy(update={"remaining_s": forecast.remaining_s()}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """A compressed model, and how it came about."""

    model: ov.Model
    """Pruned, refitted and quantized as `plan` says; with the user's inputs, preprocessing embedded."""
    plan: CompressionPlan
    drop: Drop
    """On the test part."""
    trials: tuple[Trial, ...]
    reasons: tuple[str, ...]


def compress(
    model: str | Path,
    *,
    data: str | Path | Mapping[str, Array] | Array | Sequence[Any],
    labels: Any = None,
    target: str | Target = "host:CPU",
    metric: Metric | None = None,
    on_event: Listener | None = None,
    **options: Any,
) -> Compressed:
    """The fastest model inside the accuracy budget for one target, as an `ov.Model`; nothing is written.

    The same search as `compile`, chosen on the test part and by latency on `target`. `options` are fields of
    `CompileRequest` (`budget`, `prune`, `quantize`, `max_pruning`, `effort`, `time_limit_s`, `shape`, ...).
    Raises what `compile` raises.
    """
    make_interrupts_safe()
    parts = [options.pop(name, None) for name in ("calibration_data", "test_data", "test_labels")]
    request = _request(
        model=str(model),
        targets=(target if isinstance(target, Target) else Target.parse(target),),
        data=_named(data),
        labels=_named(labels),
        calibration_data=_named(parts[0]),
        test_data=_named(parts[1]),
        test_labels=_named(parts[2]),
        **options,
    )
    handed = Handed(data, labels, parts[0], parts[1], parts[2], metric)
    clock = Clock(started=time.monotonic(), forecast=Forecast(), is_tuned=False)
    say = _with_forecast(on_event, clock.forecast)
    with _line(request) as line:
        _, (choice,) = _search_all(request, handed, clock=clock, line=line, resume=False, say=say)
    return Compressed(
        model=choice.model,
        plan=choice.plan,
        drop=choice.drop,
        trials=choice.trials,
        reasons=choice.reasons,
    )


@dataclass(frozen=True, slots=True)
class Handed:
    """What a request names but cannot hold: data and a metric, as paths or as objects in memory."""

    data: Any
    labels: Any
    calibration_data: Any
    test_data: Any
    test_labels: Any
    metric: Metric | None


def _search_all(
    request: CompileRequest, handed: Handed, *, clock: Clock, line: Line | None, resume: bool, say: Listener
) -> tuple[Material, list[Choice]]:
    """What all targets share, and the choice for each of them."""
    if request.effort not in EFFORTS:
        raise InputError(f'effort "{request.effort}" is not one of {", ".join(EFFORTS)}')
    if request.effort == DISTILL:
        require_torch()
    devices = _check_targets(request.targets)
    say(Event(stage="load", message=f"reading {request.model}"))
    source = load_model(request.model, shape=request.shape, preprocess=request.preprocess)
    for target in request.targets:
        if target.device is Device.NPU or (target.device is Device.GPU and target.profile != HOST):
            require_static(source, target.device)
    ignored = resolve_ignored(source.model, request.ignored_scope)

    say(Event(stage="data", message="reading data"))
    splits = _splits(request, source, handed)
    metric = handed.metric or _find_metric(request, source, splits)
    for part in (splits.search, splits.test):
        check_fit(metric, part)
    messages = [*source.messages, *splits.search.messages, *_metric_words(metric, splits, request.budget)]
    messages += _parity_words(source, splits)
    if source.quantized:
        messages.append(f"not quantized again: {source.quantized}")
    for message in messages:
        say(Event(stage="data", message=message))

    for target in request.targets:
        if line is not None and target.profile != HOST and not line.serves(needs_of(target)):
            messages.append(f"{target}: judged here, for no worker announces {', '.join(needs_of(target))}")
            say(Event(stage="search", message=messages[-1]))
    yardsticks = _yardsticks(request, devices, source, splits, line)
    say(Event(stage="search", message="float model on the search and test parts"))
    before = time.monotonic()
    search_reference = _reference(source, splits.search)
    between = time.monotonic()
    test_reference = _reference(source, splits.test)
    pace = (between - before, time.monotonic() - between)
    is_open = handed.metric is None and request.budget.metric == "auto"
    if is_open and never_decides(metric, itertools.chain(search_reference, test_reference)):
        words = (
            "the outputs do not look like class scores (the largest is at one or few places on all samples, or they "
            f"are of length 1), so {metric.name} says nothing: judged by cosine"
        )
        metric = find_metric("cosine", outputs=source.outputs, has_labels=False, options=request.metric_options)
        messages.append(words)
        say(Event(stage="data", message=words))
    for part, reference, title in (
        (splits.search, search_reference, "search"),
        (splits.test, test_reference, "test"),
    ):
        _check_reference(metric, part, reference, request.budget, title)
    material = Material(
        request=request,
        source=source,
        splits=splits,
        metric=metric,
        search_reference=search_reference,
        test_reference=test_reference,
        store=_store(request, source, splits),
        shared=Shared(),
        messages=tuple(messages),
        say=say,
        forecast=clock.forecast,
        facts=_facts(request, source, splits, yardsticks[0], pace=pace, is_tuned=clock.is_tuned),
    )
    _announce(material, targets=len(yardsticks))
    choices: list[Choice] = []
    failures = _Failures(say=say, stage="search")
    if request.quantize and not source.quantized:
        import_nncf()  # which takes seconds, that are no search's
    for number, yardstick in enumerate(yardsticks):
        deadlines = _deadlines(material, clock.started, targets=len(yardsticks) - number)
        options = _search_options(material, yardstick.spec, ignored, deadlines)
        if any(choice.interrupted for choice in choices):
            options = replace(options, quantize=False, prune=False)
        if number:
            _announce(material, targets=len(yardsticks) - number)
        with failures.of(yardstick.target):
            choices.append(_choose_for(material, yardstick, options=options, resume=resume))
    failures.check(choices)
    return replace(material, messages=(*material.messages, *failures.told)), choices


def _announce(material: Material, *, targets: int) -> None:
    """Tell the forecast what the targets that are left will take."""
    request = material.request
    training_s = 0.0
    if request.effort == DISTILL:
        limit = request.time_limit_s
        training_s = STAGE_S if limit is None else (1 - SEARCH_SHARE) * limit / len(request.targets)
    announce(material.forecast, material.facts, targets=targets, training_s=training_s)


@dataclass(kw_only=True)
class _Failures:
    """Targets that come to nothing, late: the others' results are not to be lost for them."""

    say: Listener
    stage: str
    found: dict[Target, Exception] = field(default_factory=dict)

    @contextmanager
    def of(self, target: Target) -> Iterator[None]:
        """What is raised inside is this target's failure."""
        try:
            yield
        except CANDIDATE_ERRORS as exc:
            self.found[target] = exc
            self.say(Event(stage=self.stage, message=f"{target}: no result: {first_line(exc)}"))

    def check(self, left: Sequence[Choice]) -> None:
        """Raises the first failure where no target is left."""
        if not left:
            raise next(iter(self.found.values()))

    @property
    def told(self) -> list[str]:
        """A sentence for each."""
        return [f"{target}: no result: {first_line(exc)}" for target, exc in self.found.items()]


def _facts(
    request: CompileRequest,
    source: SourceModel,
    splits: Splits,
    yardstick: TargetYardstick,
    *,
    pace: tuple[float, float],
    is_tuned: bool,
) -> Facts:
    """What a run is expected to take hangs on; `pace` is what the search and the test part took in float."""
    sizes = (len(splits.search), len(splits.test))
    sample_s = min(seconds / max(size, 1) for seconds, size in zip(pace, sizes, strict=True))
    is_pruned = request.prune and not source.quantized
    refitted = refit_calls(splits.calibration) * splits.calibration.batch if is_pruned else 0
    return Facts(
        sample_s=sample_s,
        overhead_s=max(min(pace) - min(sizes) * sample_s, 0.0) + 0.2,
        search=sizes[0],
        test=sizes[1],
        calibration=min(len(splits.calibration), request.subset_size),
        layers=sum(node.get_type_name() in _CONTRACTIONS for node in source.model.get_ops()),
        algebra_s=refit_workload(source.model, samples=refitted).seconds() if is_pruned else 0.0,
        formats=len(yardstick.float_precisions),
        effort=without_training(request.effort),
        quantize=request.quantize and not source.quantized,
        prune=is_pruned,
        is_tuned=is_tuned,
        final_s=final_seconds(without_training(request.effort), request.time_limit_s),
    )


def _deadlines(material: Material, started: float, *, targets: int) -> Deadlines | None:
    """When the search of the next of so many targets must end, and when tuning must; None without a time limit."""
    limit = material.request.time_limit_s
    if limit is None:
        return None
    found = divide(material.facts, now=time.monotonic(), end=started + limit, limit_s=limit, targets=targets)
    material.forecast.deadline = found.search if targets == 1 else None
    material.forecast.end = started + limit
    return found


# --------------------------------------------------------------------------- what is handed in


def _request(**fields: Any) -> CompileRequest:
    """The request, with lists as tuples and words as members; raises `InputError` for what it cannot hold."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        if isinstance(fields.get("preset"), str):
            fields["preset"] = Preset(fields["preset"])
        return CompileRequest(**fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}: {first['msg']} (got {first['input']!r:.80})") from exc
    except ValueError as exc:
        raise InputError(f"preset: {exc}; give one of {', '.join(Preset)}") from exc


def _named(value: Any) -> str | None:
    if value is None:
        return None
    return str(value) if isinstance(value, str | Path) else "in memory"


def _check_targets(targets: Sequence[Target]) -> list[DeviceSpec]:
    slugs = [t.slug for t in targets]
    if not targets:
        raise InputError("no target; name at least one, as --target host:CPU")
    twice = sorted({s for s in slugs if slugs.count(s) > 1})
    if twice:
        raise InputError(f"two targets would share the folder {twice[0]} of the bundle; name each target once")
    return [resolve(target) for target in targets]


def _yardsticks(
    request: CompileRequest,
    devices: Sequence[DeviceSpec],
    source: SourceModel,
    splits: Splits,
    line: Line | None,
) -> list[TargetYardstick]:
    """One per target, all made before the first search, so that what is missing is told before any long work."""
    samples = [splits.test[i] for i in range(min(MEASURED_SAMPLES, len(splits.test)))]
    return [
        yardstick_for(
            target,
            spec,
            reference=source.model,
            samples=samples,
            seconds=final_seconds(without_training(request.effort), request.time_limit_s),
            line=line,
        )
        for target, spec in zip(request.targets, devices, strict=True)
    ]


def _splits(
    request: CompileRequest, source: SourceModel, handed: Handed
) -> Splits:
    def load(what: Any, its_labels: Any) -> Dataset:
        if isinstance(what, str | Path):
            if its_labels is not None and not isinstance(its_labels, str | Path):
                raise DataError("labels in memory go with data in memory; give both as paths, or both as arrays")
            return load_dataset(
                str(what),
                inputs=source.inputs,
                labels=None if its_labels is None else str(its_labels),
                preprocess=source.preprocess,
                allow_code=request.allow_code,
            )
        return from_arrays(what, inputs=source.inputs, labels=its_labels)

    parts = split(
        load(handed.data, handed.labels),
        # Training learns from more than what NNCF's statistics take, which are of the first ones all the same.
        subset_size=max(request.subset_size, _LEARNT) if request.effort == DISTILL else request.subset_size,
        seed=request.seed,
        calibration=None if handed.calibration_data is None else load(handed.calibration_data, None),
        test=None if handed.test_data is None else load(handed.test_data, handed.test_labels),
    )
    # Every candidate is run on these: images are decoded once where the memory allows.
    return Splits(
        calibration=parts.calibration.held(HELD_BYTES),
        search=parts.search.held(HELD_BYTES),
        test=parts.test.held(HELD_BYTES),
    )


def _find_metric(request: CompileRequest, source: SourceModel, splits: Splits) -> Metric:
    has_labels = splits.search.labels is not None
    return find_metric(
        request.budget.metric,
        outputs=source.outputs,
        has_labels=has_labels,
        options=request.metric_options,
        allow_code=request.allow_code,
    )


def _metric_words(metric: Metric, splits: Splits, budget: AccuracyBudget) -> list[str]:
    words = [splits.describe()]
    if splits.search.labels is None:
        words.append(f"no labels: judged by {metric.name} with the float model, not by true accuracy")
    if metric.name == "sqnr":
        kept = SQNR_CEILING_DB - budget.max_drop
        words.append(
            f"sqnr counts down from {SQNR_CEILING_DB:g} dB, which equal outputs score: --max-drop "
            f"{budget.max_drop:g} asks for {kept:g} dB; INT8 models usually reach 20 to 40"
        )
    return words


def _parity_words(source: SourceModel, splits: Splits) -> list[str]:
    samples = [splits.calibration[i] for i in range(min(PARITY_SAMPLES, len(splits.calibration)))]
    report = check_parity(source, samples)
    if report.checked and not report.ok:
        return [f"warning: the OpenVINO model departs from ONNX Runtime: {report.reason}"]
    return [] if report.checked else [f"parity with the ONNX file {report.reason}"]


def _reference(source: SourceModel, data: Dataset) -> Predictions:
    """The float model's outputs in f32, whatever the CPU would choose by itself."""
    return predict(source.model, data, properties={"INFERENCE_PRECISION_HINT": "f32"})


def _check_reference(
    metric: Metric, data: Dataset, reference: Predictions, budget: AccuracyBudget, title: str
) -> None:
    """Raises `MetricError` where no drop from the float model means anything, before any candidate is built."""
    scores = score(metric, reference, data, reference)
    is_nothing = metric.needs_reference and metric.unit == "share" and scores.value == 0
    if is_nothing or not np.isfinite(scores.value):
        raise MetricError(
            f"{metric.name} of the float model with itself is {scores.value:g} on the {title} part: its outputs "
            "are not finite there; check preprocessing and data, or choose another --metric"
        )
    if budget.drop_type is DropType.RELATIVE and scores.value == 0:
        raise MetricError(
            f"{metric.name} of the float model is 0 on the {title} part, so a relative drop means nothing; check "
            "labels and preprocessing, or use --drop-type absolute"
        )
    # With a metric that counts up from 0, a float model that has nothing to lose lets everything pass.
    counts_up = metric.higher_is_better and metric.unit == "share" and metric.needs_labels
    if counts_up and budget.drop_type is DropType.ABSOLUTE and scores.value <= budget.max_drop:
        raise MetricError(
            f"{metric.name} of the float model is {scores.value:.4g} on the {title} part, no more than the drop that "
            f"is allowed ({budget.max_drop:g}): any model would pass; check labels (--label-offset), preprocessing "
            "and, for boxes, the decoding"
        )


def _store(request: CompileRequest, source: SourceModel, splits: Splits) -> Store:
    facts = {
        key: value
        for key, value in request.model_dump(mode="json").items()
        if key in ("preprocess", "shape", "seed", "subset_size", "ignored_scope")
    }
    host = fingerprint()  # times are this machine's
    parts = [_content(part) for part in (splits.calibration, splits.search)]
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # kernels, and with them times and INT8 sums, hang on it
    return Store.open(source.sha256, parts, facts, host.versions, host.cpu, cap)


def _content(data: Dataset) -> str:
    """Digest of every array of a part, so that other data under the same name is other data."""
    content = hashlib.sha256()
    for sample in data:
        for name in sorted(sample):
            content.update(f"{name}{sample[name].dtype}{sample[name].shape}".encode())
            content.update(np.ascontiguousarray(sample[name]).tobytes())
    content.update(digest(None if data.labels is None else [_told(label) for label in data.labels]).encode())
    return content.hexdigest()


def _told(label: Any) -> str:
    """All that is in a label; of an object what it says of itself, without its address."""
    if is_dataclass(label) and not isinstance(label, type):
        return " ".join(_told(getattr(label, each.name)) for each in fields(label))
    if isinstance(label, Mapping):
        return " ".join(f"{key} {_told(value)}" for key, value in label.items())
    if isinstance(label, Sequence) and not isinstance(label, str | bytes):
        return " ".join(map(_told, label))
    if isinstance(label, np.ndarray):
        return f"{label.dtype} {label.shape} {hashlib.sha256(np.ascontiguousarray(label).tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(label))


def _preset_for(spec: DeviceSpec, source: SourceModel) -> Preset | None:
    """Symmetric activations for a convolutional network on an NPU; None: NNCF's own choice.

    They are NNCF's own choice there, but named they also keep the search from asymmetric ones, whose quantizers
    an NPU runs as vector programs: on four of eight networks 1.1 to 5.6 times slower by its cost model, on the
    others the same.
    """
    return Preset.PERFORMANCE if spec.kind is Device.NPU and not source.is_transformer else None


def _search_options(
    material: Material, spec: DeviceSpec, ignored: tuple[str, ...], deadlines: Deadlines | None
) -> SearchOptions:
    request, source = material.request, material.source
    return SearchOptions(
        base=QuantizationPlan(
            preset=request.preset or _preset_for(spec, source),
            subset_size=request.subset_size,
            float_layers=ignored,
            is_transformer=source.is_transformer,
            overflow_fix=saturates_int8(spec),
        ),
        quantize=request.quantize and not source.quantized,
        prune=request.prune and not source.quantized,
        max_pruning=request.max_pruning,
        channel_multiple=spec.channel_multiple,
        seed=request.seed,
        effort=without_training(request.effort),
        deadline=None if deadlines is None else deadlines.search,
        anchor_deadline=None if deadlines is None else deadlines.anchors,
        memory_bytes=free_bytes(),
    )


# --------------------------------------------------------------------------- one target


def _choose_for(
    material: Material, yardstick: TargetYardstick, *, options: SearchOptions, resume: bool
) -> Choice:
    """Search, then choose on the test part; an interrupt ends the search with what it has."""
    splits, target = material.splits, yardstick.target
    judge = Judge(
        workshop=Workshop(
            source=material.source.model,
            calibration=splits.calibration,
            device=target.device,
            store=material.store,
            ignored=options.base.float_layers,
        ),
        yardstick=yardstick,
        metric=material.metric,
        budget=material.request.budget,
        data=splits.search,
        reference=material.search_reference,
        seed=material.request.seed,
        store=material.store,
        shared=material.shared,
        sample_s=material.facts.sample_s,
        spec=yardstick.spec,
        on_trial=lambda trial: material.say(Event(stage="trial", message=trial_line(trial))),
        forecast=material.forecast,
    )
    if resume:
        taken = judge.resume()
        material.say(Event(stage="search", message=f"{target}: {taken} finished trials taken over"))
    else:
        judge.forget()

    def say(text: str) -> None:
        material.say(Event(stage="search", message=f"{target}: {text}"))

    is_asked = material.request.effort == DISTILL
    why_not = _why_not_trained(material) if is_asked else ""
    trains = is_asked and not why_not
    found = search(judge, _before_training(options) if trains else options, say=say)
    if why_not:
        found = replace(found, reasons=(*found.reasons, f"nothing was distilled: {why_not}"))
    if trains:
        limit_s = material.request.time_limit_s
        stage_options = StageOptions(
            deadline=options.deadline, limit_s=limit_s, seed=options.seed, allows=options.allows
        )
        found = distill_beyond(judge, found, stage_options, say=say)
    test = TestPart(data=splits.test, reference=material.test_reference)
    with material.forecast.stage("choose"):
        is_late = options.deadline is not None and time.monotonic() > options.deadline + _HURRY_S
        try:
            choice = choose(judge, yardstick, found, test, say=say, is_late=is_late or found.is_interrupted)
        except KeyboardInterrupt:
            if found.is_interrupted:  # for the second time
                raise
            say("interrupted: choosing among the candidates as they are; once more ends without a bundle")
            found = replace(found, is_interrupted=True)
            choice = choose(judge, yardstick, found, test, say=say, is_late=True)
    return replace(choice, interrupted=found.is_interrupted)


def _why_not_trained(material: Material) -> str:
    """Why no candidate can be trained, empty where some can: asked before the search, which then has all the time."""
    from vinoopt.distillation.school import check_can_teach

    try:
        check_can_teach(material.source.model, material.splits.calibration)
    except DistillationError as exc:
        return str(exc)
    except CANDIDATE_ERRORS as exc:
        return first_line(exc)
    return ""


def _before_training(options: SearchOptions) -> SearchOptions:
    """The options with the part of the time that the search has where candidates are trained after it."""
    if options.deadline is None:
        return options
    now = time.monotonic()
    return replace(options, deadline=now + SEARCH_SHARE * max(options.deadline - now, 0.0))


def _all_tuned(
    material: Material, choices: Sequence[Choice], deadlines: Deadlines | None
) -> list[Choice]:
    """The choices with tuned properties; an interrupt leaves them as they are from there on."""
    tuned = list(choices)
    try:
        for place, choice in enumerate(choices):
            left = math.inf if deadlines is None else (deadlines.tuning - time.monotonic()) / (len(choices) - place)
            tuned[place] = _tuned(material, choice, min(left, 2 * TUNING_S))
    except KeyboardInterrupt:
        material.say(Event(stage="tune", message="interrupted: the bundle is written with what is known"))
        tuned[place] = replace(choices[place], interrupted=True)
    return tuned


def _tuned(material: Material, choice: Choice, seconds: float) -> Choice:
    """The choice with properties that beat the latency hint beyond noise, where the device is here or on a worker.

    `seconds` are for the whole race: heats, final and duel.
    """
    yardstick = choice.yardstick
    if choice.interrupted or not isinstance(yardstick, HostYardstick):
        return choice
    if seconds < _LEAST_TUNING_S:
        words = "runtime settings beyond the latency hint were not tried: the time limit left no time for it"
        return replace(choice, reasons=(*choice.reasons, words))
    material.say(Event(stage="tune", message=f"{yardstick.target}: runtime properties"))
    base = {k: v for k, v in choice.properties.items if k != "PERFORMANCE_HINT"}  # precision stays the plan's
    task = TuneTask(
        model=choice.model, samples=yardstick.samples, device=yardstick.spec.kind.value, spec=yardstick.spec
    )
    config = TuneConfig(base=RuntimeProperties.of(base), seconds=seconds, seed=material.request.seed)
    try:
        result = yardstick.place.tune(task, config)
    except ToolchainError as exc:  # a worker that is lost; the choice stands without it
        return replace(choice, reasons=(*choice.reasons, f"runtime settings were not raced: {exc}"))
    tried = len(result.trials)
    if result.is_default or result.comparison is None:
        words = f"none of {tried} runtime settings beats the latency hint beyond noise"
        return replace(choice, reasons=(*choice.reasons, words), tuned=result.comparison)
    settings = ", ".join(f"{key}={value}" for key, value in result.chosen.properties.items)
    c = result.comparison
    words = (
        f"of {tried} runtime settings {settings} is {c.speedup:.2f}x faster than the latency hint "
        f"(95% interval {c.low:.2f} to {c.high:.2f}, {c.evidence})"
    )
    return replace(choice, properties=result.properties, reasons=(*choice.reasons, words), tuned=c)


# --------------------------------------------------------------------------- what is handed out


def _write(
    material: Material, choices: Sequence[Choice], place: Path, *, started: float
) -> Bundle:
    """The bundle, written beside its place, reopened in a fresh process, and renamed when that agreed."""
    splits = material.splits
    golden = [dict(splits.test[i]) for i in range(min(GOLDEN_SAMPLES, len(splits.test)))]
    outputs: dict[str, list[list[Array]]] = {}
    tolerances: dict[str, float] = {}
    results: dict[Target, TargetResult] = {}
    failures = _Failures(say=material.say, stage="write")
    with bundles.writing(place) as folder:
        for choice in choices:
            target = choice.yardstick.target
            with failures.of(target):
                ir = bundles.write_target(folder, target.slug, choice.model, choice.properties)
                build = choice.yardstick.compile(ir, choice.properties, ir.with_name("model.blob"))
                bundles.write_properties(folder, target.slug, build.properties)
                outputs[target.slug] = choice.yardstick.golden_outputs(ir, build.properties, golden)
                tolerances[target.slug] = bundles.tolerance_of(choice.plan)
                results[target] = _result(choice, build)
        bundles.write_golden(folder, golden, outputs, tolerances)
        for choice in choices:
            if (target := choice.yardstick.target) in results:
                with failures.of(target):
                    _check_replay(folder, choice.yardstick, results[target])
        choices = [choice for choice in choices if choice.yardstick.target not in failures.found]
        failures.check(choices)
        for target in failures.found:
            bundles.remove_target(folder, target.slug)
            outputs.pop(target.slug, None)
        if failures.found:
            bundles.write_golden(folder, golden, outputs, tolerances)
        reference = score(material.metric, material.test_reference, splits.test, material.test_reference)
        manifest = Manifest(
            request=material.request,
            host=fingerprint(),
            inputs=material.source.inputs,
            outputs=material.source.outputs,
            model_sha256=material.source.sha256,
            splits=splits.sizes,
            float_accuracy=reference.accuracy,
            targets=tuple(results[choice.yardstick.target] for choice in choices),
            trials=sum(len(choice.trials) for choice in choices),
            interrupted=any(choice.interrupted for choice in choices),
            seconds=time.monotonic() - started,
            peak_memory_bytes=peak_bytes(),
            messages=(*material.messages, *failures.told),
            stages_s=dict(material.forecast.took),
        )
        trials = [trial for choice in choices for trial in choice.trials]
        manifest = bundles.write_documents(folder, manifest, trials)
    return Bundle(path=place.resolve(), manifest=manifest)


def _result(choice: Choice, build: Build) -> TargetResult:
    return TargetResult(
        target=choice.yardstick.target,
        plan=choice.plan,
        drop=choice.drop,
        budget_met=choice.budget_met,
        measurements=choice.bench.measurements,
        comparisons=choice.comparisons,
        properties=build.properties,
        build=build,
        reasons=choice.reasons,
        float_blocks=choice.float_blocks,
        tuned=choice.tuned,
        host=choice.yardstick.place.host if isinstance(choice.yardstick, HostYardstick) else None,
    )


def _check_replay(folder: Path, yardstick: TargetYardstick, result: TargetResult) -> None:
    """Open the target as its user will, as nearly as this machine can.

    Raises `DeviceError` where the outputs are not the golden ones.
    """
    device, properties = yardstick.replay_on(result.properties)
    answer = bundles.replay_in_child(
        folder, result, device=device, properties=properties, env=yardstick.replay_environment
    )
    if not answer["departure"] <= answer["tolerance"]:
        raise DeviceError(
            f"{result.target}: reopened in a fresh process the model departs from its golden outputs by "
            f"{answer['departure']:.3g} of their range (tolerance {answer['tolerance']:g}); nothing was written"
            f"{_where(folder, yardstick, result)}"
        )
    if not answer["disagreement"] <= answer["choice_tolerance"]:
        raise DeviceError(
            f"{result.target}: reopened in a fresh process the model chooses otherwise than its golden outputs in "
            f"{answer['disagreement']:.1%} of places (tolerance {answer['choice_tolerance']:.0%}); nothing was "
            f"written{_where(folder, yardstick, result)}"
        )


def _where(folder: Path, yardstick: TargetYardstick, result: TargetResult) -> str:
    """The first layer that departs from f32 on the CPU, as the end of a sentence."""
    device, properties = yardstick.replay_on(result.properties)
    model = ov.Core().read_model(folder / result.target.slug / "model.xml")
    run = Variant(model=model, device=device.value, properties=properties.as_dict())
    found = first_departure(Variant(model=model), run, bundles.golden_inputs(folder))
    return "" if found is None else f"; against f32 on the CPU it {found.sentence}"
