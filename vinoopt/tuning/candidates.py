"""Which settings a race tries: the values of each property, one at a time, and leaders combined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import openvino as ov

from vinoopt.records import RuntimeProperties
from vinoopt.tuning.settings import Values, axes
from vinoopt.tuning.task import TuneTask
from vinoopt.tuning.trials import Goal, Setting, SettingTrial, TuneConfig


def space_of(task: TuneTask, config: TuneConfig) -> dict[str, Values]:
    """The properties that may move, with their values, in the order of their names."""
    is_stream = config.goal is Goal.THROUGHPUT
    found = axes(task.device, task.spec, is_stream=is_stream, model=task.model)
    fixed = config.base.as_dict()
    return {key: values for key, values in sorted(found.items()) if key not in fixed}


def single_settings(space: Mapping[str, Values]) -> Iterator[Setting]:
    """Every value of every property by itself."""
    for key, values in space.items():
        yield from (Setting(properties=RuntimeProperties.of({key: value})) for value in values)


def combined(leaders: Sequence[SettingTrial]) -> Iterator[Setting]:
    """Every two leaders of different properties joined, and all three."""
    for size in (2, 3):
        for chosen in combinations((each.properties.as_dict() for each in leaders), size):
            merged: dict[str, str] = {}
            for each in chosen:
                merged |= each
            if len(merged) == sum(len(each) for each in chosen):
                yield Setting(properties=RuntimeProperties.of(merged))


def word(value: object) -> str:
    """A property's value as it is written when it is set."""
    if isinstance(value, bool):
        return "YES" if value else "NO"
    return str(value.get_type_name()) if isinstance(value, ov.Type) else str(value).rpartition(".")[2]
