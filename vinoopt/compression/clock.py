"""What a model takes at widths that were not timed, foretold from a handful of models that were.

Layers do not get faster in proportion to their multiplications: INT8 kernels run over channels in blocks, and a
small layer that loses a few of them may not gain at all. Nor does it matter alone how many multiplications go, but
on which side: half the outputs of a 16-channel layer is another kernel than half its inputs. So groups are parted in
two colours, such that the two sides of most layers differ in colour (inner channels and residual trunks; every other
link of a chain), and models are timed in which one colour is cut, the other, or both. A layer's time is then known
along either side and along its diagonal, and what lies between is interpolated.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vinoopt.compression.groups import Coupling, Layer

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedWidths:
    """One model whose blocks were timed."""

    widths: Mapping[str, int]
    """Units kept, of the groups that were cut."""
    times_us: Mapping[str, float]
    """Block -> microseconds."""


def two_colours(coupling: Coupling, times_us: Mapping[str, float]) -> tuple[frozenset[str], frozenset[str]]:
    """Two sets of groups, such that layers mostly read from one and make the other; the second may be empty.

    Where no two colours do for every layer (a projection beside a residual branch), those that take little of
    `times_us`, by block, are left with one colour on both sides: then only cutting both is known.
    """
    spans = _spans(coupling)
    near: dict[str, dict[str, float]] = {group.name: defaultdict(float) for group in coupling.groups}
    for layer in coupling.layers:
        read, made = (_parts(side, spans) for side in (layer.columns, layer.rows))
        for one, other in itertools.product(read, made):
            if one != other:
                near[one][other] += times_us[layer.name]
                near[other][one] += times_us[layer.name]
    colour: dict[str, int] = {}
    for start in near:
        waiting = {start}
        while waiting := waiting - colour.keys():
            # The one that what has a colour says most about, so that ties are few.
            weights = {name: _beside(near[name], colour) for name in sorted(waiting)}
            name = max(weights, key=lambda n: abs(weights[n][0] - weights[n][1]))
            colour[name] = int(weights[name][1] < weights[name][0])
            waiting |= near[name].keys()
    first, second = (frozenset(name for name, c in colour.items() if c == wanted) for wanted in (0, 1))
    return first, second


def _beside(near: Mapping[str, float], colour: Mapping[str, int]) -> tuple[float, float]:
    first, second = (sum(time for name, time in near.items() if colour.get(name) == c) for c in (0, 1))
    return first, second


class Clock:
    """Foretells a model's time at any widths from those that were timed; the first of them is the whole model.

    The work of a layer is the product over its sides of the share of channels kept. With f and g the times along
    either colour and h along the diagonal, all as shares of the whole layer's time, a layer takes f(a) g(b) of it,
    times h(ab) / (f(sqrt(ab)) g(sqrt(ab))), which makes the diagonal exact.
    """

    def __init__(
        self,
        coupling: Coupling,
        timed: Sequence[TimedWidths],
        colours: tuple[frozenset[str], frozenset[str]],
        *,
        overhead_us: float = 0.0,
    ) -> None:
        """`overhead_us`: what every block costs beyond the time in its kernel, as starting it and waiting for all
        threads. Only a block that goes altogether saves it, which for small layers is most of what can be saved.
        """
        self._units = {group.name: group.units for group in coupling.groups}
        self._colours = colours
        spans = _spans(coupling)
        self._layers = [
            _LayerClock(tuple(_parts(side, spans) for side in _sides(layer)), layer.name)
            for layer in coupling.layers
        ]
        self._overhead_us = overhead_us
        losses = [self._lost(row.widths) for row in timed]
        for layer in self._layers:
            layer.learn(
                [
                    (*self._work(layer, lost), row.times_us[layer.name])
                    for lost, row in zip(losses, timed, strict=True)
                ]
            )
        self._known: dict[tuple[int, float, float], float] = {}

    def at(self, widths: Mapping[str, int]) -> float:
        """Microseconds of all blocks where the named groups keep so many units and the others all."""
        lost = self._lost(widths)
        total = 0.0
        for index, layer in enumerate(self._layers):
            work = self._work(layer, lost)
            if min(work) < _TINY:
                continue
            key = (index, *work)
            if key not in self._known:
                self._known[key] = self._overhead_us + layer.at(*work)
            total += self._known[key]
        return total

    def _lost(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {name: 1.0 - width / self._units[name] for name, width in widths.items()}

    def _work(self, layer: _LayerClock, lost: Mapping[str, float]) -> tuple[float, float]:
        """The share of work left by what either colour has lost."""
        first, second = (
            math.prod(
                max(1.0 - sum(part * lost[g] for g, part in side.items() if g in lost and g in colour), 0.0)
                for side in layer.sides
            )
            for colour in self._colours
        )
        return first, second


class _LayerClock:
    """One layer's time by the work that either colour leaves of it."""

    def __init__(self, sides: tuple[Mapping[str, float], ...], name: str) -> None:
        self.sides = sides
        self.name = name
        self._whole = 0.0
        self._along: tuple[_Curve, _Curve] = (_Curve([]), _Curve([]))
        self._diagonal = _Curve([])

    def learn(self, rows: Sequence[tuple[float, float, float]]) -> None:
        """Rows of (work left by the first colour, by the second, microseconds), the whole layer first."""
        self._whole = max(rows[0][2], _TINY)
        shares = [(first, second, time / self._whole) for first, second, time in rows[1:]]
        self._along = (
            _Curve([(a, time) for a, b, time in shares if a < 1.0 and b == 1.0]),
            _Curve([(b, time) for a, b, time in shares if b < 1.0 and a == 1.0]),
        )
        both = [(a, b, time) for a, b, time in shares if a < 1.0 and b < 1.0]
        self._diagonal = _Curve([(a * b, time) for a, b, time in both])

    def at(self, first: float, second: float) -> float:
        """Microseconds."""
        if first == 1.0 or second == 1.0:
            return self._whole * self._along[0].at(first) * self._along[1].at(second)
        f, g = self._along
        middle = math.sqrt(first * second)
        bend = self._diagonal.at(first * second) / (f.at(middle) * g.at(middle))
        return self._whole * f.at(first) * g.at(second) * bend


class _Curve:
    """A share of time by a share of work: 1 at 1, never rising as the work falls, since what rises is noise."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        work = sorted({round(at, 6) for at, _ in points}, reverse=True)
        times = [float(np.mean([time for at, time in points if round(at, 6) == w])) for w in work]
        self._work = (1.0, *work)[::-1]
        self._times = tuple(np.minimum.accumulate([1.0, *times]))[::-1]

    def at(self, work: float) -> float:
        """Interpolated; below the least work that was timed it falls on as between the last two."""
        if work >= self._work[0]:
            return max(float(np.interp(work, self._work, self._times)), _TINY)
        if len(self._work) == 1:  # this side was never cut
            return max(work, _TINY)
        slope = (self._times[1] - self._times[0]) / (self._work[1] - self._work[0])
        return float(max(self._times[0] - slope * (self._work[0] - work), _TINY))


def _sides(layer: Layer) -> tuple[npt.NDArray[np.int64], ...]:
    return tuple(side for side in (layer.columns, layer.rows) if side.size)


def _spans(coupling: Coupling) -> list[tuple[int, int, str]]:
    return [(coupling.offsets[group.name], group.units, group.name) for group in coupling.groups]


def _parts(units: npt.NDArray[np.int64], spans: Sequence[tuple[int, int, str]]) -> dict[str, float]:
    """Group -> the share of a layer's channels that are its units."""
    return {
        name: count / units.size
        for offset, length, name in spans
        if (count := int(np.count_nonzero((units >= offset) & (units < offset + length))))
    }
