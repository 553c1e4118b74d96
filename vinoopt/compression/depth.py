"""Which branches a network can best do without: depth pruning as a choice of few among few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Item: TypeAlias = tuple[str, int]
"""A branch, and one of the ways in which it may go."""


def lightest_subsets(
    damages: Mapping[Item, float], savings: Mapping[Item, float], need: float, *, count: int
) -> Iterator[tuple[Item, ...]]:
    """Up to `count` sets of items that save `need` together, those with the least sum of damages first.

    A covering knapsack with at most one item per branch, solved exactly; each next set is not contained in, nor
    contains, one that was given before. Nothing where the branches together do not save enough. Savings are in any
    one unit, that of `need`.
    """
    items = sorted(damages)
    if not items or need <= 0:
        return
    worth = np.array([savings[item] for item in items])
    price = np.array([damages[item] for item in items])
    names = sorted({name for name, _ in items})
    ways = np.array([[float(item[0] == name) for item in items] for name in names])
    constraints = [LinearConstraint(worth, lb=need), LinearConstraint(ways, ub=1.0)]
    for _ in range(count):
        found = milp(price, integrality=np.ones(len(items)), bounds=Bounds(0, 1), constraints=constraints)
        if found.x is None:
            return
        chosen = found.x > 0.5
        yield tuple(item for item, is_in in zip(items, chosen, strict=True) if is_in)
        # No set that holds this one: it would only damage more.
        constraints.append(LinearConstraint(chosen.astype(float), ub=float(chosen.sum()) - 1))
