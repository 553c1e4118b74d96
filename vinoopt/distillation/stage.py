"""The stage of the search behind the training-free frontier: too damaged, but faster, and worth training.

Candidates are built as they stand and timed before any of them is trained, since training moves no time. Then they
are halved (Jamieson & Talwalkar 2016, arXiv 1502.07943): all get a short run, those that are left get longer ones.
Each run is a candidate of its own, judged by OpenVINO on the search part like every other, and may win.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import openvino as ov

from vinoopt import serde
from vinoopt.alarm import TimeIsUp, until
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge
from vinoopt.compression.precision_search import latency_of
from vinoopt.compression.search import SearchResult
from vinoopt.distillation.needs import PRUNED_RATE, ROUNDED_RATE
from vinoopt.errors import DistillationError
from vinoopt.records import CompressionPlan, DistillationPlan, GroupWidth, Trial, TrialState

STAGE_S = 1200.0
"""For the whole stage, without a time limit."""
SPEEDS = (1.12, 1.25, 1.4)
"""How many times faster than the best training-free candidate the prospects are predicted to be."""
RUNG_SHARES = (0.25, 0.25, 0.5)
"""Of the stage's time, for each round of runs."""
_LEAST_STEPS, _STEP_QUANTUM = 50, 50
_JUDGING_S = 10.0
"""Kept free at the end of a time limit."""
_AT_EACH_SPEED = 2
"""Of the plans that the search would go on to, beyond the first speed."""
_LARGE = 3 * 96 * 96
"""Values of one sample's inputs from which on a step has fewer samples, so that there are enough steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """What the stage may use."""

    deadline: float | None = None
    """In `time.monotonic` seconds."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """A plan in training."""

    plan: CompressionPlan
    latency_ms: float
    """Before training, which does not change it."""
    trial: Trial | None = None

    @property
    def runs(self) -> tuple[int, ...]:
        """Steps of the runs that it has had."""
        return self.plan.distillation.runs if self.plan.distillation is not None else ()

    @property
    def is_inside(self) -> bool:
        """Whether it is inside the budget by now."""
        return self.trial is not None and self.trial.state is TrialState.COMPLETE

    @property
    def drop(self) -> float:
        """On the search part; infinite where it failed."""
        return math.inf if self.trial is None or self.trial.drop is None else self.trial.drop


def distill_beyond(
    judge: Judge, found: SearchResult, options: StageOptions, *, say: Callable[[str], None]
) -> SearchResult:
    """The search's result with the trials of distilled candidates, and what they bought, added to it.

    Ends at the deadline, or at an interrupt, with what it has. A model that cannot be trained (an operator without
    a rule, say) is named in the reasons, and the result stays as it was.
    """
    stage = _Stage(judge=judge, found=found, options=options, say=say)
    is_interrupted = False
    try:
        with judge.forecast.stage("distill"), until(options.deadline):
            stage.run()
    except TimeIsUp:
        stage.reasons.append("the time limit ended distillation")
    except KeyboardInterrupt:
        say("interrupted: going on with the best candidate so far")
        is_interrupted = True
    return replace(
        found,
        trials=tuple(judge.trials),
        reasons=(*found.reasons, *stage.reasons),
        is_interrupted=found.is_interrupted or is_interrupted,
    )


class _Stage:
    def __init__(
        self, *, judge: Judge, found: SearchResult, options: StageOptions, say: Callable[[str], None]
    ) -> None:
        self.judge = judge
        self.found = found
        self.options = options
        self.say = say
        self.reasons: list[str] = []
        self.started = time.monotonic()
        self.seconds = STAGE_S
        if options.deadline is not None:
            self.seconds = max(options.deadline - self.started - _JUDGING_S, 0.0)

    # ------------------------------------------------------------------ the whole stage

    def run(self) -> None:
        """Train, halve, train on."""
        best = min(self.found.candidates, key=latency_of, default=None)
        plans = self._prospects(best)
        if not plans:
            self.reasons.append("nothing was distilled: the search knows no faster candidate beyond the budget")
            return
        self.judge.workshop.distill = self._distilled
        runners = self._timed(plans, best)
        if not runners:
            self.reasons.append("nothing was distilled: no candidate beyond the budget was faster when timed")
            return
        try:
            pace = self._pace(runners[0])
        except DistillationError as exc:
            self.reasons.append(f"nothing was distilled: {exc}")
            return
        for number, share in enumerate(RUNG_SHARES):
            steps = self._steps(share * self.seconds / len(runners), pace)
            if self._is_late() or steps is None:
                break
            self.say(f"round {number + 1}: {len(runners)} candidates for {steps} steps each")
            runners = self._halved([self._trained(runner, steps) for runner in runners])
            if not runners:
                break
        self.reasons.append(self._conclusion(best))

    def _prospects(self, best: Trial | None) -> list[CompressionPlan]:
        """Plans that are over budget, or predicted to be beyond it, and faster than the best one."""
        over = [t.plan for t in self.judge.trials if t.state is TrialState.OVER_BUDGET]
        plain = [plan for plan in over if plan.quantization is not None and not plan.widths]
        chosen: list[CompressionPlan] = []
        for share in self._shares(best):
            plans = () if self.found.beyond is None else self.found.beyond(share)
            chosen += plans if not chosen else plans[:_AT_EACH_SPEED]
        known = {t.plan for t in self.judge.trials if t.state is TrialState.COMPLETE}
        return [plan for plan in dict.fromkeys([*plain[:1], *chosen]) if plan not in known]

    def _shares(self, best: Trial | None) -> list[float]:
        """Predicted times worth a look, over that of the best plan without pruning."""
        whole = [t for t in self.found.candidates if not t.plan.widths]
        ground = min(map(latency_of, whole), default=None)
        ahead = 1.0 if best is None or ground is None else latency_of(best) / ground
        return [ahead / speed for speed in SPEEDS]

    def _timed(self, plans: Sequence[CompressionPlan], best: Trial | None) -> list[_Runner]:
        """The plans that are faster than the best one on the target, side by side with it; the fastest first."""
        usable: list[CompressionPlan] = []
        for plan in plans:
            self.say(f"building {plan.title} to be distilled")
            try:
                self.judge.workshop.build(plan)
            except CANDIDATE_ERRORS as exc:
                self.reasons.append(f"{plan.title} could not be built: {exc}")
            else:
                usable.append(plan)
        if not usable:
            return []
        ground = [] if best is None else [best.plan]
        try:
            times = self.judge.latencies_ms([*ground, *usable])
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"candidates for distillation could not be timed: {exc}")
            return []
        limit = times[0] if ground else math.inf
        pairs = zip(usable, times[len(ground) :], strict=True)
        runners = [_Runner(plan=plan, latency_ms=ms) for plan, ms in pairs if ms < limit]
        return sorted(runners, key=lambda runner: runner.latency_ms)

    # ------------------------------------------------------------------ runs

    def _pace(self, runner: _Runner) -> float:
        """Seconds of one step, kept so that a resumed search plans the same runs."""
        from vinoopt.distillation.distiller import seconds_per_step

        workshop, store = self.judge.workshop, self.judge.store
        plan = self._distillation((1,), runner.plan.widths)

        def measured() -> float:
            return seconds_per_step(workshop.build(runner.plan), workshop.source, workshop.calibration, plan)

        return float(store.json(f"distillation-pace-{self.judge.yardstick.target.slug}", measured))

    def _distillation(self, runs: tuple[int, ...], widths: Sequence[GroupWidth]) -> DistillationPlan:
        sample = self.judge.workshop.calibration[0]
        size = sum(array.size for array in sample.values()) / self.judge.workshop.calibration.batch
        return DistillationPlan(
            runs=runs,
            batch=16 if size >= _LARGE else 64,
            peak_rate=PRUNED_RATE if widths else ROUNDED_RATE,
            seed=self.options.seed,
        )

    def _steps(self, seconds: float, pace: float) -> int | None:
        steps = int(seconds / pace) // _STEP_QUANTUM * _STEP_QUANTUM
        if self.options.deadline is None:
            return max(steps, _LEAST_STEPS)
        return steps if steps >= _LEAST_STEPS else None

    def _trained(self, runner: _Runner, steps: int) -> _Runner:
        if self._is_late():
            return runner
        distillation = self._distillation((*runner.runs, steps), runner.plan.widths)
        plan = serde.replace(runner.plan, distillation=distillation)
        words = f"{sum(distillation.runs)} steps of distillation, {runner.latency_ms:.3g} ms before them"
        self.say(f"{plan.title}: {words}")
        trial = self.judge.judge(plan, note=words)
        return replace(runner, plan=plan, trial=trial)

    def _distilled(self, plan: CompressionPlan, student: ov.Model) -> ov.Model:
        """The last run of the plan; what the workshop calls where it has no such model yet."""
        from vinoopt.distillation.distiller import Run, train

        distillation = plan.distillation
        if distillation is None:
            raise ValueError("the plan does not distil")
        workshop = self.judge.workshop
        key = serde.sha256_record(plan)[:24]
        deadline = None if self.options.deadline is None else self.options.deadline - _JUDGING_S
        trained = train(
            student,
            workshop.source,
            workshop.calibration,
            distillation,
            Run(
                deadline=deadline,
                checkpoint=self.judge.store.folder / f"distillation-{key}.pt",
                say=lambda message, done, total: self.say(f"distillation: {message}"),
            ),
        )
        self.say(f"distillation: {trained.reason}")
        return trained.model

    @staticmethod
    def _halved(runners: Sequence[_Runner]) -> list[_Runner]:
        """What is worth a longer run: nothing slower than what is inside already; of the rest the better half."""
        inside = min((r.latency_ms for r in runners if r.is_inside), default=math.inf)
        open_ones = [r for r in runners if not r.is_inside and r.latency_ms < inside and math.isfinite(r.drop)]
        return sorted(open_ones, key=lambda r: r.drop)[: math.ceil(len(open_ones) / 2)]

    # ------------------------------------------------------------------ words

    def _conclusion(self, best: Trial | None) -> str:
        tried = [t for t in self.judge.trials if t.plan.distillation is not None]
        won = [t for t in tried if t.state is TrialState.COMPLETE and t.latency is not None]
        minutes = (time.monotonic() - self.started) / 60
        if won:
            fastest = min(won, key=latency_of)
            gain = "" if best is None else f"{latency_of(best) / latency_of(fastest):.2f}x"
            ground = "nothing inside the budget" if best is None else best.plan.title
            return (
                f"distillation ({minutes:.0f} min, {len(tried)} runs) bought {gain} on top of {ground}: "
                f"{fastest.plan.title}, drop {fastest.drop:+.4f} on the search part"
            )
        nearest = min((t for t in tried if t.drop is not None), key=lambda t: t.drop or 0.0, default=None)
        if nearest is None:
            return "distillation: no run came to its end"
        before = self._before(nearest)
        return (
            f"distillation ({minutes:.0f} min, {len(tried)} runs) brought no faster candidate into the budget: the "
            f"nearest ({nearest.note}) drops {nearest.drop:+.4f}{before} on the search part"
        )

    def _before(self, trial: Trial) -> str:
        plain = serde.replace(trial.plan, distillation=None)
        untrained = next((t for t in self.judge.trials if t.plan == plain and t.drop is not None), None)
        return "" if untrained is None else f", {untrained.drop:+.4f} without training,"

    def _is_late(self) -> bool:
        return self.options.deadline is not None and time.monotonic() > self.options.deadline - _JUDGING_S

