"""Least-squares refit of the layers that have lost columns, and of those behind them.

`closed_form` and `refit_local` use the statistics of the float model alone: cheap enough for every width of
every group. `refit_sequential` regresses the float model's outputs on what the pruned model itself computes,
layer by layer in topological order, so that later layers make up for the errors of earlier ones (He, Zhang and
Sun 2017, arXiv 1707.06168, section 3.2), with the error of the residual path added to the target. Layers that have
lost nothing take part: in networks of few channels they win back most of what the narrow ones lose.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.compression.activations import (
    ActivationStream,
    Sample,
    Tensor,
    iterate_calls,
    open_batch,
    samples_per_call,
)
from vinoopt.compression.contractions import (
    Contraction,
    bias_vector,
    biased_output,
    index_contractions,
    replace_bias,
    replace_weights,
    residual_join,
    select_contractions,
    weight_matrix,
)
from vinoopt.compression.im2col import RowReader
from vinoopt.compression.regression import EXACT_COLUMNS, PairedSums, solve, solve_rows, threads_for
from vinoopt.compression.saliency import Moments, Statistics
from vinoopt.compression.surgery import LayerCut, PrunedModel

Matrix: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the layers done and all layers."""

_ROWS, _ROWS_BYTES = 4096, 64 << 20
"""Rows that wait for their product, or their bytes as they come: what is reached first."""
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Tried where the ridge is chosen on held-back samples; see `RefitSettings.ridge` for the unit."""
_HELD_BACK = 8
"""Every so many-th sample is held back. It never enters a fit: layers behind would judge themselves by inputs that
the layers before have already been fitted to, and choose too weak a ridge."""
_SAMPLES_PER_CALL = 16
_LEAST_CALLS = 2 * _HELD_BACK
_MOST_SQUARES = 6144**2
"""Entries of a layer's second moment beyond which only `refit_local` takes part, whose rows are bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitSettings:
    """How a sequential refit samples, regularises and stops."""

    ridge: float | None = None
    """Pull toward the old weights, in units of the columns' mean variance times columns per row; None: chosen per
    layer on held-back samples."""
    residual: bool = True
    """Whether the target of a layer that feeds a residual add is the sum rather than its own output."""
    behind: bool = True
    """Whether layers that have lost nothing, but come after one that has, are refitted too."""
    ignored: frozenset[str] = frozenset()
    """Layers that keep their weights if they have lost nothing."""
    rows_per_sample: int = 64
    seed: int = 0
    memory_bytes: int = 3 << 28
    """For the activations held between layers, of both models together."""
    time_limit_s: float | None = None
    """Layers that are not reached in time keep their weights."""


class Aims:
    """What refits of one float model on one set of samples aim at, kept from one to the next up to a bound.

    Rows of the float model's outputs are the same for every pruned candidate; once they are all here, the float model
    need not run beside it again.
    """

    def __init__(self, *, memory_bytes: int = 1 << 29) -> None:
        self._room = memory_bytes
        self._kept: dict[tuple[object, ...], list[NDArray[np.floating[Any]]]] = {}

    def of(
        self, key: tuple[object, ...], make: Callable[[], Iterator[NDArray[np.floating[Any]]]]
    ) -> Iterator[NDArray[np.floating[Any]]]:
        """Call by call what is kept under `key`, or what is made now, and kept if it fits."""
        if key in self._kept:
            yield from self._kept[key]
            return
        made: list[NDArray[np.floating[Any]]] = []
        room = self._room
        for each in make():
            room -= each.nbytes
            if room >= 0:
                made.append(each)
            else:
                made.clear()
            yield each
        if room >= 0:
            self._kept[key], self._room = made, room


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LocalRefit:
    """Weights of the columns that stay, and what the bias gains."""

    weights: Matrix
    """[kept columns, outputs]"""
    bias_shift: Matrix
    """[outputs]"""
    error: float
    """Share of the outputs' variance that is lost, on the samples of the statistics."""


def closed_form(
    moments: Moments, weights: Matrix, kept_columns: Indices, *, ridge: float = 1.0, group: int = 0
) -> LocalRefit:
    """The weights of `kept_columns` that reproduce `weights` ([columns, outputs]) best on the moments' samples.

    Ridge regression pulled toward the weights as they were; `ridge` counts in units of the kept columns' mean
    variance times their number per row, so that it fades as rows grow. The bias takes up the change of the mean.
    """
    removed = np.setdiff1d(np.arange(len(weights)), kept_columns)
    scale = ridge * len(kept_columns) / moments.rows
    if moments.second is not None:
        covariance = moments.covariance(group)
        cross = covariance[np.ix_(kept_columns, removed)] @ weights[removed]
        within = covariance[np.ix_(kept_columns, kept_columns)]
        change = solve(within, cross, scale)
        lost = float(
            np.einsum("ij,ij->", covariance[np.ix_(removed, removed)] @ weights[removed], weights[removed])
        )
        lost += float(np.einsum("ij,ij->", within @ change - 2 * cross, change))
        variance = float(np.einsum("ij,ij->", covariance @ weights, weights))
    else:
        rows = moments.centred_rows(group)
        target = (rows[:, removed] @ weights[removed].astype(rows.dtype)).astype(np.float64)
        change = solve_rows(rows[:, kept_columns], target, scale)
        lost = float(np.square(target - rows[:, kept_columns] @ change).sum()) / len(rows)
        variance = float(np.square(rows @ weights.astype(rows.dtype)).sum()) / len(rows)
    mean = moments.mean[group]
    return LocalRefit(
        weights=weights[kept_columns] + change,
        bias_shift=mean[removed] @ weights[removed] - mean[kept_columns] @ change,
        error=max(lost, 0.0) / max(variance, np.finfo(np.float64).tiny),
    )


def mean_outputs(model: ov.Model, statistics: Statistics) -> dict[str, Matrix]:
    """Layer -> mean of its outputs before the bias: what stands for it once it has no columns left to read."""
    contractions = index_contractions(model)
    return {
        name: np.einsum("gk,gko->go", moments.mean, weight_matrix(contractions[name])).ravel()
        for name, moments in statistics.moments.items()
    }


def refit_local(
    original: ov.Model, pruned: PrunedModel, statistics: Statistics, *, ridge: float = 1.0
) -> ov.Model:
    """The pruned model with `closed_form` weights in every layer that has lost columns.

    `statistics` are those of `original`, the model that was pruned. Raises `PlanError` for a layer without
    statistics.
    """
    result = pruned.model.clone()
    whole, small = index_contractions(original), index_contractions(result)
    for cut in pruned.consumers:
        source, layer = whole[cut.name], small[cut.name]
        if _is_shared(layer):  # what is best for one reader is not for the other
            continue
        full, moments = weight_matrix(source), statistics[cut.name]
        matrix, shift = [], []
        for group, (columns, rows) in enumerate(_places(source, cut)):
            with threads_for(source.columns):
                refit = closed_form(moments, full[group][:, rows], columns, ridge=ridge, group=group)
            matrix.append(refit.weights)
            shift.append(refit.bias_shift)
        bias = bias_vector(layer)
        moved = np.concatenate(shift)
        replace_weights(layer, np.stack(matrix))
        replace_bias(layer, moved if bias is None else bias + moved)
    return result


def _places(source: Contraction, cut: LayerCut) -> Iterator[tuple[Indices, Indices]]:
    """Per group: the columns of its matrix that are kept, and the outputs."""
    channels = source.columns // source.taps
    for group in range(source.groups):
        kept = cut.kept_columns - group * channels
        kept = kept[(kept >= 0) & (kept < channels)]
        rows = cut.kept_rows - group * source.outputs
        spread = (kept[:, None] * source.taps + np.arange(source.taps)).ravel()
        yield spread, rows[(rows >= 0) & (rows < source.outputs)]


# --------------------------------------------------------------------------- sequential


def refit_sequential(
    original: ov.Model,
    pruned: PrunedModel,
    samples: Iterable[Sample],
    *,
    statistics: Statistics | None = None,
    settings: RefitSettings = RefitSettings(),
    aims: Aims | None = None,
    progress: Progress | None = None,
) -> ov.Model:
    """The pruned model refitted layer by layer behind the first change, each layer on the pruned model's activations.

    With `statistics` of `original` it starts from `refit_local`, which is better wherever samples are few. A layer
    changes only where that lowers its error on samples held back from all fits (every eighth; with fewer than
    eight samples nothing changes). `aims` are handed on between refits of one `original` on the same samples, or the
    first of them. Deterministic for a seed, but for a time limit. Raises `DataError` for samples that do not fit.
    """
    result = pruned.model.clone() if statistics is None else refit_local(original, pruned, statistics)
    targets = index_contractions(result)
    names = _refittable(original, pruned, targets, settings)
    every = {name: np.arange(targets[name].groups * targets[name].outputs) for name in names}
    kept_rows = every | {cut.name: cut.kept_rows for cut in (*pruned.consumers, *pruned.producers)}
    walk = _Walk(original, result, names, (samples, settings, aims))
    for done, layer in enumerate(walk.layers(), start=1):
        with threads_for(layer.columns):
            fit = best_fit(*walk.paired_sums(layer, kept_rows[layer.name]), settings.ridge)
        if fit is not None:
            change, shift = fit
            for contraction in (layer, targets[layer.name]):
                bias = bias_vector(contraction)
                replace_weights(contraction, weight_matrix(contraction) + change)
                replace_bias(contraction, shift.ravel() + (0.0 if bias is None else bias))
        if progress is not None:
            progress(done, len(names))
    return result


def _refittable(
    original: ov.Model, pruned: PrunedModel, targets: Mapping[str, Contraction], settings: RefitSettings
) -> list[str]:
    """Layers that have lost columns, and those behind the first change; none that shares its weights."""
    narrower = {cut.name for cut in pruned.consumers}
    changed = {*narrower, *(cut.name for cut in pruned.producers)}
    order = list(index_contractions(original))
    first = next((place for place, name in enumerate(order) if name in changed or name not in targets), len(order))
    behind = [name for name in order[first:] if name in targets and (settings.behind or name in narrower)]
    return [
        name
        for name in behind
        if can_refit(targets[name]) and (name in narrower or name not in settings.ignored)
    ]


def can_refit(layer: Contraction) -> bool:
    """Whether a sequential refit takes the layer, as far as its own shape and weights go."""
    return not _is_shared(layer) and layer.groups * layer.columns**2 <= _MOST_SQUARES


def _is_shared(layer: Contraction) -> bool:
    return len(layer.node.input_value(layer.weight_port).get_target_inputs()) > 1


def best_fit(fitted: PairedSums, held: PairedSums, ridge: float | None) -> tuple[Matrix, Matrix] | None:
    """The change that lowers the error on held-back rows most; None where none lowers it."""
    if not fitted.rows or not held.rows:
        return None
    best, least = None, held.ee / held.rows
    ridges = (np.inf, *(RIDGES if ridge is None else (ridge,)))
    tried: dict[int, float] = {}
    for place in _by_promise(len(ridges), tried, is_costly=fitted.x.shape[1] > EXACT_COLUMNS):
        change = fitted.solve(ridges[place])
        tried[place] = held.error(*change)
        if tried[place] < least:
            best, least = change, tried[place]
    return best


def _by_promise(count: int, tried: Mapping[int, float], *, is_costly: bool) -> Iterator[int]:
    """Which ridges to try, by what those tried so far brought; all in order where solving costs little.

    The error on held-back rows has one valley over the ridge, or nearly: from the middle down to where it rises
    again on either side. The bias alone, which needs no solution, comes first.
    """
    if not is_costly:
        yield from range(count)
        return
    yield 0
    middle = count // 2
    yield middle
    for step in (-1, 1):
        place = middle + step
        while 0 < place < count and place not in tried:
            yield place
            if tried[place] >= tried[place - step]:
                break
            place += step
        if tried.get(middle + step, np.inf) < tried[middle]:
            return  # the valley lies on this side


def correct_bias(
    original: ov.Model,
    compressed: ov.Model,
    samples: Iterable[Sample],
    layers: Sequence[str],
    *,
    kept_rows: Mapping[str, Indices] | None = None,
    settings: RefitSettings = RefitSettings(),
    aims: Aims | None = None,
) -> ov.Model:
    """The compressed model with the biases of `layers` set so that their mean outputs are the float model's.

    Layer by layer in topological order, each seeing the layers before it corrected; a layer that feeds a residual
    add is judged behind it (see `RefitSettings.residual`). `compressed` may be pruned and quantized; `kept_rows`
    says which channels of `original` a layer still makes, all where it is not named; `aims` as for
    `refit_sequential`. After Nagel et al. 2019,
    arXiv 1906.04721, section 4.2, with means measured on both sides. A layer changes only where that brings its
    means on held-back samples closer. Raises `PlanError` for a name that is no contraction.
    """
    result = compressed.clone()
    targets = index_contractions(result)
    walk = _Walk(original, compressed, layers, (samples, settings, aims))
    for layer in walk.layers():
        shift = walk.mean_error(layer, (kept_rows or {}).get(layer.name))
        if shift is not None:
            for contraction in (layer, targets[layer.name]):
                bias = bias_vector(contraction)
                replace_bias(contraction, shift + (0.0 if bias is None else bias))
    return result


class _Rows:
    """Gathers rows for sums: a product over many rows at once costs less than one for every call."""

    def __init__(self, sums: PairedSums) -> None:
        self._sums = sums
        self._waiting: list[tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]] = []
        self._bytes = self._rows = 0

    def add(self, x: NDArray[np.floating[Any]], e: NDArray[np.floating[Any]]) -> None:
        """Rows as `PairedSums.add` takes them."""
        self._waiting.append((x, e))
        self._bytes += x.nbytes + e.nbytes
        self._rows += x.shape[1]
        if self._bytes >= _ROWS_BYTES or self._rows >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Add what is waiting."""
        waiting, self._waiting, self._bytes, self._rows = self._waiting, [], 0, 0
        if len(waiting) == 1:
            self._sums.add(*waiting[0])
        elif waiting:
            x, e = (np.concatenate(parts, axis=1) for parts in zip(*waiting, strict=True))
            self._sums.add(x, e)


class _Walk:
    """Walks through the float model and a compressed one side by side, layer by layer in topological order."""

    def __init__(
        self,
        original: ov.Model,
        compressed: ov.Model,
        names: Sequence[str],
        data: tuple[Iterable[Sample], RefitSettings, Aims | None],
    ) -> None:
        samples, self._settings, aims = data
        self._aims = aims or Aims(memory_bytes=0)
        self._ends_at = None
        if self._settings.time_limit_s is not None:
            self._ends_at = time.monotonic() + self._settings.time_limit_s
        whole, small = original.clone(), compressed.clone()
        at_once = min(
            (samples_per_call([each.data], most=_SAMPLES_PER_CALL) for each in index_contractions(whole).values()),
            default=1,
        )
        open_batch(whole, small)
        known = index_contractions(whole)
        self._pairs = [(known[each.name], each) for each in select_contractions(small, names)]
        for _, layer in self._pairs:
            if bias_vector(layer) is None:  # the stream has to know the Add before it starts
                replace_bias(layer, np.zeros(layer.groups * layer.outputs))
        listed = list(samples)
        self._samples = len(listed)
        calls = list(iterate_calls(whole, listed, size=_even_size(len(listed), at_once), also=[small]))
        room = self._settings.memory_bytes // 2
        self._whole = ActivationStream(whole, calls, memory_bytes=room)
        self._small = ActivationStream(small, calls, memory_bytes=room)
        self._waiting = {layer.node for _, layer in self._pairs}
        self._source: Contraction | None = None

    def layers(self) -> Iterator[Contraction]:
        """The layers of the compressed model, both streams standing before them."""
        for source, layer in self._pairs:
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                return
            self._small.advance(layer.node)
            self._source = source
            yield layer
            self._waiting.discard(layer.node)

    def _aimed(
        self, target: ov.Output, kind: tuple[object, ...], take: Callable[[Tensor], NDArray[np.floating[Any]]]
    ) -> Iterator[NDArray[np.floating[Any]]]:
        """What `take` makes of the float model's `target`, call by call."""

        def make() -> Iterator[NDArray[np.floating[Any]]]:
            if self._source is not None:
                self._whole.advance(self._source.node)
            return (take(value) for (value,) in self._whole.read([target]))

        place = (target.get_node().get_friendly_name(), target.get_index())
        return self._aims.of((*kind, *place, self._whole.calls, self._samples), make)

    def paired_sums(self, layer: Contraction, kept_rows: Indices) -> tuple[PairedSums, PairedSums]:
        """Sums over sampled rows of what the layer reads and the error of its output: for the fit, and held back."""
        target, _, other = self._meeting(layer)
        wanted = [layer.data, *([other] if other is not None else [])]
        weights = weight_matrix(layer)
        bias = bias_vector(layer)
        reader = RowReader(layer)
        count, seed = self._settings.rows_per_sample, [self._settings.seed, zlib.crc32(layer.name.encode())]
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)

        def take(value: Tensor) -> NDArray[np.floating[Any]]:
            return reader.output_rows(value, reader.positions(value.shape, count, same))

        both = [PairedSums.empty(*weights.shape) for _ in range(2)]
        batches = [_Rows(sums) for sums in both]
        start = 0
        kind = ("rows", layer.name, count, self._settings.seed)
        for aim, tensors in zip(self._aimed(target, kind, take), self._small.read(wanted), strict=True):
            shape = reader.output_shape(tensors[0].shape)
            positions = reader.positions(shape, count, rng)
            x = reader.input_rows(tensors[0], shape, positions)
            error = aim[:, kept_rows]
            if other is not None:
                error = error - reader.output_rows(tensors[1], positions)
            if bias is not None:
                error = error - bias.astype(error.dtype)
            error = error.reshape(len(error), layer.groups, layer.outputs).transpose(1, 0, 2)
            error = error - x @ weights.astype(x.dtype)
            is_held = np.repeat(held_back(len(positions), start), positions.shape[1])
            for batch, chosen in zip(batches, (~is_held, is_held), strict=True):
                batch.add(x[:, chosen], error[:, chosen])
            start += len(positions)
        for batch in batches:
            batch.flush()
        return both[0], both[1]

    def mean_error(self, layer: Contraction, kept_rows: Indices | None) -> Matrix | None:
        """Mean over samples of the layer's error per channel; None where held-back samples do not bear it out."""
        target, made, _ = self._meeting(layer)
        reader = RowReader(layer)
        errors = []
        aimed = self._aimed(target, ("means", layer.name), reader.channel_means)
        for aim, (value,) in zip(aimed, self._small.read([made]), strict=True):
            errors.append((aim if kept_rows is None else aim[:, kept_rows]) - reader.channel_means(value))
        every = np.concatenate(errors)
        is_held = held_back(len(every))
        if is_held.all() or not is_held.any():
            return None
        fitted, held = every[~is_held].mean(axis=0), every[is_held].mean(axis=0)
        if np.square(held - fitted).sum() >= np.square(held).sum():
            return None
        shift: Matrix = every.mean(axis=0)
        return shift

    def _meeting(self, layer: Contraction) -> tuple[ov.Output, ov.Output, ov.Output | None]:
        """Where the two models are compared: in the float one, in the compressed one, and the other branch there.

        Behind the residual add where the layer feeds one, once all layers behind the other branch are done (their
        fit would change it); otherwise behind the layer itself, with no other branch.
        """
        if self._source is None:
            raise RuntimeError("no layer has been reached yet")
        joins = residual_join(self._source), residual_join(layer)
        if self._settings.residual and joins[0] is not None and joins[1] is not None:
            total, other = joins[1]
            if not self._small.depends_on(other, self._waiting):
                return joins[0][0], total, other
        return biased_output(self._source), biased_output(layer), None


def _even_size(count: int, most: int) -> int:
    """How many samples to run at once: if possible a divisor, so that every stretch is compiled for one shape.

    Few enough that calls can be held back where a tensor inside has no axis of samples.
    """
    most = max(min(most, count // _LEAST_CALLS), 1)
    divisor = max(size for size in range(1, most + 1) if count % size == 0)
    return divisor if 2 * divisor >= most else most


def held_back(count: int, start: int = 0) -> NDArray[np.bool_]:
    """Which of `count` samples, the first of them number `start`, are held back."""
    is_held: NDArray[np.bool_] = (start + np.arange(count)) % _HELD_BACK == _HELD_BACK - 1
    return is_held
