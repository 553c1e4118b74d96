"""OpenVINO's runtime properties for one model on a device of this machine: raced, and checked for parity.

result = tune(TuneTask(model=model, samples=samples), config=TuneConfig(goal=Goal.THROUGHPUT))
compiled = core.compile_model(model, "CPU", result.properties.as_dict())
"""

from vinoopt.tuning.batches import BATCHES
from vinoopt.tuning.bisection import LayerDeparture, Variant, first_departure
from vinoopt.tuning.parity import Parity
from vinoopt.tuning.race import tune
from vinoopt.tuning.settings import axes
from vinoopt.tuning.task import TuneTask
from vinoopt.tuning.trials import (
    BatchChoice,
    Goal,
    Setting,
    SettingState,
    SettingTrial,
    TuneConfig,
    TuneResult,
)

__all__ = [
    "BATCHES",
    "BatchChoice",
    "Goal",
    "LayerDeparture",
    "Parity",
    "Setting",
    "SettingState",
    "SettingTrial",
    "TuneConfig",
    "TuneResult",
    "TuneTask",
    "Variant",
    "axes",
    "first_departure",
    "tune",
]
