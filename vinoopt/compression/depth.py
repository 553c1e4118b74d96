"""Which branches a network can best do without: depth pruning as a choice of few among few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def lightest_subsets(
    damages: Mapping[str, float], savings: Mapping[str, float], need: float, *, count: int
) -> Iterator[tuple[str, ...]]:
    """Up to `count` sets of names that save `need` together, those with the least sum of damages first.

    A covering knapsack, solved exactly; each next set is not contained in, nor contains, one that was given before.
    Nothing where all names together do not save enough. Savings are in any one unit, that of `need`.
    """
    names = sorted(damages)
    if not names or need <= 0:
        return
    worth = np.array([savings[name] for name in names])
    price = np.array([damages[name] for name in names])
    constraints = [LinearConstraint(worth, lb=need)]
    for _ in range(count):
        found = milp(price, integrality=np.ones(len(names)), bounds=Bounds(0, 1), constraints=constraints)
        if found.x is None:
            return
        chosen = found.x > 0.5
        yield tuple(name for name, is_in in zip(names, chosen, strict=True) if is_in)
        # No set that holds this one: it would only damage more.
        constraints.append(LinearConstraint(chosen.astype(float), ub=float(chosen.sum()) - 1))
