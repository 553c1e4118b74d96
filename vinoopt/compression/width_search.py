"""The part of the joint search that takes channels away: from the best precision plan on, within the same budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import openvino as ov

from vinoopt import serde
from vinoopt.compression.frontier import FLOAT, INT8, FrontierPoint, Option, trace_frontier
from vinoopt.compression.judge import Judge
from vinoopt.compression.quantize import quantize
from vinoopt.compression.widths import (
    RATIOS,
    PruningKit,
    WidthTimes,
    offered_widths,
    saved_times,
    width_damages,
    width_options,
)
from vinoopt.records import CompressionPlan, GroupWidth, QuantizationPlan, Trial, TrialState

_LEAST_GAIN = 0.02
"""The bisection ends where its candidates differ by less than this share of the predicted time."""
_TIMING_SAMPLES = 4
"""Calibration calls for models that are only timed."""
_GROUP, _BLOCK = "group ", "block "


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTables:
    """What is known of the blocks' precisions, where the search looked at them."""

    damages: Mapping[str, float]
    gains_us: Mapping[str, float]


class WidthSearch:
    """Finds the fastest pruned candidate inside the budget, by bisection along the joint frontier."""

    def __init__(
        self,
        judge: Judge,
        kit: PruningKit,
        ground: CompressionPlan,
        *,
        multiple: int,
        max_pruning: float,
        rounds: int,
        deadline: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.judge = judge
        self.kit = kit
        self.ground = ground
        """The best plan without pruning: its recipe and formats are kept."""
        self.rounds = rounds
        """How often the frontier is traced, the first time included."""
        self.deadline = deadline
        self.total_us = 0.0
        self.say = say
        self.offers = {
            group.name: offers
            for group in kit.coupling.groups
            if (offers := offered_widths(group, multiple=multiple, max_pruning=max_pruning))
        }

    def run(self, tables: BlockTables) -> list[str]:
        """Judge candidates; gives sentences for the report."""
        if not self.offers:
            return ["no group of channels is wide enough to be cut in steps that the target likes"]
        self.say(f"time of the blocks with {', '.join(f'{1 - r:.0%}' for r in RATIOS)} of their channels")
        times = self._block_times()
        self.say(f"damage of {sum(map(len, self.offers.values()))} widths of {len(self.offers)} groups")
        damages = width_damages(self.kit, self.offers, self._probe, is_late=self._is_late)
        if not damages:
            return ["the time limit left none for pruning"]
        saved = saved_times(self.kit, damages, times)
        items = {
            _GROUP + name: width_options(
                name, self.kit.coupling.group(name).units, damages[name], saved[name]
            )
            for name in damages
        }
        items |= self._block_items(tables)
        self.total_us = sum(times.at(block, 1.0) for block in times.times)
        points = trace_frontier(items)
        if len(points) == 1:
            return [f"no narrower group is predicted to save time on {self.judge.yardstick.target}"]
        best = self._bisect(points)
        for _ in range(self.rounds - 1):
            if best is None or self._is_late():
                break
            again = self._around(best, damages, saved)
            if again is None:
                break
            best = again
        return [self._conclusion(best)]

    def _around(
        self,
        best: Trial,
        damages: Mapping[str, Mapping[int, float]],
        saved: Mapping[str, Mapping[int, float]],
    ) -> Trial | None:
        """A faster candidate, from damages measured again in the company of what `best` has removed already."""
        widths = {width.group: len(width.kept) for width in best.plan.widths}
        ground = self._probe(best.plan.widths)
        items: dict[str, tuple[Option, ...]] = {}
        self.say(f"damage of the next width of {len(damages)} groups, in the company of the best candidate")
        for name, known in damages.items():
            current = widths.get(name, self.kit.coupling.group(name).units)
            smaller = [width for width in known if width < current]
            if not smaller or self._is_late():
                continue
            step = max(smaller)
            damage = max(self._probe(self.kit.widths({**widths, name: step})) - ground, 0.0)
            gain = saved[name][step] - saved[name].get(current, 0.0)
            items[_GROUP + name] = (
                Option(name=str(current), damage=0.0, time_us=0.0),
                Option(name=str(step), damage=damage, time_us=-gain),
            )
        points = trace_frontier(items) if items else ()
        return self._bisect(points, fixed=widths, recipe=best.plan.quantization)

    # ------------------------------------------------------------------ tables

    def _block_times(self) -> WidthTimes:
        blocks = sorted({layer.name for layer in self.kit.coupling.layers})
        rows = []
        for ratio in RATIOS:
            kept = {
                group.name: max(round(group.units * (1 - ratio)), 1) for group in self.kit.coupling.groups
            }
            plan = serde.replace(self.ground, widths=self.kit.widths(kept))
            make = partial(self._timed_model, plan)
            rows.append(self.judge.block_times(plan, make, blocks, kind="rough"))
        # A block that is not faster with fewer channels is as fast: what is above that is noise.
        times = {
            block: tuple(min(row[block] for row in rows[: i + 1]) for i in range(len(rows))) for block in blocks
        }
        in_kernels = sum(values[0] for values in times.values())
        whole = next((t.latency for t in self.judge.trials if t.plan == self.ground), None)
        beyond = 0.0 if whole is None else max(whole.latency_p50_ms * 1e3 - in_kernels, 0.0)
        shares = tuple(1 - ratio for ratio in RATIOS)
        return WidthTimes(shares=shares, times=times, overhead_us=beyond / max(len(times), 1))

    def _timed_model(self, plan: CompressionPlan) -> ov.Model:
        """A model with these widths in the ground's formats, fit for a clock only."""
        model = self.kit.cut(plan.widths).model
        if plan.quantization is None:
            return model
        recipe = serde.replace(plan.quantization, subset_size=_TIMING_SAMPLES)
        workshop = self.judge.workshop
        return quantize(model, recipe, workshop.calibration, device=workshop.device)

    def _probe(self, widths: tuple[GroupWidth, ...]) -> float:
        """Damage in float, which is the same for every target."""
        plan = CompressionPlan(widths=widths)
        return self.judge.damage(plan, lambda: self.kit.roughly(widths), is_shared=True, kind="rough")

    def _block_items(self, tables: BlockTables) -> dict[str, tuple[Option, ...]]:
        """Precisions take part where their damages are known; else each block stays as the ground has it."""
        if self.ground.quantization is None:
            return {}
        return {
            _BLOCK + name: (
                Option(name=FLOAT, damage=0.0, time_us=max(tables.gains_us.get(name, 0.0), 0.0)),
                Option(name=INT8, damage=damage, time_us=max(-tables.gains_us.get(name, 0.0), 0.0)),
            )
            for name, damage in tables.damages.items()
        }

    # ------------------------------------------------------------------ candidates

    def _bisect(
        self,
        points: Sequence[FrontierPoint],
        *,
        fixed: Mapping[str, int] | None = None,
        recipe: QuantizationPlan | None = None,
    ) -> Trial | None:
        """The fastest candidate inside the budget along `points`, whose first changes nothing; None: none is.

        `fixed` widths hold for groups that the points do not name; `recipe` for blocks that they do not.
        """
        low, high, best = 0, len(points), None
        while high - low > 1 and not self._is_late():
            if high < len(points) and points[low].time_us - points[high].time_us < _LEAST_GAIN * self.total_us:
                break
            middle = (low + high) // 2
            plan = self._plan(points[middle], fixed or {}, recipe or self.ground.quantization)
            self.say(f"{plan.title}: {self._words(plan)}")
            trial = self.judge.judge(plan, note=self._words(plan))
            if trial.state is TrialState.COMPLETE:
                low, best = middle, trial
            else:
                high = middle
        return best

    def _plan(
        self, point: FrontierPoint, fixed: Mapping[str, int], recipe: QuantizationPlan | None
    ) -> CompressionPlan:
        kept = dict(fixed)
        kept |= {n.removeprefix(_GROUP): int(p) for n, p in point.picks.items() if n.startswith(_GROUP)}
        floats = {n.removeprefix(_BLOCK) for n, p in point.picks.items() if n.startswith(_BLOCK) and p == FLOAT}
        if recipe is not None and any(n.startswith(_BLOCK) for n in point.picks):
            recipe = _with_floats(recipe, floats | set(self.judge.workshop.ignored))
        return serde.replace(self.ground, widths=self.kit.widths(kept), quantization=recipe)

    def _words(self, plan: CompressionPlan) -> str:
        units = sum(self.kit.coupling.group(w.group).units for w in plan.widths)
        kept = sum(len(w.kept) for w in plan.widths)
        return f"{units - kept} of {units} channels removed from {len(plan.widths)} groups"

    def _conclusion(self, best: Trial | None) -> str:
        ground = next((t for t in self.judge.trials if t.plan == self.ground and t.latency is not None), None)
        tried = [t for t in self.judge.trials if t.plan.widths and t.state is TrialState.OVER_BUDGET]
        if best is not None and best.latency is not None and ground is not None and ground.latency is not None:
            gain = ground.latency.latency_p50_ms / best.latency.latency_p50_ms
            return f"pruning on top of {self.ground.title}: {gain:.2f}x ({best.note})"
        if not tried:
            return "no pruned candidate could be built in time"
        nearest = min(tried, key=lambda t: t.drop if t.drop is not None else float("inf"))
        return (
            f"pruning buys nothing inside the budget: the mildest of {len(tried)} candidates "
            f"({nearest.note}) drops {nearest.drop:+.4f} on the search part"
        )

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

def _with_floats(recipe: QuantizationPlan, floats: set[str]) -> QuantizationPlan:
    return serde.replace(recipe, float_layers=tuple(sorted(floats)))

