"""What tuning is asked, and what it tried."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

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
    batches: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """For throughput: samples per call to try beside the model's own number."""
    seconds: float | None = Field(default=None, gt=0)
    """About how long it may take, the final and the duel included, each of which has 5 rounds at least. None: until
    every setting had its turn."""
    seed: int = 0

    @property
    def default(self) -> RuntimeProperties:
        """What the device is given without tuning: the goal as its hint, and the base."""
        return RuntimeProperties.of({"PERFORMANCE_HINT": self.goal.name, **self.base.as_dict()})


class SettingState(str, Enum):
    """How far a setting came."""

    RUNNING = "running"
    """It is being tried, by itself."""
    RACING = "racing"
    """It is being measured beside others."""
    CRASHED = "crashed"
    """The process ended while it was tried by itself."""
    FAILED = "failed"
    """The device does not take it, or broke off."""
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
    """The best as the model is; where batches are tried, also the best of another batch, if that is better."""

    def __str__(self) -> str:
        return self.value


UNFINISHED = (SettingState.RUNNING, SettingState.RACING)
"""States that only a process leaves behind which ended before it could say how the setting came out."""
_SETTLED = (SettingState.CRASHED, SettingState.REFUSED, SettingState.OVER_LIMIT)


class Setting(Record):
    """What a contestant of the race adds to the default; nothing: the default itself."""

    properties: RuntimeProperties = RuntimeProperties()
    batch: int | None = None
    """Samples per call; None: the model's own number."""

    @property
    def name(self) -> str:
        """`NUM_STREAMS=1 batch 8`, also the contestant's."""
        words = [f"{key}={value}" for key, value in self.properties.items]
        return " ".join(words if self.batch is None else [*words, f"batch {self.batch}"])


class SettingTrial(Record):
    """One setting, how far it came and why not farther."""

    properties: RuntimeProperties
    """What it adds to the default; nothing: the default itself."""
    batch: int | None = None
    """Samples per call where that is not the model's own number."""
    state: SettingState
    reason: str = ""
    parity: Parity | None = None
    measurement: Measurement | None = None
    comparison: Comparison | None = None
    """Against the default; of throughput, in samples."""

    @property
    def setting(self) -> Setting:
        """Properties and batch together."""
        return Setting(properties=self.properties, batch=self.batch)

    @property
    def is_settled(self) -> bool:
        """Whether it need not be found out again: not where something may have failed, or only noise spoke."""
        is_slower = self.comparison is not None and self.comparison.is_significant
        return self.state in _SETTLED or (self.state is SettingState.DROPPED and is_slower)


class BatchChoice(Record):
    """The batch at which more samples are computed per second than at the model's own.

    The properties are tuned for the model reshaped to this batch; what `TuneResult.properties` holds is for the model
    as it is.
    """

    batch: int
    properties: RuntimeProperties
    parity: Parity
    """Sample by sample."""
    measurement: Measurement
    """Throughput in samples per second, latency of a call."""
    comparison: Comparison
    """Against the best setting of the model as it is, in samples per second."""


class TuneResult(Record):
    """The properties to use, and what speaks for them."""

    properties: RuntimeProperties
    trials: tuple[SettingTrial, ...]
    """In the order in which they ended; the chosen one of the model as it is last."""
    comparison: Comparison | None
    """The best setting against the default in the last duel; None where no setting got so far."""
    batched: BatchChoice | None = None
    """None where batches were not asked for, or none was better."""
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    """Whether the user ended the heats."""

    @property
    def chosen(self) -> SettingTrial:
        """The trial whose setting is used; that of the default where nothing beat it."""
        return self.trials[-1]

    @property
    def is_default(self) -> bool:
        """Whether the default stays."""
        return not self.chosen.properties.items
