"""From the trials of a search to the one result: judged on the test part, measured against the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, Scores, paired_drop, score, sentence
from vinoopt.compression.judge import CANDIDATE_ERRORS, Judge, first_line
from vinoopt.compression.quantize import calibration_bytes
from vinoopt.compression.search import SearchResult
from vinoopt.errors import ToolchainRefused
from vinoopt.hardware.detect import free_bytes
from vinoopt.records import (
    BlockChoice,
    Comparison,
    CompressionPlan,
    Drop,
    RuntimeProperties,
    Trial,
    TrialState,
    Verdict,
)
from vinoopt.yardsticks import SideBySide, TargetYardstick, runtime_properties

FLOAT, PLAIN_INT8, CHOSEN = "float", "plain INT8", "vinoopt"
"""Names of the contestants in the final measurement."""
_TIMED_AGAIN = 6
"""Candidates that are timed again together."""
_SHORTLIST = 4
"""Candidates that the test part is asked about without remark: among many, one is inside the budget there by
chance."""
_NAMED = 3
"""Float blocks that are named in one sentence."""
_SMALLER = 0.98
"""A candidate as fast as plain INT8 stays the result only if its weights are smaller than this share of it."""

@dataclass(frozen=True, kw_only=True, slots=True)
class TestPart:
    """Data that the search never saw, with the float model's outputs on it."""

    __test__ = False  # not a test class, whatever its name looks like to pytest

    data: Dataset
    reference: Predictions


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What one target gets, with the model itself."""

    yardstick: TargetYardstick
    plan: CompressionPlan
    model: ov.Model
    drop: Drop
    budget_met: bool
    bench: SideBySide
    comparisons: tuple[Comparison, ...]
    reasons: tuple[str, ...]
    float_blocks: tuple[BlockChoice, ...] = ()
    trials: tuple[Trial, ...]
    interrupted: bool = False
    properties: RuntimeProperties
    """What the model runs with; tuned where that was asked for."""
    tuned: Comparison | None = None
    """The best runtime settings against the latency hint."""


def choose(
    judge: Judge,
    yardstick: TargetYardstick,
    found: SearchResult,
    test: TestPart,
    *,
    say: Callable[[str], None],
    is_late: bool = False,
) -> Choice:
    """The fastest candidate that the test part lets pass, never slower than a baseline that it lets pass.

    Candidates are taken from the fastest on; one that falls outside the budget on the test part is passed over
    for the next along the frontier, which ends at the float model. Then the choice, the float model and plain
    INT8 are measured side by side; a baseline inside the budget that is faster beyond noise takes its place.
    `is_late` leaves out timing the fastest candidates again before that.
    """
    run = _Selection(judge=judge, yardstick=yardstick, found=found, test=test, say=say, is_late=is_late)
    plan = run.first_inside()
    say(f"{plan.title} side by side with the baselines")
    bench = run.measure(plan)
    faster = run.faster_baseline(bench, plan)
    if faster is not None:
        run.reasons.append(
            f"{plan.title} was not faster than {faster.title} in the final measurement, so {faster.title} it is"
        )
        plan = faster
        bench = run.measure(plan)
    if plan == run.float_plan:
        run.reasons += run.words_about_failures()
    drop = run.drop_of(plan)
    name = run.name_of(plan)
    others = [m.name for m in bench.measurements if m.name != name]
    floats = float_blocks(plan, found, ignored=judge.workshop.ignored)
    return Choice(
        yardstick=run.yardstick,
        plan=plan,
        model=judge.workshop.build(plan),
        drop=drop,
        budget_met=plan != run.float_plan or run.is_float_by_right(),
        bench=bench,
        comparisons=tuple(bench.compare(other, name) for other in others),
        reasons=(sentence(drop, judge.budget), *yardstick.notes, *run.reasons, *_words_about(floats)),
        float_blocks=floats,
        trials=found.trials,
        properties=runtime_properties(plan, yardstick.spec.kind),
    )


@dataclass(kw_only=True)
class _Selection:
    judge: Judge
    yardstick: TargetYardstick
    found: SearchResult
    test: TestPart
    say: Callable[[str], None]
    is_late: bool = False
    reasons: list[str] = field(default_factory=list)
    _drops: dict[str, Drop] = field(default_factory=dict)
    _refused: dict[str, bool] = field(default_factory=dict)
    """By plan, whether the target's own compiler said no."""
    _left_out: set[str] = field(default_factory=set)
    """Baselines that could not be measured."""
    _scores: Scores | None = None

    def __post_init__(self) -> None:
        self.reasons += self.found.reasons
        self.plain = next(
            (
                t.plan
                for t in self.found.trials
                if t.note == PLAIN_INT8 and t.state is not TrialState.FAILED
            ),
            None,
        )

    @property
    def float_plan(self) -> CompressionPlan:
        """The float model in the target's reference format."""
        return CompressionPlan(float_precision=self.yardstick.float_precisions[0])

    def ranked(self) -> list[Trial]:
        """Candidates, the fastest first; those in front are timed again side by side.

        Each was timed at another moment of the search, so the order of near ones is partly chance.
        """
        candidates = list(self.found.candidates)
        # Each is held whole while it is timed, beside its kernels: what is large goes in smaller company.
        room = int(free_bytes() / 2 / max(calibration_bytes(self.judge.workshop.source), 1))
        count = min(_TIMED_AGAIN, room)
        front, rest = candidates[:count], candidates[count:]
        if len(front) < 2 or self.is_late:
            return candidates
        self.say(f"the {len(front)} fastest candidates side by side")
        kind = self.yardstick.spec.kind
        names = {f"#{t.number}": t for t in front}
        try:
            bench = self.yardstick.compare(
                {
                    name: (t.plan, self.judge.workshop.build(t.plan), runtime_properties(t.plan, kind))
                    for name, t in names.items()
                }
            )
        except CANDIDATE_ERRORS as exc:
            self.reasons.append(f"the fastest candidates could not be timed again side by side: {first_line(exc)}")
            return candidates
        order = sorted(bench.measurements, key=lambda m: m.latency_p50_ms)
        return [names[m.name] for m in order] + rest

    def first_inside(self) -> CompressionPlan:
        """The fastest candidate that is not outside the budget on the test part; at last the float model.

        Behind one that was refused only safer ones are asked about, by their drop on the search part: the next of its
        kind might pass by chance. The float model's formats are not of its kind, and are always asked about.
        """
        refused: list[float] = []
        """By what drop on the search part another one counts as safer."""
        found = self.float_plan
        for trial in self.ranked():
            if trial.plan == self.float_plan or (self.is_late and len(refused) >= _SHORTLIST):
                break
            if refused and _is_compressed(trial) and _likely(trial) >= min(refused):
                continue
            self.say(f"{trial.plan.title} on the test part")
            try:
                drop = self.drop_of(trial.plan)
            except CANDIDATE_ERRORS as exc:
                self.reasons.append(f"{trial.plan.title} was passed over: {first_line(exc)}")
                continue
            if drop.verdict is not Verdict.OUTSIDE:
                if self.is_refused(trial.plan):
                    continue
                found = trial.plan
                break
            # One that the search part flattered, as a small one may, was less safe than it seemed.
            refused.append(max(_likely(trial), self._together(trial, drop) / 2))
            self.reasons.append(
                f"{trial.plan.title} was let through on the search part ({trial.drop_words}) but not on the test "
                f"part (drop {drop.value:+.4f}): stepped back along the frontier"
            )
        if len(refused) >= _SHORTLIST:
            self.reasons.append(
                f"{len(refused) + 1} candidates were tried on the test part, more than {_SHORTLIST}: one of so many "
                "may be inside the budget there by chance; give more --test-data to be sure"
            )
        return found

    def is_refused(self, plan: CompressionPlan) -> bool:
        """Whether the target's own compiler refuses a candidate, which a modelled time does not tell."""
        key = serde.sha256_record(plan)
        if key not in self._refused:
            try:
                self.yardstick.check(plan, self.judge.workshop.build(plan))
                self._refused[key] = False
            except ToolchainRefused as exc:
                self._refused[key] = True
                self.reasons.append(f"{plan.title} was passed over: {first_line(exc)}")
        return self._refused[key]

    def drop_of(self, plan: CompressionPlan) -> Drop:
        """The plan's drop on the test part."""
        key = serde.sha256_record(plan)
        if key not in self._drops:
            data, metric = self.test.data, self.judge.metric
            if self._scores is None:
                self._scores = score(metric, self.test.reference, data, self.test.reference)
            outputs = self.yardstick.predict(plan, self.judge.workshop.build(plan), data)
            scores = score(metric, outputs, data, self.test.reference)
            self._drops[key] = paired_drop(
                metric, self._scores, scores, budget=self.judge.budget, seed=self.judge.seed
            )
        return self._drops[key]

    def contestants(self, plan: CompressionPlan) -> Mapping[str, CompressionPlan]:
        """The float model, plain INT8, and the plan where it is neither."""
        plans = {FLOAT: self.float_plan}
        if self.plain is not None and not self.is_refused(self.plain):
            plans[PLAIN_INT8] = self.plain
        if plan not in plans.values():
            plans[CHOSEN] = plan
        return {name: each for name, each in plans.items() if each == plan or name not in self._left_out}

    def name_of(self, plan: CompressionPlan) -> str:
        """The contestant that the plan is in the final measurement."""
        return next(name for name, each in self.contestants(plan).items() if each == plan)

    def measure(self, plan: CompressionPlan) -> SideBySide:
        """The contestants side by side, long enough to tell them apart; a baseline that fails is left out."""
        while True:
            try:
                return self._measured(self.contestants(plan))
            except CANDIDATE_ERRORS as exc:
                baselines = [name for name, each in self.contestants(plan).items() if each != plan]
                if not baselines:
                    raise
                self._left_out.add(baselines[-1])
                self.reasons.append(f"{baselines[-1]} was not measured beside the result: {first_line(exc)}")

    def _measured(self, contestants: Mapping[str, CompressionPlan]) -> SideBySide:
        kind = self.yardstick.spec.kind
        return self.yardstick.compare(
            {
                name: (each, self.judge.workshop.build(each), runtime_properties(each, kind))
                for name, each in contestants.items()
            }
        )

    def faster_baseline(self, bench: SideBySide, plan: CompressionPlan) -> CompressionPlan | None:
        """The fastest baseline inside the budget that is faster, or simpler and beaten in neither time nor size."""
        beaten: list[tuple[float, CompressionPlan]] = []
        name = self.name_of(plan)
        names = list(self.contestants(plan))  # the simplest first
        for other, each in self.contestants(plan).items():
            if each == plan:
                continue
            comparison = bench.compare(other, name)
            is_better = comparison.is_significant and comparison.speedup < 1
            is_equal = not comparison.is_significant and not self._is_smaller(bench, other, name)
            is_simpler = is_equal and names.index(other) < names.index(name)
            if (is_better or is_simpler) and self._is_inside(each):
                beaten.append((comparison.speedup, each))
        return min(beaten, key=lambda pair: pair[0])[1] if beaten else None

    def _is_smaller(self, bench: SideBySide, baseline: str, candidate: str) -> bool:
        sizes = {m.name: m.size_bytes for m in bench.measurements}
        mine, its = sizes[candidate], sizes[baseline]
        return mine is not None and its is not None and mine < _SMALLER * its

    def _is_inside(self, plan: CompressionPlan) -> bool:
        """Whether the test part lets it pass, and, where the search part did not, both parts together do."""
        if plan == self.float_plan:
            return True
        try:
            drop = self.drop_of(plan)
        except CANDIDATE_ERRORS:
            return False
        trial = next((t for t in self.found.trials if t.plan == plan and t.drop is not None), None)
        if trial is None or trial.drop is None or trial.state is not TrialState.OVER_BUDGET:
            return drop.verdict is not Verdict.OUTSIDE
        return drop.verdict is not Verdict.OUTSIDE and self._together(trial, drop) <= self.judge.budget.max_drop

    def _together(self, trial: Trial, drop: Drop) -> float:
        """The drop over the search part and the test part together."""
        searched = self.judge.data.samples
        seen = drop.value if trial.drop is None else trial.drop
        return (searched * seen + drop.samples * drop.value) / (searched + drop.samples)

    def is_float_by_right(self) -> bool:
        """Whether the float model won for another reason than that all compressed ones were over budget.

        A candidate that the target refused, or that was slower, was not over budget. Late, nothing more is run.
        """
        is_over = False
        for trial in self._compressed():
            key = serde.sha256_record(trial.plan)
            if self._refused.get(key, False):
                continue
            if trial.state is TrialState.OVER_BUDGET:
                is_over = True
            elif trial.state is TrialState.COMPLETE and (key in self._drops or not self.is_late):
                if self._is_inside(trial.plan):
                    return True
                is_over = True
        return not is_over

    def words_about_failures(self) -> list[str]:
        """Why compressed candidates are missing where the float model is the result."""
        compressed = self._compressed()
        failed = [trial for trial in compressed if trial.state is TrialState.FAILED]
        if not failed:
            return []
        return [
            f"{len(failed)} of {len(compressed)} compressed candidates could not be built or run for "
            f"{self.yardstick.target}; the first: {failed[0].error}"
        ]

    def _compressed(self) -> list[Trial]:
        return [t for t in self.found.trials if _is_compressed(t)]


def _is_compressed(trial: Trial) -> bool:
    return bool(trial.plan.quantization or trial.plan.weights or trial.plan.widths)


def _likely(trial: Trial) -> float:
    """The drop to expect; infinite where it is not known."""
    return math.inf if trial.likely_drop is None else trial.likely_drop


def float_blocks(
    plan: CompressionPlan, found: SearchResult, *, ignored: tuple[str, ...]
) -> tuple[BlockChoice, ...]:
    """The blocks that an INT8 plan leaves in float, each with why; the most damaging first."""
    if plan.quantization is None:
        return ()
    total = sum(each for each in found.damages.values() if math.isfinite(each))
    blocks = []
    for name in plan.quantization.float_layers:
        damage, gain = found.damages.get(name), found.gains_us.get(name)
        known = damage if damage is not None and math.isfinite(damage) else None
        reason = (
            "left alone as was asked"
            if name in ignored
            else "the target's compiler refuses it in INT8"
            if name in found.refused
            else _why_float(damage, gain, total)
        )
        blocks.append(BlockChoice(name=name, reason=reason, damage=known, gain_us=gain))
    return tuple(sorted(blocks, key=lambda block: -(block.damage or 0.0)))


def _why_float(damage: float | None, gain: float | None, total: float) -> str:
    verb = "save" if gain is not None and gain > 0 else "cost"
    saves = "" if gain is None else f"INT8 would {verb} {abs(gain):.1f} us"
    if damage is None:
        return saves or "the search did not look at it"
    if not math.isfinite(damage):
        return f"its damage in INT8 is not known: it does not run, or time was up; {saves}"
    share = f" ({damage / total:.0%} of all blocks)" if total > 0 else ""
    return f"damage {damage:.2g}{share} in INT8; {saves}" if saves else f"damage {damage:.2g}{share} in INT8"


def _words_about(blocks: Sequence[BlockChoice]) -> tuple[str, ...]:
    if not blocks:
        return ()
    named = "; ".join(f"{block.name}: {block.reason}" for block in blocks[:_NAMED])
    rest = f"; {len(blocks) - _NAMED} more in manifest.json and report.html" if len(blocks) > _NAMED else ""
    return (f"{len(blocks)} blocks stay float: {named}{rest}",)


def trial_line(trial: Trial) -> str:
    """One line about a trial: what it was, its drop on the search part, its latency."""
    parts = [f"#{trial.number} {trial.plan.title}"]
    if trial.note:
        parts.append(trial.note)
    if trial.state is TrialState.FAILED:
        return ": ".join([*parts, f"failed: {trial.error}"])
    if trial.state is TrialState.SLOWER:
        parts.append("not faster than what is known, so not judged")
    if trial.drop is not None:
        over = "" if trial.state is TrialState.COMPLETE else ", over budget"
        parts.append(f"{trial.drop_words}{over}")
    if trial.latency is not None:
        parts.append(f"{trial.latency.latency_p50_ms:.3g} ms ({trial.latency.evidence})")
    return ": ".join(parts)
