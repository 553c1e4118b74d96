"""Short heats against the default, a final of the leaders, and a duel that decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vinoopt import bench
from vinoopt.alarm import make_interrupts_safe
from vinoopt.bench import BenchResult
from vinoopt.errors import DeviceError, InputError
from vinoopt.records import Measurement
from vinoopt.tuning.candidates import combined, single_settings, space_of, word
from vinoopt.tuning.settings import Values
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
_ANEW = 1.3
"""Time of a duel over that of its rounds: its contestants are compiled several times."""
LEADERS = 3
"""Settings that are combined with each other, and that reach the final."""
SUGGESTED_HEATS = 2
"""Heats of settings of several properties that optuna names, each after what the one before it taught."""
JOINED = 2
"""The best batches are raced with so many of the best settings."""
FINAL_SHARE = 0.3
"""Of the time, what the final and the duel have."""
BATCH_SHARE = 0.3
"""Of the time, what batches have where they are tried."""
HURRY_S = 5.0
"""What the final and the duel have after an interrupt."""


def tune(
    task: TuneTask,
    *,
    config: TuneConfig | None = None,
    storage: Path | None = None,
    progress: Callable[[SettingTrial], None] | None = None,
    measure: Measure = bench.measure,
    keeps_best: bool = False,
) -> TuneResult:
    """The runtime properties that serve the goal best on this machine, with the evidence.

    Every setting of one property is raced against the default in short heats; the leaders are combined and raced
    again, and so is what optuna suggests from all that was learnt; the best of a final meets the default in a duel on
    fresh rounds, and displaces it only by a significant gain. Settings whose outputs fall below `min_cosine` or
    `min_agreement` against the float reference, and below the default's own, are refused before they are timed.
    With `batches`, the model is raced at these too, sample by sample against the reference; the best of them meets
    the best setting of the model as it is, and is told beside it, for the properties belong to the model as it is.
    `storage` is a database file of optuna: settings that were settled there for the same model, samples, machine and
    configuration are not tried again, nor those that ended the process. With `keeps_best` an interrupt (Ctrl-C) ends
    the heats, and the final and the duel follow in a few seconds; a second one passes through. Raises `DeviceError`
    where the default itself does not run, `InputError` for an unusable request.
    """
    make_interrupts_safe()
    config = config or TuneConfig()
    if config.latency_limit_ms is not None and config.goal is Goal.LATENCY:
        raise InputError("a latency limit belongs to the goal throughput; for least latency leave it out")
    if config.batches and config.goal is Goal.LATENCY:
        raise InputError("batches belong to the goal throughput; for least latency leave them out")
    if not task.samples:
        raise InputError("tuning needs samples to run on")
    space = space_of(task, config)
    study = Study(storage, digest_of(task, config, space), space, seed=config.seed)
    race = _Race(task=task, config=config, study=study, progress=progress, measure=measure)
    try:
        race.search(space)
    except KeyboardInterrupt:
        if not keeps_best:
            raise
        race.hurry()
    finally:
        race.put_back()
        study.close()
    try:
        return race.finish()
    finally:
        race.put_back()


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
        self.leaders: list[_Leader] = []
        self.is_interrupted = False
        self._begun: list[Setting] = []
        seconds = config.seconds if config.seconds is not None else math.inf
        started = time.monotonic()
        self.end = started + seconds
        self._heats_end = started + (1 - FINAL_SHARE) * seconds
        self.deadline = self._heats_end - (BATCH_SHARE * seconds if config.batches and config.seconds else 0.0)
        self.track = Track(task, config, measure)

    @property
    def is_late(self) -> bool:
        """Whether the time for heats is over."""
        return time.monotonic() > self.deadline

    def search(self, space: Mapping[str, Values]) -> None:
        """Heats of single properties, of leaders combined, of what optuna suggests, and of batches."""
        self.heats([each for each in single_settings(space) if not self._is_default(each)])
        self.heats(list(combined(self._ranked()[:LEADERS])))
        for _ in range(SUGGESTED_HEATS):
            fresh = [] if self.is_late else self.study.suggest(HEAT_SIZE - 1)
            self.heats([Setting(properties=each) for each in fresh])
        self._batch_heats()

    def heats(self, settings: Sequence[Setting]) -> None:
        """Race the settings, as far as the time allows; those that are faster than the default join the leaders."""
        fresh = [each for each in settings if not self._is_known(each)]
        sound = [each for each in fresh if each not in self.study.suspects]
        size = HEAT_SIZE - 1
        heats = [sound[first : first + size] for first in range(0, len(sound), size)]
        for heat in [*heats, *([each] for each in fresh if each in self.study.suspects)]:
            self._heat(self._in_time(heat))

    def hurry(self) -> None:
        """The user has waited long enough: what is left is the final and the duel, in a few seconds."""
        self.is_interrupted = True
        self.end = min(self.end, time.monotonic() + HURRY_S)

    def put_back(self) -> None:
        """Take back what was begun and will not be ended, so that no later race takes it for a crash."""
        for setting in self._begun:
            self.study.tell(SettingTrial(**dict(setting), state=SettingState.NOT_TRIED, reason="interrupted"))
        self._begun.clear()

    def finish(self) -> TuneResult:
        """The best leader of a final against the default, in rounds that chose nothing yet; then the best batch."""
        own, batched = self._ranked(), self._ranked(of_batches=True)
        parts = 2 if batched else 1
        best = self._final(own, parts)
        duel = self._duel([best], parts) if best is not None else None
        if best is None or duel is None:
            best, duel = None, self._lonely_default(parts)
        state, reason = self._verdict(duel, DEFAULT, best.setting) if best else (SettingState.LEADER, "")
        is_default = state is not SettingState.CHOSEN
        choice = self._batch_choice(batched, None if is_default else best) if batched else None
        default = SettingTrial(
            properties=NOTHING.properties,
            state=SettingState.CHOSEN if is_default else SettingState.LEADER,
            reason="" if is_default else "displaced",
            parity=self.track.parity,
            measurement=duel.of(DEFAULT),
        )
        last = [_judged(best, state, reason, duel)] if best else []
        self._record([*self._behind(own, best), *([*last, default] if is_default else [default, *last])])
        if is_default and choice is None:
            self._note_limit(duel.of(DEFAULT))
        chosen = NOTHING if best is None or is_default else best.setting
        return TuneResult(
            properties=self.track.properties(chosen),
            trials=tuple(self.trials),
            comparison=duel.compare(DEFAULT, best.setting.name) if best else None,
            batched=choice,
            warnings=(*self.track.warnings, *duel.warnings),
            interrupted=self.is_interrupted,
        )

    # ------------------------------------------------------------------ heats

    def _is_default(self, setting: Setting) -> bool:
        """Whether the device already does this by default."""
        return all(word(self.track.default.get_property(key)) == value for key, value in setting.properties.items)

    def _ranked(self, *, of_batches: bool = False) -> list[SettingTrial]:
        """The leaders of the model as it is, or of other batches, fastest first."""
        ranked = sorted(self.leaders, key=lambda each: each.gain, reverse=True)
        return [each.trial for each in ranked if (each.trial.batch is not None) == of_batches]

    def _batch_heats(self) -> None:
        """Other batches, alone and with the best settings."""
        self.deadline = self._heats_end
        if self.track.batching is None or not self.track.batching.sizes:
            return
        if not self.track.pace_ms:
            self.track.measure([], HEAT_ROUNDS)
        self.heats([Setting(batch=batch) for batch in self.track.batching.sizes])
        own, batched = self._ranked()[:JOINED], self._ranked(of_batches=True)[:JOINED]
        self.heats([Setting(properties=one.properties, batch=other.batch) for other in batched for one in own])

    def _in_time(self, settings: Sequence[Setting]) -> list[Setting]:
        """Those of a heat that there is time for; large batches take longest."""
        left_ms = (self.deadline - time.monotonic()) * 1e3
        late = "the time was over" if left_ms < 0 else "it would take longer than the time that was left"
        left_ms -= self.track.heat_ms(NOTHING)  # the default is in every heat
        kept = []
        for setting in settings:
            left_ms -= self.track.heat_ms(setting)
            if left_ms >= 0:
                kept.append(setting)
            else:
                self._record([SettingTrial(**dict(setting), state=SettingState.NOT_TRIED, reason=late)])
        return kept

    def _heat(self, settings: Sequence[Setting]) -> None:
        entrants = [each for setting in settings if (each := self._admitted(setting)) is not None]
        for entrant, result in self._raced(entrants, HEAT_ROUNDS):
            name = entrant.setting.name
            measurement, gain = result.of(name), result.compare(DEFAULT, name).speedup
            if self._is_over_limit(measurement):
                reason = f"p90 {measurement.latency_p90_ms:.3g} ms"
                self._record([_judged(entrant, SettingState.OVER_LIMIT, reason, result)])
            elif gain <= 1 and not self._is_over_limit(result.of(DEFAULT)):
                reason = f"{gain:.3f}x of the default"
                self._record([_judged(entrant, SettingState.DROPPED, reason, result)])
            else:
                trial = _judged(entrant, SettingState.LEADER, f"{gain:.3f}x in its heat", result)
                self._keep(trial)
                self.leaders.append(_Leader(trial=trial, gain=gain))

    def _admitted(self, setting: Setting) -> Entrant | None:
        """The setting compiled, or None where the device refuses it or its outputs depart."""
        self._begin(setting, SettingState.RUNNING)
        try:
            compiled = self.track.compile(setting)
            found = self.track.parity_of(compiled, setting)
        except DeviceError as exc:
            self._fail(setting, exc)
            return None
        if reason := self.track.refusal(found, setting):
            refused = SettingState.REFUSED
            self._record([SettingTrial(**dict(setting), state=refused, reason=reason, parity=found)])
            return None
        return Entrant(setting=setting, parity=found, compiled=compiled)

    def _raced(self, entrants: Sequence[Entrant], rounds: int) -> list[tuple[Entrant, BenchResult]]:
        """Each entrant with the run it was measured in: with all others, or alone where one of them broke off."""
        if not entrants:
            return []
        is_alone = len(entrants) == 1
        self._begin_all(entrants)
        try:
            result = self.track.measure(entrants, rounds)
        except DeviceError as exc:
            if is_alone:
                self._fail(entrants[0].setting, exc)
                return []
            return [pair for each in entrants for pair in self._raced([each], rounds)]
        return [(each, result) for each in entrants]

    # ------------------------------------------------------------------ final and duels

    def _final(self, leaders: Sequence[SettingTrial], parts: int) -> SettingTrial | None:
        """The fastest leader within the limit; a single one needs no final."""
        if len(leaders) < 2:
            return next(iter(leaders), None)
        finalists = [each for trial in leaders[:LEADERS] if (each := self._entrant(trial)) is not None]
        self.track.renew_default()
        rounds = self._rounds(FINAL_ROUNDS, finalists, 2 * parts)
        raced = [
            (result.compare(DEFAULT, each.setting.name).speedup, each.setting)
            for each, result in self._raced(finalists, rounds)
            if not self._is_over_limit(result.of(each.setting.name))
        ]
        best = max(raced, key=lambda each: each[0], default=None)
        return None if best is None else next(trial for trial in leaders if trial.setting == best[1])

    def _duel(self, rivals: Sequence[SettingTrial], parts: int) -> BenchResult | None:
        """The default and the rivals, all compiled anew, several times: how fast a compilation came out is chance.

        None where the last of them does not run.
        """
        entrants = [each for trial in rivals if (each := self._entrant(trial)) is not None]
        if len(entrants) < len(rivals):
            return None
        self._begin_all(entrants)
        try:
            rounds = self._rounds(DUEL_ROUNDS, entrants, _ANEW * parts)
            return self.track.measure(entrants, rounds, is_last=True)
        except DeviceError as exc:
            self._fail(rivals[-1].setting, exc)
            return None

    def _lonely_default(self, parts: int) -> BenchResult:
        return self.track.measure([], self._rounds(DUEL_ROUNDS, [], _ANEW * parts), is_last=True)

    def _rounds(self, wanted: int, entrants: Sequence[Entrant], parts: float) -> int:
        """As many rounds as wanted, or as fit into one of so many parts of the time that is left."""
        left_ms = (self.end - time.monotonic()) * 1e3 / parts
        settings = [each.setting for each in entrants]
        return wanted if left_ms == math.inf else min(wanted, self.track.rounds_in(left_ms, settings))

    def _batch_choice(self, leaders: Sequence[SettingTrial], champion: SettingTrial | None) -> BatchChoice | None:
        """The best batch of a final, where it beats the best setting of the model as it is (None: the default)."""
        best = self._final(leaders, 1)
        self._record(self._behind(leaders, best))
        duel = None if best is None else self._duel([champion, best] if champion else [best], 1)
        if best is None or duel is None:
            return None
        against = champion.setting.name if champion else DEFAULT
        state, reason = self._verdict(duel, against, best.setting)
        self._record([_judged(best, state, reason, duel)])
        if state is not SettingState.CHOSEN:
            return None
        return BatchChoice(
            batch=best.batch or 0,
            properties=self.track.properties(best.setting),
            parity=best.parity or self.track.parity,
            measurement=duel.of(best.setting.name),
            comparison=duel.compare(against, best.setting.name),
        )

    def _verdict(self, duel: BenchResult, champion: str, rival: Setting) -> tuple[SettingState, str]:
        """What the duel says about the setting that challenges the champion."""
        measured = duel.of(rival.name)
        comparison = duel.compare(champion, rival.name)
        is_gain = comparison.is_significant and comparison.speedup > 1
        if self._is_over_limit(measured):
            return SettingState.OVER_LIMIT, f"p90 {measured.latency_p90_ms:.3g} ms in the duel"
        if is_gain or self._is_over_limit(duel.of(champion)):
            return SettingState.CHOSEN, ""
        return SettingState.LEADER, f"no significant gain over {'the default' if champion == DEFAULT else champion}"

    def _entrant(self, trial: SettingTrial) -> Entrant | None:
        """A leader compiled again, for between heats only the default stays compiled; None where that fails."""
        found = trial.parity if trial.parity is not None else self.track.parity
        try:
            return Entrant(setting=trial.setting, parity=found, compiled=self.track.compile(trial.setting))
        except DeviceError as exc:
            self._fail(trial.setting, exc)
            return None

    def _behind(self, leaders: Sequence[SettingTrial], best: SettingTrial | None) -> list[SettingTrial]:
        """The trials of the leaders that are not the best and did not fail since."""
        ended = {trial.setting for trial in self.trials} | ({best.setting} if best is not None else set())
        return [each for each in leaders if each.setting not in ended]

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

    def _begin(self, setting: Setting, state: SettingState) -> None:
        """Leave word of what is about to run: a setting that ends the process must not do so again."""
        self.study.tell(SettingTrial(**dict(setting), state=state))
        if setting not in self._begun:
            self._begun.append(setting)

    def _begin_all(self, entrants: Sequence[Entrant]) -> None:
        state = SettingState.RUNNING if len(entrants) == 1 else SettingState.RACING
        for each in entrants:
            self._begin(each.setting, state)

    def _keep(self, trial: SettingTrial) -> None:
        self.study.tell(trial)
        if trial.setting in self._begun:
            self._begun.remove(trial.setting)

    def _fail(self, setting: Setting, exc: DeviceError) -> None:
        self._record([SettingTrial(**dict(setting), state=SettingState.FAILED, reason=str(exc))])

    def _record(self, trials: Sequence[SettingTrial]) -> None:
        """Keep trials that have ended."""
        for trial in trials:
            self.trials.append(trial)
            self._keep(trial)
            if self.progress is not None:
                self.progress(trial)


def _judged(entrant: Entrant | SettingTrial, state: SettingState, reason: str, result: BenchResult) -> SettingTrial:
    """The trial of a setting that was measured."""
    name = entrant.setting.name
    return SettingTrial(
        **dict(entrant.setting),
        state=state,
        reason=reason,
        parity=entrant.parity,
        measurement=result.of(name),
        comparison=result.compare(DEFAULT, name),
    )
