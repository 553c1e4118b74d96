"""Short heats against the default, a final of the leaders, and a duel that decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import openvino as ov

from vinoopt import bench
from vinoopt.bench import BenchResult
from vinoopt.errors import DeviceError, InputError
from vinoopt.records import Measurement, RuntimeProperties
from vinoopt.tuning.settings import Values, axes
from vinoopt.tuning.study import Study
from vinoopt.tuning.task import TuneTask, digest_of
from vinoopt.tuning.track import DEFAULT, HEAT_ROUNDS, HEAT_SIZE, NOTHING, Entrant, Measure, Track
from vinoopt.tuning.trials import (
    BatchChoice,
    Goal,
    Setting,
    SettingState,
    SettingTrial,
    TuneConfig,
    TuneResult,
)

FINAL_ROUNDS = 15
DUEL_ROUNDS = 40
LEADERS = 3
"""Settings that are combined with each other, and that reach the final."""
SUGGESTED_HEATS = 2
"""Heats of settings of several properties that optuna names, each after what the one before it taught."""
JOINED = 2
"""The best batches are raced with so many of the best settings."""
BATCH_SHARE = 0.4
"""Of the time for heats, what batches have where they are tried."""


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
    With `batches`, the model is raced at these too, sample by sample against the reference; the best of them meets
    the best setting of the model as it is, and is told beside it, for the properties belong to the model as it is.
    `storage` is a database file of optuna: settings that left the race there for the same model, device and
    configuration are not tried again. Raises `DeviceError` where the default itself does not run, `InputError` for
    an unusable request.
    """
    config = config or TuneConfig()
    if config.latency_limit_ms is not None and config.goal is Goal.LATENCY:
        raise InputError("a latency limit belongs to the goal throughput; for least latency leave it out")
    if config.batches and config.goal is Goal.LATENCY:
        raise InputError("batches belong to the goal throughput; for least latency leave them out")
    if not task.samples:
        raise InputError("tuning needs samples to run on")
    space = _space(task, config)
    study = Study(storage, digest_of(task, config, space), space, seed=config.seed)
    race = _Race(task=task, config=config, study=study, progress=progress, measure=measure)
    try:
        leaders = race.heats([each for each in _single_settings(space) if not race.is_default(each)])
        leaders += race.heats(list(_combined(leaders[:LEADERS])))
        for _ in range(SUGGESTED_HEATS):
            fresh = [] if race.is_late else study.suggest(HEAT_SIZE - 1)
            leaders += race.heats([Setting(properties=each) for each in fresh])
        leaders.sort(key=lambda each: each.gain, reverse=True)
        return race.finish(leaders, race.batches(leaders))
    finally:
        study.close()


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
        self.config, self.study, self.progress = config, study, progress
        self.trials: list[SettingTrial] = []
        self.end = time.monotonic() + config.seconds if config.seconds else None
        share = BATCH_SHARE if config.batches else 0.0
        self.deadline = self.end - share * config.seconds if self.end and config.seconds else None
        self.track = Track(task, config, measure)

    @property
    def is_late(self) -> bool:
        """Whether the time for heats is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def is_default(self, setting: Setting) -> bool:
        """Whether the device already does this by default."""
        return all(_word(self.track.default.get_property(key)) == value for key, value in setting.properties.items)

    def batches(self, leaders: Sequence[_Leader]) -> list[_Leader]:
        """Other batches that were faster than the default, alone and with the best settings, fastest first."""
        self.deadline = self.end
        if self.track.batching is None or not self.track.batching.sizes:
            return []
        if not self.track.pace_ms:
            self.track.measure([], HEAT_ROUNDS)
        found = self.heats([Setting(batch=batch) for batch in self.track.batching.sizes])
        joined = [
            Setting(properties=own.trial.properties, batch=each.trial.batch)
            for each in found[:JOINED]
            for own in leaders[:JOINED]
        ]
        return sorted([*found, *self.heats(joined)], key=lambda each: each.gain, reverse=True)

    def heats(self, settings: Sequence[Setting]) -> list[_Leader]:
        """The settings that were faster than the default, fastest first."""
        leaders: list[_Leader] = []
        fresh = [each for each in settings if not self._is_known(each)]
        size = HEAT_SIZE - 1
        for first in range(0, len(fresh), size):
            heat = self._in_time(fresh[first : first + size])
            leaders += self._heat(heat) if heat else []
        return sorted(leaders, key=lambda each: each.gain, reverse=True)

    def finish(self, leaders: Sequence[_Leader], batched: Sequence[_Leader] = ()) -> TuneResult:
        """The best leader of a final against the default, in rounds that chose nothing yet; then the best batch."""
        finalists = [self._entrant(each.trial) for each in leaders[:LEADERS]]
        self.track.renew_default()
        best = self._final(finalists)
        duel = self.track.measure([best] if best else [], DUEL_ROUNDS)
        state, reason = self._verdict(duel, DEFAULT, best) if best else (SettingState.LEADER, "")
        is_default = state is not SettingState.CHOSEN
        choice = self._batch_choice(batched, None if is_default else best) if batched else None
        default = SettingTrial(
            properties=NOTHING.properties,
            state=SettingState.CHOSEN if is_default else SettingState.LEADER,
            reason="" if is_default else "displaced",
            parity=self.track.parity,
            measurement=duel.of(DEFAULT),
        )
        last = [self._trial(best, state, reason, duel)] if best else []
        self._record([*_behind(leaders, best), *([*last, default] if is_default else [default, *last])])
        if is_default and choice is None:
            self._note_limit(duel.of(DEFAULT))
        chosen = NOTHING if best is None or is_default else best.setting
        return TuneResult(
            properties=self.track.properties(chosen),
            trials=tuple(self.trials),
            comparison=duel.compare(DEFAULT, best.setting.name) if best else None,
            batched=choice,
            warnings=(*self.track.warnings, *duel.warnings),
        )

    def _final(self, finalists: Sequence[Entrant]) -> Entrant | None:
        """The fastest finalist within the limit; a single one needs no final."""
        if len(finalists) < 2:
            return next(iter(finalists), None)
        result = self.track.measure(finalists, FINAL_ROUNDS)
        eligible = [e for e in finalists if not self._is_over_limit(result.of(e.setting.name))]
        gains = [result.compare(DEFAULT, each.setting.name).speedup for each in eligible]
        return eligible[gains.index(max(gains))] if eligible else None

    def _batch_choice(self, leaders: Sequence[_Leader], champion: Entrant | None) -> BatchChoice | None:
        """The best batch of a final, where it beats the best setting of the model as it is (None: the default)."""
        best = self._final([self._entrant(each.trial) for each in leaders[:LEADERS]])
        self._record(_behind(leaders, best))
        if best is None:
            return None
        duel = self.track.measure([champion, best] if champion else [best], DUEL_ROUNDS)
        against = champion.setting.name if champion else DEFAULT
        state, reason = self._verdict(duel, against, best)
        self._record([self._trial(best, state, reason, duel)])
        if state is not SettingState.CHOSEN:
            return None
        return BatchChoice(
            batch=best.setting.batch or 0,
            properties=self.track.properties(best.setting),
            parity=best.parity,
            measurement=duel.of(best.setting.name),
            comparison=duel.compare(against, best.setting.name),
        )

    def _verdict(self, duel: BenchResult, champion: str, entrant: Entrant) -> tuple[SettingState, str]:
        """What the duel says about the setting that challenges the champion."""
        rival = duel.of(entrant.setting.name)
        comparison = duel.compare(champion, rival.name)
        is_gain = comparison.is_significant and comparison.speedup > 1
        if self._is_over_limit(rival):
            return SettingState.OVER_LIMIT, f"p90 {rival.latency_p90_ms:.3g} ms in the duel"
        if is_gain or self._is_over_limit(duel.of(champion)):
            return SettingState.CHOSEN, ""
        return SettingState.LEADER, f"no significant gain over {'the default' if champion == DEFAULT else champion}"

    def _in_time(self, settings: Sequence[Setting]) -> list[Setting]:
        """Those of a heat that there is time for; large batches take longest."""
        left_ms = float("inf") if self.deadline is None else (self.deadline - time.monotonic()) * 1e3
        late = "the time was over" if left_ms < 0 else "it would take longer than the time that was left"
        kept = []
        for setting in settings:
            left_ms -= self.track.heat_ms(setting)
            if left_ms >= 0:
                kept.append(setting)
            else:
                self._record([SettingTrial(**dict(setting), state=SettingState.NOT_TRIED, reason=late)])
        return kept

    def _heat(self, settings: Sequence[Setting]) -> list[_Leader]:
        entrants = [each for setting in settings if (each := self._admitted(setting)) is not None]
        if not entrants:
            return []
        result = self.track.measure(entrants, HEAT_ROUNDS)
        default_is_over = self._is_over_limit(result.of(DEFAULT))
        leaders = []
        for entrant in entrants:
            name = entrant.setting.name
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

    def _admitted(self, setting: Setting) -> Entrant | None:
        """The setting compiled, or None where the device refuses it or its outputs depart."""
        try:
            compiled = self.track.compile(setting)
            found = self.track.parity_of(compiled, setting)
        except DeviceError as exc:
            self._record([SettingTrial(**dict(setting), state=SettingState.FAILED, reason=str(exc))])
            return None
        if reason := self.track.refusal(found, setting):
            refused = SettingState.REFUSED
            self._record([SettingTrial(**dict(setting), state=refused, reason=reason, parity=found)])
            return None
        return Entrant(setting=setting, parity=found, compiled=compiled)

    def _entrant(self, trial: SettingTrial) -> Entrant:
        """A leader compiled again: between heats only the default stays compiled."""
        found = trial.parity if trial.parity is not None else self.track.parity
        setting = trial.setting
        return Entrant(setting=setting, parity=found, compiled=self.track.compile(setting))

    def _trial(
        self, entrant: Entrant, state: SettingState, reason: str, result: BenchResult
    ) -> SettingTrial:
        name = entrant.setting.name
        return SettingTrial(
            **dict(entrant.setting),
            state=state,
            reason=reason,
            parity=entrant.parity,
            measurement=result.of(name),
            comparison=result.compare(DEFAULT, name),
        )

    def _is_over_limit(self, measurement: Measurement) -> bool:
        limit, p90 = self.config.latency_limit_ms, measurement.latency_p90_ms
        return limit is not None and p90 is not None and p90 > limit

    def _note_limit(self, default: Measurement) -> None:
        if self._is_over_limit(default):
            self.track.warnings.append(
                f"no setting keeps the latency limit of {self.config.latency_limit_ms:g} ms; the default has "
                f"p90 {default.latency_p90_ms:.3g} ms"
            )

    def _is_known(self, setting: Setting) -> bool:
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


def _single_settings(space: Mapping[str, Values]) -> Iterator[Setting]:
    for key, values in space.items():
        yield from (Setting(properties=RuntimeProperties.of({key: value})) for value in values)


def _combined(leaders: Sequence[_Leader]) -> Iterator[Setting]:
    """Every two leaders of different properties joined, and all three."""
    for size in (2, 3):
        for chosen in combinations((each.trial.properties.as_dict() for each in leaders), size):
            merged: dict[str, str] = {}
            for each in chosen:
                merged |= each
            if len(merged) == sum(len(each) for each in chosen):
                yield Setting(properties=RuntimeProperties.of(merged))


def _behind(leaders: Sequence[_Leader], best: Entrant | None) -> list[SettingTrial]:
    """The trials of the leaders that are not the best."""
    return [each.trial for each in leaders if best is None or each.trial.setting != best.setting]
