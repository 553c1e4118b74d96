"""The best trade-offs between damage and time when every item picks one of its options.

This is the multiple-choice knapsack problem. Its linear relaxation has the well-known greedy solution: keep of
every item only the options on the lower convex hull of (time, damage), then walk from the least damage towards
the least time, always taking the step that costs least damage per time saved (Sinha & Zoltners 1979, "The
multiple-choice knapsack problem", Operations Research 27(3), section 2). Every point of that walk is an optimal
integer solution for its own time, so the walk is the frontier that a search needs, in O(n log n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

FLOAT, INT8 = "float", "int8"
"""Names of a block's options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One thing that an item can be, with what it is predicted to do."""

    name: str
    damage: float
    """Predicted output damage, not negative; additive over items as a first guess."""
    time_us: float
    """Predicted time on the target, relative to any common origin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """One option for every item."""

    picks: Mapping[str, str]
    """Item -> option name."""
    damage: float
    time_us: float


def trace_frontier(items: Mapping[str, Sequence[Option]]) -> tuple[FrontierPoint, ...]:
    """Points from the least damage (first) to the least time (last), each the best for its time.

    Options with the same damage as a faster one never appear, so an option that costs time and buys nothing is
    dropped in the first point already. Raises `ValueError` for an item without options.
    """
    hulls = {name: _lower_hull(options) for name, options in items.items()}
    picks = dict.fromkeys(hulls, 0)
    steps = sorted(
        (_slope(slow, fast), name, position)  # cheapest damage per time saved first
        for name, hull in hulls.items()
        for position, (slow, fast) in enumerate(pairwise(hull))
    )
    points = [_point(hulls, picks)]
    for _, name, position in steps:
        picks[name] = position + 1
        points.append(_point(hulls, picks))
    return tuple(points)


def _lower_hull(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options on the lower convex hull, from the least damage to the least time; infinite damage is never picked."""
    if not options:
        raise ValueError("an item needs at least one option")
    hull: list[Option] = []
    usable = [option for option in options if math.isfinite(option.damage)] or options[:1]
    for option in sorted(usable, key=lambda o: (o.damage, o.time_us, o.name)):
        if hull and option.time_us >= hull[-1].time_us:
            continue  # slower or equal, and not less damaging
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return tuple(hull)


def _slope(slow: Option, fast: Option) -> float:
    """Damage per time saved on the step from `slow` to `fast`."""
    return (fast.damage - slow.damage) / (slow.time_us - fast.time_us)


def _point(hulls: Mapping[str, Sequence[Option]], picks: Mapping[str, int]) -> FrontierPoint:
    chosen = {name: hull[picks[name]] for name, hull in hulls.items()}
    return FrontierPoint(
        picks={name: option.name for name, option in chosen.items()},
        damage=sum(option.damage for option in chosen.values()),
        time_us=sum(option.time_us for option in chosen.values()),
    )
