"""The joint search: precisions and widths, one damage table, one cost table, one budget.

Anchors first (the float model in every format the target likes, and plain INT8), so that there is a result from
the first minute. Then tables: what each choice alone damages, and what it costs on the target. The frontier over
both gives candidates from least damage to least time; since damage grows along it, bisection finds the fastest
one inside the budget with few whole judgements. The sum of single damages is not the damage of the sum: around
the candidate found, the damages of the blocks still in float are measured again, in its company, and the
bisection goes on until it finds nothing faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vinoopt import serde
from vinoopt.compression.frontier import FrontierPoint, Option, trace_frontier
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge
from vinoopt.compression.precision import find_blocks
from vinoopt.compression.refusal import find_refused
from vinoopt.compression.sensitivity import block_damages
from vinoopt.compression.width_search import FLOAT, INT8, BlockTables, WidthSearch
from vinoopt.compression.widths import prepare
from vinoopt.errors import ToolchainRefused
from vinoopt.records import (
    CompressionPlan,
    Precision,
    Preset,
    QuantizationPlan,
    Trial,
    TrialState,
)

_MOST_REFUSED = 4
"""Blocks that a target's compiler may refuse in INT8 before the search stops asking which."""

ROUNDS = {"fast": 1, "balanced": 2, "thorough": 4}
"""How often tables are corrected and the frontier searched again, by effort."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What the search may do."""

    base: QuantizationPlan
    """NNCF's recipe, with layers that must stay float."""
    quantize: bool = True
    prune: bool = True
    max_pruning: float = 0.5
    channel_multiple: int = 16
    seed: int = 0
    effort: str = "balanced"
    deadline: float | None = None
    """In `time.monotonic` seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What came out, with sentences about what was learnt on the way."""

    trials: tuple[Trial, ...]
    damages: Mapping[str, float]
    """Output damage of each block alone in INT8, where the search asked."""
    gains_us: Mapping[str, float]
    """Time that INT8 saves in each block on the target; negative where it costs."""
    reasons: tuple[str, ...]

    @property
    def candidates(self) -> tuple[Trial, ...]:
        """Trials inside the budget that have a latency, the fastest first."""
        inside = [t for t in self.trials if t.state is TrialState.COMPLETE and t.latency is not None]
        unique = {serde.sha256_record(t.plan): t for t in inside}
        return tuple(sorted(unique.values(), key=_latency))


def search(judge: Judge, options: SearchOptions, *, say: Callable[[str], None]) -> SearchResult:
    """Trials of the candidates worth judging; stops early at the deadline with what it has."""
    run = _Run(judge=judge, options=options, say=say)
    run.anchors()
    if options.quantize:
        run.precisions()
    if options.prune:
        run.widths()
    return SearchResult(
        trials=tuple(judge.trials),
        damages=run.damages,
        gains_us=run.gains,
        reasons=tuple(run.reasons),
    )


class _Run:
    """One search and what it has learnt so far."""

    def __init__(self, *, judge: Judge, options: SearchOptions, say: Callable[[str], None]) -> None:
        self.judge = judge
        self.options = options
        self.say = say
        self.damages: dict[str, float] = {}
        self.gains: dict[str, float] = {}
        self.reasons: list[str] = []

    # ------------------------------------------------------------------ anchors

    def anchors(self) -> None:
        """The float model in each format, then plain INT8 in each format for what it leaves in float."""
        formats = self.judge.yardstick.float_precisions
        anchors = {"float": [CompressionPlan(float_precision=precision) for precision in formats]}
        if self.options.quantize:
            base = self.options.base
            anchors["plain INT8"] = [
                CompressionPlan(quantization=base, float_precision=precision) for precision in formats
            ]
        self.say(f"{' and '.join(anchors)} in {', '.join(map(str, formats))}")
        self.judge.judge_anchors(anchors)

    # ------------------------------------------------------------------ precisions

    def precisions(self) -> None:
        """Candidates with some blocks in float: where INT8 hurts, and where it does not pay."""
        recipe = self._recipe()
        if recipe is None or self._is_late():
            return
        precision = self._rest_precision()
        pair = self.judge.workshop.pair((), recipe)
        blocks = [b.name for b in find_blocks(pair) if b.name not in recipe.float_layers]
        if not blocks:
            self.reasons.append("NNCF quantized no layer of this model, so there is nothing to choose between")
            return
        recipe = self._accepted(recipe, precision, blocks)
        blocks = [name for name in blocks if name not in recipe.float_layers]
        try:
            self._cost_table(recipe, precision, blocks)
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"INT8 cannot be timed on {self.judge.yardstick.target}: {exc}")
            return
        whole = CompressionPlan(quantization=recipe, float_precision=precision)
        is_inside = any(
            t.state is TrialState.COMPLETE and t.plan.quantization is not None for t in self.judge.trials
        )
        slower = sorted(name for name in blocks if self.gains[name] <= 0)
        if is_inside:
            self._without_losers(whole, blocks, slower)
            return
        self.say(f"damage of each of {len(blocks)} blocks")
        self._damage_table(whole, blocks)
        self._bisect(whole, blocks)
        for _ in range(ROUNDS[self.options.effort] - 1):
            if self._is_late() or not self._correct(whole, blocks):
                break
        self._other_formats(whole)

    # ------------------------------------------------------------------ widths

    def widths(self) -> None:
        """Pruned candidates, from the fastest one inside the budget so far."""
        if self._is_late():
            return
        inside = self._inside()
        if not inside:
            self.reasons.append("nothing was pruned: not even the float model could be timed inside the budget")
            return
        try:
            self._widths(min(inside, key=_latency).plan)
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"pruning was left out: {str(exc).splitlines()[0]}")

    def _widths(self, ground: CompressionPlan) -> None:
        workshop = self.judge.workshop
        kit = self.judge.shared.once(
            "pruning kit",
            lambda: prepare(
                workshop.source,
                workshop.calibration,
                ignored=workshop.ignored,
                seed=self.options.seed,
                say=self.say,
            ),
        )
        if kit is None:
            self.reasons.append("no group of channels of this model can be removed; see vinoopt inspect")
            return
        workshop.prune, workshop.correct = kit.thoroughly, kit.corrected
        stage = WidthSearch(
            self.judge,
            kit,
            ground,
            multiple=self.options.channel_multiple,
            max_pruning=self.options.max_pruning,
            rounds=ROUNDS[self.options.effort],
            deadline=self.options.deadline,
            say=self.say,
        )
        self.reasons += stage.run(BlockTables(damages=self.damages, gains_us=self.gains))

    def _inside(self) -> list[Trial]:
        return [t for t in self.judge.trials if t.state is TrialState.COMPLETE and t.latency is not None]

    # ------------------------------------------------------------------ parts of the precision search

    def _recipe(self) -> QuantizationPlan | None:
        """The quantizer's recipe with the least damage when every block is INT8; None where all fail."""
        base = self.options.base
        inside = [t for t in self.judge.trials if t.state is TrialState.COMPLETE]
        if any(t.plan.quantization is not None for t in inside):
            return base
        damages: dict[str, tuple[float, QuantizationPlan]] = {}
        for name, recipe in _recipes(base, self.options).items():
            if damages and self._is_late():
                break
            self.say(f"recipe {name}")
            plan = CompressionPlan(quantization=recipe, float_precision=self._rest_precision())
            damages[name] = (self.judge.damage(plan, partial(self.judge.workshop.build, plan)), recipe)
        damages = {name: entry for name, entry in damages.items() if math.isfinite(entry[0])}
        if not damages:
            self.reasons.append("no recipe of the quantizer gives a model that runs")
            return None
        best = min(damages, key=lambda name: damages[name][0])
        if best != "plain":
            self.reasons.append(f"recipe {best} does less damage than plain INT8 and is the ground of the search")
        return damages[best][1]

    def _accepted(
        self, recipe: QuantizationPlan, precision: Precision, blocks: Sequence[str]
    ) -> QuantizationPlan:
        """The recipe with those blocks in float that the target's compiler refuses in INT8."""
        whole = CompressionPlan(quantization=recipe, float_precision=precision)
        if not any(t.state is TrialState.FAILED and t.plan.quantization is not None for t in self.judge.trials):
            return recipe

        def accepts(floats: set[str]) -> bool:
            plan = _with_floats(whole, floats)
            try:
                self.judge.yardstick.measure(plan, self.judge.workshop.build(plan))
            except ToolchainRefused:
                return False
            return True

        self.say("whether the target's compiler takes every block in INT8")
        try:
            refused = find_refused(blocks, accepts, most=_MOST_REFUSED)
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"the target's compiler could not be asked which blocks it refuses: {exc}")
            return recipe
        if not refused:
            return recipe
        self.reasons.append(
            f"the target's compiler refuses {', '.join(sorted(refused))} in INT8, so that stays float"
        )
        self._judge_floats(whole, set(refused), "what the target's compiler takes in INT8")
        return serde.replace(recipe, float_layers=tuple(sorted({*recipe.float_layers, *refused})))

    def _rest_precision(self) -> Precision:
        """The fastest float format that by itself takes less than half of the budget."""
        budget = self.judge.budget.max_drop
        timed = [
            t
            for t in self._inside()
            if t.plan.quantization is None and t.drop is not None and t.drop <= budget / 2
        ]
        if not timed:
            return self.judge.yardstick.float_precisions[0]
        return min(timed, key=_latency).plan.float_precision

    def _cost_table(self, recipe: QuantizationPlan, precision: Precision, blocks: Sequence[str]) -> None:
        build = self.judge.workshop.build
        in_float = CompressionPlan(float_precision=precision)
        in_int8 = CompressionPlan(quantization=recipe, float_precision=precision)
        slow = self.judge.block_times(in_float, partial(build, in_float), blocks)
        fast = self.judge.block_times(in_int8, partial(build, in_int8), blocks)
        self.gains = {name: slow.get(name, 0.0) - fast.get(name, 0.0) for name in blocks}

    def _damage_table(self, whole: CompressionPlan, blocks: Sequence[str]) -> None:
        table = block_damages(
            blocks,
            # What the time does not reach is unknown: infinite damage keeps it in float.
            lambda names: math.inf if self._is_late() else self._damage_of(whole, set(blocks) - set(names)),
            deadline=self._table_deadline(),
        )
        self.damages = dict(table.damages)

    def _damage_of(self, whole: CompressionPlan, floats: set[str]) -> float:
        plan = _with_floats(whole, floats)
        return self.judge.damage(plan, partial(self.judge.workshop.build, plan))

    def _bisect(self, whole: CompressionPlan, blocks: Sequence[str]) -> Trial | None:
        """Judge along the frontier of all blocks until the fastest candidate inside the budget is cornered."""
        points = trace_frontier({name: self._options(name) for name in blocks})
        slower = sum(gain <= 0 for gain in self.gains.values())
        if slower:
            self.reasons.append(f"{slower} blocks stay float because INT8 does not make them faster by themselves")
        return self._bisect_points(whole, points)

    def _bisect_points(self, whole: CompressionPlan, points: Sequence[FrontierPoint]) -> Trial | None:
        all_float = [point for point in points if INT8 not in point.picks.values()]
        points = points[len(all_float) :]  # those are the float model itself
        low, high = -1, len(points)  # points[low] is inside, points[high] outside
        best: Trial | None = None
        while high - low > 1 and not self._is_late():
            middle = (low + high) // 2
            floats = {name for name, pick in points[middle].picks.items() if pick == FLOAT}
            trial = self._judge_floats(whole, floats, f"frontier point {middle + 1} of {len(points)}")
            if trial.state is TrialState.COMPLETE:
                low, best = middle, trial
            else:
                high = middle
        return best

    def _options(self, name: str) -> tuple[Option, ...]:
        return (
            Option(name=FLOAT, damage=0.0, time_us=max(self.gains[name], 0.0)),
            Option(name=INT8, damage=self.damages[name], time_us=max(-self.gains[name], 0.0)),
        )

    def _correct(self, whole: CompressionPlan, blocks: Sequence[str]) -> bool:
        """Measure again, around the best candidate, what its float blocks would damage; True if that helped."""
        best = self._best_mixed(whole)
        if best is None:
            return False
        floats = set(_recipe_of(best.plan).float_layers) & set(blocks)
        paying = sorted((n for n in floats if self.gains[n] > 0), key=lambda n: -self.gains[n])
        if not paying:
            return False
        ground = self._damage_of(whole, floats)
        self.say(f"damage of {len(paying)} float blocks again, in the company of the best candidate")
        deadline = self._table_deadline()
        again: dict[str, float] = {}
        for name in paying:
            if deadline is not None and time.monotonic() > deadline:
                break
            again[name] = max(self._damage_of(whole, floats - {name}) - ground, 0.0)
        self.damages.update(again)
        points = trace_frontier({name: self._options(name) for name in again})
        fixed = floats - set(again)
        points = tuple(
            FrontierPoint(
                picks={**p.picks, **dict.fromkeys(fixed, FLOAT)}, damage=p.damage, time_us=p.time_us
            )
            for p in points[1:]  # the first is the candidate itself
        )
        found = self._bisect_points(whole, points)
        return found is not None

    def _other_formats(self, whole: CompressionPlan) -> None:
        """The best candidate with its float blocks in the target's other float formats: the same model."""
        best = self._best_mixed(whole)
        if best is None:
            return
        for precision in self.judge.yardstick.float_precisions:
            if precision is not best.plan.float_precision and not self._is_late():
                self.judge.judge(
                    serde.replace(best.plan, float_precision=precision), note="best candidate in another format"
                )

    def _best_mixed(self, whole: CompressionPlan) -> Trial | None:
        recipe = serde.replace(_recipe_of(whole), float_layers=())
        mixed = [
            t
            for t in self.judge.trials
            if t.state is TrialState.COMPLETE
            and t.latency is not None
            and t.plan.quantization is not None
            and serde.replace(t.plan.quantization, float_layers=()) == recipe
        ]
        return min(mixed, key=_latency, default=None)

    def _without_losers(self, whole: CompressionPlan, blocks: Sequence[str], slower: Sequence[str]) -> None:
        """INT8 is inside the budget: leave it only where it costs time, and find a safer neighbour."""
        if slower:
            self.reasons.append(
                f"{len(slower)} of {len(blocks)} blocks are not faster in INT8 by themselves on "
                f"{self.judge.yardstick.target}: {', '.join(slower[:4])}{' ...' if len(slower) > 4 else ''}"
            )
            if len(slower) < len(blocks):  # else it is the float model, which is an anchor
                self._judge_floats(whole, set(slower), "INT8 only where it is faster")
        tightest = min(t.drop for t in self._inside() if t.plan.quantization is not None and t.drop is not None)
        if tightest <= self.judge.budget.max_drop / 2 or self._is_late():
            return
        self.say(f"damage of each of {len(blocks)} blocks, for a candidate with more reserve")
        self._damage_table(whole, blocks)
        points = trace_frontier({name: self._options(name) for name in blocks})
        half = sum(damage for damage in self.damages.values() if math.isfinite(damage)) / 2
        safer = next((p for p in reversed(points) if p.damage <= half), points[0])
        floats = {name for name, pick in safer.picks.items() if pick == FLOAT}
        if len(floats) < len(blocks):
            self._judge_floats(whole, floats, "half of the predicted damage")

    def _judge_floats(self, whole: CompressionPlan, floats: set[str], note: str) -> Trial:
        plan = _with_floats(whole, floats)
        self.say(f"{plan.title}: {note}")
        return self.judge.judge(plan, note=note)

    def _is_late(self) -> bool:
        return self.options.deadline is not None and time.monotonic() > self.options.deadline

    def _table_deadline(self) -> float | None:
        """A table may use half of the time that is left: the other half is for judging candidates."""
        if self.options.deadline is None:
            return None
        now = time.monotonic()
        return now + max(self.options.deadline - now, 0.0) / 2


def _recipes(base: QuantizationPlan, options: SearchOptions) -> dict[str, QuantizationPlan]:
    """Recipes worth comparing when plain INT8 is over budget, by effort."""
    recipes = {"plain": base}
    if options.effort == "fast":
        return recipes
    if base.preset is None and not base.is_transformer:
        recipes["mixed preset"] = serde.replace(base, preset=Preset.MIXED)
    if options.effort == "thorough":
        recipes["accurate bias correction"] = serde.replace(base, fast_bias_correction=False)
        recipes["histogram ranges"] = serde.replace(base, activation_range="histogram")
        if base.is_transformer:
            recipes["weaker smoothing"] = serde.replace(base, smooth_quant_alpha=0.5)
    return recipes


def _recipe_of(plan: CompressionPlan) -> QuantizationPlan:
    if plan.quantization is None:
        raise ValueError("the plan quantizes nothing")
    return plan.quantization


def _with_floats(plan: CompressionPlan, floats: set[str]) -> CompressionPlan:
    """The plan with these blocks in float beside those that its recipe leaves in float already."""
    recipe = _recipe_of(plan)
    names = tuple(sorted(floats | set(recipe.float_layers)))
    return serde.replace(plan, quantization=serde.replace(recipe, float_layers=names))


def _latency(trial: Trial) -> float:
    return trial.latency.latency_p50_ms if trial.latency is not None else float("inf")
