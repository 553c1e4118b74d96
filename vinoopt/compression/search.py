"""The joint search: precisions and widths, one damage table, one cost table, one budget.

Anchors first (the float model in every format the target likes, and plain INT8), so that there is a result from
the first minute. Then tables: what each choice alone damages, and what it costs on the target. The frontier over
both gives candidates from least damage to least time; since damage grows along it, bisection finds the fastest
one inside the budget with few whole judgements. The sum of single damages is not the damage of the sum: around
the candidate found, the damages of the blocks still in float are measured again, in its company, and the
bisection goes on until it finds nothing faster. Narrower models come last, along a path of steps whose damage is
measured in the company of the steps before (see `descent`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import openvino as ov

from vinoopt import serde
from vinoopt.alarm import TimeIsUp, until
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge, first_line
from vinoopt.compression.options import ROUNDS as ROUNDS
from vinoopt.compression.options import SearchOptions as SearchOptions
from vinoopt.compression.precision_search import PrecisionSearch, latency_of
from vinoopt.compression.quantize import calibration_bytes, import_nncf
from vinoopt.compression.weight_search import search_weights
from vinoopt.compression.width_search import BlockTables, WidthSearch
from vinoopt.compression.widths import prepare
from vinoopt.records import CompressionPlan, GroupWidth, QuantizationPlan, Trial, TrialState

Beyond: TypeAlias = Callable[[float], tuple[CompressionPlan, ...]]
"""From a share of the time of the best plan without pruning to plans of little damage that are predicted to take no
more, the most promising to train first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What came out, with sentences about what was learnt on the way."""

    trials: tuple[Trial, ...]
    damages: Mapping[str, float]
    """Output damage of each block alone in INT8, where the search asked."""
    gains_us: Mapping[str, float]
    """Time that INT8 saves in each block on the target; negative where it costs."""
    reasons: tuple[str, ...]
    refused: frozenset[str] = frozenset()
    """Blocks that the target's compiler does not take in INT8."""
    is_interrupted: bool = False
    """Whether the user ended it."""
    beyond: Beyond | None = None
    """What narrower models the search would go on to; None where it looked at no widths."""

    @property
    def candidates(self) -> tuple[Trial, ...]:
        """Trials inside the budget that have a latency, the fastest first; of models that differ only by their
        training, or by how ranges and biases were found, which changes no time, the one with the least drop."""
        inside = [t for t in self.trials if t.state is TrialState.COMPLETE and t.latency is not None]
        unique: dict[CompressionPlan, Trial] = {}
        for trial in inside:
            plan = _timeless(trial.plan)
            if plan not in unique or (trial.likely_drop or 0.0) <= (unique[plan].likely_drop or 0.0):
                unique[plan] = trial
        return tuple(sorted(unique.values(), key=latency_of))


def _timeless(plan: CompressionPlan) -> CompressionPlan:
    """What every plan has in common with this one that runs the same kernels."""
    recipe = plan.quantization
    if recipe is not None:
        recipe = serde.replace(recipe, activation_range=None, fast_bias_correction=True)
    return serde.replace(plan, quantization=recipe, distillation=None)


def search(judge: Judge, options: SearchOptions, *, say: Callable[[str], None]) -> SearchResult:
    """Trials of the candidates worth judging; ends at the deadline, or at an interrupt, with what it has."""
    run = _Run(judge=judge, options=options, say=say)
    is_interrupted = False
    if options.quantize:
        import_nncf()  # an import that the alarm breaks off would leave half a module behind
    try:
        with until(options.anchor_deadline or options.deadline):
            run.baselines()
        with until(options.deadline):
            run.all()
    except TimeIsUp:
        run.reasons.append(f"the time limit ended the search while it was at: {run.doing}")
    except KeyboardInterrupt:
        say("interrupted: going on with the best candidate so far")
        run.reasons.append(f"interrupted while the search was at: {run.doing}")
        is_interrupted = True
    except CANDIDATE_ERRORS as exc:
        if not judge.trials:
            raise
        run.reasons.append(f"the search broke off while it was at: {run.doing}: {first_line(exc)}")
    judge.take_over(run.is_at_hand)
    return SearchResult(
        trials=tuple(judge.trials),
        damages=run.damages,
        gains_us=run.gains,
        reasons=tuple(run.reasons),
        refused=run.refused,
        is_interrupted=is_interrupted,
        beyond=run.beyond,
    )


class _Run:
    """One search and what it has learnt so far."""

    def __init__(self, *, judge: Judge, options: SearchOptions, say: Callable[[str], None]) -> None:
        self.judge = judge
        self.options = options
        self._say = say
        self.doing = "its beginning"
        self.damages: Mapping[str, float] = {}
        self.gains: Mapping[str, float] = {}
        self.refused: frozenset[str] = frozenset()
        self.recipe: QuantizationPlan | None = None
        self.beyond: Beyond | None = None
        self.reasons: list[str] = []
        # One answer for all targets of a run, which hold ever more memory; what was calibrated before is there.
        free = judge.shared.once("free bytes", lambda: options.memory_bytes)
        needed = calibration_bytes(judge.workshop.source)
        self.can_calibrate = judge.workshop.is_calibrated or needed <= free
        if not self.can_calibrate and (options.quantize or options.prune):
            self.reasons.append(
                f"calibration of this model takes {needed / 2**20:.0f} MiB or more, and {free / 2**20:.0f} are free: "
                "its weights are compressed without data, and nothing is pruned"
            )

    def is_at_hand(self, plan: CompressionPlan) -> bool:
        """Whether these options allow a plan of an earlier session, and its model can be had without a search."""
        if plan.distillation is not None or not self.options.allows(plan):
            return False
        return not plan.widths or self.judge.workshop.is_pruned(plan.widths)

    def baselines(self) -> None:
        """What all else is compared with."""
        with self.judge.forecast.stage("anchors"):
            self.anchors()

    def all(self) -> None:
        """Every further stage that the options ask for, in order."""
        stages = {
            "precisions": (self.options.quantize and self.can_calibrate, self.precisions),
            "weights": (self.options.quantize, self.weights),
            "widths": (self.options.prune and self.can_calibrate, self.widths),
        }
        for name, (is_wanted, run) in stages.items():
            with self.judge.forecast.stage(name):
                try:
                    if is_wanted:
                        run()
                except CANDIDATE_ERRORS as exc:  # what the other stages find is not lost with it
                    self.reasons.append(f"the search of {name} broke off at: {self.doing}: {first_line(exc)}")

    def say(self, text: str) -> None:
        """Tell what is being done, and remember it."""
        self.doing = text
        self._say(text)

    # ------------------------------------------------------------------ anchors

    def anchors(self) -> None:
        """The float model in each format, then plain INT8 in each format for what it leaves in float."""
        formats = self.judge.yardstick.float_precisions
        plans = [("float", CompressionPlan(float_precision=each)) for each in formats]
        if self.options.quantize and self.can_calibrate:
            base = self.options.base
            plans += [("plain INT8", CompressionPlan(quantization=base, float_precision=each)) for each in formats]
        # Under a time limit what is ready soonest goes ahead: what is timed together is lost together.
        ends = [len(formats), len(formats) + 1, len(plans)] if self.options.deadline is not None else [len(plans)]
        start = 0
        for end in ends:
            anchors: dict[str, list[CompressionPlan]] = {}
            for note, plan in plans[start:end]:
                anchors.setdefault(note, []).append(plan)
            if anchors:
                self.say(f"baselines: {', '.join(f'{note} ({p.float_precision})' for note, p in plans[start:end])}")
                self.judge.judge_anchors(anchors)
            start = end

    # ------------------------------------------------------------------ precisions

    def precisions(self) -> None:
        """Candidates with some blocks in float: where INT8 hurts, and where it does not pay."""
        if self.options.is_late:
            return
        stage = PrecisionSearch(judge=self.judge, options=self.options, say=self.say)
        try:
            stage.run()
        finally:  # the time limit, or an interrupt, may end it from within
            self.damages, self.gains = stage.damages, stage.gains
            self.refused, self.recipe = stage.refused, stage.recipe
            self.reasons += stage.reasons

    def weights(self) -> None:
        """Candidates that store weights in fewer bits and compute in float."""
        if not self.options.is_late:
            self.reasons += search_weights(self.judge, self.options, say=self.say)

    # ------------------------------------------------------------------ widths

    def widths(self) -> None:
        """Pruned candidates, from the fastest one inside the budget so far."""
        if self.options.is_late:
            return
        inside = self._inside()
        if not inside:
            self.reasons.append("nothing was pruned: not even the float model could be timed inside the budget")
            return
        self._widths(self._milder(min(inside, key=latency_of).plan))

    def _milder(self, plan: CompressionPlan) -> CompressionPlan:
        """The plan by the recipe that was found to damage least, where that is inside the budget too."""
        if self.recipe is None or plan.quantization is None:
            return plan
        recipe = serde.replace(self.recipe, float_layers=plan.quantization.float_layers)
        milder = serde.replace(plan, quantization=recipe)
        return milder if any(t.plan == milder for t in self._inside()) else plan

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
                store=self.judge.store,
            ),
        )
        if kit is None:
            self.reasons.append("no group of channels of this model can be removed; see vinoopt inspect")
            return
        differences: list[float] = []

        def pruned(widths: tuple[GroupWidth, ...]) -> ov.Model:
            differences.append(kit.proven(widths))
            return kit.thoroughly(widths)

        workshop.prune, workshop.correct = pruned, kit.corrected
        stage = WidthSearch(
            self.judge,
            kit,
            ground,
            multiple=self.options.channel_multiple,
            max_pruning=self.options.max_pruning,
            is_thorough=ROUNDS[self.options.effort] > 1,
            deadline=self.options.deadline,
            say=self.say,
        )
        self.beyond = stage.beyond
        self.reasons += stage.run(BlockTables(damages=self.damages, gains_us=self.gains))
        if differences:
            self.reasons.append(
                f"surgery was proven on {len(differences)} pruned models: before the refit they differ from the "
                f"whole model with the same channels at zero by at most {max(differences):.1g} of their outputs"
            )

    def _inside(self) -> list[Trial]:
        return [t for t in self.judge.trials if t.state is TrialState.COMPLETE and t.latency is not None]
