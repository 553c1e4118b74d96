"""Candidates judged whole: built, run on the search part, compared in pairs, timed, written to the journal."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, Scores, output_names, paired_drop, score
from vinoopt.accuracy.metrics import Agreement, Metric, TopK, judged_outputs
from vinoopt.compression.activations import in_order, sized_like
from vinoopt.compression.build import Workshop
from vinoopt.compression.gate import expected_drop
from vinoopt.compression.sensitivity import divergence
from vinoopt.errors import VinooptError
from vinoopt.forecast import Forecast
from vinoopt.records import (
    AccuracyBudget,
    CompressionPlan,
    DeviceSpec,
    Evidence,
    Measurement,
    Precision,
    Target,
    Trial,
    TrialState,
)
from vinoopt.store import Memo, Store, digest

T = TypeVar("T")

JOURNAL = "trials.jsonl"
TABLES = "tables.jsonl"
PROBE_SAMPLES = (8, 16, 32, 64, 128)
"""Held-back samples that a damage probe may run: enough for a KL or a relative error to rank."""
PROBE_MS = 400.0
"""What the float model may take for them."""
PROBE_BYTES = 64 << 20
"""Of the float model's outputs on them, of which a damage takes several times as much."""
_FATAL = 2
"""Times that a step must have ended the process before it is left out."""
_AS_FAST = 1.02
"""Times taken at different moments of a search are not told apart below this ratio."""
OF_VALUES = frozenset({"cosine", "pooled_cosine", "sqnr", "mse"})
"""Metrics that take outputs for what they are, not for class scores: so do damages then."""

_TIMED = (Evidence.MEASURED, Evidence.EMULATED)

CANDIDATE_ERRORS = (Exception,)
"""What may go wrong with one candidate without ending the search: whatever OpenVINO, NNCF, a compiler or a user's
metric raise. An hour of work is not to be lost for one of its trials; each keeps its error."""


class Yardstick(Protocol):
    """What the search asks of a target."""

    @property
    def target(self) -> Target:
        """Where the result will run."""
        ...

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """Float formats worth trying there; the first is the reference."""
        ...

    @property
    def arithmetic(self) -> str:
        """What computes predictions: two targets that name the same get the same outputs from the same model."""
        ...

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Latency of a candidate on the target, in whatever evidence can be had."""
        ...

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        """Latencies of several candidates, taken so that they can be compared with each other."""
        ...

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        """Outputs as the target would compute them, as nearly as this machine can."""
        ...

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Microseconds per block on the target."""
        ...


class Shared:
    """What searches for several targets of one model share: values that depend on no target."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The value under `key`, made where it is new; a key always stands for values of one type."""
        if key not in self._values:
            self._values[key] = make()
        return cast(T, self._values[key])


@dataclass(kw_only=True)
class Spent:
    """What single steps have taken in this run, in seconds."""

    accuracy_s: float = 0.0
    """Running one candidate on the search part and scoring it, the last time."""
    timing_s: float = math.inf
    """Timing one candidate, at best."""
    probe_s: float = 0.0
    """One damage probe, the last time."""


@dataclass(kw_only=True)
class Judge:
    """Judges plans for one target and remembers the verdicts, across runs through the store's journal."""

    workshop: Workshop
    yardstick: Yardstick
    metric: Metric
    budget: AccuracyBudget
    data: Dataset
    """The search part."""
    reference: Predictions
    """The float model's outputs on it, in f32."""
    seed: int
    store: Store
    shared: Shared = field(default_factory=Shared)
    """One for all targets of a run."""
    sample_s: float = 0.0
    """Inference of one sample in float on this machine."""
    spec: DeviceSpec | None = None
    """The target's figures, which what is kept of it depends on."""
    on_trial: Callable[[Trial], None] = lambda trial: None
    forecast: Forecast = field(default_factory=Forecast)
    """Told what the search will take as that becomes known."""
    trials: list[Trial] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    _known: dict[str, Trial] = field(default_factory=dict)
    _scores: Scores | None = None
    _memo: Memo | None = None
    _probe_data: Dataset | None = None
    _anchor: Trial | None = None
    """Of an earlier session, which the first timing of this one is to be in unit with."""
    _steady: Trial | None = None
    """The baseline beside which measured candidates are timed."""
    _unit: float = 1.0
    _crashed: frozenset[str] = frozenset()
    _open_outputs: frozenset[str] | None = None

    def resume(self) -> int:
        """Take over the finished trials of the journal that are for this target; gives their number."""
        self._crashed = self._crashes()
        for line in self.store.lines(self._journal):
            trial = serde.from_json(Trial, line, where=self._journal)
            if trial.state is not TrialState.FAILED:  # what failed may have failed for want of memory or disk
                self._known[_key(trial.plan)] = trial
        self._anchor = next((t for t in self._known.values() if t.latency is not None), None)
        return len(self._known)

    def forget(self) -> None:
        """Start a new journal."""
        self.store.clear(self._journal)
        self.store.clear(self._risks)

    @property
    def reference_scores(self) -> Scores:
        """The float model's scores on the search part."""
        if self._scores is None:
            self._scores = score(self.metric, self.reference, self.data, self.reference)
        return self._scores

    def judge(self, plan: CompressionPlan, *, note: str = "", beat_ms: float | None = None) -> Trial:
        """The trial of `plan`: from the journal where it was judged before, else built and run now.

        A candidate over budget is not timed. With `beat_ms`, one that is not faster than that is of no use: where
        timing has been cheaper than judging it is timed first, and is `SLOWER` if so. What goes wrong with the
        candidate makes the trial `FAILED`, with the error kept.
        """
        known = self._known.get(_key(plan)) or self._fatal(plan)
        if known is not None and not self._is_open(known, beat_ms):
            return self._take(serde.replace(known, number=len(self.trials), note=note), is_new=False)
        if beat_ms is not None and self.spent.timing_s < self.spent.accuracy_s:
            return self._take(self._run_if_faster(plan, note, beat_ms), is_new=True)
        trial, model = self._run(plan, note)
        if trial.state is TrialState.COMPLETE and model is not None:
            trial = self._timed([(trial, model)])[0]
        return self._take(trial, is_new=True)

    def knows(self, plan: CompressionPlan) -> bool:
        """Whether this run has judged the plan already."""
        return any(trial.plan == plan for trial in self.trials)

    def finished(self) -> tuple[Trial, ...]:
        """What the journal holds, of this session and of one that it takes up; failures are not held."""
        return tuple(self._known.values())

    def take_over(self, is_wanted: Callable[[CompressionPlan], bool]) -> None:
        """Makes trials of this run of what an earlier one found inside the budget, and this one did not come by.

        It may have gone another way, or have been ended sooner. Nothing is built for that.
        """
        for trial in self.finished():
            is_open = trial.state is TrialState.COMPLETE and not self.knows(trial.plan)
            if is_open and is_wanted(trial.plan):
                self.judge(trial.plan, note=trial.note)

    def latencies_ms(
        self,
        plans: Sequence[CompressionPlan],
        make: Callable[[CompressionPlan], ov.Model] | None = None,
        *,
        kind: str = "",
    ) -> tuple[float, ...]:
        """Latencies of plans that are timed together and not judged, to be compared with each other; kept.

        `make` gives the models where they are not the plans' own, and `kind` tells how they were made.
        """
        build = make or self.workshop.build
        key = f"latencies {kind} {self._place} {digest([_key(plan) for plan in plans])}"

        def measured() -> list[float]:
            found = self.yardstick.measure_together([(plan, build(plan)) for plan in plans])
            return [each.latency_p50_ms for each in found]

        return tuple(self._tables().once(key, measured))

    def judge_anchors(self, plans: Mapping[str, Sequence[CompressionPlan]]) -> None:
        """Trials of the plans that all others are compared with, by note: timed together, over budget or not."""
        everything = [(note, plan) for note, each in plans.items() for plan in each]
        for note, plan in everything:
            if _key(plan) in self._known:
                self.judge(plan, note=note)
        ran: list[tuple[Trial, ov.Model | None]] = []
        for note, plan in everything:
            if _key(plan) in self._known:
                continue
            fatal = self._fatal(plan)
            trial, model = (serde.replace(fatal, note=note), None) if fatal else self._run(plan, note)
            ran.append((serde.replace(trial, number=len(self.trials) + len(ran)), model))
        runnable = [(trial, model) for trial, model in ran if model is not None]
        timed = {trial.number: trial for trial in (self._timed(runnable) if runnable else ())}
        for trial, _ in ran:
            self._take(timed.get(trial.number, trial), is_new=True)
        self._settle()

    def _take(self, trial: Trial, *, is_new: bool) -> Trial:
        if is_new:
            self.store.append(self._journal, serde.to_json(trial))
            self._known[_key(trial.plan)] = trial
        self.trials.append(trial)
        self.on_trial(trial)
        return trial

    def _is_open(self, known: Trial, beat_ms: float | None) -> bool:
        """Whether a trial that was not judged because something else was faster has to be judged now."""
        if known.state is not TrialState.SLOWER or known.latency is None:
            return False
        return beat_ms is None or known.latency.latency_p50_ms < _AS_FAST * beat_ms

    def _run_if_faster(self, plan: CompressionPlan, note: str, beat_ms: float) -> Trial:
        trial = self._new_trial(plan, note)
        started = time.monotonic()
        try:
            with self._at_risk(_key(plan)):
                model = self.workshop.build(plan)
        except CANDIDATE_ERRORS as exc:
            return serde.replace(trial, error=first_line(exc), seconds=time.monotonic() - started)
        timed = self._timed([(serde.replace(trial, state=TrialState.SLOWER), model)])[0]
        if timed.latency is None or timed.latency.latency_p50_ms >= _AS_FAST * beat_ms:
            return timed
        judged, _ = self._run(plan, note)
        return serde.replace(judged, latency=timed.latency, seconds=judged.seconds + timed.seconds)

    def _timed(self, candidates: Sequence[tuple[Trial, ov.Model]]) -> list[Trial]:
        started = time.monotonic()
        try:
            times = self._in_one_unit([(trial.plan, model) for trial, model in candidates])
        except CANDIDATE_ERRORS as exc:
            if len(candidates) > 1:  # one that the target refuses must not take the others with it
                return [trial for candidate in candidates for trial in self._timed([candidate])]
            return [serde.replace(t, state=TrialState.FAILED, error=first_line(exc)) for t, _ in candidates]
        spent = (time.monotonic() - started) / max(len(candidates), 1)
        self.spent.timing_s = min(spent, self.spent.timing_s)
        return [
            serde.replace(trial, latency=latency, seconds=trial.seconds + spent)
            for (trial, _), latency in zip(candidates, times, strict=True)
        ]

    def _in_one_unit(self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]) -> list[Measurement]:
        """Latencies as the journal's trials have them.

        A yardstick starts with a unit of its own in every run, and where it times things its unit moves with the pace
        of the machine: candidates are then timed beside the fastest baseline, which is more like them than the float
        model.
        """
        anchor = self._steady or self._anchor
        if anchor is None or anchor.latency is None:
            found = list(self.yardstick.measure_together(candidates))
        else:
            try:
                model = self.workshop.build(anchor.plan)
                first, *found = self.yardstick.measure_together([(anchor.plan, model), *candidates])
            except CANDIDATE_ERRORS:
                found = list(self.yardstick.measure_together(candidates))
                self._steady = None  # it was not their fault
            else:
                self._unit, self._anchor = anchor.latency.latency_p50_ms / first.latency_p50_ms, None
        return [serde.replace(each, latency_p50_ms=each.latency_p50_ms * self._unit) for each in found]

    def _settle(self) -> None:
        """Choose the baseline beside which all others are timed from here on: the fastest, if it was measured.

        Once and for all: were it always the fastest so far, the luck of each would stay in the figures of the next.
        """
        pairs = [(t.latency, t) for t in self.trials if t.latency is not None]
        timed = [(latency.latency_p50_ms, t) for latency, t in pairs if latency.evidence in _TIMED]
        self._steady = min(timed, key=lambda pair: pair[0], default=(0.0, None))[1]

    # ------------------------------------------------------------------ what ends the process

    @contextmanager
    def _at_risk(self, key: str) -> Iterator[None]:
        """Marks what native code is about to be done: where no end follows, it took the process with it."""
        self.store.append(self._risks, f"begun {key}")
        try:
            yield
        finally:
            self.store.append(self._risks, f"ended {key}")

    def _crashes(self) -> frozenset[str]:
        """What ended the process more than once; once may have been the user, or another program's memory."""
        open_: Counter[str] = Counter()
        for line in self.store.lines(self._risks):
            word, _, key = line.partition(" ")
            open_[key] += 1 if word == "begun" else -1
        return frozenset(key for key, count in open_.items() if count >= _FATAL)

    def _fatal(self, plan: CompressionPlan) -> Trial | None:
        """The trial of a plan that ended the process each time it was tried; None for any other."""
        if _key(plan) not in self._crashed:
            return None
        error = f"the process ended while this was built or run, {_FATAL} times: memory, or a crash of native code"
        return serde.replace(self._new_trial(plan, ""), error=error)

    def _new_trial(self, plan: CompressionPlan, note: str) -> Trial:
        return Trial(
            number=len(self.trials),
            plan=plan,
            state=TrialState.FAILED,
            target=str(self.yardstick.target),
            note=note,
        )

    def _run(self, plan: CompressionPlan, note: str) -> tuple[Trial, ov.Model | None]:
        """The trial without its latency, and the model where it could be built and run."""
        started = time.monotonic()
        trial = self._new_trial(plan, note)
        try:
            with self._at_risk(_key(plan)):
                model = self.workshop.build(plan)
                built = time.monotonic()
                outputs = self.yardstick.predict(plan, model, self.data)
            scores = score(self.metric, outputs, self.data, self.reference)
            drop = paired_drop(
                self.metric, self.reference_scores, scores, budget=self.budget, seed=self.seed
            )
        except CANDIDATE_ERRORS as exc:
            return serde.replace(trial, error=first_line(exc), seconds=time.monotonic() - started), None
        self.spent.accuracy_s = time.monotonic() - built
        expected = expected_drop(self.metric, self.reference_scores, scores, drop)
        judged = serde.replace(
            trial,
            state=TrialState.COMPLETE if expected <= self.budget.max_drop else TrialState.OVER_BUDGET,
            accuracy=scores.accuracy,
            drop=drop.value,
            drop_high=drop.high,
            expected_drop=expected,
            seconds=time.monotonic() - started,
        )
        return judged, model

    @property
    def are_scores(self) -> bool:
        """Whether outputs of a classifier's shape are class scores, by what is known of metric and labels."""
        labels = self.data.labels
        is_numbered = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
        return isinstance(self.metric, TopK | Agreement) or (is_numbered and self.metric.name not in OF_VALUES)

    def _found_open(self) -> frozenset[str]:
        """Outputs whose size hangs on what the model finds in an input, not on the input's size."""
        if self._open_outputs is None:
            source = self.workshop.source
            outputs = sized_like(source, in_order(source, self.data[0])).outputs
            pairs = zip(output_names(source), outputs, strict=True)
            self._open_outputs = frozenset(name for name, each in pairs if each.get_partial_shape().is_dynamic)
        return self._open_outputs

    def damage(
        self, plan: CompressionPlan, make: Callable[[], ov.Model], *, is_shared: bool = False, kind: str = ""
    ) -> float:
        """Divergence from the float reference on a few samples of the search part; kept by plan.

        Only outputs that the metric looks at count. Targets that quantize and compute alike share it. `is_shared`
        says that it is the same for every target; `kind` tells apart models made in different ways from one plan.
        """
        where = "" if is_shared else f"{self.workshop.device} {self.yardstick.arithmetic}"
        are_scores = self.are_scores
        names = judged_outputs(self.metric) or tuple(self.reference[0])

        def probe() -> float:
            started = time.monotonic()
            calls = (self.reference[i] for i in range(len(sample)))
            reference = [{name: call[name] for name in names} for call in calls]
            with self._at_risk(digest(key)):
                outputs = list(self.yardstick.predict(plan, make(), sample))
            found = divergence(reference, outputs, are_scores=are_scores, open_outputs=unordered)
            self.spent.probe_s = time.monotonic() - started
            return found

        try:
            sample, unordered = self.probe_data, self._found_open() & set(names)
            of = digest("scores" if are_scores else "values", *names, *sorted(unordered))[:12]
            key = f"damage {of} {kind} {where} {len(sample)} {_key(plan)}"
            return math.inf if digest(key) in self._crashed else self._tables().once(key, probe)
        except CANDIDATE_ERRORS:
            return math.inf  # a choice that cannot be built or run is never taken; the next run tries it again

    def block_times(
        self,
        plan: CompressionPlan,
        make: Callable[[], ov.Model],
        blocks: Sequence[str],
        *,
        kind: str = "",
    ) -> Mapping[str, float]:
        """Microseconds per block on the target; kept by plan."""
        key = f"times {kind} {self._place} {_key(plan)} {digest(sorted(blocks))}"
        return self._tables().once(key, lambda: dict(self.yardstick.block_times(plan, make(), blocks)))

    def _tables(self) -> Memo:
        if self._memo is None:
            self._memo = self.store.memo(TABLES)
        return self._memo

    @property
    def probe_data(self) -> Dataset:
        """The samples that damage probes run, on this machine: fewer for a model that is slow.

        As many for every target, and in later runs, so that what was learnt is shared.
        """
        if self._probe_data is None:

            def fitting() -> int:
                sample_ms = 1e3 * self.sample_s
                quick = max((n for n in PROBE_SAMPLES if n * sample_ms <= PROBE_MS), default=PROBE_SAMPLES[0])
                call_bytes = sum(values.nbytes for values in self.reference[0].values())
                return max(min(quick, PROBE_BYTES // max(call_bytes, 1)), 2)

            count = int(self.store.json("probe-samples", fitting))
            self._probe_data = self.data.subset(range(min(count, len(self.data))))
        return self._probe_data

    @property
    def _journal(self) -> str:
        judged_by = digest(self.metric.name, _identity(self.metric), serde.to_json(self.budget))[:12]
        return f"{self._place}-{judged_by}-{JOURNAL}"

    @property
    def _risks(self) -> str:
        return f"{self._place}-risks.jsonl"

    @property
    def _place(self) -> str:
        """The target, told apart from others of its name: its figures, or what stands in for it, may change."""
        slug = self.yardstick.target.slug
        if self.spec is None:
            return slug
        return f"{slug}-{digest(serde.to_json(self.spec), self.yardstick.arithmetic)[:12]}"


def _identity(metric: Metric) -> str:
    """What tells a metric from others of its name in every session: its figures and its code, not its address."""
    kind = type(metric)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt, or compiled
        code = ""
    text = f"{kind.__module__}.{kind.__qualname__} {metric!r} {vars(metric) if hasattr(metric, '__dict__') else ''}"
    return digest(re.sub(r" at 0x[0-9a-fA-F]+", "", text), code)


def first_line(exc: Exception) -> str:
    """What an error says in one line; with its kind where it is none of this package's or says nothing."""
    kind, lines = type(exc).__name__, str(exc).strip().splitlines()
    if not lines:
        return kind
    return lines[0] if isinstance(exc, VinooptError) else f"{kind}: {lines[0]}"


def _key(plan: CompressionPlan) -> str:
    return serde.sha256_record(plan)
