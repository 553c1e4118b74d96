"""The stage of the search behind the training-free frontier: too damaged, but faster, and worth training.

The fastest candidate of the search is trained as well where the test part may refuse it: a result in hand, to be
made safe before what is faster. Candidates are built as they stand and timed before any of them is trained, since
training moves no time; those for which there is one that is faster and less damaged are left out. Then they are
halved (Jamieson & Talwalkar 2016, arXiv 1502.07943): as many as there is time for get a short run, those that are
left get longer ones, and the best of them what time is left. As soon as one is inside the budget, still faster ones
are looked for and join those that are left. Each run is a candidate of its own, judged by OpenVINO on the search
part like every other, and may win.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import openvino as ov

from vinoopt import serde
from vinoopt.alarm import TimeIsUp, until
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge, first_line
from vinoopt.compression.precision_search import latency_of
from vinoopt.compression.search import SearchResult
from vinoopt.distillation.needs import PRUNED_RATE, ROUNDED_RATE, usual_batch
from vinoopt.errors import DistillationError
from vinoopt.records import CompressionPlan, DistillationPlan, GroupWidth, Trial, TrialState
from vinoopt.store import digest

if TYPE_CHECKING:
    from vinoopt.distillation.distiller import Cost
    from vinoopt.distillation.school import School

STAGE_S = 1200.0
"""For the whole stage, without a time limit."""
SPEEDS = (1.08, 1.18, 1.35)
"""How many times faster than the best training-free candidate the prospects are predicted to be."""
RUNG_SHARES = (0.25, 0.4, 1.0)
"""Of the time that is left then, for each round of runs."""
_ALONE_SHARE = 0.5
"""At least, for a round of one candidate: what makes it safe in that leaves time for faster ones."""
BUILDING_SHARE = 0.2
"""Of the stage's time, after which no further candidate is built."""
_LEAST_STEPS, _FAIR_STEPS, _MOST_STEPS, _STEP_QUANTUM = 50, 150, 3000, 50
"""Of one run. Less than is fair tells little of a candidate, and fewer of them get longer runs then; more than the
most is better spent on a second run, which begins with a lower rate, or on others."""
_JUDGING_S = 10.0
"""Kept free at the end of a time limit where nothing is known yet of what a judgement takes."""
_SPARE = 1.3
"""Of what a judgement took, kept free for the next."""
_LEAST_GAIN = 0.1
"""Of what a candidate is over the budget, or of its damage, what a run must bring to be followed by another: drops
are counted in samples that change sides, which few do by chance, and damages tell more of runs that are alike."""
_PATIENCE = 1.5
"""Of the time that a run was planned to take, under a time limit."""
_FASTER = 0.97
"""Of the best one's time, what another may take at most: training is too dear for less."""
_NEAREST = 2
"""Candidates of the search that were over the budget, the nearest to it."""
_AT_EACH_SPEED = 2
"""Of the plans that the search would go on to, beyond the first speed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """What the stage may use."""

    deadline: float | None = None
    """In `time.monotonic` seconds."""
    limit_s: float | None = None
    """Of the whole run that the deadline belongs to: rounds of another one are planned anew."""
    seed: int = 0
    allows: Callable[[CompressionPlan], bool] = lambda plan: True
    """Whether the options of the search could give such a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A plan in training."""

    plan: CompressionPlan
    latency_ms: float
    """Before training, which does not change it."""
    damage: float
    """As far as it is trained."""
    trial: Trial | None = None
    is_spent: bool = False
    """Whether its last run brought nothing."""
    attempts: int = 0
    """Runs that it has had, those that brought nothing counted."""

    @property
    def runs(self) -> tuple[int, ...]:
        """Steps of the runs that it has had."""
        return self.plan.distillation.runs if self.plan.distillation is not None else ()

    @property
    def is_inside(self) -> bool:
        """Whether it is inside the budget by now."""
        return self.trial is not None and self.trial.state is TrialState.COMPLETE

    @property
    def is_open(self) -> bool:
        """Whether it can be trained at all, as far as is known."""
        return self.trial is None or self.trial.drop is not None

    def is_safe(self, max_drop: float) -> bool:
        """Whether it is inside the budget so clearly that the test part will hardly refuse it."""
        if not self.is_inside or self.trial is None or self.trial.likely_drop is None:
            return False
        is_proven = self.trial.drop_high is not None and self.trial.drop_high <= max_drop
        return is_proven or self.trial.likely_drop <= max_drop / 2

    @property
    def drop(self) -> float:
        """On the search part, as far as is known; infinite where it is not."""
        return math.inf if self.trial is None or self.trial.likely_drop is None else self.trial.likely_drop


def worth_a_run(runners: Sequence[Runner], max_drop: float, *, only_fresh: bool = False) -> list[Runner]:
    """What to train next: nothing that is hardly faster than what is safely inside the budget already.

    First what the search itself found inside, which a run may make safe; then what would be the fastest inside, the
    nearest to it in front; then what is inside, but not safely, the fastest in front; then, for the case that the
    test part refuses those, the rest. What its last run brought nothing comes behind all others, or, with
    `only_fresh`, not at all.
    """
    most = _FASTER * _safe_ms(runners, max_drop)
    inside = _inside_ms(runners)

    def order(runner: Runner) -> tuple[bool, int, float, float]:
        if runner.is_inside:
            return runner.is_spent, 2 if runner.runs else 0, runner.latency_ms, 0.0
        return runner.is_spent, 1 if runner.latency_ms < inside else 3, runner.drop, runner.damage

    found = [r for r in runners if r.is_open and r.latency_ms < most and not (only_fresh and r.is_spent)]
    return sorted(found, key=order)


def _is_hopeful(runner: Runner) -> bool:
    """Whether a longer run may bring what its last one did not."""
    return not runner.is_spent or runner.attempts < len(RUNG_SHARES)


def _safe_ms(runners: Sequence[Runner], max_drop: float) -> float:
    """The least latency of those safely inside; infinite where none is."""
    return min((r.latency_ms for r in runners if r.is_safe(max_drop)), default=math.inf)


def _inside_ms(runners: Sequence[Runner]) -> float:
    """The least latency of those inside; infinite where none is."""
    return min((r.latency_ms for r in runners if r.is_inside), default=math.inf)


def _is_trainable(plan: CompressionPlan) -> bool:
    """Whether it is compressed in a way that training can make good, and was not trained yet."""
    return plan.distillation is None and plan.weights is None and bool(plan.quantization or plan.widths)


def _untrained(plan: CompressionPlan) -> CompressionPlan:
    return serde.replace(plan, distillation=None)


def _undominated(runners: Sequence[Runner]) -> list[Runner]:
    """Without those for which there is one that is both faster and less damaged."""
    return [
        each
        for each in runners
        if not any(other.latency_ms < each.latency_ms and other.damage < each.damage for other in runners)
    ]


class _CutShort(DistillationError):  # noqa: N818 - reads as what happened
    """A run that the time limit ended: what it made is not the plan's model, but that of fewer steps."""

    def __init__(self, model: ov.Model, steps: int) -> None:
        super().__init__(f"the time limit ended the run after {steps} steps")
        self.model = model
        self.steps = steps


def distill_beyond(
    judge: Judge, found: SearchResult, options: StageOptions, *, say: Callable[[str], None]
) -> SearchResult:
    """The search's result with the trials of distilled candidates, and what they bought, added to it.

    Ends at the deadline, or at an interrupt, with what it has; what an earlier session trained is taken over in any
    case, also where the search was interrupted and nothing more is trained. A model that cannot be trained (an
    operator without a rule, say) is named in the reasons, and the result stays as it was.
    """
    stage = _Stage(judge=judge, found=found, options=options, say=say)
    is_interrupted = False
    try:
        with judge.forecast.stage("distill"), until(options.deadline):
            if not found.is_interrupted:
                stage.run()
    except TimeIsUp:
        stage.reasons.append("the time limit ended distillation")
    except KeyboardInterrupt:
        say("interrupted: going on with the best candidate so far")
        is_interrupted = True
    except CANDIDATE_ERRORS as exc:
        stage.reasons.append(f"distillation broke off: {first_line(exc)}")
    for trial in judge.finished():  # of an earlier session, which went another way, or further
        plan = trial.plan
        if plan.distillation is not None and options.allows(_untrained(plan)) and not judge.knows(plan):
            judge.judge(plan, note=trial.note)
    if stage.has_begun:
        stage.reasons.append(stage.conclusion())
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
        self.ends = self.started + STAGE_S if options.deadline is None else options.deadline
        self.building_ends = self.started + BUILDING_SHARE * (self.ends - self.started)
        self.made: dict[CompressionPlan, ov.Model | Exception] = {}
        """What runs gave that are not in the store, by their plans."""
        self.cost: Cost | None = None
        """Of a run, as the last one of some length had it."""
        self.run_ends = math.inf
        """When the run at hand has had so much more time than was planned that others need the rest."""
        self.tried: set[CompressionPlan] = set()
        """Plans of earlier rounds, as they were before training."""
        self.best = min(found.candidates, key=latency_of, default=None)
        """Of the search."""
        self.has_begun = False
        """Whether there was something to train."""
        self.has_run = False
        self._school: School | None = None

    # ------------------------------------------------------------------ the whole stage

    def run(self) -> None:
        """Train, halve, train on; where that brought one into the budget, look for still faster ones as well."""
        best = self.best
        plans = self._prospects(best)
        self.judge.workshop.distill = self._distilled
        faster = self._timed(plans, best)
        runners = [*self._in_hand(best), *faster]
        if not runners:
            why = "was faster when timed" if plans else "is known to the search that would be faster"
            self.reasons.append(f"nothing was distilled: no candidate beyond the budget {why}")
            return
        try:
            runners = self._paced(runners)
        except DistillationError as exc:
            self.reasons.append(f"nothing was distilled: {exc}")
            return
        self.has_begun = True
        while runners:
            left = self._rounds(runners)
            runners = [*left, *self._further(runners)]

    def _paced(self, runners: Sequence[Runner]) -> list[Runner]:
        """The runners from the first one on that can be trained, whose pace is taken for that of all.

        Raises `DistillationError` where the teacher's image cannot be made, or none of them can be trained.
        """
        refused: list[tuple[Runner, DistillationError]] = []
        for place, runner in enumerate(runners):
            try:
                self.cost = self._measured_cost(runner)
            except DistillationError as exc:
                if self._school is None:
                    raise
                refused.append((runner, exc))
            else:
                self.reasons += [f"{each.plan.title} was not distilled: {why}" for each, why in refused]
                return list(runners[place:])
        raise refused[0][1]

    def _further(self, runners: Sequence[Runner]) -> list[Runner]:
        """New runners, faster than the fastest that came inside; none where none did, or time is short."""
        inside = [runner for runner in runners if runner.is_inside]
        self.tried |= {_untrained(runner.plan) for runner in runners}
        if not inside or self._run_s(_LEAST_STEPS) > self._left():
            return []
        fastest = min(inside, key=lambda runner: runner.latency_ms)
        self.building_ends = time.monotonic() + BUILDING_SHARE * self._left()
        plans = [plan for plan in self._prospects(fastest.trial) if plan not in self.tried]
        return self._timed(plans, fastest.trial)

    def _rounds(self, runners: list[Runner]) -> list[Runner]:
        """Rounds of ever fewer and longer runs, until a faster one is inside or safe, or all is used up.

        What is left to train where a faster one is; nothing otherwise. What became of all of them is in `runners`.
        The first round is short, and for those that had none yet.
        """
        count, limit = len(runners), self.judge.budget.max_drop
        inside_ms, safe_ms = _inside_ms(runners), _safe_ms(runners, limit)
        for number in itertools.count():
            chosen = worth_a_run(runners, limit, only_fresh=number >= len(RUNG_SHARES))
            is_alone = len(chosen) == 1
            if number == 0:
                chosen = [runner for runner in chosen if not runner.attempts] or chosen
            chosen, steps = self._planned(chosen[:count], number, is_alone=is_alone)
            if not chosen:
                break
            self.say(f"round {number + 1}: {len(chosen)} candidates for {steps} steps each")
            for runner in chosen:
                if self._left() <= 0 and (self.has_run or self.options.deadline is not None):
                    return []
                runners[runners.index(runner)] = self._trained(runner, steps)
            if _safe_ms(runners, limit) < safe_ms or _inside_ms(runners) < _FASTER * inside_ms:
                return list(filter(_is_hopeful, worth_a_run(runners, limit)))
            count = math.ceil(count / 2)
        return []

    def _planned(self, chosen: list[Runner], number: int, *, is_alone: bool) -> tuple[list[Runner], int]:
        """As many of the runners as time allows, and the steps of each; a resumed search does the same."""
        if not chosen:
            return [], 0
        share = RUNG_SHARES[min(number, len(RUNG_SHARES) - 1)]
        if is_alone:
            share = max(share, _ALONE_SHARE)
        seconds = share * (self._left() + self._judging_s())

        def planned() -> tuple[int, int]:
            counts = range(len(chosen), 0, -1)
            each = [(n, self._steps(seconds / n)) for n in counts]
            fitting = (pair for least in (_FAIR_STEPS, _LEAST_STEPS) for pair in each if pair[1] >= least)
            # Without a time limit something is tried anyhow.
            if not self.has_run and self.options.deadline is None:
                return next(fitting, (1, _LEAST_STEPS))
            return next(fitting)

        plans = [serde.sha256_record(runner.plan) for runner in chosen]
        key = digest(number, share, self.options.limit_s, plans)[:16]
        name = f"distillation-round-{self.judge.yardstick.target.slug}-{key}"
        try:
            count, steps = self.judge.store.json(name, planned)
            if count * self._run_s(steps) > max(self._left(), seconds) and self.options.deadline is not None:
                count, steps = planned()  # it was planned for a longer time limit
        except StopIteration:  # not even one of the least length fits, which is not kept
            return [], 0
        return chosen[:count], steps

    def _steps(self, seconds: float) -> int:
        """Of a run that takes so long, its judgement included."""
        if self.cost is None:
            return 0
        steps_s = seconds - self.cost.setup_s - self._judging_s()
        return min(int(steps_s / self.cost.step_s), _MOST_STEPS) // _STEP_QUANTUM * _STEP_QUANTUM

    def _run_s(self, steps: int) -> float:
        """Seconds of a run, without its judgement."""
        return 0.0 if self.cost is None else self.cost.setup_s + steps * self.cost.step_s

    def _left(self) -> float:
        """Seconds for runs, the judgement of the last one kept free."""
        return self.ends - time.monotonic() - self._judging_s()

    def _judging_s(self) -> float:
        """What the judgement of one run takes, as measured in this search."""
        spent = self.judge.spent
        timing_s = 2 * spent.timing_s if math.isfinite(spent.timing_s) else 0.0  # beside its anchor
        return _SPARE * (spent.accuracy_s + timing_s) if spent.accuracy_s else _JUDGING_S

    # ------------------------------------------------------------------ candidates

    def _prospects(self, best: Trial | None) -> list[CompressionPlan]:
        """Plans that are over budget, or predicted to be beyond it, and faster than the best one.

        What is predicted for each speed in turn, so that some of each are built where time is short.
        """
        over = [t for t in self.judge.trials if t.state is TrialState.OVER_BUDGET and _is_trainable(t.plan)]
        plain = [t for t in over if not t.plan.widths][:1]
        nearest = sorted(over, key=lambda t: math.inf if t.likely_drop is None else t.likely_drop)[:_NEAREST]
        at_speeds: list[Sequence[CompressionPlan]] = []
        for share in self._shares(best):
            if self.found.beyond is None or (at_speeds and time.monotonic() > self.building_ends):
                break
            plans = self.found.beyond(share)
            at_speeds.append(plans[:_AT_EACH_SPEED] if any(at_speeds) else plans)
        in_turn = [plan for each in itertools.zip_longest(*at_speeds) for plan in each if plan is not None]
        known = {t.plan for t in self.judge.trials if t.state is TrialState.COMPLETE}
        prospects = [*(t.plan for t in (*plain, *nearest)), *in_turn]
        return [plan for plan in dict.fromkeys(prospects) if plan not in known]

    def _shares(self, best: Trial | None) -> list[float]:
        """Predicted times worth a look, over that of the best plan without pruning."""
        whole = [t for t in self.found.candidates if not t.plan.widths]
        ground = min(map(latency_of, whole), default=None)
        ahead = 1.0 if best is None or ground is None else latency_of(best) / ground
        return [ahead / speed for speed in SPEEDS]

    def _timed(self, plans: Sequence[CompressionPlan], best: Trial | None) -> list[Runner]:
        """The plans that are faster on the target than the best one, beside it; the least damaged first."""
        usable = self._built(plans)
        if not usable:
            return []
        ground = [] if best is None else [best.plan]
        try:
            times = self.judge.latencies_ms([*ground, *usable])
        except CANDIDATE_ERRORS as exc:
            if len(usable) == 1:
                why = f"{usable[0].title} is not distilled, since it could not be timed: {first_line(exc)}"
                self.reasons.append(why)
                return []
            # One that the target refuses must not take the others with it.
            alone = [runner for plan in usable for runner in self._timed([plan], best)]
            return sorted(_undominated(alone), key=lambda runner: runner.damage)
        limit = math.inf if best is None else latency_of(best)
        unit = 1.0 if best is None else limit / times[0]  # the machine's pace may be another than when that was timed
        pairs = zip(usable, (unit * ms for ms in times[len(ground) :]), strict=True)
        build = self.judge.workshop.build
        runners = [
            Runner(plan=plan, latency_ms=ms, damage=self.judge.damage(plan, partial(build, plan)))
            for plan, ms in pairs
            if ms < _FASTER * limit
        ]
        return sorted(_undominated(runners), key=lambda runner: runner.damage)

    def _in_hand(self, best: Trial | None) -> list[Runner]:
        """The best candidate of the search, where it can be trained and the test part may refuse it."""
        if best is None or not _is_trainable(best.plan):
            return []
        damage = self.judge.damage(best.plan, partial(self.judge.workshop.build, best.plan))
        runner = Runner(plan=best.plan, latency_ms=latency_of(best), damage=damage, trial=best)
        return [] if runner.is_safe(self.judge.budget.max_drop) else [runner]

    def _built(self, plans: Sequence[CompressionPlan]) -> list[CompressionPlan]:
        """The plans whose models could be built in time."""
        usable: list[CompressionPlan] = []
        for number, plan in enumerate(plans):
            if usable and time.monotonic() > self.building_ends:
                left_out = len(plans) - number
                self.reasons.append(f"{left_out} candidates for distillation were not built, for want of time")
                break
            self.say(f"building {plan.title} to be distilled")
            try:
                self.judge.workshop.build(plan)
            except CANDIDATE_ERRORS as exc:
                self.reasons.append(f"{plan.title} could not be built: {exc}")
            else:
                usable.append(plan)
        return usable

    # ------------------------------------------------------------------ runs

    def _opened(self) -> School:
        """Teacher and inputs, made ready once for all runs."""
        from vinoopt.distillation.school import open_school

        if self._school is None:
            workshop = self.judge.workshop
            self._school = open_school(
                workshop.source, workshop.calibration, seed=self.options.seed, are_scores=self.judge.are_scores
            )
        return self._school

    def _measured_cost(self, runner: Runner) -> Cost:
        """Of runs, kept so that a resumed search need not measure it again."""
        from vinoopt.distillation.distiller import Cost, cost_of

        workshop, store = self.judge.workshop, self.judge.store
        plan = self._distillation((1,), runner.plan.widths)

        def measured() -> list[float]:
            cost = cost_of(workshop.build(runner.plan), self._opened(), plan)
            return [cost.setup_s, cost.step_s]

        setup_s, step_s = store.json(f"distillation-cost-{self.judge.yardstick.target.slug}", measured)
        return Cost(setup_s=float(setup_s), step_s=float(step_s))

    def _distillation(self, runs: tuple[int, ...], widths: Sequence[GroupWidth]) -> DistillationPlan:
        workshop = self.judge.workshop
        return DistillationPlan(
            runs=runs,
            batch=usual_batch(workshop.source, workshop.calibration),
            peak_rate=PRUNED_RATE if widths else ROUNDED_RATE,
            are_scores=self.judge.are_scores,
            seed=self.options.seed,
        )

    def _trained(self, runner: Runner, steps: int) -> Runner:
        """The runner after a run, judged."""
        self.run_ends = time.monotonic() + _PATIENCE * self._run_s(steps)
        self.judge.forecast.still("distill", max(self.ends - time.monotonic(), 0.0))
        plan = self._with_runs(runner.plan, (*runner.runs, steps))
        words = f"{runner.latency_ms:.3g} ms before training"
        self.say(f"{plan.title}: {sum((*runner.runs, steps))} steps of distillation, {words}")
        plan = self._made(plan)
        runs = plan.distillation.runs if plan.distillation is not None else ()
        trial = self.judge.judge(plan, note=f"{sum(runs)} steps of distillation, {words}")
        damage = self.judge.damage(plan, partial(self.judge.workshop.build, plan))
        self.made.clear()
        self.has_run = True
        runner = replace(runner, attempts=runner.attempts + 1)
        after = replace(runner, plan=plan, trial=trial, damage=damage)
        if runner.trial is None and (damage < runner.damage or trial.likely_drop is None or self._left() < 0):
            return replace(after, is_spent=trial.likely_drop is None)
        if runner.trial is None:  # a short run may make worse what was inside
            note = f"without training: after {steps} steps its outputs were further from the float model's"
            runner = replace(runner, trial=self.judge.judge(runner.plan, note=note))
        gain, missing = runner.drop - after.drop, max(runner.drop - self.judge.budget.max_drop, 0.0)
        is_closer = damage < (1 - _LEAST_GAIN) * runner.damage
        is_spent = gain <= _LEAST_GAIN * missing and not is_closer
        is_kept = gain > 0 or (is_closer and (after.is_inside or not runner.is_inside))
        # What brought nothing goes on, if at all, from where it was.
        return replace(after if is_kept else runner, is_spent=is_spent)

    def _with_runs(self, plan: CompressionPlan, runs: tuple[int, ...]) -> CompressionPlan:
        return serde.replace(plan, distillation=self._distillation(runs, plan.widths))

    def _made(self, plan: CompressionPlan) -> CompressionPlan:
        """The plan, its model made; or, where time ran out, the plan of the steps that were taken."""
        try:
            self.judge.workshop.build(plan)
            self._checkpoint(plan).unlink(missing_ok=True)
        except _CutShort as cut:
            runs = () if plan.distillation is None else plan.distillation.runs
            plan = self._with_runs(plan, (*runs[:-1], max(cut.steps, 1)))
            self.made[plan] = cut.model
        except CANDIDATE_ERRORS as exc:
            self.made[plan] = exc  # the judge is told the same without another run
        return plan

    def _checkpoint(self, plan: CompressionPlan) -> Path:
        return self.judge.store.folder / f"distillation-{serde.sha256_record(plan)[:24]}.pt"

    def _distilled(self, plan: CompressionPlan, student: ov.Model) -> ov.Model:
        """The last run of the plan; what the workshop calls where it has no such model yet."""
        from vinoopt.distillation.distiller import Run, train

        made, distillation = self.made.get(plan), plan.distillation
        if isinstance(made, Exception):
            raise made
        if made is not None:
            return made
        if distillation is None:
            raise ValueError("the plan does not distil")
        limit = self.options.deadline
        closing_s = 0.0 if self.cost is None else self.cost.setup_s  # comparing with the teacher, writing
        deadline = None if limit is None else min(limit - self._judging_s() - closing_s, self.run_ends)
        trained = train(
            student,
            self._opened(),
            distillation,
            Run(
                deadline=deadline,
                checkpoint=self._checkpoint(plan),
                is_judged_later=True,
                say=lambda message, done, total: self.say(f"distillation: {message}"),
            ),
        )
        self.say(f"distillation: {trained.reason}")
        if self.cost is not None and trained.outcome.steps >= _LEAST_STEPS:
            self.cost = replace(self.cost, step_s=trained.outcome.step_s)
        if trained.outcome.is_cut:
            raise _CutShort(trained.model, trained.outcome.steps)
        return trained.model

    # ------------------------------------------------------------------ words

    def conclusion(self) -> str:
        """What the stage bought, in a sentence."""
        best = self.best
        tried = [t for t in self.judge.trials if t.plan.distillation is not None]
        others = [t for t in self.judge.trials[len(self.found.trials) :] if t.plan.distillation is None]
        won = [t for t in (*tried, *others) if t.state is TrialState.COMPLETE and t.latency is not None]
        spent = f"{(time.monotonic() - self.started) / 60:.0f} min, {len(tried)} runs"
        if won:
            fastest = min(won, key=latency_of)
            ground = "nothing inside the budget" if best is None else best.plan.title
            result = f"{fastest.plan.title}, {fastest.drop_words}{self._before(fastest)} on the search part"
            if best is not None and _untrained(fastest.plan) == best.plan:
                return f"distillation ({spent}) made nothing faster, but may have made the best safer: {result}"
            gain = math.inf if best is None else latency_of(best) / latency_of(fastest)
            if gain <= 1:
                return f"distillation ({spent}) bought nothing: {result}, but {gain:.2f}x as fast as {ground}"
            bought = "a result" if best is None else f"{gain:.2f}x"
            if fastest in others:
                return f"before it was trained ({spent}) one was inside, {bought} on top of {ground}: {result}"
            return f"distillation ({spent}) bought {bought} on top of {ground}: {result}"
        nearest = min((t for t in tried if t.drop is not None), key=lambda t: t.likely_drop or 0.0, default=None)
        if nearest is None and not self.has_run:
            took = f"{self._run_s(_LEAST_STEPS) + self._judging_s():.0f} s with its judgement"
            return f"nothing was distilled: a run of {_LEAST_STEPS} steps takes {took}, and less was left"
        if nearest is None:
            return "distillation: no run came to its end"
        before = self._before(nearest)
        return (
            f"distillation ({spent}) brought no faster candidate into the budget: the "
            f"nearest ({nearest.note}): {nearest.drop_words}{before} on the search part"
        )

    def _before(self, trial: Trial) -> str:
        plain = _untrained(trial.plan)
        untrained = next((t for t in self.judge.trials if t.plan == plain and t.drop is not None), None)
        return "" if untrained is None else f", {untrained.drop:+.4f} without training,"
