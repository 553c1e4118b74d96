"""What tuning is asked, and what it tried."""

from __future__ import annotations

from enum import Enum

from pydantic import Field

from vinoopt.records import Comparison, Measurement, Record, RuntimeProperties
from vinoopt.tuning.parity import Parity


class Goal(str, Enum):
    """What is tuned for."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"

    def __str__(self) -> str:
        return self.value


class TuneConfig(Record):
    """What to tune for, and what a setting must keep."""

    goal: Goal = Goal.LATENCY
    latency_limit_ms: float | None = Field(default=None, gt=0)
    """For throughput: settings whose 90th percentile of latency exceeds it are out."""
    base: RuntimeProperties = RuntimeProperties()
    """Properties that every setting has; they are not tuned."""
    min_cosine: float = Field(default=0.999, ge=-1, le=1)
    """Of every output against the float reference."""
    min_agreement: float = Field(default=0.99, ge=0, le=1)
    """Share of samples with the float reference's top class, where outputs are class scores."""
    turn_ms: float = Field(default=15.0, gt=0)
    """Length of a setting's turn in a round."""
    seconds: float | None = Field(default=None, gt=0)
    """When the heats end; the final is still run. None: when every setting had its turn."""
    seed: int = 0

    @property
    def default(self) -> RuntimeProperties:
        """What the device is given without tuning: the goal as its hint, and the base."""
        return RuntimeProperties.of({"PERFORMANCE_HINT": self.goal.name, **self.base.as_dict()})


class SettingState(str, Enum):
    """How far a setting came."""

    FAILED = "failed"
    """The device does not take it."""
    REFUSED = "refused"
    """Its outputs depart from the float reference."""
    DROPPED = "dropped"
    """Not faster than the default in its heat."""
    OVER_LIMIT = "over_limit"
    """Its latency exceeds the limit."""
    NOT_TRIED = "not_tried"
    """The time was over."""
    LEADER = "leader"
    """Faster than the default in its heat, but not the best."""
    CHOSEN = "chosen"

    def __str__(self) -> str:
        return self.value


FINAL_STATES = (SettingState.FAILED, SettingState.REFUSED, SettingState.DROPPED, SettingState.OVER_LIMIT)
"""States that need not be found out again."""


class SettingTrial(Record):
    """One setting, how far it came and why not farther."""

    properties: RuntimeProperties
    """What it adds to the default; nothing: the default itself."""
    state: SettingState
    reason: str = ""
    parity: Parity | None = None
    measurement: Measurement | None = None
    comparison: Comparison | None = None
    """Against the default."""


class TuneResult(Record):
    """The properties to use, and what speaks for them."""

    properties: RuntimeProperties
    trials: tuple[SettingTrial, ...]
    """In the order in which they ended; the chosen one last."""
    comparison: Comparison | None
    """The best setting against the default in the last duel; None where no setting got so far."""
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> SettingTrial:
        """The trial whose setting is used; that of the default where nothing beat it."""
        return self.trials[-1]

    @property
    def is_default(self) -> bool:
        """Whether the default stays."""
        return not self.chosen.properties.items
