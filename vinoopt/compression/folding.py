"""Residual branches that one layer can stand for: found, fitted by least squares, and put in place.

A branch that is dropped is replaced by its mean; the best affine map of what the branch reads does better for one
cheap layer: a convolution (or a matrix product) from the branch's input to its output. In networks whose blocks
change little, most of a branch is affine. Known as activation linearization and depth compression with training
(Dror et al. 2021, arXiv 2106.09309; Fu et al. 2022, arXiv 2206.00843); here the layer is the solution of a ridge
regression on calibration data, and later layers are refitted behind it.

The stand-in takes the name and the bias of the branch's last layer, so that groups, statistics, refits and
precisions address it as they would address that layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from vinoopt.compression.activations import (
    ActivationStream,
    Sample,
    iterate_calls,
    open_batch,
    samples_per_call,
)
from vinoopt.compression.contractions import (
    Contraction,
    biased_output,
    index_contractions,
    replace_bias,
    replace_weights,
    residual_join,
)
from vinoopt.compression.groups import Coupling
from vinoopt.compression.im2col import RowReader
from vinoopt.compression.refit import best_fit, held_back
from vinoopt.compression.regression import PairedSums, threads_for
from vinoopt.compression.saliency import Moments
from vinoopt.errors import PlanError

Matrix: TypeAlias = NDArray[np.float64]

KERNELS = (3, 1)
"""Sizes of a stand-in's window, along every spatial dimension."""
_WORTH = 0.75
"""Of the branch's multiplications, what a stand-in may have at most."""
_MOST_COLUMNS = 2304
_ROWS_PER_SAMPLE = 32
_SAMPLES_PER_CALL = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A residual branch that one layer can stand for."""

    end: str
    """Its last layer, whose name the stand-in takes."""
    group: str
    """The pruning group that the last layer reads."""
    inner: tuple[str, ...]
    """Every group whose layers all lie in the branch, `group` among them."""
    source: tuple[str, int]
    """Node and output that its first layers read."""
    strides: tuple[int, ...]
    """Per spatial dimension; empty for a matrix product."""
    kernels: tuple[int, ...]
    """What is worth trying, the most expensive first."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StandIn:
    """The affine map that comes nearest to a branch."""

    weights: Matrix
    """[1, columns, outputs], as `replace_weights` takes them."""
    bias: Matrix
    """[outputs]"""
    moments: Moments
    """Of the columns that it reads."""


# --------------------------------------------------------------------------- finding


def find_branches(model: ov.Model, coupling: Coupling) -> tuple[Branch, ...]:
    """Branches of at least two layers that end in a residual add, in graph order."""
    graph = _Graph(model)
    found = (_branch(each, graph, coupling) for each in graph.contractions.values())
    return tuple(branch for branch in found if branch is not None)


class _Graph:
    """What is asked of a model's nodes again and again."""

    def __init__(self, model: ov.Model) -> None:
        self.contractions = index_contractions(model)
        self.layers = {each.node for each in self.contractions.values()}
        self.order: dict[ov.Node, int] = {}
        self.fixed: set[ov.Node] = set()
        """Nodes whose values depend on constants alone."""
        for place, node in enumerate(model.get_ordered_ops()):
            self.order[node] = place
            sources = [value.get_node() for value in node.input_values()]
            if node.get_type_name() == "Constant" or (sources and self.fixed.issuperset(sources)):
                self.fixed.add(node)


def _branch(end: Contraction, graph: _Graph, coupling: Coupling) -> Branch | None:
    join = residual_join(end)
    is_product = end.type == "MatMul" and end.weight_port == 1
    if join is None or not (is_product or (end.type == "Convolution" and end.groups == 1)):
        return None
    region = _region(end, join[1], graph)
    if region is None:
        return None
    source, nodes = region
    inside = {name: each for name, each in graph.contractions.items() if each.node in nodes}
    groups = [group for group in coupling.groups if {*group.producers, *group.consumers} <= inside.keys()]
    read = [group for group in groups if group.can_vanish and end.name in group.consumers]
    strides = _strides(source, end.node.output(0), is_product=is_product)
    if len(inside) < 2 or len(read) != 1 or strides is None:
        return None
    work = sum(_multiplications(each) for each in inside.values())
    kernels = [k for k in KERNELS if (k == 1 or not is_product) and _is_worth(k, source, end, work, len(strides))]
    if not kernels:
        return None
    return Branch(
        end=end.name,
        group=read[0].name,
        inner=tuple(group.name for group in groups),
        source=(source.get_node().get_friendly_name(), source.get_index()),
        strides=strides,
        kernels=tuple(kernels),
    )


def _region(end: Contraction, other: ov.Output, graph: _Graph) -> tuple[ov.Output, set[ov.Node]] | None:
    """What the branch's first layers read, and the nodes from there to its end; None where it is not that simple.

    Walks back from the end; where all that is open is one tensor, the branch may begin there. Of such places the
    one nearest to the end that has all of the branch's layers behind it is taken, as behind a normalisation.
    """
    shared = {other.get_node(), *_ancestors(other.get_node())}
    nodes = {end.node}
    waiting = {end.data}
    best: tuple[int, ov.Output, set[ov.Node]] | None = None
    while waiting:
        if len(waiting) == 1:
            (only,) = waiting
            count = len(nodes & graph.layers)
            if best is None or count > best[0]:
                best = (count, only, set(nodes))
            if only.get_node() in shared:
                break
        latest = max(waiting, key=lambda output: graph.order[output.get_node()])
        node = latest.get_node()
        if node in shared or not node.get_input_size():
            return None  # two tensors of the trunk, or an input of the model, are read
        waiting = {output for output in waiting if output.get_node() != node}
        nodes.add(node)
        waiting |= {value for value in node.input_values() if value.get_node() not in graph.fixed}
    if best is None:
        return None
    _, source, inside = best
    leaks = (
        target.get_node() not in inside
        for node in inside - {end.node}
        for output in node.outputs()
        for target in output.get_target_inputs()
    )
    return None if any(leaks) else (source, inside)


def _ancestors(node: ov.Node) -> set[ov.Node]:
    found: set[ov.Node] = set()
    stack = [node]
    while stack:
        for value in stack.pop().input_values():
            above = value.get_node()
            if above not in found:
                found.add(above)
                stack.append(above)
    return found


def _strides(source: ov.Output, made: ov.Output, *, is_product: bool) -> tuple[int, ...] | None:
    """Per spatial dimension how many positions are read for one that is made; None where that is not known."""
    before, after = source.get_partial_shape(), made.get_partial_shape()
    if before.rank.is_dynamic or before.rank != after.rank or len(before) < 2:
        return None
    if is_product:
        same = all(a == b for a, b in zip(list(before)[:-1], list(after)[:-1], strict=True))
        return () if same and before[-1].is_static else None
    strides = []
    for size, places in zip(list(before)[2:], list(after)[2:], strict=True):
        if size.is_dynamic or places.is_dynamic or size.get_length() % places.get_length():
            return None
        strides.append(size.get_length() // places.get_length())
    return tuple(strides) if before[1].is_static else None


def _multiplications(layer: Contraction) -> float:
    """Of one sample."""
    shape = layer.node.get_output_partial_shape(0)
    sizes = [d.get_length() for d in list(shape)[1:] if d.is_static]
    return float(math.prod(sizes)) * layer.columns


def _is_worth(kernel: int, source: ov.Output, end: Contraction, work: float, rank: int) -> bool:
    channels = source.get_partial_shape()[1 if rank else -1].get_length()
    columns = channels * kernel**rank
    return bool(columns <= _MOST_COLUMNS and _multiplications(end) / end.columns * columns <= _WORTH * work)


# --------------------------------------------------------------------------- fitting


def fit_stand_ins(
    model: ov.Model, branches: Sequence[Branch], samples: Iterable[Sample], *, seed: int, memory_bytes: int = 1 << 30
) -> dict[tuple[str, int], StandIn]:
    """(last layer, kernel) -> the stand-in that comes nearest to the branch on the model's own activations.

    The ridge is chosen on every eighth sample, held back from the fit.
    """
    graph = model.clone()
    ends = {branch.end for branch in branches}
    exposed = [each.data for name, each in index_contractions(graph).items() if name in ends]
    size = samples_per_call(exposed, most=_SAMPLES_PER_CALL)
    open_batch(graph)
    listed = list(samples)
    calls = list(iterate_calls(graph, listed, size=size))
    nodes = {node.get_friendly_name(): node for node in graph.get_ops()}
    contractions = index_contractions(graph)
    rng = np.random.default_rng(seed)
    sides = {
        (branch.end, kernel): _layer(nodes[branch.source[0]].output(branch.source[1]), branch, contractions, kernel)
        for branch in branches
        for kernel in branch.kernels
    }
    stream = ActivationStream(graph, calls, memory_bytes=memory_bytes)
    found: dict[tuple[str, int], StandIn] = {}
    for branch in branches:
        first = nodes[branch.source[0]]
        stream.advance(first)
        wanted = [sides[branch.end, branch.kernels[0]].data, biased_output(contractions[branch.end])]
        sums = {k: _Sums(sides[branch.end, k]) for k in branch.kernels}
        start = 0
        for x, aim in stream.read(wanted):
            for each in sums.values():
                each.add(x, aim, start, rng)
            start += len(x)
        found |= {(branch.end, kernel): each.solved() for kernel, each in sums.items()}
    return found


def _layer(
    source: ov.Output, branch: Branch, contractions: Mapping[str, Contraction], kernel: int
) -> Contraction:
    """A layer of zeros that reads `source` and makes what the branch's last layer makes."""
    end = contractions[branch.end]
    kind = source.get_element_type().to_dtype()
    shape = source.get_partial_shape()
    if end.type == "MatMul":
        zeros = np.zeros((shape[-1].get_length(), end.outputs), kind)
        node = opset.matmul(source, opset.constant(zeros), False, False)
    else:
        rank = len(branch.strides)
        zeros = np.zeros((end.outputs, shape[1].get_length(), *[kernel] * rank), kind)
        pads = [kernel // 2] * rank
        node = opset.convolution(source, opset.constant(zeros), list(branch.strides), pads, pads, [1] * rank)
    columns = zeros.size // end.outputs
    return Contraction(
        node=node,
        name=branch.end,
        type=end.type,
        data_port=0,
        weight_port=1,
        groups=1,
        columns=columns,
        outputs=end.outputs,
        taps=1 if end.type == "MatMul" else kernel ** len(branch.strides),
    )


class _Sums:
    """What the regression of one stand-in needs, of fitted and of held-back samples."""

    def __init__(self, layer: Contraction) -> None:
        self._layer = layer
        self._reader = RowReader(layer)
        self._both = [PairedSums.empty(1, layer.columns, layer.outputs) for _ in range(2)]

    def add(self, x: NDArray[np.floating], aim: NDArray[np.floating], start: int, rng: np.random.Generator) -> None:
        shape = self._reader.output_shape(x.shape)
        positions = self._reader.positions(shape, _ROWS_PER_SAMPLE, rng)
        columns = self._reader.input_rows(x, shape, positions)
        rows = self._reader.output_rows(aim, positions)[None]
        is_held = np.repeat(held_back(len(positions), start), positions.shape[1])
        with threads_for(self._layer.columns):
            for sums, chosen in zip(self._both, (~is_held, is_held), strict=True):
                sums.add(columns[:, chosen], rows[:, chosen])

    def solved(self) -> StandIn:
        fitted, held = self._both
        every = fitted + held
        with threads_for(self._layer.columns):
            fit = best_fit(fitted, held, None)
        weights, bias = fit if fit is not None else (np.zeros_like(every.xe), every.e / every.rows)
        moments = Moments(rows=every.rows, mean=every.x / every.rows, second=every.xx / every.rows, sampled=None)
        return StandIn(weights=weights, bias=bias.ravel(), moments=moments)


# --------------------------------------------------------------------------- putting in place


def folded(
    model: ov.Model, folds: Iterable[tuple[Branch, int]], stand_ins: Callable[[str, int], StandIn]
) -> ov.Model:
    """A copy of `model` in which a stand-in of the given kernel takes the place of each branch.

    Raises `PlanError` for a kernel that the branch does not offer.
    """
    clone = model.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ops()}
    for branch, kernel in folds:
        if kernel not in branch.kernels:
            raise PlanError(f'no layer of kernel {kernel} can stand for the branch that ends in "{branch.end}"')
        contractions = index_contractions(clone)
        stand_in, end = stand_ins(branch.end, kernel), contractions[branch.end]
        layer = _layer(nodes[branch.source[0]].output(branch.source[1]), branch, contractions, kernel)
        replace_bias(end, stand_in.bias)
        replace_weights(layer, stand_in.weights)
        layer.node.set_friendly_name(branch.end)
        for reader in end.node.output(0).get_target_inputs():
            reader.replace_source_output(layer.node.output(0))
    result = ov.Model(clone.get_results(), clone.get_parameters(), model.get_friendly_name())
    result.validate_nodes_and_infer_types()
    return result


def offered_stand_ins(branches: Iterable[Branch]) -> Mapping[str, tuple[Branch, tuple[int, ...]]]:
    """Group -> its branch, and the kernels that may stand for it."""
    pairs = itertools.chain((branch.group, (branch, branch.kernels)) for branch in branches)
    return dict(pairs)
