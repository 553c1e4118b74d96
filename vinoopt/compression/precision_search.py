"""The part of the joint search that leaves blocks in float: where INT8 hurts, and where it does not pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from vinoopt import serde
from vinoopt.compression.activations import in_order, sized_like
from vinoopt.compression.boundaries import MixCosts, fastest_mix, find_neighbours, fit_costs, trace_mixes
from vinoopt.compression.frontier import FLOAT, INT8, FrontierPoint
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge
from vinoopt.compression.options import ROUNDS, SearchOptions
from vinoopt.compression.precision import find_blocks
from vinoopt.compression.quantize import kept_bytes
from vinoopt.compression.refusal import find_refused
from vinoopt.compression.sensitivity import block_damages
from vinoopt.errors import DeviceError, ToolchainRefused
from vinoopt.records import CompressionPlan, Precision, Preset, QuantizationPlan, Trial, TrialState

_MOST_REFUSED = 4
"""Blocks that a target's compiler may refuse in INT8 before the search stops asking which."""
_FASTER = 0.99
"""A mix is judged only where it is predicted to take less than this share of the best time so far."""
_RUN = 4
"""Blocks in a row that share their label in one of the mixes that are timed to learn what conversions cost."""
_ACCURATE = "accurate bias correction"
_ACCURATE_TAKES = 4
"""Times what fast correction takes: it runs the network anew for every layer (twice for a ResNet-32, more for deep
ones)."""
_RECIPES_SHARES = {False: 0.25, True: 0.1}
"""Whether plain INT8 is inside the budget -> share of the time that is left for other recipes."""
_MOST_ACTIVATIONS = 2 << 30
"""Bytes that accurate bias correction may keep."""
_MILDER = 0.75
"""Share of plain INT8's damage from which down another recipe takes its place, where that is inside the budget."""
_RESERVES = {"fast": (0.5,), "balanced": (0.5, 0.2), "thorough": (0.7, 0.4, 0.15)}
"""Shares of the best candidate's predicted damage at which safer ones are judged, by effort: the test part may
refuse what the search part let pass, and the next candidate must not be the float model."""


class PrecisionSearch:
    """One search over precisions and what it has learnt so far; anchors must have been judged before."""

    def __init__(self, *, judge: Judge, options: SearchOptions, say: Callable[[str], None]) -> None:
        self.judge = judge
        self.options = options
        self.say = say
        self.damages: dict[str, float] = {}
        """Output damage of each block alone in INT8, where the search asked."""
        self.gains: dict[str, float] = {}
        """Microseconds that INT8 saves in each block's own kernels on the target; negative where it costs."""
        self.refused: frozenset[str] = frozenset()
        """Blocks that the target's compiler does not take in INT8."""
        self.recipe: QuantizationPlan | None = None
        """What does the least damage; None where nothing is quantized."""
        self.reasons: list[str] = []
        self.seen: list[tuple[frozenset[str], float]] = []
        """Mixes that were timed: blocks in float, and microseconds beyond INT8 throughout."""
        self.int8_us = math.nan
        """INT8 throughout, in the unit of trials."""

    def run(self) -> None:
        """Judge candidates with some blocks in float."""
        recipe = self.recipe = self._recipe()
        if recipe is None or self.options.is_late:
            return
        precision = self._rest_precision()
        pair = self.judge.workshop.pair((), recipe)
        blocks = [b.name for b in find_blocks(pair) if b.name not in recipe.float_layers]
        if not blocks:
            self.reasons.append("NNCF quantized no layer of this model, so there is nothing to choose between")
            return
        recipe = self._accepted(recipe, precision, blocks)
        blocks = [name for name in blocks if name not in recipe.float_layers]
        whole = CompressionPlan(quantization=recipe, float_precision=precision)
        try:
            self._cost_table(whole, blocks)
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"INT8 cannot be timed on {self.judge.yardstick.target}: {exc}")
            return
        if any(t.state is TrialState.COMPLETE and t.plan.quantization is not None for t in self.judge.trials):
            self._in_fastest_format(recipe)
            self._without_losers(whole, blocks)
            return
        if not self._can_pay(whole):
            return
        self._damage_table(whole, blocks, trials=6)
        self._bisect(whole, trace_mixes(self.costs, self.damages))
        for _ in range(ROUNDS[self.options.effort] - 1):
            if self.options.is_late or not self._correct(whole, blocks):
                break
        self._other_formats(whole)
        self._reserves(whole, self._best_mixed(whole))

    # ------------------------------------------------------------------ what is quantized, and how

    def _recipe(self) -> QuantizationPlan | None:
        """The quantizer's recipe with the least damage when every block is INT8; None where all fail.

        Where plain INT8 is inside the budget already, only among those that change no time: what they leave of the
        budget can be spent on pruning.
        """
        base = self.options.base
        is_inside = any(t.state is TrialState.COMPLETE and t.plan.quantization is not None for t in self.judge.trials)
        recipes = _recipes(base, self.options, only_free=is_inside)
        if is_inside and len(recipes) == 1:
            return base
        self._leave_out_what_does_not_fit(recipes)
        deadline = self.options.deadline_of(_RECIPES_SHARES[is_inside])
        damages: dict[str, tuple[float, QuantizationPlan]] = {}
        took_s = max((t.seconds for t in self.judge.trials if t.plan.quantization is not None), default=0.0)

        def is_late(recipe: QuantizationPlan) -> bool:
            expected_s = took_s * (1 if recipe.fast_bias_correction else _ACCURATE_TAKES)
            return deadline is not None and time.monotonic() + expected_s > deadline

        for number, (name, recipe) in enumerate(recipes.items()):
            if damages and is_late(recipe):
                continue
            self._expect((len(recipes) - number) * took_s, trials=0)
            damages[name] = (self._damage_of_recipe(name, recipe), recipe)
        better = [name for name in damages if damages[name][0] < damages["plain"][0]]
        better.sort(key=lambda name: -damages[name][0])
        together = _together(base, [damages[each][1] for each in better])
        if len(better) > 1 and not is_late(together):
            name = " and ".join(better)
            damages[name] = (self._damage_of_recipe(name, together), together)
        plain = damages["plain"][0]
        damages = {name: entry for name, entry in damages.items() if math.isfinite(entry[0])}
        if not damages:
            if any(t.plan.quantization is not None and t.drop is not None for t in self.judge.trials):
                self.reasons.append("INT8's damage to the outputs has no figure, so the recipe is NNCF's own")
                return base
            self.reasons.append("no recipe of the quantizer gives a model that runs")
            return None
        best = min(damages, key=lambda name: damages[name][0])
        if is_inside and damages[best][0] > _MILDER * plain:
            return base
        if best != "plain":
            runs = f"{damages[best][0] / plain:.0%} of the damage of plain INT8" if math.isfinite(plain) else "runs"
            self.reasons.append(f"recipe with {best}: {runs}, and is the ground of the search")
        return damages[best][1]

    def _leave_out_what_does_not_fit(self, recipes: dict[str, QuantizationPlan]) -> None:
        """Takes accurate bias correction out where memory has no room for what it keeps, and says so."""
        source, calls = self.judge.workshop.source, self.judge.workshop.calibration
        needed = kept_bytes(sized_like(source, in_order(source, calls[0])), self.options.base, len(calls))
        if _ACCURATE in recipes and needed > min(self.options.memory_bytes / 2, _MOST_ACTIVATIONS):
            del recipes[_ACCURATE]
            size = f"{needed / 2**20:.3g} MiB" if math.isfinite(needed) else "an unknown number"
            self.reasons.append(f"{_ACCURATE} was not tried: it would keep {size} of activations")

    def _in_fastest_format(self, recipe: QuantizationPlan) -> None:
        """Judge the recipe in place of plain INT8, where that is the fastest."""
        best = min((t for t in self._inside() if t.plan.quantization is not None), key=latency_of, default=None)
        if best is None:
            return
        plan = serde.replace(best.plan, quantization=recipe)
        if not self.judge.knows(plan):
            self.judge.judge(plan, note="the recipe of least damage")

    def _damage_of_recipe(self, name: str, recipe: QuantizationPlan) -> float:
        self.say(f"recipe {name if name == 'plain' else f'with {name}'}")
        plan = CompressionPlan(quantization=recipe, float_precision=self._rest_precision())
        return self.judge.damage(plan, partial(self.judge.workshop.build, plan))

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
            except (ToolchainRefused, DeviceError):  # by a compiler that is apart, or by the plugin of a device here
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
        self.refused = refused
        self.reasons.append(
            f"the target's compiler refuses {', '.join(sorted(refused))} in INT8, so that stays float"
        )
        self._judge_floats(whole, refused, "what the target's compiler takes in INT8")
        return serde.replace(recipe, float_layers=tuple(sorted({*recipe.float_layers, *refused})))

    def _rest_precision(self) -> Precision:
        """The fastest float format that by itself takes less than half of the budget."""
        budget = self.judge.budget.max_drop
        timed = [
            t
            for t in self._inside()
            if t.plan.quantization is None and t.plan.weights is None and _expected(t) <= budget / 2
        ]
        if not timed:
            return self.judge.yardstick.float_precisions[0]
        return min(timed, key=latency_of).plan.float_precision

    # ------------------------------------------------------------------ tables

    def _cost_table(self, whole: CompressionPlan, blocks: Sequence[str]) -> None:
        """What INT8 saves in each block, and what conversions cost between blocks, from mixes that are timed."""
        self.say(f"time of each of {len(blocks)} blocks, and of conversions between them")
        build = self.judge.workshop.build
        in_float = CompressionPlan(float_precision=whole.float_precision)
        slow = self.judge.block_times(in_float, partial(build, in_float), blocks)
        fast = self.judge.block_times(whole, partial(build, whole), blocks)
        self.gains = {name: slow.get(name, 0.0) - fast.get(name, 0.0) for name in blocks}
        self.neighbours = find_neighbours(self.judge.workshop.source, blocks)
        mixes = _telling_mixes(blocks)
        plans = [in_float, whole, *(_with_floats(whole, floats) for floats in mixes)]
        float_ms, int8_ms, *mixed_ms = self.judge.latencies_ms(plans)
        anchor = next((t for t in self._inside() if t.plan == in_float), None)
        unit = 1.0 if anchor is None else latency_of(anchor) / float_ms
        self.int8_us = int8_ms * unit * 1e3
        self.seen = [
            (frozenset(floats), (ms - int8_ms) * unit * 1e3)
            for floats, ms in zip([set(blocks), *mixes], [float_ms, *mixed_ms], strict=True)
        ]
        self.costs: MixCosts = fit_costs(self.neighbours, self.gains, self.seen)
        share = self.costs.conversion_us / self.int8_us
        self.reasons.append(
            f"a conversion between INT8 and float costs about {share:.1%} of the INT8 model's time on "
            f"{self.judge.yardstick.target} (fitted to {len(mixes)} mixed models)"
        )

    def _damage_table(self, whole: CompressionPlan, blocks: Sequence[str], *, trials: int) -> None:
        """The damage of each block; `trials` are expected to follow."""
        self.say(f"damage of each of {len(blocks)} blocks")
        deadline = self.options.table_deadline

        def probe(names: Sequence[str]) -> float:
            if deadline is not None and time.monotonic() > deadline:
                return math.inf  # what the time does not reach is unknown, which keeps it in float
            return self._damage_of(whole, set(blocks) - set(names))

        table = block_damages(
            blocks,
            probe,
            deadline=deadline,
            progress=lambda done, total: self._expect((total - done) * self.judge.spent.probe_s, trials=trials),
        )
        self.damages = dict(table.damages)

    def _damage_of(self, whole: CompressionPlan, floats: Collection[str]) -> float:
        plan = _with_floats(whole, floats)
        return self.judge.damage(plan, partial(self.judge.workshop.build, plan))

    # ------------------------------------------------------------------ candidates

    def _bisect(self, whole: CompressionPlan, points: Sequence[FrontierPoint]) -> Trial | None:
        """Judge along the frontier until the fastest candidate inside the budget is cornered.

        Points that are predicted to be no faster than what is known to be inside are left out.
        """
        points = self._worth(points)
        low, high = -1, len(points)  # points[low] is inside, points[high] outside
        best: Trial | None = None
        while high - low > 1 and not self.options.is_late:
            middle = (low + high) // 2
            self._expect(0.0, trials=math.ceil(math.log2(high - low)))
            floats = _floats_of(points[middle])
            trial = self._judge_floats(whole, floats, f"frontier point {middle + 1} of {len(points)}")
            if trial.state is TrialState.FAILED:  # which says nothing about its neighbours
                del points[middle]
                high -= 1
            elif trial.state in (TrialState.COMPLETE, TrialState.SLOWER):
                low, best = middle, trial if trial.state is TrialState.COMPLETE else best
            else:
                high = middle
            if trial.state is TrialState.SLOWER and not self._worth(points[low + 1 : high], is_said=False):
                break  # what was seen since has corrected the costs: nothing that is left can pay
        return best

    def _can_pay(self, whole: CompressionPlan) -> bool:
        """Whether any mix at all is predicted to be faster than what is inside already, whatever it damages."""
        least = self.int8_us + self.costs.beyond_int8_us(fastest_mix(self.costs))
        best_us = self._best_ms() * 1e3
        if least < _FASTER * best_us:
            return True
        self.reasons.append(
            f"INT8 was over budget, and no mix of INT8 and {whole.float_precision} is predicted to be faster than "
            f"what is inside: at best {least / 1e3:.3g} ms against {best_us / 1e3:.3g} ms"
        )
        return False

    def _worth(self, points: Sequence[FrontierPoint], *, is_said: bool = True) -> list[FrontierPoint]:
        mixed = [point for point in points if INT8 in point.picks.values()]  # else it is the float model
        best_us = self._best_ms() * 1e3
        found = [p for p in mixed if self._predicted_us(p) < _FASTER * best_us]
        if mixed and not found and is_said:
            nearest = min(map(self._predicted_us, mixed))
            self.reasons.append(
                f"no other mix of INT8 and float is predicted to be faster than what is known: at best "
                f"{nearest / 1e3:.3g} ms against {best_us / 1e3:.3g} ms, conversions between formats included"
            )
        return found

    def _predicted_us(self, point: FrontierPoint) -> float:
        return self.int8_us + self.costs.beyond_int8_us(_floats_of(point))

    def _correct(self, whole: CompressionPlan, blocks: Sequence[str]) -> bool:
        """Measure again, around the best candidate, what its float blocks would damage; True if that helped."""
        best = self._best_mixed(whole)
        if best is None:
            return False
        floats = set(_recipe_of(best.plan).float_layers) & set(blocks)
        paying = sorted(floats - fastest_mix(self.costs), key=lambda n: -self.gains[n])
        if not paying:
            return False
        ground = self._damage_of(whole, floats)
        self.say(f"damage of {len(paying)} float blocks again, in the company of the best candidate")
        deadline = self.options.table_deadline
        again: dict[str, float] = {}
        for place, name in enumerate(paying):
            if deadline is not None and time.monotonic() > deadline:
                break
            self._expect((len(paying) - place) * self.judge.spent.probe_s, trials=3)
            again[name] = max(self._damage_of(whole, floats - {name}) - ground, 0.0)
        self.damages.update(again)
        # What is INT8 in the best candidate costs nothing more; what was not measured again stays as it is.
        around = {name: again.get(name, math.inf if name in floats else 0.0) for name in blocks}
        return self._bisect(whole, trace_mixes(self.costs, around)) is not None

    def _reserves(self, whole: CompressionPlan, best: Trial | None) -> None:
        """Judge safer candidates between the best one and the float model, where there are none yet."""
        if best is None or not self.damages:
            return
        floats = set(_recipe_of(best.plan).float_layers)
        limit = sum(damage for name, damage in self.damages.items() if name not in floats)
        float_ms = min((latency_of(t) for t in self._inside() if t.plan.quantization is None), default=math.inf)
        points = [
            point
            for point in trace_mixes(self.costs, self.damages)
            if self._predicted_us(point) < _FASTER * 1e3 * float_ms
        ]
        shares = _RESERVES[self.options.effort]
        for place, share in enumerate(shares):
            self._expect(0.0, trials=len(shares) - place)
            safer = [p for p in points if p.damage <= share * limit and INT8 in p.picks.values()]
            if not safer or self.options.is_late:
                return
            plan = _with_floats(whole, _floats_of(safer[-1]))
            if not self.judge.knows(plan):
                self.say(f"{plan.title}: a safer candidate")
                note = f"{share:.0%} of the best candidate's predicted damage"
                self.judge.judge(plan, note=note, beat_ms=float_ms)

    def _other_formats(self, whole: CompressionPlan) -> None:
        """The best candidate with its float blocks in the target's other float formats: the same model."""
        best = self._best_mixed(whole)
        if best is None:
            return
        for precision in self.judge.yardstick.float_precisions:
            if precision is not best.plan.float_precision and not self.options.is_late:
                self.judge.judge(
                    serde.replace(best.plan, float_precision=precision),
                    note="best candidate in another format",
                    beat_ms=self._best_ms(),
                )

    def _without_losers(self, whole: CompressionPlan, blocks: Sequence[str]) -> None:
        """INT8 is inside the budget: leave it only where it costs time, and find safer neighbours."""
        slower = sorted(name for name in blocks if self.gains[name] <= 0)
        floats = fastest_mix(self.costs)
        if slower:
            names = f"{', '.join(slower[:4])}{' ...' if len(slower) > 4 else ''}"
            fate = (
                f"{len(floats)} blocks are better left in float"
                if floats
                else "leaving them in float would cost more in conversions than it saves"
            )
            self.reasons.append(
                f"{len(slower)} of {len(blocks)} blocks are not faster in INT8 by themselves on "
                f"{self.judge.yardstick.target} ({names}); {fate}"
            )
        predicted = self.int8_us + self.costs.beyond_int8_us(floats)
        if floats and len(floats) < len(blocks) and predicted < _FASTER * self._best_ms() * 1e3:
            self._judge_floats(whole, floats, "INT8 only where it is faster")
        best = min(
            (t for t in self._inside() if t.plan.quantization is not None), key=latency_of, default=None
        )
        if best is None or self._is_safe(best) or self.options.is_late:
            return
        self._damage_table(whole, blocks, trials=len(_RESERVES[self.options.effort]))
        self._reserves(whole, best)

    def _is_safe(self, trial: Trial) -> bool:
        """Whether the test part will hardly refuse it; with little effort, half of the budget left is enough."""
        limit = self.judge.budget.max_drop
        if trial.drop_high is not None and trial.drop_high <= limit:
            return True
        return self.options.effort == "fast" and trial.drop is not None and trial.drop <= limit / 2

    def _judge_floats(self, whole: CompressionPlan, floats: Collection[str], note: str) -> Trial:
        plan = _with_floats(whole, floats)
        known = next((trial for trial in self.judge.trials if trial.plan == plan), None)
        if known is not None:
            return known
        self.say(f"{plan.title}: {note}")
        trial = self.judge.judge(plan, note=note, beat_ms=self._best_ms())
        if trial.latency is not None and self.seen:
            self.seen.append((frozenset(floats), trial.latency.latency_p50_ms * 1e3 - self.int8_us))
            self.costs = fit_costs(self.neighbours, self.gains, self.seen)
        return trial

    # ------------------------------------------------------------------ what is known

    def _inside(self) -> list[Trial]:
        return [t for t in self.judge.trials if t.state is TrialState.COMPLETE and t.latency is not None]

    def _best_ms(self) -> float:
        """The least latency of what is inside the budget."""
        return min(map(latency_of, self._inside()), default=math.inf)

    def _best_mixed(self, whole: CompressionPlan) -> Trial | None:
        recipe = serde.replace(_recipe_of(whole), float_layers=())
        mixed = [
            t
            for t in self._inside()
            if t.plan.quantization is not None
            and serde.replace(t.plan.quantization, float_layers=()) == recipe
        ]
        return min(mixed, key=latency_of, default=None)

    def _expect(self, seconds: float, *, trials: int) -> None:
        """Tell what is left of this stage: `seconds`, and so many trials."""
        known = [t.seconds for t in self.judge.trials if t.plan.quantization is not None]
        each = min(known) if known else 0.0
        self.judge.forecast.still("precisions", seconds + trials * each)


def _telling_mixes(blocks: Sequence[str]) -> list[set[str]]:
    """Two mixes to time: one with as many conversions as there can be, one with fewer."""
    mixes = [set(blocks[1::2]), {name for place, name in enumerate(blocks) if place // _RUN % 2}]
    return [mix for mix in mixes if mix]


def _recipes(base: QuantizationPlan, options: SearchOptions, *, only_free: bool) -> dict[str, QuantizationPlan]:
    """Recipes worth comparing, by effort; with `only_free`, those that leave the kernels as they are.

    How ranges are found and biases corrected takes no time in the result. Asymmetric activations may.
    """
    recipes = {"plain": base}
    if options.effort == "fast":
        return recipes
    if not only_free:
        if base.preset is None and not base.is_transformer:
            recipes["mixed preset"] = serde.replace(base, preset=Preset.MIXED)
        if options.effort == "thorough" and base.is_transformer:
            recipes["weaker smoothing"] = serde.replace(base, smooth_quant_alpha=0.5)
    if base.activation_range is None:
        ranges = ("minmax", "histogram") if options.effort == "thorough" else ("minmax",)
        recipes |= {f"{name} ranges": serde.replace(base, activation_range=name) for name in ranges}
    if base.fast_bias_correction:
        recipes[_ACCURATE] = serde.replace(base, fast_bias_correction=False)
    return recipes


def _together(base: QuantizationPlan, recipes: Sequence[QuantizationPlan]) -> QuantizationPlan:
    """What the recipes change of `base`, all at once; where two change the same, as the last one does."""
    changes = {
        name: value
        for recipe in recipes
        for name in QuantizationPlan.model_fields
        if (value := getattr(recipe, name)) != getattr(base, name)
    }
    return serde.replace(base, **changes)


def _recipe_of(plan: CompressionPlan) -> QuantizationPlan:
    if plan.quantization is None:
        raise ValueError("the plan quantizes nothing")
    return plan.quantization


def _with_floats(plan: CompressionPlan, floats: Collection[str]) -> CompressionPlan:
    """The plan with these blocks in float beside those that its recipe leaves in float already."""
    recipe = _recipe_of(plan)
    names = tuple(sorted({*floats, *recipe.float_layers}))
    return serde.replace(plan, quantization=serde.replace(recipe, float_layers=names))


def _floats_of(point: FrontierPoint) -> frozenset[str]:
    return frozenset(name for name, pick in point.picks.items() if pick == FLOAT)


def _expected(trial: Trial) -> float:
    return math.inf if trial.expected_drop is None else trial.expected_drop


def latency_of(trial: Trial) -> float:
    """Milliseconds; infinite where it was not timed."""
    return trial.latency.latency_p50_ms if trial.latency is not None else math.inf
