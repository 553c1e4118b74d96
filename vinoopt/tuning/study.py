"""What a race has learnt: kept by optuna, in memory or in a database file, and asked for what to try next."""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from vinoopt import serde
from vinoopt.errors import InputError
from vinoopt.records import RuntimeProperties
from vinoopt.tuning.settings import Values
from vinoopt.tuning.trials import UNFINISHED, Setting, SettingState, SettingTrial

BY_DEFAULT = ""
"""Value of a property that a setting leaves alone."""
_TRIAL = "vinoopt/"
"""Begins the study's attributes that hold our trials as JSON, the last word on each setting."""
_SETTING, _SUGGESTED = "setting", "suggested"
"""Attributes of an optuna trial: what it is of, as JSON, and whether the sampler named it."""
_LIMITED = -10.0
"""Added to the value of a setting beyond the latency limit."""
_LEAST_KNOWN = 4
"""Timed trials from which the sampler stops guessing at random."""
_ATTEMPTS = 4
"""Suggestions per setting that is asked for; the sampler may name known ones."""


class Study:
    """The trials of one race, and of earlier ones of the same model, device and configuration.

    With a path they lie in an SQLite database that optuna reads and writes, `optuna-dashboard` included; the value of
    a trial is the logarithm of how many times faster it was than the default. `closed` holds those that an earlier
    race settled, and those during whose trial the process ended; `suspects` those of which one may have ended it,
    being measured beside the others. Raises `InputError` where the file is something else.
    """

    def __init__(self, path: Path | None, key: str, space: Mapping[str, Values], *, seed: int = 0) -> None:
        import optuna

        self._optuna = optuna
        self._space: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution((BY_DEFAULT, *values))
            for name, values in space.items()
        }
        self._asked: dict[RuntimeProperties, Any] = {}
        with _quiet(optuna):
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=True, n_startup_trials=_LEAST_KNOWN
            )
            self._study = optuna.create_study(
                study_name=key,
                storage=_storage(optuna, path),
                sampler=sampler,
                direction="maximize",
                load_if_exists=True,
            )
        texts = [text for key, text in sorted(self._study.user_attrs.items()) if key.startswith(_TRIAL)]
        found = [_ended(serde.from_json(SettingTrial, text, where=str(path))) for text in texts]
        self.known = {trial.setting: trial for trial in found}
        self.closed = {key: trial for key, trial in self.known.items() if trial.is_settled}
        self.suspects = {key for key, trial in self.known.items() if trial.state is SettingState.RACING}
        self._suggested: list[RuntimeProperties] = []
        self._given: set[RuntimeProperties] = set()
        self._taught: set[Setting] = set()
        for each in self._study.get_trials(deepcopy=False):
            if _SETTING in each.user_attrs:
                setting = serde.from_json(Setting, each.user_attrs[_SETTING], where=str(path))
                if each.state is optuna.trial.TrialState.COMPLETE:
                    self._taught.add(setting)
                if _SUGGESTED in each.user_attrs:
                    self._suggested.append(setting.properties)

    def tell(self, trial: SettingTrial) -> None:
        """Keep a trial in place of what was known of its setting; it is in the database when this returns."""
        self.known[trial.setting] = trial
        self._study.set_user_attr(_TRIAL + serde.sha256_record(trial.setting), trial.model_dump_json())
        if trial.state not in UNFINISHED:
            self._teach(trial)

    def _teach(self, trial: SettingTrial) -> None:
        """Let optuna learn from a trial; of a setting that is timed again, as finalists are, the first counts."""
        optuna, setting, properties = self._optuna, trial.setting, trial.properties.as_dict()
        attributes = {_SETTING: setting.model_dump_json()}
        value = _value(trial)
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        asked = self._asked.pop(trial.properties, None) if trial.batch is None else None
        if asked is None and setting in self._taught:
            return
        if value is not None:
            self._taught.add(setting)
        if asked is not None:
            asked.set_user_attr(_SETTING, attributes[_SETTING])
            asked.set_user_attr(_SUGGESTED, True)
            self._study.tell(asked, value, state=state)
        elif trial.batch is not None:  # without parameters: what a batch gains says nothing about the properties
            self._study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attributes))
        elif set(properties) <= set(self._space):
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params={name: properties.get(name, BY_DEFAULT) for name in self._space},
                    distributions=self._space,
                    user_attrs=attributes,
                )
            )

    def suggest(self, count: int) -> list[RuntimeProperties]:
        """Up to so many settings of several properties, by what was learnt so far; those of earlier races first.

        Tree-structured Parzen estimator over all properties together (Bergstra et al., NeurIPS 2011).
        """
        earlier = [each for each in dict.fromkeys(self._suggested) if each not in self._given]
        found = earlier[:count]
        fail = self._optuna.trial.TrialState.FAIL
        for _ in range(_ATTEMPTS * count):
            if len(found) == count:
                break
            with _quiet(self._optuna):
                asked = self._study.ask(self._space)
            setting = RuntimeProperties.of({k: v for k, v in asked.params.items() if v != BY_DEFAULT})
            if len(setting.items) < 2 or Setting(properties=setting) in self.known or setting in self._asked:
                self._study.tell(asked, state=fail)
            else:
                self._asked[setting] = asked
                found.append(setting)
        self._given |= set(found)
        return found

    def close(self) -> None:
        """Give back what was suggested and not tried."""
        for asked in self._asked.values():
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        self._asked.clear()


def _ended(trial: SettingTrial) -> SettingTrial:
    """A trial as it was left; one that ran by itself when the process ended is what ended it."""
    if trial.state is not SettingState.RUNNING:
        return trial
    return serde.replace(trial, state=SettingState.CRASHED, reason="an earlier race ended while it was tried")


def _value(trial: SettingTrial) -> float | None:
    """None for what was never timed."""
    if trial.state in (
        SettingState.CRASHED, SettingState.FAILED, SettingState.REFUSED, SettingState.NOT_TRIED
    ):  # fmt: skip
        return None
    if trial.comparison is None:
        return 0.0
    gain = math.log(trial.comparison.speedup)
    return gain + _LIMITED if trial.state is SettingState.OVER_LIMIT else gain


def _storage(optuna: Any, path: Path | None) -> Any:
    if path is None:
        return None
    try:
        with closing(sqlite3.connect(path)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error as exc:
        problem = f"{path} cannot be used as a database of trials: {exc}"
        raise InputError(f"{problem}; name another file with --storage") from exc
    return optuna.storages.RDBStorage(f"sqlite:///{path}")


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's lines about every study and its warning that joint sampling is still experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
