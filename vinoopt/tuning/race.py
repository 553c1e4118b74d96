"""Short heats against the default, a final of the leaders, and a duel that decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

import openvino as ov

from vinoopt import bench
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, MeasureMode, Sample
from vinoopt.errors import DeviceError, InputError
from vinoopt.records import Measurement, RuntimeProperties
from vinoopt.tuning.bisection import Variant, first_departure
from vinoopt.tuning.parity import Outputs, Parity, departure, parity, run_all
from vinoopt.tuning.settings import Values, axes
from vinoopt.tuning.study import Study
from vinoopt.tuning.task import TuneTask, digest_of
from vinoopt.tuning.trials import Goal, SettingState, SettingTrial, TuneConfig, TuneResult

HEAT_SIZE = 6
"""Settings compiled at the same time, the default among them: each holds a copy of the weights."""
HEAT_ROUNDS = 7
FINAL_ROUNDS = 15
DUEL_ROUNDS = 40
LEADERS = 3
"""Settings that are combined with each other, and that reach the final."""
SUGGESTED_HEATS = 2
"""Heats of settings of several properties that optuna names, each after what the one before it taught."""
PARITY_SAMPLES = 64
DEFAULT = "default"
NOTHING = RuntimeProperties()


class Measure(Protocol):
    """`bench.measure`, or what stands in for it."""

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        """Measurements in the order of the contestants."""


def tune(
    task: TuneTask,
    *,
    config: TuneConfig | None = None,
    storage: Path | None = None,
    progress: Callable[[SettingTrial], None] | None = None,
    measure: Measure = bench.measure,
) -> TuneResult:
    """The runtime properties that serve the goal best on this machine, with the evidence.

    Every setting of one property is raced against the default in short heats; the leaders are combined and raced
    again, and so is what optuna suggests from all that was learnt; the best of a final meets the default in a duel on
    fresh rounds, and displaces it only by a significant gain. Settings whose outputs fall below `min_cosine` or
    `min_agreement` against the float reference, and below the default's own, are refused before they are timed.
    `storage` is a database file of optuna: settings that left the race there for the same model, device and
    configuration are not tried again. Raises `DeviceError` where the default itself does not run, `InputError` for
    an unusable request.
    """
    config = config or TuneConfig()
    if config.latency_limit_ms is not None and config.goal is Goal.LATENCY:
        raise InputError("a latency limit belongs to the goal throughput; for least latency leave it out")
    if not task.samples:
        raise InputError("tuning needs samples to run on")
    space = _space(task, config)
    study = Study(storage, digest_of(task, config, space), space, seed=config.seed)
    race = _Race(task=task, config=config, study=study, progress=progress, measure=measure)
    try:
        leaders = race.heats([each for each in _single_settings(space) if not race.is_default(each)])
        leaders += race.heats(list(_combined(leaders[:LEADERS])))
        for _ in range(SUGGESTED_HEATS):
            leaders += [] if race.is_late else race.heats(study.suggest(HEAT_SIZE - 1))
        leaders.sort(key=lambda each: each.gain, reverse=True)
        return race.finish(leaders)
    finally:
        study.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entrant:
    """A setting that the device takes and whose outputs are right."""

    setting: RuntimeProperties
    parity: Parity
    compiled: ov.CompiledModel


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leader:
    """A setting that was faster than the default in its heat."""

    trial: SettingTrial
    gain: float


class _Race:
    def __init__(
        self,
        *,
        task: TuneTask,
        config: TuneConfig,
        study: Study,
        progress: Callable[[SettingTrial], None] | None,
        measure: Measure,
    ) -> None:
        self.measure = measure
        self.task, self.config, self.study, self.progress = task, config, study, progress
        self.trials: list[SettingTrial] = []
        self.warnings: list[str] = []
        self.deadline = time.monotonic() + config.seconds if config.seconds else None
        samples = task.samples[:PARITY_SAMPLES]
        self.default = self._compile(NOTHING)
        reference = task.reference if task.reference is not None else task.model
        self.expected: Outputs = run_all(_compiled(reference, "CPU", _EXACT), samples)
        self.parity = parity(run_all(self.default, samples), self.expected)
        if reason := self._departure(self.parity, None):
            where = self._where(NOTHING, reference)
            self.warnings.append(f"the default setting itself departs from the float reference: {reason}{where}")

    @property
    def is_late(self) -> bool:
        """Whether the time for heats is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def is_default(self, setting: RuntimeProperties) -> bool:
        """Whether the device already does this by default."""
        return all(_word(self.default.get_property(key)) == value for key, value in setting.items)

    def heats(self, settings: Sequence[RuntimeProperties]) -> list[_Leader]:
        """The settings that were faster than the default, fastest first."""
        leaders: list[_Leader] = []
        fresh = [each for each in settings if not self._is_known(each)]
        size = HEAT_SIZE - 1
        for first in range(0, len(fresh), size):
            heat = fresh[first : first + size]
            if self.is_late:
                late = "the time was over"
                self._record(
                    SettingTrial(properties=each, state=SettingState.NOT_TRIED, reason=late) for each in heat
                )
            else:
                leaders += self._heat(heat)
        return sorted(leaders, key=lambda each: each.gain, reverse=True)

    def finish(self, leaders: Sequence[_Leader]) -> TuneResult:
        """The best leader of a final against the default, in rounds that chose nothing yet."""
        finalists = [self._entrant(each.trial) for each in leaders[:LEADERS]]
        self.default = self._compile(NOTHING)  # as fresh as its rivals
        best = self._final(finalists)
        duel = self._measure([best] if best else [], DUEL_ROUNDS)
        state, reason = self._verdict(duel) if best else (SettingState.LEADER, "")
        is_default = state is not SettingState.CHOSEN
        default = SettingTrial(
            properties=NOTHING,
            state=SettingState.CHOSEN if is_default else SettingState.LEADER,
            reason="" if is_default else "displaced",
            parity=self.parity,
            measurement=duel.of(DEFAULT),
        )
        last = [self._trial(best, state, reason, duel)] if best else []
        behind = [each.trial for each in leaders if best is None or each.trial.properties != best.setting]
        self._record([*behind, *([*last, default] if is_default else [default, *last])])
        self._note_limit(duel.of(DEFAULT), is_default=is_default)
        chosen = NOTHING if best is None or is_default else best.setting
        return TuneResult(
            properties=self._properties(chosen),
            trials=tuple(self.trials),
            comparison=duel.compare(DEFAULT, _name(best.setting)) if best else None,
            warnings=(*self.warnings, *duel.warnings),
        )

    def _final(self, finalists: Sequence[_Entrant]) -> _Entrant | None:
        """The fastest finalist within the limit; a single one needs no final."""
        if len(finalists) < 2:
            return next(iter(finalists), None)
        result = self._measure(finalists, FINAL_ROUNDS)
        eligible = [e for e in finalists if not self._is_over_limit(result.of(_name(e.setting)))]
        gains = [result.compare(DEFAULT, _name(each.setting)).speedup for each in eligible]
        return eligible[gains.index(max(gains))] if eligible else None

    def _verdict(self, duel: BenchResult) -> tuple[SettingState, str]:
        """What the duel says about the setting that is not the default."""
        default, rival = duel.measurements
        comparison = duel.compare(DEFAULT, rival.name)
        is_gain = comparison.is_significant and comparison.speedup > 1
        if self._is_over_limit(rival):
            return SettingState.OVER_LIMIT, f"p90 {rival.latency_p90_ms:.3g} ms in the duel"
        if is_gain or self._is_over_limit(default):
            return SettingState.CHOSEN, ""
        return SettingState.LEADER, "no significant gain over the default"

    def _heat(self, settings: Sequence[RuntimeProperties]) -> list[_Leader]:
        entrants = [each for setting in settings if (each := self._admitted(setting)) is not None]
        if not entrants:
            return []
        result = self._measure(entrants, HEAT_ROUNDS)
        default_is_over = self._is_over_limit(result.of(DEFAULT))
        leaders = []
        for entrant in entrants:
            name = _name(entrant.setting)
            measurement, gain = result.of(name), result.compare(DEFAULT, name).speedup
            if self._is_over_limit(measurement):
                reason = f"p90 {measurement.latency_p90_ms:.3g} ms"
                self._record([self._trial(entrant, SettingState.OVER_LIMIT, reason, result)])
            elif gain <= 1 and not default_is_over:
                reason = f"{gain:.3f}x of the default"
                self._record([self._trial(entrant, SettingState.DROPPED, reason, result)])
            else:
                trial = self._trial(entrant, SettingState.LEADER, f"{gain:.3f}x in its heat", result)
                self.study.tell(trial)
                leaders.append(_Leader(trial=trial, gain=gain))
        return leaders

    def _admitted(self, setting: RuntimeProperties) -> _Entrant | None:
        """The setting compiled, or None where the device refuses it or its outputs depart."""
        try:
            compiled = self._compile(setting)
            outputs = run_all(compiled, self.task.samples[:PARITY_SAMPLES])
        except DeviceError as exc:
            self._record([SettingTrial(properties=setting, state=SettingState.FAILED, reason=str(exc))])
            return None
        found = parity(outputs, self.expected)
        if reason := self._departure(found, self.parity):
            refused, reason = SettingState.REFUSED, reason + self._where(setting, self.task.model)
            self._record([SettingTrial(properties=setting, state=refused, reason=reason, parity=found)])
            return None
        return _Entrant(setting=setting, parity=found, compiled=compiled)

    def _entrant(self, trial: SettingTrial) -> _Entrant:
        """A leader compiled again: between heats only the default stays compiled."""
        found = trial.parity if trial.parity is not None else self.parity
        setting = trial.properties
        return _Entrant(setting=setting, parity=found, compiled=self._compile(setting))

    def _measure(self, entrants: Sequence[_Entrant], rounds: int) -> BenchResult:
        device = self.task.device
        contestants = [
            Contestant(name=DEFAULT, model=self.default, device=device),
            *(Contestant(name=_name(e.setting), model=e.compiled, device=device) for e in entrants),
        ]
        config = MeasureConfig(
            mode=MeasureMode(self.config.goal.value),
            rounds=rounds,
            min_round_ms=self.config.turn_ms,
            warmup_ms=2 * self.config.turn_ms,
            seed=self.config.seed,
        )
        return self.measure(contestants, self.task.samples, config=config)

    def _trial(
        self, entrant: _Entrant, state: SettingState, reason: str, result: BenchResult
    ) -> SettingTrial:
        name = _name(entrant.setting)
        return SettingTrial(
            properties=entrant.setting,
            state=state,
            reason=reason,
            parity=entrant.parity,
            measurement=result.of(name),
            comparison=result.compare(DEFAULT, name),
        )

    def _departure(self, found: Parity, default: Parity | None) -> str:
        demands = {"min_cosine": self.config.min_cosine, "min_agreement": self.config.min_agreement}
        return departure(found, **demands, default=default)

    def _where(self, setting: RuntimeProperties, reference: ov.Model) -> str:
        """The first layer that departs, as the end of a sentence; empty where it cannot be told."""
        candidate = Variant(
            model=self.task.model, device=self.task.device, properties=self._properties(setting).as_dict()
        )
        try:
            found = first_departure(
                Variant(model=reference), candidate, self.task.samples, min_cosine=self.config.min_cosine
            )
        except DeviceError:  # a part that does not run by itself; the refusal stands without it
            return ""
        return "" if found is None else f"; {found.sentence}"

    def _properties(self, setting: RuntimeProperties) -> RuntimeProperties:
        return RuntimeProperties.of({**self.config.default.as_dict(), **setting.as_dict()})

    def _compile(self, setting: RuntimeProperties) -> ov.CompiledModel:
        return _compiled(self.task.model, self.task.device, self._properties(setting))

    def _is_over_limit(self, measurement: Measurement) -> bool:
        limit, p90 = self.config.latency_limit_ms, measurement.latency_p90_ms
        return limit is not None and p90 is not None and p90 > limit

    def _note_limit(self, default: Measurement, *, is_default: bool) -> None:
        if is_default and self._is_over_limit(default):
            self.warnings.append(
                f"no setting keeps the latency limit of {self.config.latency_limit_ms:g} ms; the default has "
                f"p90 {default.latency_p90_ms:.3g} ms"
            )

    def _is_known(self, setting: RuntimeProperties) -> bool:
        """Whether it left an earlier race; its trial is then taken over."""
        trial = self.study.closed.get(setting)
        if trial is not None:
            self.trials.append(trial)
        return trial is not None

    def _record(self, trials: Iterator[SettingTrial] | Sequence[SettingTrial]) -> None:
        ended = tuple(trials)
        self.trials.extend(ended)
        for trial in ended:
            self.study.tell(trial)
        if self.progress is not None:
            for trial in ended:
                self.progress(trial)


_EXACT = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32"})


def _name(setting: RuntimeProperties) -> str:
    return " ".join(f"{key}={value}" for key, value in setting.items)


def _word(value: object) -> str:
    """A property's value as it is written when it is set."""
    if isinstance(value, bool):
        return "YES" if value else "NO"
    return str(value.get_type_name()) if isinstance(value, ov.Type) else str(value).rpartition(".")[2]


def _space(task: TuneTask, config: TuneConfig) -> dict[str, Values]:
    """The properties that may move, with their values, in the order of their names."""
    is_stream = config.goal is Goal.THROUGHPUT
    found = axes(task.device, task.spec, is_stream=is_stream, model=task.model)
    fixed = config.base.as_dict()
    return {key: values for key, values in sorted(found.items()) if key not in fixed}


def _single_settings(space: Mapping[str, Values]) -> Iterator[RuntimeProperties]:
    for key, values in space.items():
        yield from (RuntimeProperties.of({key: value}) for value in values)


def _combined(leaders: Sequence[_Leader]) -> Iterator[RuntimeProperties]:
    """Every two leaders of different properties joined, and all three."""
    for size in (2, 3):
        for chosen in combinations((each.trial.properties.as_dict() for each in leaders), size):
            merged: dict[str, str] = {}
            for each in chosen:
                merged |= each
            if len(merged) == sum(len(each) for each in chosen):
                yield RuntimeProperties.of(merged)


def _compiled(model: ov.Model, device: str, properties: RuntimeProperties) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(model, device, properties.as_dict())
    except RuntimeError as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise DeviceError(f"{device} does not take {_name(properties)}: {reason}") from exc
