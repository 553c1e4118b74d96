"""One point of the trade-off between damage and time: what every block computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT, INT8 = "float", "int8"
"""Names of a block's options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """One option for every item."""

    picks: Mapping[str, str]
    """Item -> option name."""
    damage: float
    """Predicted output damage, not negative; additive over items as a first guess."""
    time_us: float
    """Predicted time on the target, relative to any common origin."""
