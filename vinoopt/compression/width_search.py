"""The part of the joint search that takes channels away: from the best precision plan on, within the same budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import openvino as ov

from vinoopt import serde
from vinoopt.compression.clock import Clock, TimedWidths, two_colours
from vinoopt.compression.depth import lightest_subsets
from vinoopt.compression.descent import Descent, Ground, Place
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge
from vinoopt.compression.quantize import quantize
from vinoopt.compression.widths import (
    PruningKit,
    lasting_shares,
    middle_width,
    offered_widths,
    size_of,
    width_damages,
    with_best_orders,
)
from vinoopt.records import CompressionPlan, Evidence, GroupWidth, Trial, TrialState

_RATIOS = (0.25, 0.5)
"""Shares of channels removed at which blocks are timed."""
_LEAST_GAIN = 0.02
"""Candidates that differ by less than this share of the predicted time are not both judged."""
_RESERVES = {False: (0.6,), True: (0.8, 0.6, 0.4)}
"""Whether the search is thorough -> shares of the best gain at which milder candidates are judged."""
_OVERSHOOT, _MOST_GROWTH = 1.25, 4.0
"""Of the damage at which the budget is predicted to be spent, and of the damage so far: what is looked at next."""
_DETOURS = {False: 0, True: 6}
"""Whether the search is thorough -> candidates that are judged around the step that left the budget."""
_COUNTED_US = 1.0
"""Time per layer that counters on a device of this machine do not tell apart; they count whole microseconds."""
_TRIALS_AHEAD = 4
"""Candidates that usually follow while the path is still inside the budget."""
_SHALLOWER = 2
"""Plans that let branches go, for each share of time that is asked for."""
_REFITTED = {False: 2, True: 5}
"""Whether the search is thorough -> cuts of either kind that are refitted to learn what of their damage lasts."""
_REFITTED_CALLS, _REFITTED_S = 256, 60.0
"""Calibration calls for that, and seconds after which no further cut is begun."""
_TABLE_SHARE, _REFITTED_SHARE = 0.5, 0.3
"""Of the time that is left, what the damage table and those cuts may use: the rest is for candidates."""
_TINY = 1e-12
_LEAST_SHARE = 0.5
"""Of what counters say, what a layer takes at least when the whole model's latency corrects them."""
_TIMING_SAMPLES = 4
"""Calibration calls for models that are only timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTables:
    """What is known of the blocks' precisions, where the search looked at them."""

    damages: Mapping[str, float]
    gains_us: Mapping[str, float]


class WidthSearch:
    """Finds the fastest pruned candidate inside the budget, by steps along a path of widths and precisions."""

    def __init__(
        self,
        judge: Judge,
        kit: PruningKit,
        ground: CompressionPlan,
        *,
        multiple: int,
        max_pruning: float,
        is_thorough: bool,
        deadline: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.judge = judge
        self.kit = kit
        self.ground = ground
        """The best plan without pruning: its recipe and formats are kept."""
        self.is_thorough = is_thorough
        """Whether each group's order of leaving is chosen by what it damages, and more widths are timed."""
        self.deadline = deadline
        self.free: frozenset[str] = frozenset()
        """Blocks that are float at the start, and whose precision the path chooses too."""
        self.path: Descent | None = None
        self.clock: Clock | None = None
        self.damages: Mapping[str, Mapping[int, float]] = {}
        """Group -> width -> damage of this width alone."""
        self.lasting: Mapping[str, Mapping[int, float]] = {}
        """Group -> width -> share of these damages that the thorough refit leaves."""
        self.gains_us: Mapping[str, float] = {}
        """Block -> what INT8 saves there."""
        self.ground_us = 0.0
        """Predicted time of `ground`."""
        self.say = say
        self.offers = {
            group.name: offers
            for group in kit.coupling.groups
            if (
                offers := offered_widths(
                    group,
                    multiple=multiple,
                    max_pruning=max_pruning,
                    kernels=kit.branches[group.name].kernels if group.name in kit.branches else (),
                )
            )
        }
        self._rough: dict[CompressionPlan, ov.Model] = {}
        """Models that are only timed."""
        self.stand_in_us: Mapping[tuple[str, int], float] = {}
        """(group, kernel) -> time of the layer that stands for its branch."""

    def run(self, tables: BlockTables) -> list[str]:
        """Judge candidates; gives sentences for the report."""
        if not self.offers:
            return ["no group of channels is wide enough to be cut in steps that the target likes"]
        clock = self._clock()
        self.say(f"damage of {sum(map(len, self.offers.values()))} widths of {len(self.offers)} groups")
        late = self._late_after(_TABLE_SHARE)
        if self.is_thorough:
            self.kit = with_best_orders(self.kit, self.offers, self._probe, is_late=late)
        damages = width_damages(self.kit, self.offers, self._probe, is_late=late)
        if not damages:
            why = "the time limit left none for it" if late() else "no narrower model could be compared with this one"
            return [f"nothing was pruned: {why}"]
        self.clock, self.damages = clock, damages
        self.lasting = self._lasting_shares()
        self.free = self._free_blocks(tables)

        self.gains_us = tables.gains_us
        path = Descent(
            Ground(
                units={group.name: group.units for group in self.kit.coupling.groups},
                damages=damages,
                block_damages={name: tables.damages[name] for name in self.free},
                floats=self.free,
                lasting=self.lasting,
                least_us=self._least_us(),
            ),
            predict=self._predicted_us,
            probe=lambda widths: self._probe(self.kit.widths(widths)),
            is_late=self._is_late,
        )
        self.path, self.ground_us = path, self._predicted_us({}, self.free)
        first = self._reach(path, damage=0.0, below_us=self.ground_us * (1 - 2 * _LEAST_GAIN))
        if first is None:
            return [f"no narrower group is predicted to save time on {self.judge.yardstick.target}"]
        best = self._follow(path, first, self.ground_us)
        if best is not None:
            self._reserves(path, best)
        return [self._conclusion(best)]

    def _reserves(self, path: Descent, best: Trial) -> None:
        """Judge milder places before the best one: the test part may refuse what the search part let pass."""
        if best.drop_high is not None and best.drop_high <= self.judge.budget.max_drop:
            return
        reached = next((place for place in path.places if self._plan(place) == best.plan), None)
        if reached is None:
            return
        gain_us, step_us = self.ground_us - reached.time_us, _LEAST_GAIN * self.ground_us
        last_us = reached.time_us
        known = [*path.places, *self._neighbours(reached)]
        for share in _RESERVES[self.is_thorough]:
            latest = self.ground_us - min(share * gain_us, self.ground_us - last_us - step_us)
            milder = [p for p in known if p.damage < reached.damage and p.time_us >= latest]
            fastest_us = min((p.time_us for p in milder), default=math.inf)
            if fastest_us > self.ground_us - step_us or self._is_late():
                return
            as_fast = [p for p in milder if p.time_us <= fastest_us + step_us / 2]
            place = min(as_fast, key=lambda p: p.damage)
            last_us = place.time_us
            if not self.judge.knows(self._plan(place)):
                self._judged(place)

    def _neighbours(self, place: Place) -> list[Place]:
        """The place with one of its groups a step wider, or nearly whole, or whole again: milder by another way.

        The path itself may have come there in few large steps. Their damage is that of the place, by what probes say.
        """
        whole = max(self._probe(self.kit.widths(place.widths)), _TINY)
        found: list[Place] = []
        for name, width in place.widths.items():
            wider = [offered for offered in self.offers[name] if size_of(offered) > size_of(width)]
            rest = {group: kept for group, kept in place.widths.items() if group != name}
            for widths in (rest, *({**rest, name: offered} for offered in dict.fromkeys((*wider[-1:], *wider[:1])))):
                if self._is_late():
                    return found
                share = min(self._probe(self.kit.widths(widths)) / whole, 1.0)
                time_us = self._predicted_us(widths, place.floats)
                found.append(
                    Place(widths=widths, floats=place.floats, damage=share * place.damage, time_us=time_us)
                )
        return found

    def _follow(self, path: Descent, first: int, ground_us: float) -> Trial | None:
        """The fastest candidate inside the budget along the path, whose reach grows until it has left it.

        It grows to the damage at which the budget would be spent, and some more, if drop grew with damage.

        Places that are not predicted to be faster than the ground by `_LEAST_GAIN` are not judged.
        """
        low, high, best = 0, first, None
        while not self._is_late():
            self._expect(_TRIALS_AHEAD)
            trial = self._judged(path.places[high])
            if trial.state is not TrialState.COMPLETE:
                break
            here, low, best = path.places[high], high, trial
            spent = max(trial.likely_drop or 0.0, 0.0) / max(self.judge.budget.max_drop, _TINY)
            grown = min(max(_OVERSHOOT / max(spent, _TINY), _OVERSHOOT), _MOST_GROWTH)
            further = self._reach(
                path, damage=here.damage * grown, below_us=here.time_us - _LEAST_GAIN * ground_us
            )
            if further is None:
                return best
            high = further
        low, high, found = self._between(path, (low, high), ground_us)
        return self._around(path, (low, high), ground_us) or found or best

    def _between(self, path: Descent, ends: tuple[int, int], ground_us: float) -> tuple[int, int, Trial | None]:
        """The last place inside the budget, the first outside, and the fastest candidate found between, if any."""
        low, high = ends
        step, best = _LEAST_GAIN * ground_us, None
        while high - low > 1 and not self._is_late():
            middle = (low + high) // 2
            if low and path.places[low].time_us < path.places[high].time_us + step:
                break
            if path.places[middle].time_us > ground_us - step:
                low = middle
                continue
            self._expect(math.ceil(math.log2(high - low)))
            trial = self._judged(path.places[middle])
            if trial.state is TrialState.COMPLETE:
                low, best = middle, trial
            else:
                high = middle
        return low, high, best

    def _around(self, path: Descent, ends: tuple[int, int], ground_us: float) -> Trial | None:
        """The fastest candidate by other steps than that which left the budget; None: none is inside."""
        low, high = ends
        step, best = _LEAST_GAIN * ground_us, None
        for left in range(_DETOURS[self.is_thorough], 0, -1):
            if self._is_late():
                break
            if high > low:
                path.turn(low, high)
            below_us = min(path.places[low].time_us, ground_us - step) - step
            further = self._reach(path, damage=0.0, below_us=below_us)
            if further is None:
                break
            self._expect(left)
            trial = self._judged(path.places[further])
            if trial.state is TrialState.COMPLETE:
                low = high = further
                best = trial
            else:
                high = further
        return best

    def _reach(self, path: Descent, *, damage: float, below_us: float) -> int | None:
        """The first place that damages so much and is so fast, or the last that there is below that time."""
        index = 0
        while not (path.places[index].damage >= damage and path.places[index].time_us < below_us):
            index += 1
            if index == len(path.places) and path.extend() is None:
                index -= 1
                return index if path.places[index].time_us < below_us else None
        return index

    def beyond(self, share: float) -> tuple[CompressionPlan, ...]:
        """Plans that are predicted to take this share of the ground's time, or less, with little damage.

        Those that let whole branches go come first: they save what no narrower branch does, the start of its layers,
        and a network that is trained on learns to do without them. The path's plan is the last.
        """
        self.deadline = None  # the search may be over by now; who asks has time of his own
        plans = [serde.replace(self.ground, widths=self.kit.widths(each)) for each in self._shallower(share)]
        if self.path is not None and (place := _first_below(self.path, share * self.ground_us)) is not None:
            plans.append(self._plan(place))
        return tuple(dict.fromkeys(plans))

    def _shallower(self, share: float) -> list[dict[str, int]]:
        """Branches that go or are stood for, whose damages, of each alone, are the least that save so much."""
        clock = self.clock
        if clock is None:
            return []
        damages = {
            (name, width): damage * self.lasting.get(name, {}).get(width, 1.0)
            for name, known in self.damages.items()
            for width, damage in known.items()
            if width <= 0 and math.isfinite(damage)
        }
        whole = self._time_us(clock, {})
        savings = {(name, width): whole - self._time_us(clock, {name: width}) for name, width in damages}
        damages = {item: damage for item, damage in damages.items() if math.isfinite(savings[item])}
        need = (1.0 - share) * self.ground_us
        return [dict(chosen) for chosen in lightest_subsets(damages, savings, need, count=_SHALLOWER)]

    # ------------------------------------------------------------------ tables

    def _least_us(self) -> Mapping[str, float]:
        """Group -> time that a step has to save to be believed: what its layers' counters tell apart."""
        if not self._is_counted():
            return {}
        return {
            group.name: _COUNTED_US * len({*group.producers, *group.consumers}) for group in self.kit.coupling.groups
        }

    def _is_counted(self) -> bool:
        """Whether times of blocks are counters of a device of this machine."""
        ground = next((t.latency for t in self.judge.trials if t.plan == self.ground and t.latency), None)
        return ground is not None and ground.evidence in (Evidence.MEASURED, Evidence.EMULATED)

    def _predicted_us(self, widths: Mapping[str, int], floats: frozenset[str]) -> float:
        """Of all blocks, where `floats` have not gone to INT8."""
        if self.clock is None:
            raise RuntimeError("nothing was timed yet")
        return self._time_us(self.clock, widths) + sum(max(self.gains_us.get(name, 0.0), 0.0) for name in floats)

    def _time_us(self, clock: Clock, widths: Mapping[str, int]) -> float:
        """Of all blocks, the layers that stand for branches included."""
        plain: dict[str, int] = {}
        stand_ins_us = 0.0
        for name, width in widths.items():
            if width < 0:
                plain |= dict.fromkeys(self.kit.branches[name].inner, 0)
                stand_ins_us += self.stand_in_us[name, -width]
            else:
                plain.setdefault(name, width)
        return clock.at(plain) + stand_ins_us

    def _clock(self) -> Clock:
        """From models in which groups of one colour, or all, have lost channels, or all branches are stood for."""
        blocks = sorted({layer.name for layer in self.kit.coupling.layers})
        whole = self._timed({}, blocks)
        colours = two_colours(self.kit.coupling, whole.times_us)
        every, alone = colours[0] | colours[1], colours if all(colours) else ()
        cuts = [(every, _RATIOS[-1]), *((colour, _RATIOS[-1]) for colour in alone)]
        if self.is_thorough:
            cuts += [(cut, ratio) for ratio in _RATIOS[:-1] for cut in (every, *alone)]
        kept = [self._kept(cut, ratio) for cut, ratio in cuts] + self._with_stand_ins()
        rows = [whole]
        for number, widths in enumerate(kept):
            if number and self._is_late():
                break
            self.say(f"time of the blocks in other models, {number + 1} of {len(kept)}")
            try:
                rows.append(self._timed(widths, blocks))
            except CANDIDATE_ERRORS:
                if min(widths.values()) > 0:
                    raise
                # What cannot be timed is not offered.
        latency = next((t.latency for t in self.judge.trials if t.plan == self.ground), None)
        in_kernels = sum(whole.times_us.values())
        beyond = 0.0 if latency is None else max(latency.latency_p50_ms * 1e3 - in_kernels, 0.0)
        overhead_us = beyond / max(len(blocks), 1)
        rows = self._as_a_whole(rows, overhead_us)
        self.stand_in_us = {
            (name, -width): row.times_us.get(self.kit.branches[name].end, math.inf) + overhead_us
            for row in rows
            for name, width in row.widths.items()
            if width < 0
        }
        narrower = [row for row in rows if all(width > 0 for width in row.widths.values())]
        return Clock(self.kit.coupling, narrower, colours, overhead_us=overhead_us)

    def _kept(self, cut: frozenset[str], ratio: float) -> dict[str, int]:
        return {
            group.name: max(round(group.units * (1 - ratio)), 1)
            for group in self.kit.coupling.groups
            if group.name in cut
        }

    def _with_stand_ins(self) -> list[dict[str, int]]:
        """Every branch with its largest stand-in, then with its next smaller one, and so on."""
        offered = {name: branch.kernels for name, branch in self.kit.branches.items() if name in self.offers}
        longest = max(map(len, offered.values()), default=0)
        return [
            {name: -kernels[number] for name, kernels in offered.items() if number < len(kernels)}
            for number in range(longest)
        ]

    def _timed(self, widths: Mapping[str, int], blocks: Sequence[str]) -> TimedWidths:
        plan = serde.replace(self.ground, widths=self.kit.widths(widths))
        times = self.judge.block_times(plan, partial(self._timed_model, plan), blocks, kind="rough")
        return TimedWidths(widths=widths, times_us=times)

    def _as_a_whole(self, rows: Sequence[TimedWidths], overhead_us: float) -> list[TimedWidths]:
        """The rows, the first the whole model, with what counters of layers do not see shared out among the layers.

        Channels that do not fill a vector may cost conversions between layers; the model as a whole shows them.
        """
        if not self._is_counted():
            return list(rows)
        plans = [serde.replace(self.ground, widths=self.kit.widths(row.widths)) for row in rows]
        self.say(f"latency of {len(plans)} models together")
        try:
            first_ms, *others_ms = self.judge.latencies_ms(plans, self._timed_model, kind="rough")
        except CANDIDATE_ERRORS:
            return list(rows)
        whole_us = sum(rows[0].times_us.values()) + overhead_us * _layers(rows[0])
        corrected = [rows[0]]
        for row, ms in zip(rows[1:], others_ms, strict=True):
            in_kernels = sum(row.times_us.values())
            share = (whole_us * ms / first_ms - overhead_us * _layers(row)) / max(in_kernels, _TINY)
            share = min(max(share, _LEAST_SHARE), 1 / _LEAST_SHARE)
            times = {name: time_us * share for name, time_us in row.times_us.items()}
            corrected.append(TimedWidths(widths=row.widths, times_us=times))
        return corrected

    def _timed_model(self, plan: CompressionPlan) -> ov.Model:
        """A model with these widths in the ground's formats, fit for a clock only."""
        if plan not in self._rough:
            model = self.kit.cut(plan.widths).model
            if plan.quantization is not None:
                recipe = serde.replace(plan.quantization, subset_size=_TIMING_SAMPLES, fast_bias_correction=True)
                workshop = self.judge.workshop
                model = quantize(model, recipe, workshop.calibration, device=workshop.device)
            self._rough[plan] = model
        return self._rough[plan]

    def _probe(self, widths: tuple[GroupWidth, ...]) -> float:
        """Damage in float, which is the same for every target."""
        plan = CompressionPlan(widths=widths)
        return self.judge.damage(plan, lambda: self.kit.roughly(widths), is_shared=True, kind="rough")

    def _lasting_shares(self) -> Mapping[str, Mapping[int, float]]:
        """What layers behind a cut cannot make up for, of whole branches that go and of narrower groups."""
        count = _REFITTED[self.is_thorough]
        self.say(f"what a refit of the layers behind makes up for, at up to {3 * count} cuts")
        late = self._late_after(_REFITTED_SHARE, most_s=_REFITTED_S)
        order = [group.name for group in self.kit.coupling.groups if group.name in self.damages]

        def shares(widths: Mapping[str, int]) -> dict[str, float]:
            names = [name for name in order if name in widths]
            return lasting_shares(names, lambda n: self._lasting(n, widths[n]), count=count, is_late=late)

        def finite(name: str, widths: Sequence[int]) -> int | None:
            return next((w for w in widths if math.isfinite(self.damages[name].get(w, math.inf))), None)

        kinds = (
            {name: finite(name, sorted(w for w in self.damages[name] if w < 0)) for name in order},
            {name: finite(name, [0]) for name in order},
            {name: finite(name, [middle_width([w for w in self.damages[name] if w > 0] or [0])]) for name in order},
        )
        stood_for, gone, narrow = (
            shares({name: width for name, width in each.items() if width is not None}) for each in kinds
        )
        return {
            name: {
                width: (narrow if width > 0 else stood_for if width else gone).get(name, 1.0)
                for width in self.damages[name]
            }
            for name in order
        }

    def _lasting(self, name: str, width: int) -> float:
        widths = self.kit.widths({name: width})

        def refitted() -> ov.Model:
            return self.kit.thoroughly(widths, calls=_REFITTED_CALLS)

        left = self.judge.damage(CompressionPlan(widths=widths), refitted, is_shared=True, kind="refitted")
        return left / max(self.damages[name][width], _TINY)

    def _free_blocks(self, tables: BlockTables) -> frozenset[str]:
        """Float blocks of the ground whose damage in INT8 is known: the path may take them to INT8 too.

        What is INT8 there stays so: a single block in float would cost conversions that the ground does without.
        """
        recipe = self.ground.quantization
        if recipe is None:
            return frozenset()
        return frozenset(name for name in recipe.float_layers if math.isfinite(tables.damages.get(name, math.inf)))

    # ------------------------------------------------------------------ candidates

    def _judged(self, place: Place) -> Trial:
        plan = self._plan(place)
        self.say(f"{plan.title}: {self._words(plan)}")
        return self.judge.judge(plan, note=self._words(plan))

    def _expect(self, trials: int) -> None:
        """Tell that so many trials are left, as far as can be foretold."""
        known = [t.seconds for t in self.judge.trials if t.plan.widths and t.seconds]
        if known:
            self.judge.forecast.still("widths", trials * sum(known) / len(known))

    def _plan(self, place: Place) -> CompressionPlan:
        plan = serde.replace(self.ground, widths=self.kit.widths(place.widths))
        if plan.quantization is not None and self.free:
            fixed = set(plan.quantization.float_layers) - self.free
            recipe = serde.replace(plan.quantization, float_layers=tuple(sorted(fixed | place.floats)))
            plan = serde.replace(plan, quantization=recipe)
        return plan

    def _words(self, plan: CompressionPlan) -> str:
        stood_for = [w for w in plan.widths if w.stand_in]
        narrower = [w for w in plan.widths if not w.stand_in]
        units = sum(self.kit.coupling.group(w.group).units for w in narrower)
        kept = sum(len(w.kept) for w in narrower)
        words = [f"{units - kept} of {units} channels removed from {len(narrower)} groups"] if narrower else []
        words += [f"one layer in place of each of {len(stood_for)} branches"] if stood_for else []
        return ", ".join(words)

    def _conclusion(self, best: Trial | None) -> str:
        ground = next((t for t in self.judge.trials if t.plan == self.ground and t.latency is not None), None)
        tried = [t for t in self.judge.trials if t.plan.widths and t.state is TrialState.OVER_BUDGET]
        if best is not None and best.latency is not None and ground is not None and ground.latency is not None:
            gain = ground.latency.latency_p50_ms / best.latency.latency_p50_ms
            if gain <= 1:
                return f"pruning buys nothing: {best.note} is inside the budget, but {gain:.2f}x as fast as before"
            return f"pruning on top of {self.ground.title}: {gain:.2f}x ({best.note})"
        if not tried:
            return "no pruned candidate could be built in time"
        nearest = min(tried, key=lambda t: t.likely_drop if t.likely_drop is not None else float("inf"))
        return (
            f"pruning buys nothing inside the budget: the mildest of {len(tried)} candidates "
            f"({nearest.note}): {nearest.drop_words} on the search part"
        )

    def _late_after(self, share: float, *, most_s: float = math.inf) -> Callable[[], bool]:
        """Whether this share of the time that is left now, or so many seconds, will have passed."""
        now = time.monotonic()
        left_s = math.inf if self.deadline is None else max(self.deadline - now, 0.0)
        ends_at = now + min(share * left_s, most_s)
        return lambda: time.monotonic() > ends_at

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _layers(row: TimedWidths) -> int:
    """Layers that were run; those of branches that are gone take no time."""
    return sum(time_us > 0 for time_us in row.times_us.values())


def _first_below(path: Descent, time_us: float) -> Place | None:
    """The first place that is predicted to take so long, or less; None where the path does not reach it."""
    while path.places[-1].time_us > time_us:
        if path.extend() is None:
            return None
    return next(place for place in path.places if place.time_us <= time_us)
