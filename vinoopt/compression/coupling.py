"""Index-level coupling: atoms for the indices of tensors, links between them, and the units that result.

Every index of every dimension of a constant is an *atom*; operator rules carry the atoms forward, so that a
tensor's dimension is an array of labels. Rules emit *links* (these indices live or die together) and *freezes*
(this index must stay). Connected components of atoms are the *units*. A label below zero is an index that is
frozen from birth; it names its reason.

Where a reshape merges or splits dimensions, or a grouped convolution reads its channels, just one of the
factors may carry units: flat index `(a, b)` cannot go with `a` and with `b`. Such places are *sites*; they are
decided after all other links are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Labels: TypeAlias = NDArray[np.int64]
Dims: TypeAlias = "tuple[Labels | None, ...] | None"
"""Labels per dimension; None for a dimension of unknown size, or for a tensor of unknown rank."""

MAX_ATOMS_PER_DIMENSION = 1 << 20
MAX_RESOLVE_ROUNDS = 6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Site:
    """A flat dimension that is the product of several; at most one factor carries units."""

    key: tuple[str, str]
    """Name of the node, and which of its places."""
    layer: str
    flat: Labels
    factors: tuple[Labels, ...]
    preferred: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contraction:
    """A layer with a constant weight: it reads `columns` away and makes `rows`."""

    name: str
    node: str
    columns: Labels
    rows: Labels
    data_port: int
    column_axis: int
    """Axis of the data input that is summed over."""
    row_axis: int
    """Axis of the output that the rows lie on."""
    site: tuple[str, str] | None = None
    """Grouped convolution: the site that decides whether it reads positions inside its groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenLayer:
    """A layer that keeps its indices, and why."""

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Solution:
    """Units of a trace: a component per atom, and the reason of every frozen component."""

    component: Labels
    reason: Labels
    """Per component: index into the trace's reasons, or -1 where it is free."""
    chosen: dict[tuple[str, str], int | None]
    """Per site: the factor that carries its units."""

    def components_of(self, labels: Labels) -> Labels:
        """The free component of every label, -1 where it is frozen."""
        result = np.full(labels.shape, -1, np.int64)
        positive = labels >= 0
        found = self.component[labels[positive]]
        result[positive] = np.where(self.reason[found] < 0, found, -1)
        return result

    def reads(self, contraction: Contraction) -> bool:
        """Whether channels end there; a grouped convolution that loses whole groups only passes them on."""
        if contraction.site is None:
            return True
        return contraction.columns.size > 0 and self.chosen.get(contraction.site) == 1

    def reason_of(self, labels: Labels) -> int:
        """The first reason that freezes one of the labels, -1 if none does."""
        flat = labels.ravel()
        positive = flat >= 0
        reasons = np.where(positive, -1, -flat - 1)
        reasons[positive] = self.reason[self.component[flat[positive]]]
        frozen = reasons[reasons >= 0]
        return int(frozen[0]) if frozen.size else -1


@dataclass(slots=True, eq=False)
class Trace:
    """What the operator rules have found while walking a graph once, front to back."""

    tensors: dict[tuple[str, int], Dims] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    """Names of nodes whose value depends on constants alone."""
    contractions: list[Contraction] = field(default_factory=list)
    embeddings: list[tuple[str, Labels | None]] = field(default_factory=list)
    """Lookups in a constant table, and the labels of its width."""
    frozen: list[FrozenLayer] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    read_ports: set[tuple[str, int]] = field(default_factory=set)
    """Inputs whose labels a rule has looked at."""
    _atoms: int = 0
    _left: list[Labels] = field(default_factory=list)
    _right: list[Labels] = field(default_factory=list)
    _freezes: list[tuple[Labels, Labels]] = field(default_factory=list)

    # ---------------------------------------------------------------- reading and writing tensors

    def dims(self, node: ov.Node, port: int) -> Dims:
        """Labels of a node's input."""
        source = node.input_value(port)
        self.read_ports.add((node.get_name(), port))
        return self.tensors[source.get_node().get_name(), source.get_index()]

    def is_constant(self, node: ov.Node, port: int) -> bool:
        """Whether an input's value depends on constants alone."""
        return node.input_value(port).get_node().get_name() in self.constants

    def put(self, node: ov.Node, *outputs: Dims) -> None:
        """Set the labels of a node's outputs."""
        for index, dims in enumerate(outputs):
            self.tensors[node.get_name(), index] = dims

    def atoms(self, size: int, reason: str) -> Labels:
        """New free labels; frozen at once where the dimension is too long to be channels."""
        if size > MAX_ATOMS_PER_DIMENSION:
            return self.fixed(size, reason)
        self._atoms += size
        return np.arange(self._atoms - size, self._atoms, dtype=np.int64)

    def fixed(self, size: int, reason: str) -> Labels:
        """Labels that are frozen from birth; they take no room."""
        return np.broadcast_to(np.int64(-1 - self.reason(reason)), (size,))

    def reason(self, text: str) -> int:
        """Index of a reason."""
        if not self.reasons or self.reasons[-1] != text:
            self.reasons.append(text)
        return len(self.reasons) - 1

    # ---------------------------------------------------------------- links and freezes

    def link(self, one: Labels | None, other: Labels | None, reason: str) -> None:
        """Labels at equal positions live or die together; a partner of unknown size freezes."""
        if one is None or other is None:
            self.freeze(one, reason)
            self.freeze(other, reason)
            return
        if one is other:
            return
        both = (one >= 0) & (other >= 0)
        if both.any():
            self._left.append(one[both])
            self._right.append(other[both])
        for free, stuck in ((one, other), (other, one)):
            mask = (free >= 0) & (stuck < 0)
            if mask.any():
                self._freezes.append((free[mask], -stuck[mask] - 1))

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These indices must stay."""
        if labels is None:
            return
        free = np.unique(labels[labels >= 0])
        if free.size:
            self._freezes.append((free, np.full(free.size, self.reason(reason), np.int64)))

    def freeze_node(self, node: ov.Node, reason: str) -> None:
        """Nothing that this node reads or makes may lose an index."""
        name = node.get_friendly_name()
        self.frozen.append(FrozenLayer(name=name, op_type=node.get_type_name(), reason=reason))
        why = f"{node.get_type_name()} '{name}': {reason}"
        for port in range(node.get_input_size()):
            for labels in self.dims(node, port) or ():
                self.freeze(labels, why)
        self.put(node, *(self.fixed_dims(output, why) for output in node.outputs()))

    def fixed_dims(self, output: ov.Output, reason: str) -> Dims:
        """Frozen labels in the shape of an output."""
        shape = output.get_partial_shape()
        if shape.rank.is_dynamic:
            return None
        return tuple(self.fixed(d.get_length(), reason) if d.is_static else None for d in shape)

    # ---------------------------------------------------------------- solving

    def solve(self) -> Solution:
        """Decide the sites and find the units.

        A first decision that leaves a site with fewer than two units is taken back and tried otherwise;
        the decision with the most units stays.
        """
        banned: set[tuple[tuple[str, str], int]] = set()
        best, best_units = None, -1
        for _ in range(MAX_RESOLVE_ROUNDS):
            solution = _Resolver(self, banned).run()
            units = self._count_units(solution)
            if units > best_units:
                best, best_units = solution, units
            collapsed = self._collapsed(solution) - banned
            if not collapsed:
                break
            banned |= collapsed
        assert best is not None  # the loop runs at least once
        return best

    def _count_units(self, solution: Solution) -> int:
        """Free components that some layer makes and another reads away."""
        rows = [solution.components_of(each.rows) for each in self.contractions]
        columns = [solution.components_of(each.columns) for each in self.contractions if solution.reads(each)]
        if not rows or not columns:
            return 0
        both = np.intersect1d(np.concatenate(rows), np.concatenate(columns))
        return int((both >= 0).sum())

    def _collapsed(self, solution: Solution) -> set[tuple[tuple[str, str], int]]:
        result = set()
        for site in self.sites:
            choice = solution.chosen[site.key]
            if choice is not None and site.factors[choice].size > 1:
                units = np.unique(solution.components_of(site.factors[choice]))
                if (units >= 0).sum() < 2:
                    result.add((site.key, choice))
        return result


class _Resolver:
    """One decision over all sites of a trace."""

    def __init__(self, trace: Trace, banned: set[tuple[tuple[str, str], int]]) -> None:
        self.trace = trace
        self.banned = banned
        self.left = list(trace._left)
        self.right = list(trace._right)
        self.freezes = list(trace._freezes)
        self.chosen: dict[tuple[str, str], int | None] = {}

    def run(self) -> Solution:
        pending = list(self.trace.sites)
        while pending:
            solution = self._solution()
            undecided = []
            for site in pending:
                alive = self._alive(site, solution)
                if len(alive) > 1:
                    undecided.append((site, alive))
                else:
                    self._commit(site, alive[0] if alive else None, solution)
            if len(undecided) == len(pending):
                for site, choice in _clusters(undecided, self._decided(), solution):
                    self._commit(site, choice, solution)
            pending = [site for site, _ in undecided if site.key not in self.chosen]
        return self._solution()

    def _solution(self) -> Solution:
        count = self.trace._atoms
        if self.left:
            left, right = np.concatenate(self.left), np.concatenate(self.right)
            edges = coo_matrix((np.ones(left.size, np.bool_), (left, right)), shape=(count, count))
            components, component = connected_components(edges, directed=False)
        else:
            components, component = count, np.arange(count)
        none = np.iinfo(np.int64).max
        reason = np.full(components, none, np.int64)
        if self.freezes:
            labels = np.concatenate([each[0] for each in self.freezes])
            np.minimum.at(reason, component[labels], np.concatenate([each[1] for each in self.freezes]))
        reason[reason == none] = -1
        return Solution(component=component.astype(np.int64), reason=reason, chosen=self.chosen)

    def _decided(self) -> list[tuple[Site, int]]:
        choices = ((site, self.chosen.get(site.key)) for site in self.trace.sites)
        return [(site, choice) for site, choice in choices if choice is not None]

    def _alive(self, site: Site, solution: Solution) -> list[int]:
        if not (solution.components_of(site.flat) >= 0).any():
            return []
        return [
            index
            for index, labels in enumerate(site.factors)
            if (site.key, index) not in self.banned and (solution.components_of(labels) >= 0).any()
        ]

    def _commit(self, site: Site, choice: int | None, solution: Solution) -> None:
        self.chosen[site.key] = choice
        if choice is None:
            known = max(solution.reason_of(labels) for labels in (site.flat, *site.factors))
            reason = known if known >= 0 else self.trace.reason(f"'{site.layer}': no factor is free")
            for labels in (site.flat, *site.factors):
                self._freeze(labels, reason)
            return
        sizes = [labels.size for labels in site.factors]
        carrier = np.expand_dims(site.factors[choice], [i for i in range(len(sizes)) if i != choice])
        carrier = np.broadcast_to(carrier, sizes).reshape(-1)
        both = (carrier >= 0) & (site.flat >= 0)
        self.left.append(carrier[both])
        self.right.append(site.flat[both])
        for free, stuck in ((carrier, site.flat), (site.flat, carrier)):
            mask = (free >= 0) & (stuck < 0)
            self.freezes.append((free[mask], -stuck[mask] - 1))
        reason = self.trace.reason(
            f"'{site.layer}': another of the dimensions it merges or splits carries the units"
        )
        for index, labels in enumerate(site.factors):
            if index != choice:
                self._freeze(labels, reason)

    def _freeze(self, labels: Labels, reason: int) -> None:
        free = np.unique(labels[labels >= 0])
        self.freezes.append((free, np.full(free.size, reason, np.int64)))


def _clusters(
    undecided: Sequence[tuple[Site, list[int]]], decided: Sequence[tuple[Site, int]], solution: Solution
) -> list[tuple[Site, int]]:
    """Choices that share units are made together: the most sites first, then the most preferred, then units.

    Sites decided before count for the choices that share their units.
    """
    candidates = [*decided, *((site, index) for site, alive in undecided for index in alive)]
    groups = _connected([solution.components_of(site.factors[index]) for site, index in candidates])
    clusters: dict[int, list[tuple[Site, int]]] = {}
    for candidate, group in zip(candidates, groups, strict=True):
        clusters.setdefault(int(group), []).append(candidate)

    def rank(cluster: list[tuple[Site, int]]) -> tuple[int, int, int]:
        sites = len({site.key for site, _ in cluster})
        preferred = sum(site.preferred == index for site, index in cluster)
        return -sites, -preferred, -sum(site.factors[index].size for site, index in cluster)

    open_keys = {site.key for site, _ in undecided}
    made: dict[tuple[str, str], tuple[Site, int]] = {}
    touched: set[tuple[str, str]] = set()
    for cluster in sorted(clusters.values(), key=rank):
        keys = {site.key for site, _ in cluster} & open_keys
        if not keys & touched:
            for site, index in cluster:
                if site.key in keys:
                    made.setdefault(site.key, (site, index))
        touched |= keys
    return list(made.values())


def _connected(members: Sequence[Labels]) -> Labels:
    """Number of the connected set that each candidate belongs to; candidates connect where they share a unit."""
    rows = np.concatenate([np.full(each.size, number) for number, each in enumerate(members)])
    columns = np.concatenate(members)
    rows, columns = rows[columns >= 0], columns[columns >= 0]
    _, columns = np.unique(columns, return_inverse=True)
    size = len(members) + int(columns.max(initial=-1)) + 1
    edges = coo_matrix((np.ones(rows.size, np.bool_), (rows, columns + len(members))), shape=(size, size))
    found: Labels = connected_components(edges, directed=False)[1][: len(members)].astype(np.int64)
    return found
