"""In which order units leave a group, and what each step costs the outputs that read them.

The Optimal Brain Surgeon (Hassibi and Stork 1993) removes a weight by the loss it causes once all the others have
been adjusted for it. Here the loss is the squared error of linear outputs, the others are the columns that stay, and
a step removes all columns of a unit at once (Optimal Brain Compression, Frantar et al. 2022, arXiv 2208.11580,
section 4, blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky
from scipy.linalg.lapack import dpotri

Matrix: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]

_PENDING_COLUMNS = 256
"""How many columns of updates wait before they are applied at once as a matrix product."""

_EXACT_COLUMNS = 1024
_LEAST_DAMPING = 1e-12
"""For columns that never move: keeps the covariance invertible."""
_STILL = 1e-24
"""A variance below which outputs do not move: nothing is lost with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Outputs `x @ weights` of centred columns x, and the columns that each unit of a group has among them."""

    covariance: Matrix
    """[columns, columns]"""
    weights: Matrix
    """[columns, outputs]"""
    unit_columns: tuple[Indices, ...]
    """Per unit; empty where this reader does not see the unit."""
    damping: float
    """Added to the diagonal of the covariance, as a share of its mean: how little the samples are trusted."""

    @property
    def variance(self) -> float:
        """Variance of the outputs, summed over them."""
        return float(np.einsum("ij,ij->", self.covariance @ self.weights, self.weights))

    @property
    def weight(self) -> float:
        """What a squared error of the outputs counts: one over their variance, 0 where they never move."""
        variance = self.variance
        return 1.0 / variance if variance > _STILL else 0.0


def order_by_surgery(readers: Sequence[Reader]) -> Indices:
    """Units in the order of greedy elimination, cheapest first: at each step the one that costs the readers least.

    A reader's cost counts relative to the variance of its outputs. For U units of t columns among K, with O outputs,
    a reader takes O(U t K (K + O)) operations and two K x K matrices.
    """
    states = [_Elimination(reader) for reader in readers]
    units = states[0].total
    alive = np.ones(units, dtype=np.bool_)
    order = np.empty(units, dtype=np.intp)
    for step in range(units):
        costs = np.sum([state.costs() for state in states], axis=0)
        order[step] = unit = int(np.argmin(np.where(alive, costs, np.inf)))
        alive[unit] = False
        for state in states:
            state.eliminate(unit)
    return order


def nested_damage(reader: Reader, order: Indices) -> Matrix:
    """[units + 1]: share of the outputs' variance lost when so many units are kept and the rest leave in `order`.

    The columns that stay are refitted. One Cholesky factor serves all widths: with the columns sorted by how
    long they stay and `R^T R` the damped covariance, the loss of keeping the first p is the squared norm of
    the rows of `R W` from p on.
    """
    staying = [reader.unit_columns[unit] for unit in order[::-1]]
    fixed = _fixed_columns(reader)
    columns = np.concatenate([fixed, *staying])
    ends = len(fixed) + np.cumsum([0, *map(len, staying)])
    factor = cholesky(_damped(reader)[np.ix_(columns, columns)], lower=False)
    energy = np.square(factor @ reader.weights[columns]).sum(axis=1)
    lost = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    damage: Matrix = lost[ends] * reader.weight
    return damage


def _fixed_columns(reader: Reader) -> Indices:
    is_fixed = np.ones(len(reader.weights), dtype=np.bool_)
    for columns in reader.unit_columns:
        is_fixed[columns] = False
    return np.flatnonzero(is_fixed)


def _damped(reader: Reader) -> Matrix:
    damped: Matrix = reader.covariance.copy()
    level = reader.damping * float(np.mean(np.diag(damped)))
    damped[np.diag_indices_from(damped)] += max(level, _LEAST_DAMPING)
    return damped


class _Elimination:
    """The state of one reader during greedy elimination: inverse covariance and weights of what is left.

    Columns are laid out unit by unit, padded to the same number for each with columns that no output reads,
    the fixed ones behind. The inverse is kept as `base - panels @ panels.T`, the weights as `weights - panels @
    shares`; of each unit the diagonal block of the inverse and the Gram matrix of its weights are up to date.
    """

    def __init__(self, reader: Reader) -> None:
        taps = max(1, max(map(len, reader.unit_columns)))
        units = len(reader.unit_columns)
        layout = np.full((units, taps), -1, dtype=np.intp)
        for unit, columns in enumerate(reader.unit_columns):
            layout[unit, : len(columns)] = columns
        source = np.concatenate([layout.ravel(), _fixed_columns(reader)])
        is_real = source >= 0
        self._taps = taps
        self._slots = np.arange(units)
        """Unit -> its place among those that are left; -1 once it is gone."""
        self._units = np.arange(units)
        # Float32 halves the traffic of large matrices; their damping keeps the inverse far from its precision.
        dtype = np.float64 if len(source) <= _EXACT_COLUMNS else np.float32
        scale = reader.weight**0.5
        self._weights = np.where(is_real[:, None], scale * reader.weights[source], 0.0).astype(dtype)
        self._base = np.eye(len(source), dtype=dtype)
        real = np.flatnonzero(is_real)
        self._base[np.ix_(real, real)] = _inverse(_damped(reader))[np.ix_(source[real], source[real])]
        self.total = units
        self._reset()

    def _reset(self) -> None:
        """Start with nothing pending."""
        columns, outputs = self._weights.shape
        self._panels = np.empty((columns, _PENDING_COLUMNS + self._taps), dtype=self._base.dtype)
        self._shares = np.empty((_PENDING_COLUMNS + self._taps, outputs), dtype=self._base.dtype)
        self._pending = 0
        count, taps = len(self._units), self._taps
        self._blocks = self._diagonal_blocks().astype(np.float64)
        weights = self._weights[: count * taps].reshape(count, taps, outputs)
        self._grams = (weights @ weights.transpose(0, 2, 1)).astype(np.float64)

    def _diagonal_blocks(self) -> Matrix:
        count, taps = len(self._units), self._taps
        spread = self._base[: count * taps, : count * taps].reshape(count, taps, count, taps)
        return np.ascontiguousarray(np.einsum("utus->uts", spread))

    def costs(self) -> Matrix:
        """[units]: relative loss if the unit went next; undefined for those that have gone."""
        if self._taps == 1:
            losses = self._grams[:, 0, 0] / self._blocks[:, 0, 0]
        else:
            losses = np.einsum("uts,uts->u", np.linalg.inv(self._blocks), self._grams)
        costs = np.zeros(self.total)
        costs[self._units] = losses
        return costs

    def eliminate(self, unit: int) -> None:
        """Take the unit out and adjust the weights of all columns that are left."""
        slot, taps = int(self._slots[unit]), self._taps
        here = slice(slot * taps, (slot + 1) * taps)
        panels, shares = self._panels[:, : self._pending], self._shares[: self._pending]
        whiten = np.linalg.inv(np.linalg.cholesky(self._blocks[slot])).T.astype(self._base.dtype)
        update = (self._base[:, here] - panels @ panels[here].T) @ whiten
        share = whiten.T @ (self._weights[here] - panels[here] @ shares)
        crossed = self._weights @ share.T - panels @ (shares @ share.T)

        size = len(self._units) * taps
        moved = update[:size].reshape(-1, taps, taps).astype(np.float64)
        mixed = moved @ crossed[:size].reshape(-1, taps, taps).transpose(0, 2, 1)
        moved_back = moved.transpose(0, 2, 1)
        self._grams += moved @ (share @ share.T).astype(np.float64) @ moved_back
        self._grams -= mixed + mixed.transpose(0, 2, 1)
        self._blocks -= moved @ moved_back
        self._grams[slot], self._blocks[slot] = 0.0, np.eye(taps)

        self._panels[:, self._pending : self._pending + taps] = update
        self._shares[self._pending : self._pending + taps] = share
        self._pending += taps
        self._slots[unit] = -1
        if self._pending >= _PENDING_COLUMNS:
            self._settle()

    def _settle(self) -> None:
        """Apply what is pending and drop the columns of units that have gone."""
        left = self._slots[self._units] >= 0
        keep = np.flatnonzero(np.append(np.repeat(left, self._taps), np.ones(self._fixed, dtype=np.bool_)))
        panels = self._panels[keep, : self._pending]
        self._base = self._base[np.ix_(keep, keep)] - panels @ panels.T
        self._weights = self._weights[keep] - panels @ self._shares[: self._pending]
        self._units = self._units[left]
        self._slots[self._units] = np.arange(len(self._units))
        self._reset()

    @property
    def _fixed(self) -> int:
        return len(self._weights) - len(self._units) * self._taps


def _inverse(matrix: Matrix) -> Matrix:
    """Inverse of a symmetric positive definite matrix, through its Cholesky factor."""
    factor = cholesky(matrix, lower=True)
    inverse, _ = dpotri(factor, lower=1, overwrite_c=1)
    lower: Matrix = np.tril(inverse)
    full: Matrix = lower + np.tril(lower, -1).T
    return full
