"""A path from the whole model to ever smaller ones, each step the cheapest in damage per time saved.

Damages of single choices do not add up, so every step of the path is measured in the company of the steps before
it, as NetAdapt does (Yang et al. 2018, arXiv 1804.03230, section 3.2), here on damage after a closed-form refit
instead of short training. Measuring every possible step each time would take groups x steps probes; a step's
estimate is carried over from before instead, and only the step that looks cheapest is measured again, until one
that was measured in the present company still does (lazy evaluation, Minoux 1978). Two or three probes a step
are usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vinoopt.compression.widths import size_of

_MOST_PROBES = 4
"""In one step; then the best of what was measured is taken."""
_AS_CHEAP = 1.05
"""What was measured is taken as long as no estimate promises more than this factor less."""
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One point of the path."""

    widths: Mapping[str, int]
    """Units kept, of the groups that have lost some; see `widths.size_of` for what is below them."""
    floats: frozenset[str]
    """Blocks that compute in float."""
    damage: float
    """As probed; what blocks in INT8 add is their damage alone."""
    time_us: float
    """Predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """Where a path starts and what its steps are predicted to do."""

    units: Mapping[str, int]
    """Group -> all its units."""
    damages: Mapping[str, Mapping[int, float]]
    """Group -> width -> damage of this width alone."""
    block_damages: Mapping[str, float] = field(default_factory=dict)
    """Blocks that start in float -> damage of each alone in INT8."""
    floats: frozenset[str] = frozenset()
    """Blocks in float at the start, with or without a damage; those without one stay."""
    lasting: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Group -> width -> what is left in the end of the damage that probes see, as a share; 1 where it is not named.
    What is lost early in a network can be made up for behind, which probes are too quick to do."""
    least_us: Mapping[str, float] = field(default_factory=dict)
    """Group -> what a step of it must be predicted to save at least; less may be noise of the clock."""


@dataclass(frozen=True, slots=True)
class _Move:
    group: str
    width: int | None
    """None: the block named `group` goes to INT8."""


class Descent:
    """Grows the path on demand.

    `predict` gives microseconds for widths and float blocks; `probe` the damage of widths, infinite where they
    cannot be built.
    """

    def __init__(
        self,
        ground: Ground,
        *,
        predict: Callable[[Mapping[str, int], frozenset[str]], float],
        probe: Callable[[Mapping[str, int]], float],
        is_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ground = ground
        self._predict = predict
        self._probe = probe
        self._is_late = is_late
        self._factors = dict.fromkeys(ground.damages, 1.0)
        """Group -> how much more its steps damage in the path's company than the table says."""
        self._lasting = {
            group: {width: damage * ground.lasting.get(group, {}).get(width, 1.0) for width, damage in table.items()}
            for group, table in ground.damages.items()
        }
        """The table of damages as they will be in the end."""
        self._probed = 0.0
        """Damage of the last place's widths, as probes see it."""
        start = Place(widths={}, floats=ground.floats, damage=0.0, time_us=predict({}, ground.floats))
        self.places: list[Place] = [start]
        self._banned: dict[str, float] = {}
        """Group -> size from which down it may not go any more; of a block, that it stays in float."""

    def extend(self) -> Place | None:
        """The next place; None where nothing is left that saves time, or the time is up."""
        here = self.places[-1]
        gains = {move: gain for move in self._moves(here) if (gain := self._gain(here, move)) > self._least_us(move)}
        measured: dict[_Move, float] = {}
        while gains and not self._is_late():
            prices = {move: self._delta(here, move, measured) / gain for move, gain in gains.items()}
            known = {move: price for move, price in prices.items() if move in measured or move.width is None}
            best = min(prices, key=prices.__getitem__)
            if known and (min(known.values()) <= _AS_CHEAP * prices[best] or len(measured) >= _MOST_PROBES):
                return self._go(here, min(known, key=known.__getitem__), measured)
            after = self._probe(self._widths(here, best))
            if math.isfinite(after):
                self._learn(here, best, max(after - self._probed, 0.0), measured)
            else:
                del gains[best]  # it cannot be built in this company
        return None

    def turn(self, low: int, high: int) -> None:
        """Go back to place `low`, and never again take that step between there and `high` that damages most.

        For a place that turned out to damage more than it was predicted to: the path goes on by other steps.
        """
        steps = range(low + 1, high + 1)
        worst = max(steps, key=lambda index: self.places[index].damage - self.places[index - 1].damage)
        before, after = self.places[worst - 1], self.places[worst]
        for name in before.floats - after.floats:
            self._banned[name] = 0.0
        for group, width in after.widths.items():
            if before.widths.get(group) != width:
                self._banned[group] = size_of(width)
        del self.places[low + 1 :]
        self._probed = self._probe(self.places[-1].widths) if self.places[-1].widths else 0.0

    # ------------------------------------------------------------------ parts

    def _moves(self, here: Place) -> Iterator[_Move]:
        for group, damages in self._ground.damages.items():
            current = here.widths.get(group, self._ground.units[group])
            least = self._banned.get(group, -math.inf)
            yield from (_Move(group, width) for width in damages if least < size_of(width) < size_of(current))
        movable = (here.floats & self._ground.block_damages.keys()) - self._banned.keys()
        yield from (_Move(name, None) for name in movable)

    def _least_us(self, move: _Move) -> float:
        return _TINY + (0.0 if move.width is None else self._ground.least_us.get(move.group, 0.0))

    def _gain(self, here: Place, move: _Move) -> float:
        return here.time_us - self._predict(self._widths(here, move), self._floats(here, move))

    def _delta(self, here: Place, move: _Move, measured: Mapping[_Move, float]) -> float:
        if move.width is None:
            return max(self._ground.block_damages[move.group], _TINY)
        alone = self._alone(here, move)
        factor = measured[move] / alone if move in measured else self._factors[move.group]
        return max(self._alone(here, move, self._lasting) * factor, _TINY)

    def _alone(self, here: Place, move: _Move, table: Mapping[str, Mapping[int, float]] | None = None) -> float:
        damages = (table or self._ground.damages)[move.group]
        current = here.widths.get(move.group)
        if move.width is None:
            raise ValueError("a block has no width")
        return max(damages[move.width] - (0.0 if current is None else damages[current]), _TINY)

    def _learn(self, here: Place, move: _Move, damage: float, measured: dict[_Move, float]) -> None:
        measured[move] = damage
        self._factors[move.group] = max(damage, _TINY) / self._alone(here, move)

    def _go(self, here: Place, move: _Move, measured: Mapping[_Move, float]) -> Place:
        delta = self._delta(here, move, measured)
        widths, floats = self._widths(here, move), self._floats(here, move)
        if move.width is not None:
            self._probed += measured.get(move, 0.0)
        place = Place(
            widths=MappingProxyType(widths),
            floats=floats,
            damage=here.damage + delta,
            time_us=self._predict(widths, floats),
        )
        self.places.append(place)
        return place

    @staticmethod
    def _widths(here: Place, move: _Move) -> dict[str, int]:
        return dict(here.widths) if move.width is None else {**here.widths, move.group: move.width}

    @staticmethod
    def _floats(here: Place, move: _Move) -> frozenset[str]:
        return here.floats - {move.group} if move.width is None else here.floats
