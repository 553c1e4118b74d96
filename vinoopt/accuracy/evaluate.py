"""Model x dataset x metric to an accuracy, and two accuracies to a paired drop with its 95% interval."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.accuracy import intervals
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.metrics import Metric
from vinoopt.errors import DataError, DeviceError, MetricError
from vinoopt.records import Accuracy, AccuracyBudget, Drop, DropType, Verdict

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with calls done and calls in all."""

MEMORY_BYTES = 256 << 20
"""Predictions beyond it go to a temporary file."""
_RESAMPLING_S, _LEAST_RESAMPLES = 5.0, 100
"""What the resamples of one bootstrap may take where a metric is slow, and how many there are at the least."""


# --------------------------------------------------------------------------- predictions


class Predictions:
    """Outputs of a model for every call of a dataset, in its order; large ones lie in a temporary file."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=memory_bytes)  # noqa: SIM115
        self._calls: list[tuple[tuple[str, str, tuple[int, ...], int], ...]] = []
        self._end = 0

    def append(self, outputs: Mapping[str, Array]) -> None:
        """Add one call's outputs."""
        call = []
        for name, values in outputs.items():
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(values).tobytes())
            call.append((name, values.dtype.str, values.shape, self._end))
            self._end += values.nbytes
        self._calls.append(tuple(call))

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def is_on_disk(self) -> bool:
        """Whether they have outgrown the memory that is theirs."""
        return self._end > self._memory_bytes

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Output name -> array for one call."""
        outputs: dict[str, Array] = {}
        for name, dtype, shape, start in self._calls[index]:
            self._file.seek(start)
            count = int(np.prod(shape, dtype=np.int64))
            raw = self._file.read(count * np.dtype(dtype).itemsize)
            outputs[name] = np.frombuffer(raw, dtype=dtype, count=count).reshape(shape)
        return outputs

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (self[index] for index in range(len(self)))


def predict(
    model: ov.Model | ov.CompiledModel,
    dataset: Dataset,
    *,
    properties: Mapping[str, str] | None = None,
    device: str = "CPU",
    progress: Progress | None = None,
) -> Predictions:
    """The model's outputs for every call of the dataset, in its order.

    A model that is not compiled yet is compiled for `device` with `properties`; the float reference on a CPU
    needs `INFERENCE_PRECISION_HINT` `f32`. Variables of stateful models are reset before every call. Raises
    `DeviceError` where OpenVINO cannot compile or run it.
    """
    names = output_names(model)
    compiled = _compiled(model, device, properties or {})
    try:
        return _infer(compiled, names, dataset, progress)
    except RuntimeError as exc:
        raise DeviceError(f"inference on {device} failed: {exc}") from exc


def _infer(
    compiled: ov.CompiledModel, names: Sequence[str], dataset: Dataset, progress: Progress | None
) -> Predictions:
    """Predictions through a ring of requests, taken in turn, so that results come in order.

    OpenVINO's own queue calls back into Python from its threads; it can hang for ever when it is taken down
    while the last callback still waits for the interpreter.
    """
    count = max(int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")), 1)
    ring = [compiled.create_infer_request() for _ in range(min(count, max(len(dataset), 1)))]
    is_stateful = bool(ring[0].query_state())
    feeding: deque[tuple[ov.InferRequest, Any]] = deque()
    store = Predictions()

    def finish_first() -> None:
        request, _ = feeding.popleft()
        request.wait()
        store.append({n: np.array(request.get_output_tensor(i).data) for i, n in enumerate(names)})
        if progress is not None:
            progress(len(store), len(dataset))

    try:
        for index in range(len(dataset)):
            if len(feeding) == len(ring):
                finish_first()
            request, sample = ring[index % len(ring)], dataset[index]
            if is_stateful:
                request.reset_state()
            request.start_async(sample, share_inputs=True)
            feeding.append((request, sample))  # the sample's memory is shared and must outlive the inference
        while feeding:
            finish_first()
    finally:
        # After an error, or an interrupt: no request may go on reading memory that is given back.
        for request, _ in feeding:
            with contextlib.suppress(RuntimeError):
                request.wait()
    return store


def _compiled(
    model: ov.Model | ov.CompiledModel, device: str, properties: Mapping[str, str]
) -> ov.CompiledModel:
    if isinstance(model, ov.CompiledModel):
        return model
    try:
        return ov.Core().compile_model(model, device, {"PERFORMANCE_HINT": "THROUGHPUT", **properties})
    except RuntimeError as exc:
        raise DeviceError(f"cannot be compiled for {device} with {dict(properties)}: {exc}") from exc


def output_names(model: ov.Model | ov.CompiledModel) -> list[str]:
    """The ONNX names of a model's outputs, as `Predictions` hold them; to be asked before compiling.

    Compiling gives names to outputs that have none, different ones in every model.
    """
    return [_output_name(output, number) for number, output in enumerate(model.outputs)]


def _output_name(output: Any, number: int) -> str:
    """The ONNX name of an output; one that several tensors share has many names, its result node tells which."""
    names: set[str] = output.get_names()
    own = str(output.get_node().get_friendly_name()).removesuffix("/result")
    if own in names:
        return own
    return min(names) if names else f"output_{number}"


# --------------------------------------------------------------------------- scores


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """A metric's statistics, one per sample, and their value."""

    statistics: Sequence[Any]
    accuracy: Accuracy
    resampled: dict[str, Array] = field(default_factory=dict, repr=False)
    """What resamples of these statistics gave, by their counts."""
    value_s: float = 0.0
    """Seconds that the value took to compute."""

    @property
    def value(self) -> float:
        """The metric's value over all samples."""
        return self.accuracy.value


def check_fit(metric: Metric, dataset: Dataset) -> None:
    """Raises `MetricError` or `DataError` where the dataset's labels cannot serve the metric; costs nothing."""
    if not metric.needs_labels:
        return
    if dataset.labels is None:
        raise MetricError(f'metric "{metric.name}" needs labels, and {dataset.title} has none; give --labels')
    check = getattr(metric, "check_labels", None)
    if check is not None:
        check(dataset.labels)


def score(
    metric: Metric, predictions: Predictions, dataset: Dataset, reference: Predictions | None = None
) -> Scores:
    """Statistics of every sample and the metric's value.

    `reference` holds the float model's predictions for the same dataset; a metric that needs it scores the float
    model perfect against itself. Calls of several samples are taken apart along axis 0. Raises `MetricError` or
    `DataError` where labels, outputs or lengths do not fit.
    """
    check_fit(metric, dataset)
    for given in (predictions, *([reference] if reference is not None else [])):
        if len(given) != len(dataset):
            raise DataError(f"{len(given)} predictions for {len(dataset)} calls of {dataset.title}")
    labels = dataset.labels if metric.needs_labels else None
    statistics: list[Any] = []
    for index, outputs in enumerate(predictions):
        label = None if labels is None else labels[index]
        other = None if reference is None else reference[index]
        parts = dataset.batch if labels is not None or _can_split(outputs, dataset.batch) else 1
        for part in range(parts):
            statistics.append(
                metric.statistic(
                    _part(outputs, part, parts),
                    label[part] if parts > 1 and label is not None else label,
                    None if other is None else _part(other, part, parts),
                )
            )
    began = time.perf_counter()
    value = float(metric.value(statistics))
    value_s = time.perf_counter() - began
    accuracy = Accuracy(
        metric=metric.name, value=value, samples=len(statistics), higher_is_better=metric.higher_is_better
    )
    return Scores(statistics=statistics, accuracy=accuracy, value_s=value_s)


def _can_split(outputs: Mapping[str, Array], parts: int) -> bool:
    return parts > 1 and all(values.ndim > 0 and values.shape[0] == parts for values in outputs.values())


def _part(outputs: Mapping[str, Array], part: int, parts: int) -> Mapping[str, Array]:
    if parts == 1:
        return outputs
    if not _can_split(outputs, parts):
        shapes = ", ".join(f'"{name}" {values.shape}' for name, values in outputs.items())
        raise MetricError(
            f"outputs of a call of {parts} samples cannot be taken apart along axis 0: {shapes}"
        )
    return {name: values[part : part + 1] for name, values in outputs.items()}


# --------------------------------------------------------------------------- drops


def paired_drop(
    metric: Metric, reference: Scores, candidate: Scores, *, budget: AccuracyBudget, seed: int
) -> Drop:
    """How much worse the candidate is on the same samples, with a 95% interval and a verdict.

    Positive is worse, whichever way the metric points. Shares of hits get Tango's score interval (absolute), Nam
    and Blackwelder's (relative), or Clopper and Pearson's where the float model is perfect by definition; other
    means a studentized bootstrap, other metrics a percentile bootstrap over samples. Raises `MetricError` where a
    relative drop is asked for and the float model's value is 0.
    """
    if len(reference.statistics) != len(candidate.statistics):
        raise DataError(
            f"{len(reference.statistics)} and {len(candidate.statistics)} samples cannot be compared in pairs"
        )
    relative = budget.drop_type is DropType.RELATIVE
    sign = 1.0 if metric.higher_is_better else -1.0
    if relative and reference.value == 0:
        raise MetricError(
            f"{metric.name} of the float model is 0, so a relative drop means nothing; use --drop-type absolute"
        )
    value = sign * (reference.value - candidate.value) / (abs(reference.value) if relative else 1.0)
    (low, high), method, needed = _interval(
        metric, reference, candidate, value=value, budget=budget, seed=seed
    )
    verdict = _verdict(value, high, budget.max_drop)
    return Drop(
        metric=metric.name,
        drop_type=budget.drop_type,
        reference=reference.value,
        candidate=candidate.value,
        value=value,
        low=min(low, value),
        high=max(high, value),
        samples=len(reference.statistics),
        method=method,
        verdict=verdict,
        samples_to_prove=needed if verdict is Verdict.POINT_ESTIMATE else None,
    )


def _verdict(value: float, high: float, limit: float) -> Verdict:
    if high <= limit:
        return Verdict.PROVEN
    # The comparison is false for NaN, so a value that means nothing is never inside.
    return Verdict.POINT_ESTIMATE if value <= limit else Verdict.OUTSIDE


_Found = tuple[intervals.Interval, str, int | None]


def _interval(
    metric: Metric, reference: Scores, candidate: Scores, *, value: float, budget: AccuracyBudget, seed: int
) -> _Found:
    """The interval, how it was found, and how many samples would bring its upper end inside the budget."""
    samples, limit = len(reference.statistics), budget.max_drop
    relative = budget.drop_type is DropType.RELATIVE
    if not np.isfinite(value):
        return (value, value), "not finite", None
    if metric.is_mean:
        before = np.asarray(reference.statistics, dtype=np.float64)
        after = np.asarray(candidate.statistics, dtype=np.float64)
        if metric.higher_is_better and _are_hits(before) and _are_hits(after):
            return _hits_interval(before, after, exact=metric.needs_reference, relative=relative, limit=limit)
        if np.ptp(before - after) == 0:
            return _no_change(metric, reference.value, value, relative=relative, samples=samples, limit=limit)
        sign = 1.0 if metric.higher_is_better else -1.0
        base = before * np.sign(reference.value) if relative else np.ones(samples)
        found, method = intervals.bootstrap_means(sign * (before - after), base, seed=seed)
    else:
        drops = _drops_of_counts(metric, reference, candidate, relative)
        resamples = _resamples(metric, reference)
        found, method = intervals.bootstrap_counts(drops, samples=samples, seed=seed, resamples=resamples)
        if not np.isfinite(found).all():
            return (value, value), "no resample has a value", None
        if found[0] == found[1]:
            return _no_change(metric, reference.value, value, relative=relative, samples=samples, limit=limit)
    return found, method, _root_rule(value, found[1], limit, samples)


def _are_hits(statistics: Array) -> bool:
    return bool(np.isin(statistics, (0.0, 1.0)).all())


def _hits_interval(before: Array, after: Array, *, exact: bool, relative: bool, limit: float) -> _Found:
    samples, both = len(before), float(np.sum(before * after))
    lost, won = float(before.sum()) - both, float(after.sum()) - both

    def interval(times: float) -> intervals.Interval:
        if exact:
            return intervals.exact_interval(lost * times, samples * times)
        if relative:
            return intervals.relative_interval(both * times, lost * times, won * times, samples * times)
        return intervals.difference_interval(lost * times, won * times, samples * times)

    score_method = "score (Nam-Blackwelder)" if relative else "score (Tango)"
    method = "exact (Clopper-Pearson)" if exact else score_method
    return interval(1.0), method, _smallest(lambda times: interval(times)[1], limit, samples)


def _smallest(high: Callable[[float], float], limit: float, samples: int) -> int | None:
    """About how many samples bring the upper end down to the limit, where more would look like these."""
    upper = 1.0
    while high(upper) > limit:
        upper *= 2
        if upper > 1e6:
            return None
    lower = upper / 2
    while upper - lower > 0.005 * upper:
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if high(middle) > limit else (lower, middle)
    return int(np.ceil(samples * upper))


def _no_change(
    metric: Metric, reference: float, value: float, *, relative: bool, samples: int, limit: float
) -> _Found:
    """Every sample changed by the same amount (mostly none), so resampling sees no spread.

    For a share, samples that were not drawn could still be wholly wrong: the exact upper limit of their
    share, with no event in so many samples, bounds the drop.
    """
    if metric.unit != "share":
        return (value, value), "all samples change alike", None
    room = reference if metric.higher_is_better else 1.0 - reference
    worst = room / abs(reference) if relative else room

    def high(times: float) -> float:
        return value + intervals.exact_interval(0.0, samples * times)[1] * worst

    method = "exact (no sample differs)"
    return (value, high(1.0)), method, _smallest(high, limit, samples) if value < limit else None


def _drops_of_counts(
    metric: Metric, reference: Scores, candidate: Scores, relative: bool
) -> Callable[[Array], Array]:
    sign = 1.0 if metric.higher_is_better else -1.0

    def drops(counts: Array) -> Array:
        key = hashlib.sha256(counts.tobytes()).hexdigest()
        if key not in reference.resampled:  # the same for every candidate
            reference.resampled[key] = _values(metric, reference.statistics, counts)
        before = reference.resampled[key]
        after = _values(metric, candidate.statistics, counts)
        found: Array = sign * (before - after) / (np.abs(before) if relative else 1.0)
        return found

    return drops


def _resamples(metric: Metric, reference: Scores) -> int:
    """How many a bootstrap may take: fewer for a metric of the user's that takes its time."""
    if getattr(metric, "values", None) is not None:
        return intervals.RESAMPLES
    fitting = _RESAMPLING_S / max(reference.value_s, 1e-9)
    return int(min(max(fitting, _LEAST_RESAMPLES), intervals.RESAMPLES))


def _values(metric: Metric, statistics: Sequence[Any], counts: Array) -> Array:
    """The metric's value for every row of resampling counts; not a number where it has none."""
    quick = getattr(metric, "values", None)
    if quick is not None:
        return np.asarray(quick(statistics, counts), dtype=np.float64)
    rows = (np.repeat(np.arange(len(statistics)), row).tolist() for row in counts)
    return np.asarray([_value(metric, [statistics[i] for i in picks]) for picks in rows], dtype=np.float64)


def _value(metric: Metric, statistics: Sequence[Any]) -> float:
    try:
        return float(metric.value(statistics))
    except Exception:  # noqa: BLE001 - a resample may hold one class only, say, and what a user's metric raises is open
        return float("nan")


def _root_rule(value: float, high: float, limit: float, samples: int) -> int | None:
    """Intervals shrink with the square root of the samples."""
    if not value < limit or high <= limit:
        return None
    return int(np.ceil(samples * ((high - value) / (limit - value)) ** 2))


def sentence(drop: Drop, budget: AccuracyBudget) -> str:
    """The drop in plain words: how much, how sure, inside the budget or not, and what would prove it."""
    relative = budget.drop_type is DropType.RELATIVE
    amount = _percent if relative else _plain
    moved = "drops by" if drop.value >= 0 else "improves by"
    text = (
        f"{drop.metric}: {_plain(drop.reference)} -> {_plain(drop.candidate)}, {moved} {amount(abs(drop.value))} "
        f"({budget.drop_type}; 95% interval of the drop {amount(drop.low)} to {amount(drop.high)}, "
        f"{drop.samples} samples, {drop.method})"
    )
    limit = f"the budget of {amount(budget.max_drop)} ({budget.drop_type})"
    if drop.verdict is Verdict.OUTSIDE:
        return f"{text}: outside {limit}."
    if drop.verdict is Verdict.PROVEN:
        return f"{text}: inside {limit}, proven."
    text = f"{text}: inside {limit} by point estimate only"
    if drop.samples_to_prove is None:
        return f"{text}; no number of samples can be named that would prove it."
    return f"{text}; about {drop.samples_to_prove:,} samples would prove it."


def _plain(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1e-4 and number else f"{number:.4f}".rstrip("0").rstrip(".")


def _percent(number: float) -> str:
    return f"{_plain(100 * number)}%"
