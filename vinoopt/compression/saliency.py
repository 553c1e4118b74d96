"""Which units matter: calibration statistics collected once, and the order in which units leave their group.

Memory and time of the statistics: a contraction with K input columns needs 16 K^2 bytes while it is collected,
8 K^2 to keep (4 K^2 beyond 1024 columns), and 2 n K^2 operations for n rows. A 3x3 convolution of 512 channels
(K = 4608) takes 340 MB and, for 16,000 rows, 7e11 operations: some seconds on two cores. Where 16 K^2 is more
than the memory allowed (K > 8192 by default), the moment gives way to at most `MAX_ROWS` sampled rows of 4 K
bytes each. Their own moment has that mean, and a relative error of about sqrt(K / rows) in spectral norm, so that
solutions lean more on the ridge.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.compression.activations import (
    Part,
    Sample,
    in_order,
    iterate_calls,
    open_batch,
    samples_per_call,
)
from vinoopt.compression.contractions import (
    Array,
    Contraction,
    index_contractions,
    select_contractions,
    weight_matrix,
)
from vinoopt.compression.elimination import Indices, Matrix, Reader, nested_damage, order_by_surgery
from vinoopt.compression.groups import Coupling
from vinoopt.compression.im2col import RowReader
from vinoopt.compression.regression import EXACT_COLUMNS, threads_for
from vinoopt.errors import PlanError
from vinoopt.serde import nearest

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the work done and the whole work, in samples."""

MAX_ROWS = 4096
_SAMPLES_PER_CALL = 16
_LEAST_DAMPING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Mean and second moment of the columns that a contraction reads."""

    rows: int
    mean: Matrix
    """[groups, columns]"""
    second: Array | None
    """[groups, columns, columns], mean of x x^T; None where there are too many columns."""
    sampled: Array | None = None
    """[groups, rows, columns], instead of `second`."""

    def covariance(self, group: int = 0) -> Matrix:
        """[columns, columns] of one group."""
        mean = self.mean[group]
        if self.second is not None:
            second: Matrix = self.second[group].astype(np.float64)
            return second - np.outer(mean, mean)
        centred = self.centred_rows(group)
        covariance: Matrix = (centred.T @ centred).astype(np.float64) / len(centred)
        return covariance

    def centred_rows(self, group: int = 0) -> Array:
        """[rows, columns] of one group, where rows were kept instead of the second moment."""
        if self.sampled is None:
            raise PlanError("these statistics hold a second moment, not rows")
        rows: Array = self.sampled[group] - self.mean[group].astype(self.sampled.dtype)
        return rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """Moments per contraction; contractions that read the same columns share them."""

    moments: Mapping[str, Moments]

    def __getitem__(self, layer: str) -> Moments:
        """The moments of a layer; `PlanError` where none were collected."""
        if layer not in self.moments:
            raise PlanError(f'no statistics for layer "{layer}"{nearest(layer, list(self.moments))}')
        return self.moments[layer]


def collect_statistics(
    model: ov.Model,
    layers: Sequence[str],
    samples: Iterable[Sample],
    *,
    rows_per_sample: int = 64,
    seed: int = 0,
    memory_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Statistics:
    """Moments of the input columns of `layers`, from rows at random output positions, in float32 on the CPU.

    Each sample gives `rows_per_sample` rows (all, where there are fewer). Layers are taken in turns of at most
    `memory_bytes` of moments, one pass over `samples` per turn; a layer that is larger alone keeps sampled rows
    instead (see the module's docstring). The tensors of one call of up to 16 samples come on top.
    Raises `PlanError` for a name that is no contraction with constant weights, or a depthwise convolution,
    from which single channels cannot be removed; `DataError` for samples that do not fit.
    """
    calls = samples if isinstance(samples, Collection) else list(samples)
    graph = model.clone()
    sizes = {name: each.data for name, each in index_contractions(graph).items()}
    size = samples_per_call([sizes[name] for name in dict.fromkeys(layers) if name in sizes], most=_SAMPLES_PER_CALL)
    open_batch(graph)
    turns = _turns(_collectors(graph, layers, (rows_per_sample, seed, memory_bytes)), memory_bytes)
    done, total = 0, len(turns) * len(calls)
    finished: dict[str, Moments] = {}
    for number, turn in enumerate(turns, start=1):
        part = Part([collector.data for collector in turn], graph.get_parameters())
        for call in iterate_calls(graph, calls, size=size):
            for collector, tensor in zip(turn, part.run(in_order(graph, call)), strict=True):
                collector.read(tensor)
            if progress is not None:
                done = min(done + next(iter(call.values())).shape[0], number * len(calls))
                progress(done, total)
        for collector in turn:
            moments = collector.finish()
            finished.update(dict.fromkeys(collector.names, moments))
    return Statistics(moments=MappingProxyType(finished))


class _Collector:
    """Sums the moments of one tensor as the contractions in `names` read it."""

    def __init__(self, contraction: Contraction, sampling: tuple[int, int, int]) -> None:
        rows_per_sample, seed, memory_bytes = sampling
        self.names = [contraction.name]
        self.data = contraction.data
        dense_bytes = 16 * contraction.groups * contraction.columns**2
        row_bytes = 4 * contraction.groups * contraction.columns
        self._is_sampled = dense_bytes > memory_bytes
        self._room = max(2, min(MAX_ROWS, memory_bytes // row_bytes))
        self.memory_bytes = self._room * row_bytes if self._is_sampled else dense_bytes
        self._reader = RowReader(contraction)
        self._rows_per_sample = rows_per_sample
        self._rng = np.random.default_rng([seed, zlib.crc32(contraction.name.encode())])
        self._count = 0
        self._mean = np.zeros((contraction.groups, contraction.columns))
        self._second: Matrix | None = None
        self._sampled: Array | None = None

    def read(self, tensor: Array) -> None:
        """Add the rows of one call."""
        shape = self._reader.output_shape(tensor.shape)
        positions = self._reader.positions(shape, self._rows_per_sample, self._rng)
        rows = self._reader.input_rows(tensor, shape, positions)
        self._mean += rows.sum(axis=1, dtype=np.float64)
        if self._is_sampled:
            self._sample(rows)
        else:
            groups, _, columns = rows.shape
            if self._second is None:
                self._second = np.zeros((groups, columns, columns))
            exact = rows.astype(np.float64 if columns <= EXACT_COLUMNS else np.float32, copy=False)
            with threads_for(columns):
                for group, part in enumerate(exact):
                    self._second[group] += part.T @ part
        self._count += rows.shape[1]

    def _sample(self, rows: Array) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R): every row seen so far is kept with the same chance."""
        room = max(0, self._room - self._count)
        head = rows[:, :room]
        self._sampled = (
            head.copy() if self._sampled is None else np.concatenate([self._sampled, head], axis=1)
        )
        for offset in range(head.shape[1], rows.shape[1]):
            place = int(self._rng.integers(self._count + offset + 1))
            if place < self._room:
                self._sampled[:, place] = rows[:, offset]

    def finish(self) -> Moments:
        """The moments of all rows read."""
        second = None
        if self._second is not None:
            self._second /= self._count
            is_large = self._second.shape[-1] > EXACT_COLUMNS
            second = self._second.astype(np.float32) if is_large else self._second
        mean = self._mean / self._count
        self._second = None
        return Moments(rows=self._count, mean=mean, second=second, sampled=self._sampled)


def _collectors(graph: ov.Model, layers: Sequence[str], sampling: tuple[int, int, int]) -> list[_Collector]:
    """One per tensor and way of reading it, in topological order of their first reader."""
    found: dict[tuple[object, ...], _Collector] = {}
    for contraction in select_contractions(graph, layers):
        if contraction.is_depthwise:
            raise PlanError(
                f'"{contraction.name}" is a depthwise convolution, which passes channels on; '
                "collect statistics for the contractions behind it"
            )
        attributes = contraction.node.get_attributes()
        key = (
            contraction.data.get_node().get_name(),
            contraction.data.get_index(),
            contraction.type,
            contraction.data_port,
            contraction.groups,
            contraction.columns,
            contraction.taps,
            str(sorted(attributes.items())),
            tuple(contraction.node.input_value(contraction.weight_port).get_shape())[-2:]
            * (contraction.taps > 1),
        )
        if key in found:
            found[key].names.append(contraction.name)
        else:
            found[key] = _Collector(contraction, sampling)
    return list(found.values())


def _turns(collectors: Sequence[_Collector], memory_bytes: int) -> list[list[_Collector]]:
    """Collectors in passes of at most `memory_bytes` of moments."""
    turns: list[list[_Collector]] = []
    used = 0
    for collector in collectors:
        if not turns or used + collector.memory_bytes > memory_bytes:
            turns.append([])
            used = 0
        turns[-1].append(collector)
        used += collector.memory_bytes
    return turns


# --------------------------------------------------------------------------- order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnitOrder:
    """In which order the units of a group leave, and what their readers are expected to lose."""

    group: str
    order: tuple[int, ...]
    """The unit that goes first comes first."""
    damage: Matrix
    """[units + 1]: loss when so many units are kept and the readers refitted, as a share of the variance of
    their outputs, summed over the readers; on the statistics' own samples."""

    def kept(self, width: int) -> tuple[int, ...]:
        """The units that stay at this width, in ascending order."""
        return tuple(sorted(self.order[len(self.order) - width :]))


Criterion: TypeAlias = Callable[[Sequence[Reader]], Indices]


def order_units(
    model: ov.Model,
    coupling: Coupling,
    statistics: Statistics,
    *,
    criterion: str = "obs",
    ridge: float = 1.0,
) -> dict[str, UnitOrder]:
    """Group -> the order in which its units leave, by the damage to the outputs of all layers that read them.

    `model` is the float model of `coupling` and `statistics`. Criteria: `obs`, greedy elimination with the
    remaining columns adjusted (see `elimination`); `energy`, the variance of a unit's columns times its weights
    squared, which is the damage without adjustment and correlation; `l1`, the sum of the weights' absolute
    values. Each reader counts relative to the variance (for `l1`, the sum) of its outputs. Columns are adjusted
    against a ridge of `ridge` times their mean variance and number per row, so that few samples do not promise
    more than they can hold. Raises `PlanError` for an unknown criterion and for layers without statistics.
    """
    if criterion not in CRITERIA:
        raise PlanError(f'unknown criterion "{criterion}"{nearest(criterion, list(CRITERIA))}')
    contractions = index_contractions(model)
    orders: dict[str, UnitOrder] = {}
    for group in coupling.groups:
        readers = [
            _reader(contractions[units.name], statistics[units.name], (units.unit_of, group.units), ridge)
            for units in coupling.columns[group.name]
        ]
        with threads_for(0):  # thousands of small products
            order = CRITERIA[criterion](readers)
            damage = np.sum([nested_damage(reader, order) for reader in readers], axis=0)
        orders[group.name] = UnitOrder(group=group.name, order=tuple(order.tolist()), damage=damage)
    return orders


def _reader(
    contraction: Contraction, moments: Moments, seen: tuple[NDArray[np.int64], int], ridge: float
) -> Reader:
    """The contraction as linear outputs of centred columns, its groups laid side by side."""
    matrix = weight_matrix(contraction)
    unit_of, units = seen
    unit_of_column = np.repeat(unit_of, contraction.taps)
    if moments.second is None:
        return _reduced(moments, matrix, (unit_of_column, units), ridge)
    groups, columns, outputs = matrix.shape
    covariance = np.zeros((groups * columns, groups * columns))
    weights = np.zeros((groups * columns, groups * outputs))
    for group in range(groups):
        here = slice(group * columns, (group + 1) * columns)
        covariance[here, here] = moments.covariance(group)
        weights[here, group * outputs : (group + 1) * outputs] = matrix[group]
    return Reader(
        covariance=covariance,
        weights=weights,
        unit_columns=_columns_of(unit_of_column, units),
        damping=max(ridge * columns / moments.rows, _LEAST_DAMPING),
    )


def _columns_of(unit_of_column: NDArray[np.int64], units: int) -> tuple[Indices, ...]:
    order = np.argsort(unit_of_column, kind="stable")
    ends = np.searchsorted(unit_of_column[order], np.arange(units + 1))
    return tuple(np.sort(order[start:end]) for start, end in itertools.pairwise(ends))


def _reduced(moments: Moments, matrix: Matrix, seen: tuple[NDArray[np.int64], int], ridge: float) -> Reader:
    """One column per unit: what the unit contributes to the outputs, as a whole.

    The refit may then only scale the contributions of the units that stay, which restricts the full refit: the
    damage found is an upper bound of its damage. Costs n K^2 operations for n sampled rows and K columns.
    """
    if len(matrix) > 1:
        raise PlanError(f"a grouped convolution of {matrix.shape[1]} columns a group is too large to order")
    unit_of_column, units = seen
    rows, weights = moments.centred_rows(), matrix[0].astype(np.float32)
    owner = np.where(unit_of_column < 0, units, unit_of_column)
    sort = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[sort], np.arange(units + 1))
    is_seen = np.diff(np.append(starts, len(sort))) > 0
    gram = np.zeros((units + 1, units + 1))
    present = np.flatnonzero(is_seen)
    for unit in present:
        columns = np.flatnonzero(owner == unit)
        products = (rows[:, columns].T @ rows) * (weights[columns] @ weights.T)
        gram[unit, present] = np.add.reduceat(products.sum(axis=0, dtype=np.float64)[sort], starts[present])
    gram /= len(rows)
    return Reader(
        covariance=gram,
        weights=np.ones((units + 1, 1)),
        unit_columns=tuple(np.array([unit]) for unit in range(units)),
        damping=max(ridge * (units + 1) / len(rows), _LEAST_DAMPING),
    )


def _unit_sums(reader: Reader, per_column: Matrix) -> Matrix:
    return np.array([per_column[columns].sum() for columns in reader.unit_columns])


def _by_energy(readers: Sequence[Reader]) -> Indices:
    scores = [
        _unit_sums(reader, np.diag(reader.covariance) * np.square(reader.weights).sum(axis=1))
        * reader.weight
        for reader in readers
    ]
    return np.argsort(np.sum(scores, axis=0), kind="stable")


def _by_l1(readers: Sequence[Reader]) -> Indices:
    scores = [
        _unit_sums(reader, np.abs(reader.weights).sum(axis=1)) / np.abs(reader.weights).sum()
        for reader in readers
    ]
    return np.argsort(np.sum(scores, axis=0), kind="stable")


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "obs": order_by_surgery,
        "energy": _by_energy,
        "l1": _by_l1,
    }
)
