"""What a race has learnt: kept by optuna, in memory or in a database file, and asked for what to try next."""

from __future__ import annotations

import json
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
from vinoopt.tuning.trials import FINAL_STATES, Setting, SettingState, SettingTrial

BY_DEFAULT = ""
"""Value of a property that a setting leaves alone."""
_TRIAL, _SUGGESTED = "vinoopt", "suggested"
"""Attributes of an optuna trial: ours as JSON, and whether the sampler named it."""
_LIMITED = -10.0
"""Added to the value of a setting beyond the latency limit."""
_LEAST_KNOWN = 4
"""Timed trials from which the sampler stops guessing at random."""
_ATTEMPTS = 4
"""Suggestions per setting that is asked for; the sampler may name known ones."""


class Study:
    """The trials of one race, and of earlier ones of the same model, device and configuration.

    With a path they lie in an SQLite database that optuna reads and writes, `optuna-dashboard` included; the value of
    a trial is the logarithm of how many times faster it was than the default. `closed` holds those that left an
    earlier race and need not be tried again. Raises `InputError` where the file is something else.
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
        self.known: dict[Setting, SettingTrial] = {}
        self._suggested: list[RuntimeProperties] = []
        self._given: set[RuntimeProperties] = set()
        for each in self._study.get_trials(deepcopy=False):
            if _TRIAL in each.user_attrs:
                trial = serde.from_mapping(SettingTrial, json.loads(each.user_attrs[_TRIAL]), where=str(path))
                self.known[trial.setting] = trial
                if _SUGGESTED in each.user_attrs:
                    self._suggested.append(trial.properties)
        self.closed = {key: trial for key, trial in self.known.items() if trial.state in FINAL_STATES}

    def tell(self, trial: SettingTrial) -> None:
        """Keep a trial; it is in the database when this returns."""
        optuna, properties = self._optuna, trial.properties.as_dict()
        attributes = {_TRIAL: trial.model_dump_json()}
        value = _value(trial)
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        asked = self._asked.pop(trial.properties, None) if trial.batch is None else None
        self.known[trial.setting] = trial
        if asked is not None:
            asked.set_user_attr(_TRIAL, attributes[_TRIAL])
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


def _value(trial: SettingTrial) -> float | None:
    """None for what was never timed."""
    if trial.state in (SettingState.FAILED, SettingState.REFUSED, SettingState.NOT_TRIED):
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
