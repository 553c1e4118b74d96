"""What it costs to change between INT8 and float inside a model, and the mixes that are worth it.

A block's own time says nothing about the conversions around it: a block that is as fast in float as in INT8 is
not free to stay float, because its neighbours' tensors then have to be converted, twice. Which blocks to leave in
float is therefore a labelling problem: every block pays for its own label, and every tensor between two labels
pays for its conversion. With two labels and payments that are never negative for a difference, a minimum cut
solves it exactly (Greig, Porteous, Seheult 1989, "Exact maximum a posteriori estimation for binary images";
Boykov, Veksler 1999 describe the construction used here). Weighing damage against time and splitting the interval
between two known solutions finds all corners of the convex frontier (Eisner and Severance 1976, "Mathematical
techniques for efficient record segmentation in large shared databases", JACM 23(4), section 3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import openvino as ov
from scipy.optimize import nnls
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from vinoopt.compression.frontier import FLOAT, INT8, FrontierPoint

_STARTING_ELEMENTS = 8192
"""Elements that could be converted in the time that it takes to start a conversion, on CPUs about 2 us."""
_FLOAT_ONLY_NAMES = """
    Softmax LogSoftmax MVN NormalizeL2 RMS ScaledDotProductAttention NonMaxSuppression TopK LSTMSequence GRUSequence
    RNNSequence LSTMCell GRUCell RNNCell TensorIterator Loop If DetectionOutput ROIAlign GridSample
"""
_FLOAT_ONLY = frozenset(_FLOAT_ONLY_NAMES.split())
"""Operators that have no INT8 kernel anywhere: they convert whatever feeds them."""
_ABSENT = frozenset({"Parameter", "Result", "Constant", "ShapeOf"})
_LARGEST = 1 << 28
"""Capacities are integers of 32 bits, and two tensors may lie between the same two nodes."""
_MOST_CUTS = 48
_TRUST, _DOUBT = 0.5, 0.1
"""Shares of a model's row that prior beliefs count for beside what was seen."""
_SCALES = (1.0, 0.5, 0.2, 0.0)
"""Conversion costs at which frontiers are traced, as shares of the true one: with the whole cost few mixes are
corners of the frontier, since blocks change only in regions; the others lie between those corners."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An edge of the graph: two nodes that share a tensor of so many elements."""

    left: int
    right: int
    elements: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Blocks, the operators between them, and the tensors that would be converted where labels differ."""

    blocks: Mapping[str, int]
    """Name -> node."""
    nodes: int
    floats: frozenset[int]
    """Nodes that compute in float whatever is chosen."""
    tensors: tuple[Tensor, ...]
    sizes: Mapping[str, float] = field(default_factory=dict)
    """Block -> elements that it writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixCosts:
    """What is known about a model's mixes on one target."""

    neighbours: Neighbours
    gains_us: Mapping[str, float]
    """Microseconds that INT8 saves in each block's own kernels; negative where it costs."""
    scale: float = 1.0
    """Latency that a microsecond of kernels stands for."""
    conversion_us: float = 0.0
    """Of as many elements as `_STARTING_ELEMENTS`, and of starting a conversion, each."""
    traffic_us: float = 0.0
    """What a float block's output costs everything behind it, per `_STARTING_ELEMENTS`, beyond what INT8 does."""

    @property
    def own_us(self) -> Mapping[str, float]:
        """What each block costs more in float than in INT8, conversions left out."""
        sizes = self.neighbours.sizes
        return {
            name: self.scale * self.gains_us.get(name, 0.0)
            + self.traffic_us * sizes.get(name, 0.0) / _STARTING_ELEMENTS
            for name in self.neighbours.blocks
        }

    def conversions_us(self, floats: Collection[str]) -> float:
        """Of the mix with `floats` in float, beyond those that the model has in INT8 throughout."""
        return self.conversion_us * (_conversions(self.neighbours, floats) - _conversions(self.neighbours, ()))

    def beyond_int8_us(self, floats: Collection[str]) -> float:
        """How much slower than INT8 throughout the mix is predicted to be; negative where it is faster."""
        own = self.own_us
        return sum(own[name] for name in floats) + self.conversions_us(floats)


def find_neighbours(model: ov.Model, blocks: Collection[str]) -> Neighbours:
    """The graph of the float model's operators that work on activations; `blocks` are those with a choice.

    A tensor that several operators read becomes a node of its own, so that it is converted once for all of them.
    """
    names = set(blocks)
    places: dict[str, int] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in _ABSENT and _is_active(node, places):
            places[node.get_friendly_name()] = len(places)
    floats = {places[n.get_friendly_name()] for n in model.get_ops()
              if n.get_friendly_name() in places and n.get_type_name() in _FLOAT_ONLY}  # fmt: skip
    tensors: list[Tensor] = []
    count = len(places)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in places:
            continue
        for output in node.outputs():
            left, elements = places[node.get_friendly_name()], _elements(output)
            readers = sorted({places[edge.get_node().get_friendly_name()] for edge in output.get_target_inputs()
                              if edge.get_node().get_friendly_name() in places})  # fmt: skip
            if len(readers) > 1:
                tensors.append(Tensor(left=left, right=count, elements=elements))
                left, count = count, count + 1
            tensors += [Tensor(left=left, right=right, elements=elements) for right in readers]
    known = {name: place for name, place in places.items() if name in names}
    sizes = {
        node.get_friendly_name(): _elements(node.output(0))
        for node in model.get_ops()
        if node.get_friendly_name() in known
    }
    return Neighbours(
        blocks=known,
        nodes=count,
        floats=frozenset(floats - set(known.values())),
        tensors=tuple(tensors),
        sizes=sizes,
    )


def _is_active(node: ov.Node, known: Mapping[str, int]) -> bool:
    """Whether a model's input reaches the operator other than by its shape."""
    sources = [value.get_node() for value in node.input_values()]
    return any(s.get_type_name() == "Parameter" or s.get_friendly_name() in known for s in sources)


def _elements(output: ov.Output) -> float:
    """Elements of the tensor; an unknown dimension counts as its least length, at least 1."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic:
        return 1.0
    return float(math.prod(max(dimension.get_min_length(), 1) for dimension in shape))


def _weight(tensor: Tensor) -> float:
    return 1.0 + tensor.elements / _STARTING_ELEMENTS


def _weights(neighbours: Neighbours) -> Array:
    return np.array([_weight(tensor) for tensor in neighbours.tensors], np.float64)


def _conversions(neighbours: Neighbours, floats: Collection[str]) -> float:
    """The least conversions, in units of one start, when just the blocks `floats` compute in float."""
    forced = {place: math.inf for name, place in neighbours.blocks.items() if name not in floats}
    back = {place: math.inf for name, place in neighbours.blocks.items() if name in floats}
    integers = _cut(neighbours, stay=forced, go=back, between=_weights(neighbours))
    return sum(
        _weight(tensor)
        for tensor in neighbours.tensors
        if (tensor.left in integers) != (tensor.right in integers)
    )


def fit_costs(
    neighbours: Neighbours, gains_us: Mapping[str, float], seen: Sequence[tuple[Collection[str], float]]
) -> MixCosts:
    """The costs that explain best how much slower than INT8 throughout mixes were seen to be.

    `seen` holds blocks in float and microseconds. Three figures are fitted, none negative: the latency behind a
    microsecond of kernels, the cost of a conversion, and that of float outputs for the operators between blocks.
    Latencies of a few rounds on a busy machine say less than the counters of kernels, so the first is held near 1
    as by `_TRUST` of a further mix, and the last near 0.
    """
    base = _conversions(neighbours, ())

    def row(floats: Collection[str]) -> list[float]:
        kernels = sum(gains_us.get(name, 0.0) for name in floats)
        written = sum(neighbours.sizes.get(name, 0.0) for name in floats) / _STARTING_ELEMENTS
        return [kernels, _conversions(neighbours, floats) - base, written]

    trust = _TRUST * sum(abs(gain) for gain in gains_us.values())
    doubt = _DOUBT * row(list(neighbours.blocks))[2]
    rows = np.array([*(row(floats) for floats, _ in seen), [trust, 0.0, 0.0], [0.0, 0.0, doubt]])
    (scale, conversion, traffic), _ = nnls(rows, np.array([*(slower for _, slower in seen), trust, 0.0], np.float64))
    return MixCosts(
        neighbours=neighbours,
        gains_us=gains_us,
        scale=float(scale),
        conversion_us=float(conversion),
        traffic_us=float(traffic),
    )


# --------------------------------------------------------------------------- frontier


def trace_mixes(costs: MixCosts, damages: Mapping[str, float]) -> tuple[FrontierPoint, ...]:
    """Mixes that no other beats in both damage and time, from the least damage (first) to the least time (last).

    `FrontierPoint.time_us` counts from INT8 throughout. A block of infinite damage stays in float.
    """
    found = {floats for share in _SCALES for floats in _corners(costs, damages, share)}
    points = [_point(costs, damages, floats) for floats in found]
    points.sort(key=lambda point: (point.damage, point.time_us))
    best: list[FrontierPoint] = []
    for point in points:
        if not best or point.time_us < best[-1].time_us - 1e-9:
            best.append(point)
    return tuple(best)


def fastest_mix(costs: MixCosts) -> frozenset[str]:
    """The blocks that are better left in float where nothing but time counts."""
    return _solve(costs, {}, damage_us=0.0, share=1.0)


def _point(costs: MixCosts, damages: Mapping[str, float], floats: Collection[str]) -> FrontierPoint:
    return FrontierPoint(
        picks={name: FLOAT if name in floats else INT8 for name in costs.neighbours.blocks},
        damage=sum(damages.get(name, 0.0) for name in costs.neighbours.blocks if name not in floats),
        time_us=costs.beyond_int8_us(floats),
    )


def _corners(costs: MixCosts, damages: Mapping[str, float], share: float) -> set[frozenset[str]]:
    """The corners of the convex frontier when conversions cost `share` of what they do."""

    def at(floats: frozenset[str]) -> tuple[float, float]:
        damage = sum(damages.get(name, 0.0) for name in costs.neighbours.blocks if name not in floats)
        return damage, sum(own[name] for name in floats) + share * costs.conversions_us(floats)

    own, everything = costs.own_us, frozenset(costs.neighbours.blocks)
    fast = _solve(costs, damages, damage_us=0.0, share=share)
    found = {everything: at(everything), fast: at(fast)}
    open_pairs, cuts = [(everything, fast)], 0
    while open_pairs and cuts < _MOST_CUTS:
        slow, fast = open_pairs.pop(0)
        (least, slow_us), (most, fast_us) = found[slow], found[fast]
        if most - least <= 0 or slow_us - fast_us <= 0:
            continue
        price = (slow_us - fast_us) / (most - least)
        middle = _solve(costs, damages, damage_us=price, share=share)
        cuts += 1
        damage, time_us = at(middle)
        if middle in found or time_us + price * damage >= slow_us + price * least - 1e-9 * abs(slow_us):
            continue
        found[middle] = (damage, time_us)
        open_pairs += pairwise([slow, middle, fast])
    return set(found)


def _solve(costs: MixCosts, damages: Mapping[str, float], *, damage_us: float, share: float) -> frozenset[str]:
    """The blocks in float of the mix with the least time and damage, a unit of damage counting `damage_us`."""
    stay: dict[int, float] = {}
    go: dict[int, float] = {}
    own = costs.own_us
    for name, place in costs.neighbours.blocks.items():
        gain, damage = own[name], damages.get(name, 0.0)
        stay[place] = max(gain, 0.0)
        go[place] = max(-gain, 0.0) + (damage * damage_us if math.isfinite(damage) else math.inf)
    between = _weights(costs.neighbours) * costs.conversion_us * share
    integers = _cut(costs.neighbours, stay=stay, go=go, between=between)
    return frozenset(name for name, place in costs.neighbours.blocks.items() if place not in integers)


def _cut(
    neighbours: Neighbours, *, stay: Mapping[int, float], go: Mapping[int, float], between: Array
) -> set[int]:
    """The nodes on the INT8 side of the least cut: `stay` is paid for leaving it, `go` for being on it."""
    source, sink = neighbours.nodes, neighbours.nodes + 1
    arcs = [(source, place, cost) for place, cost in stay.items()]
    arcs += [(place, sink, cost) for place, cost in go.items()]
    arcs += [(place, sink, math.inf) for place in neighbours.floats]
    for tensor, cost in zip(neighbours.tensors, between, strict=True):
        arcs += [(tensor.left, tensor.right, cost), (tensor.right, tensor.left, cost)]
    rows, columns, costs = (np.array(each) for each in zip(*arcs, strict=True))
    # What leaves the source and what lies between bound every cut: a larger cost, infinite ones too, is as good.
    bound = max(sum(cost for cost in stay.values() if math.isfinite(cost)) + float(between.sum()), 1e-9)
    capacities = np.round(np.minimum(costs.astype(np.float64) / bound, 1.01) * _LARGEST)
    graph = csr_array((capacities.astype(np.int32), (rows, columns)), shape=(sink + 1, sink + 1))
    graph.sum_duplicates()
    flow = maximum_flow(graph, source, sink).flow
    residual = graph - flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    order = breadth_first_order(csr_array(residual), source, return_predecessors=False)
    return {int(place) for place in order} - {source}
