"""From links and freezes to units: connected components of atoms, with every site decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from vinoopt.compression.coupling import Contraction, Labels, Site, Trace

MAX_SECOND_THOUGHTS = 5


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


def solve(trace: Trace) -> Solution:
    """Decide the sites and find the units.

    A first decision that leaves a site with fewer than two units is taken back and tried otherwise;
    the decision with the most units stays.
    """
    banned: set[tuple[tuple[str, str], int]] = set()
    best = _Resolver(trace, banned).run()
    last, best_units = best, _count_units(trace, best)
    for _ in range(MAX_SECOND_THOUGHTS):
        collapsed = _collapsed(trace, last)
        if collapsed <= banned:
            break
        banned |= collapsed
        last = _Resolver(trace, banned).run()
        units = _count_units(trace, last)
        if units > best_units:
            best, best_units = last, units
    return best


def _count_units(trace: Trace, solution: Solution) -> int:
    """Free components that some layer makes and another reads away."""
    rows = [solution.components_of(each.rows) for each in trace.contractions]
    columns = [solution.components_of(each.columns) for each in trace.contractions if solution.reads(each)]
    if not rows or not columns:
        return 0
    both = np.intersect1d(np.concatenate(rows), np.concatenate(columns))
    return int((both >= 0).sum())


def _collapsed(trace: Trace, solution: Solution) -> set[tuple[tuple[str, str], int]]:
    """Choices that leave fewer than two units; where a preference was followed to that end, only those."""
    found = []
    for site in trace.sites:
        choice = solution.chosen[site.key]
        if choice is not None and site.factors[choice].size > 1:
            units = np.unique(solution.components_of(site.factors[choice]))
            if (units >= 0).sum() < 2:
                found.append((site, choice))
    preferred = {(site.key, choice) for site, choice in found if site.preferred == choice}
    return preferred or {(site.key, choice) for site, choice in found}


class _Resolver:
    """One decision over all sites of a trace."""

    def __init__(self, trace: Trace, banned: set[tuple[tuple[str, str], int]]) -> None:
        self.trace = trace
        self.banned = banned
        self.left = list(trace.left)
        self.right = list(trace.right)
        self.freezes = list(trace.freezes)
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
        count = self.trace.atom_count
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
        free = labels[labels >= 0]
        self.freezes.append((free, np.full(free.size, reason, np.int64)))


def _clusters(
    undecided: Sequence[tuple[Site, list[int]]], decided: Sequence[tuple[Site, int]], solution: Solution
) -> list[tuple[Site, int]]:
    """Choices that share units are made together.

    First those that follow what is decided before, then those of the most sites, the most preferred, of the most
    units.
    """
    candidates = [*decided, *((site, index) for site, alive in undecided for index in alive)]
    groups = _connected([solution.components_of(site.factors[index]) for site, index in candidates])
    clusters: dict[int, list[tuple[Site, int]]] = {}
    for candidate, group in zip(candidates, groups, strict=True):
        clusters.setdefault(int(group), []).append(candidate)

    open_keys = {site.key for site, _ in undecided}

    def rank(cluster: list[tuple[Site, int]]) -> tuple[int, int, int, int]:
        keys = {site.key for site, _ in cluster}
        preferred = sum(site.preferred == index for site, index in cluster)
        units = sum(site.factors[index].size for site, index in cluster)
        return -len(keys - open_keys), -len(keys), -preferred, -units

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
