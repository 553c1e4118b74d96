"""What counts as accuracy: one sample's outputs to a statistic, statistics to one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vinoopt.accuracy.user_code import import_attribute, is_code
from vinoopt.errors import DataError, MetricError
from vinoopt.records import TensorSpec
from vinoopt.serde import nearest

Array = NDArray[Any]
Outputs = Mapping[str, Array]
"""Output name -> array, for one sample (batch axis of 1 included)."""

GROUP = "vinoopt.metrics"
"""Entry-point group of metrics: name -> `factory(*, outputs, options) -> Metric`."""

SQNR_CEILING_DB = 120.0
"""What two equal outputs score: beyond it lies the rounding of float32 itself."""


@runtime_checkable
class Metric(Protocol):
    """Accuracy of a set of samples, from one statistic per sample.

    A metric that is no mean may offer `values(statistics, counts) -> [R]`, its value where sample i counts
    `counts[r, i]` times: the bootstrap is quick then. Any metric may offer `check_labels(labels)`, which raises
    `DataError` before inference starts, and `output`, the name of the one output that it looks at: what a candidate
    does to others is no damage then.
    """

    @property
    def name(self) -> str:
        """The word that finds it."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Which way it points."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether a label comes with every sample."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the float model's outputs, which then score perfectly themselves."""
        ...

    @property
    def unit(self) -> str:
        """`share` (0 to 1), `dB`, or a word for the scale of the outputs."""
        ...

    @property
    def is_mean(self) -> bool:
        """Whether the value is the mean of the statistics, which are then numbers."""
        ...

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> Any:
        """What one sample adds; `reference` holds the float model's outputs for it."""
        ...

    def value(self, statistics: Sequence[Any]) -> float:
        """The metric over samples with these statistics."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mean:
    """Shared ground of metrics that are the mean of one number per sample."""

    higher_is_better = True
    needs_labels = False
    needs_reference = False
    unit = "share"
    is_mean = True

    def value(self, statistics: Sequence[Any]) -> float:
        """Mean of the statistics."""
        return float(np.mean(np.asarray(statistics, dtype=np.float64)))


def class_scores(outputs: Outputs, name: str) -> Array:
    """The scores [C] of one sample in a classifier's output of shape [1, C] or [1, C, 1, 1]."""
    if name not in outputs:
        raise MetricError(f'the model gave no output "{name}"{nearest(name, list(outputs))}')
    return np.asarray(outputs[name]).reshape(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK(_Mean):
    """Share of samples whose label is among the k highest scores; equal scores rank by class index."""

    k: int
    output: str
    classes: int | None = None
    label_offset: int = 0
    """Added to a label to find its place in the output: 1 where the model has a background class first."""

    needs_labels = True

    @property
    def name(self) -> str:
        """`top1`, `top5`."""
        return f"top{self.k}"

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> float:
        """1.0 for a hit, else 0.0; outputs that are not finite miss."""
        scores = class_scores(outputs, self.output)
        place = int(label) + self.label_offset
        if not 0 <= place < scores.size:
            raise DataError(self._out_of_range(int(label), scores.size))
        if not np.isfinite(scores).all():
            return 0.0
        own = scores[place]
        ahead = np.count_nonzero(scores > own) + np.count_nonzero(scores[:place] == own)
        return float(ahead < self.k)

    def check_labels(self, labels: Any) -> None:
        """Raises `DataError` for labels that the output has no place for."""
        kind = labels.dtype.kind if isinstance(labels, np.ndarray) else "O"
        if kind == "f":
            raise DataError(f"{self.name}: some labels are not whole numbers; give class indices, not scores")
        if kind not in "iu":
            raise DataError(f"{self.name} needs one class index per sample, and the labels are of another kind")
        flat = labels.reshape(-1)
        if not flat.size:
            return
        if self.classes is None:
            if flat.min() + self.label_offset < 0:
                raise DataError(f"{self.name}: label {flat.min()} is negative; give class indices from 0")
            return
        for label in (int(flat.min()), int(flat.max())):
            if not 0 <= label + self.label_offset < self.classes:
                raise DataError(self._out_of_range(label, self.classes))

    def _out_of_range(self, label: int, classes: int) -> str:
        offset = f" with label offset {self.label_offset}" if self.label_offset else ""
        return (
            f'label {label}{offset} lies outside output "{self.output}", which has {classes} classes; '
            "check the labels, or give --label-offset"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement(_Mean):
    """Share of samples whose highest score is the float model's."""

    output: str

    name = "agreement"
    needs_reference = True

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> float:
        """1.0 where both pick the same class."""
        scores = class_scores(outputs, self.output)
        if not np.isfinite(scores).all():
            return 0.0
        return float(scores.argmax() == class_scores(_needed(reference, self.name), self.output).argmax())


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(_Mean):
    """Mean over samples of the cosine between outputs and the float model's, of the worst output each time."""

    outputs: tuple[str, ...]

    name = "cosine"
    needs_reference = True

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> float:
        """The lowest cosine of this sample's outputs; 0.0 where outputs are not finite."""
        pairs = _pairs(outputs, _needed(reference, self.name), self.outputs)
        return min(_cosine(own, other) for own, other in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanSquaredError(_Mean):
    """Mean squared difference from the float model's outputs, of the worst output of each sample."""

    outputs: tuple[str, ...]

    name = "mse"
    higher_is_better = False
    needs_reference = True
    unit = "squared output"

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> float:
        """The largest mean squared difference of this sample's outputs; infinite where they are not finite."""
        pairs = _pairs(outputs, _needed(reference, self.name), self.outputs)
        errors = [float(np.mean((own - other) ** 2)) if own.size else 0.0 for own, other in pairs]
        return max(error if np.isfinite(error) else float("inf") for error in errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pooled:
    """Shared ground of metrics over sums of squares: statistics are float64 [outputs, sums]."""

    outputs: tuple[str, ...]

    higher_is_better = True
    needs_labels = False
    needs_reference = True
    is_mean = False

    def value(self, statistics: Sequence[Any]) -> float:
        """The worst output's value over all samples."""
        return float(self.values(statistics, np.ones((1, len(statistics))))[0])

    def values(self, statistics: Sequence[Any], counts: Array) -> Array:
        """Values [R] where sample i counts `counts[r, i]` times."""
        table = np.asarray(statistics, dtype=np.float64)
        sums = np.tensordot(counts.astype(np.float64), table, axes=(1, 0))
        worst: Array = self._of_sums(sums).min(axis=1)
        return worst

    def _of_sums(self, sums: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sqnr(_Pooled):
    """Signal to noise against the float model in dB: all samples' signal over all samples' noise, worst output."""

    name = "sqnr"
    unit = "dB"

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> Array:
        """Signal and noise of each output, float64 [outputs, 2]."""
        pairs = _pairs(outputs, _needed(reference, self.name), self.outputs)
        rows = [(float(np.sum(other**2)), float(np.sum((own - other) ** 2))) for own, other in pairs]
        return np.asarray([(s, n if np.isfinite(n) else np.finfo(np.float64).max / 1e9) for s, n in rows])

    def _of_sums(self, sums: Array) -> Array:
        signal, noise = sums[..., 0], sums[..., 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 10.0 * np.log10(signal / noise)
        # Silence that stays silent is perfect; noise upon silence has no bound.
        ratio = np.where(noise == 0, SQNR_CEILING_DB, ratio)
        return np.clip(ratio, -SQNR_CEILING_DB, SQNR_CEILING_DB)


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledCosine(_Pooled):
    """Cosine with the float model over all samples together: for outputs of a single value."""

    name = "pooled_cosine"
    unit = "share"

    def statistic(self, outputs: Outputs, label: Any, reference: Outputs | None) -> Array:
        """Inner product and both squared norms of each output, float64 [outputs, 3]."""
        pairs = _pairs(outputs, _needed(reference, self.name), self.outputs)
        rows = [(np.sum(own * other), np.sum(own**2), np.sum(other**2)) for own, other in pairs]
        return np.asarray([row if np.isfinite(row).all() else (0.0, 1.0, row[2]) for row in rows])

    def _of_sums(self, sums: Array) -> Array:
        norm = np.sqrt(sums[..., 1] * sums[..., 2])
        both_zero = (sums[..., 1] == 0) & (sums[..., 2] == 0)
        cosine = np.divide(sums[..., 0], norm, out=np.zeros_like(norm), where=norm > 0)
        return np.where(both_zero, 1.0, cosine)


def _needed(reference: Outputs | None, name: str) -> Outputs:
    if reference is None:
        raise MetricError(f"{name} compares with the float model, whose outputs were not given")
    return reference


def _pairs(outputs: Outputs, reference: Outputs, names: Sequence[str]) -> list[tuple[Array, Array]]:
    """Own and float values [n] of each output, as float64; sizes that differ count as not finite."""
    pairs = []
    for name in names:
        if name not in outputs or name not in reference:
            missing = list(outputs) if name not in outputs else list(reference)
            raise MetricError(f'no output "{name}"{nearest(name, missing)}')
        own = np.asarray(outputs[name], dtype=np.float64).reshape(-1)
        other = np.asarray(reference[name], dtype=np.float64).reshape(-1)
        pairs.append((own if own.size == other.size else np.full_like(other, np.nan), other))
    return pairs


def _cosine(own: Array, other: Array) -> float:
    if not np.isfinite(own).all():
        return 0.0
    norm = float(np.linalg.norm(own) * np.linalg.norm(other))
    if norm == 0:
        return float(np.array_equal(own, other))
    return float(np.clip(np.dot(own, other) / norm, -1.0, 1.0))


# --------------------------------------------------------------------------- choice


def find_metric(
    name: str,
    *,
    outputs: Sequence[TensorSpec],
    has_labels: bool,
    options: Mapping[str, Any] | None = None,
    allow_code: bool = False,
) -> Metric:
    """The metric of this name for a model with these outputs.

    `auto`: top1 with labels for a classifier, else agreement for a classifier and cosine for the rest. `options`:
    `output` (name of the output that is judged), `label_offset`, and, for `map`, those of
    `vinoopt.accuracy.detection`. Metrics of other packages come from the entry-point group `vinoopt.metrics`;
    `module:attribute`, a metric or its factory, runs code and needs `allow_code`.
    Raises `MetricError` for an unknown name (with the nearest), an option that the metric lacks, missing labels,
    or outputs that do not fit.
    """
    chosen = {key: value for key, value in (options or {}).items() if value is not None}
    if name == "auto":
        name = _automatic(outputs, has_labels, chosen)
    if is_code(name):
        factory = import_attribute(name, allow_code=allow_code, error=MetricError)
    else:
        factory = _FACTORIES.get(name) or _plugged(name)
    is_ready = isinstance(factory, Metric) and not isinstance(factory, type)
    metric = factory if is_ready else factory(outputs=outputs, options=chosen)
    if not isinstance(metric, Metric):
        raise MetricError(f'metric "{name}": its factory gave {type(metric).__name__}, which is no Metric')
    if metric.needs_labels and not has_labels:
        raise MetricError(
            f'metric "{name}" needs labels; give --labels, or use --metric auto, which compares with the float model'
        )
    return metric


def metric_names() -> tuple[str, ...]:
    """Every name that `find_metric` knows, `auto` and plug-ins included, sorted."""
    return tuple(sorted({"auto", *_FACTORIES, *(point.name for point in _plug_ins())}))


_LEAST_DECISIONS = 8
"""Calls from which on one class that wins in all of them is taken for no class. A model that is sure of one class on
so few is judged by cosine then, which is the stricter."""
_MANY_CLASSES, _FEW_WINNERS, _TELLING = 16, 3, 20
"""Where no more than so few of so many classes ever win, in at least so many calls, they are no classes either: the
largest coordinate of a shape alternates between its outermost points."""
_UNIT = 1e-3
"""How near to 1 the length of all rows must be for an output that was normalised, as embeddings are."""


def looks_like_classifier(spec: TensorSpec) -> bool:
    """Whether an output is [B, C] or [B, C, 1, 1] with C of at least 2."""
    sizes = [size for size in spec.shape[1:] if size != 1]
    return len(spec.shape) >= 2 and len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] >= 2


def _holds_scores(spec: TensorSpec) -> bool:
    """Whether scores of classes are what an output of this shape usually holds: [B, C] or [B, C, 1, 1].

    One of [B, 1, N] is rather a signal, or a row of coordinates.
    """
    return looks_like_classifier(spec) and spec.shape[1] != 1


def _is_single_value(spec: TensorSpec) -> bool:
    return all(size == 1 for size in spec.shape[1:])


def _automatic(outputs: Sequence[TensorSpec], has_labels: bool, options: Mapping[str, Any]) -> str:
    judged = [spec for spec in outputs if options.get("output") in (None, spec.name)]
    is_classifier = looks_like_classifier if has_labels else _holds_scores
    if len(judged) == 1 and is_classifier(judged[0]):
        return "top1" if has_labels else "agreement"
    if has_labels:
        raise MetricError(
            f"no output looks like a classifier's ({_listed(outputs)}), so what the labels mean is not known; "
            "name a metric (--metric map for boxes), or leave the labels out to compare with the float model"
        )
    return "pooled_cosine" if judged and all(map(_is_single_value, judged)) else "cosine"


def judged_outputs(metric: Metric) -> tuple[str, ...] | None:
    """Names of the outputs that a metric looks at, where it has one `output` or is of this package; else None."""
    one, several = getattr(metric, "output", None), getattr(metric, "outputs", None)
    if isinstance(one, str):
        return (one,)
    is_ours = isinstance(metric, Cosine | MeanSquaredError | _Pooled)
    return tuple(several) if is_ours and several is not None else None


def never_decides(metric: Metric, reference: Iterable[Outputs]) -> bool:
    """Whether `agreement` would compare what are no class scores, by the float model's outputs, one mapping per call.

    So it is where the largest value is at one place on all samples, or at few of many, as of coordinates; and where
    all rows have the length 1 and negative values, as embeddings have.
    """
    if not isinstance(metric, Agreement):
        return False
    rows = [np.asarray(call[metric.output], np.float64).reshape(len(call[metric.output]), -1) for call in reference]
    if len({row.shape[1] for row in rows}) > 1:
        return True
    scores = np.concatenate(rows)
    if scores.shape[1] > 2 and (scores < 0).any() and np.allclose(np.linalg.norm(scores, axis=1), 1.0, atol=_UNIT):
        return True
    winners = len(np.unique(scores.argmax(axis=1)))
    is_few = scores.shape[1] >= _MANY_CLASSES and winners <= _FEW_WINNERS and len(rows) >= _TELLING
    return is_few or (winners == 1 and len(rows) >= _LEAST_DECISIONS)


def _listed(outputs: Sequence[TensorSpec]) -> str:
    return ", ".join(f'"{s.name}" [{", ".join(map(str, s.shape))}]' for s in outputs) or "none"


def _classifier(name: str, outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> TensorSpec:
    """The output that is judged: the one that is named, else the only one that looks like a classifier's."""
    if wanted := options.get("output"):
        named = next((spec for spec in outputs if spec.name == wanted), None)
        if named is None:
            raise MetricError(f'no output "{wanted}"{nearest(wanted, [s.name for s in outputs])}')
        if not looks_like_classifier(named):
            raise MetricError(
                f"{name} needs class scores of shape [B, C]; {_listed([named])} holds something else"
            )
        return named
    found = [spec for spec in outputs if looks_like_classifier(spec)]
    if len(found) != 1:
        what = "several outputs look" if found else "no output looks"
        raise MetricError(
            f"{name}: {what} like class scores of shape [B, C] ({_listed(outputs)}); "
            + ("name one with --metric-option output=NAME" if found else "use cosine, sqnr or mse")
        )
    return found[0]


def _judged(outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> tuple[str, ...]:
    wanted = options.get("output")
    names = tuple(spec.name for spec in outputs if wanted in (None, spec.name))
    if not names:
        raise MetricError(f'no output "{wanted}"{nearest(str(wanted), [s.name for s in outputs])}')
    return names


def check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `MetricError` for an option that the metric does not have."""
    for key in options:
        if key not in known:
            raise MetricError(f'metric "{name}" has no option "{key}"{nearest(key, list(known))}')


def _top(k: int) -> Callable[..., Metric]:
    def factory(*, outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> Metric:
        check_options(f"top{k}", options, ("output", "label_offset"))
        spec = _classifier(f"top{k}", outputs, options)
        classes = next(size for size in spec.shape[1:] if size != 1)
        offset = int(options.get("label_offset", 0))
        return TopK(k=k, output=spec.name, classes=int(classes), label_offset=offset)

    return factory


def _agreement(*, outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> Metric:
    check_options("agreement", options, ("output", "label_offset"))
    return Agreement(output=_classifier("agreement", outputs, options).name)


def _cosine_metric(*, outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> Metric:
    check_options("cosine", options, ("output",))
    names = _judged(outputs, options)
    meaningful = tuple(s.name for s in outputs if s.name in names and not _is_single_value(s))
    if not meaningful:
        raise MetricError("the cosine of single values is only their sign; use pooled_cosine, sqnr or mse")
    return Cosine(outputs=meaningful)


def _over_outputs(name: str, kind: Callable[..., Metric]) -> Callable[..., Metric]:
    def factory(*, outputs: Sequence[TensorSpec], options: Mapping[str, Any]) -> Metric:
        check_options(name, options, ("output",))
        return kind(outputs=_judged(outputs, options))

    return factory


_FACTORIES: dict[str, Callable[..., Metric]] = {
    "top1": _top(1),
    "top5": _top(5),
    "agreement": _agreement,
    "cosine": _cosine_metric,
    "pooled_cosine": _over_outputs("pooled_cosine", PooledCosine),
    "sqnr": _over_outputs("sqnr", Sqnr),
    "mse": _over_outputs("mse", MeanSquaredError),
}


# Loaded by name like a plug-in, so that a run without boxes never imports it.
_SHIPPED = (EntryPoint(name="map", value="vinoopt.accuracy.detection:mean_average_precision", group=GROUP),)


def _plug_ins() -> tuple[EntryPoint, ...]:
    return (*_SHIPPED, *entry_points(group=GROUP))


def _plugged(name: str) -> Callable[..., Any]:
    """The factory behind an entry point; raises `MetricError` where none is found or it fails to load."""
    points = [point for point in _plug_ins() if point.name == name]
    if not points:
        known = list(metric_names())
        raise MetricError(f'unknown metric "{name}"{nearest(name, known)}; known: {", ".join(known)}')
    try:
        factory: Callable[..., Any] = points[0].load()
    except (ImportError, AttributeError) as exc:
        raise MetricError(f'metric "{name}" ({points[0].value}) cannot be loaded: {exc}') from exc
    return factory
