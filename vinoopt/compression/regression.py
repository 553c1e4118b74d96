"""Ridge regression from moments or from rows, paired moments for validation, and the threads they run on."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import ThreadpoolController

Matrix: TypeAlias = NDArray[np.float64]
Array: TypeAlias = NDArray[np.floating]

_LEAST_RIDGE = 1e-9
_SMALL = 64
"""Columns up to which the systems of all groups are solved at once."""
_ROUNDED = 1e-13
"""Of a second moment: a variance below that is what rounding left."""
EXACT_COLUMNS = 1024
"""Up to here products run in float64; beyond, those of some thousand rows each in float32, their sum in float64."""


def threads_for(columns: int) -> contextlib.AbstractContextManager[Any]:
    """Linear algebra on one thread while the context is open, if it is about few columns.

    Up to about `EXACT_COLUMNS` a second thread gains little, and costs much where OpenVINO's threads or another
    process want the cores: a refit took 3 to 5 times as long in all on two busy cores.
    """
    if columns > EXACT_COLUMNS:
        return contextlib.nullcontext()
    return _controller().limit(limits=1, user_api="blas")  # type: ignore[no-any-return]


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def solve(covariance: Matrix, cross: Matrix, scale: float) -> Matrix:
    """`(covariance + scale * mean variance * I)^-1 cross`, for a symmetric covariance; 0 where nothing varies."""
    if not covariance.diagonal().any():
        return np.zeros_like(cross)
    damped = covariance.copy()
    level = max(scale, _LEAST_RIDGE) * float(np.mean(np.diag(covariance)))
    damped[np.diag_indices_from(damped)] += max(level, np.finfo(np.float64).tiny)
    solution: Matrix = cho_solve(cho_factor(damped, lower=True, overwrite_a=True), cross)
    return solution


def _solve_each(within: Matrix, cross: Matrix, scale: float, second: Matrix) -> Matrix:
    """`solve` for many small systems at once: [groups, columns, columns] and [groups, columns, outputs].

    `second` are the moments before the means were taken away, which tell variance from what rounding left of it.
    """
    variances, powers = (np.diagonal(each, axis1=1, axis2=2).mean(axis=1) for each in (within, second))
    levels = max(scale, _LEAST_RIDGE) * variances
    is_flat = variances <= _ROUNDED * powers
    levels[is_flat] = 1.0
    damped = within + levels[:, None, None] * np.eye(within.shape[1])
    solution: Matrix = np.linalg.solve(damped, cross)
    solution[is_flat] = 0.0
    return solution


def solve_rows(rows: Array, target: Matrix, scale: float) -> Matrix:
    """`solve` for the covariance of centred `rows`, in the dual: as many unknowns as there are rows."""
    count, columns = rows.shape
    if not columns:
        return np.zeros((0, target.shape[1]))
    kernel = (rows @ rows.T).astype(np.float64)
    level = max(scale, _LEAST_RIDGE) * count * float(np.square(rows).mean())
    kernel[np.diag_indices_from(kernel)] += max(level, np.finfo(np.float64).tiny)
    solution: Matrix = rows.T @ cho_solve(cho_factor(kernel, lower=True, overwrite_a=True), target)
    return solution


@dataclass(kw_only=True, slots=True, eq=False)
class PairedSums:
    """Sums over rows of columns x and of errors e that a change of the weights is to take away, per group."""

    rows: int
    x: Matrix
    """[groups, columns]"""
    e: Matrix
    """[groups, outputs]"""
    xx: Matrix
    """[groups, columns, columns]"""
    xe: Matrix
    """[groups, columns, outputs]"""
    ee: float

    @classmethod
    def empty(cls, groups: int, columns: int, outputs: int) -> PairedSums:
        """Sums over no rows."""
        return cls(
            rows=0,
            x=np.zeros((groups, columns)),
            e=np.zeros((groups, outputs)),
            xx=np.zeros((groups, columns, columns)),
            xe=np.zeros((groups, columns, outputs)),
            ee=0.0,
        )

    def add(self, x: Array, e: Array) -> None:
        """Add rows: x [groups, rows, columns], e [groups, rows, outputs]."""
        dtype = np.float64 if x.shape[2] <= EXACT_COLUMNS else np.float32
        x, e = x.astype(dtype, copy=False), e.astype(dtype, copy=False)
        self.rows += x.shape[1]
        self.x += x.sum(axis=1, dtype=np.float64)
        self.e += e.sum(axis=1, dtype=np.float64)
        for group in range(len(x)):
            self.xx[group] += x[group].T @ x[group]
            self.xe[group] += x[group].T @ e[group]
        self.ee += float(np.square(e, dtype=np.float64).sum())

    def __add__(self, other: PairedSums) -> PairedSums:
        return PairedSums(
            rows=self.rows + other.rows,
            x=self.x + other.x,
            e=self.e + other.e,
            xx=self.xx + other.xx,
            xe=self.xe + other.xe,
            ee=self.ee + other.ee,
        )

    def solve(self, ridge: float) -> tuple[Matrix, Matrix]:
        """Change of the weights [groups, columns, outputs] and of the bias [groups, outputs].

        `ridge` counts in units of the columns' mean variance times columns per row; infinite: the bias alone.
        """
        mean_x, mean_e = self.x / self.rows, self.e / self.rows
        if np.isinf(ridge):
            return np.zeros_like(self.xe), mean_e
        scale = ridge * self.x.shape[1] / self.rows
        within = self.xx / self.rows - mean_x[:, :, None] * mean_x[:, None, :]
        cross = self.xe / self.rows - mean_x[:, :, None] * mean_e[:, None, :]
        if within.shape[1] <= _SMALL:
            change = _solve_each(within, cross, scale, self.xx / self.rows)
        else:
            change = np.stack([solve(each, right, scale) for each, right in zip(within, cross, strict=True)])
        return change, mean_e - np.einsum("gk,gko->go", mean_x, change)

    def error(self, change: Matrix, shift: Matrix) -> float:
        """Mean squared error per row that is left after the change."""
        if not change.any():  # the bias alone: without a product of all columns
            return self.ee / self.rows + float((shift * (shift - 2 * self.e / self.rows)).sum())
        moved = np.einsum("gk,gko->go", self.x, change)
        total = self.ee - 2 * float((change * self.xe).sum() + (shift * self.e).sum())
        total += float((change * (self.xx @ change)).sum())
        total += float((shift * (2 * moved + self.rows * shift)).sum())
        return total / self.rows
