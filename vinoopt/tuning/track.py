"""Where settings run: compiled, held against the float reference, and measured beside the default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import openvino as ov

from vinoopt.bench import BenchResult, Contestant, MeasureConfig, MeasureMode, Sample
from vinoopt.bench.intervals import LEAST_ROUNDS
from vinoopt.bench.protocol import least_requests
from vinoopt.errors import DeviceError, ShapeError
from vinoopt.records import RuntimeProperties
from vinoopt.toolchains.host import reason_of
from vinoopt.tuning.batches import Batching, by_sample, find_batching
from vinoopt.tuning.bisection import Variant, first_departure
from vinoopt.tuning.parity import Outputs, Parity, departure, parity, run_all
from vinoopt.tuning.task import TuneTask
from vinoopt.tuning.trials import Goal, Setting, TuneConfig

HEAT_SIZE = 6
"""Settings compiled at the same time, the default among them: each holds a copy of the weights."""
HEAT_ROUNDS = 7
PARITY_SAMPLES = 64
_LEAST_PARITY_SAMPLES = 8
_GATE_SHARE = 0.05
"""Of the time, what the outputs of one setting may take."""
_WARM_TURNS = 2
DEFAULT = "default"
NOTHING = Setting()
_EXACT = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32"})


class Measure(Protocol):
    """`bench.measure`, or what stands in for it."""

    def __call__(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], *, config: MeasureConfig
    ) -> BenchResult:
        """Measurements in the order of the contestants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """A setting that the device takes and whose outputs are right."""

    setting: Setting
    parity: Parity
    compiled: ov.CompiledModel


class Track:
    """The model on its device, with the outputs of the float reference and the default, which stays compiled."""

    def __init__(self, task: TuneTask, config: TuneConfig, measure: Measure) -> None:
        self.task, self.config, self._bench = task, config, measure
        self.warnings: list[str] = []
        self.pace_ms = 0.0
        """The default's: of a sample where throughput is the goal, else of a call; 0 before the first measurement."""
        self.batching: Batching | None = None
        self.default = self.compile(NOTHING)
        self.samples = task.samples[: PARITY_SAMPLES if config.seconds is None else self._affordable(config.seconds)]
        reference = task.reference if task.reference is not None else task.model
        self.expected: Outputs = run_all(_compiled(reference, "CPU", _EXACT), self.samples)
        started = time.monotonic()
        self.parity = parity(run_all(self.compile(NOTHING), self.samples), self.expected)
        self.gate_ms = (time.monotonic() - started) * 1e3
        """What it takes to compile a setting and to hold its outputs against the reference's."""
        if reason := self._departure(self.parity, None):
            where = self._where(NOTHING, reference)
            self.warnings.append(f"the default setting itself departs from the float reference: {reason}{where}")
        self.batching = self._batching() if config.batches else None

    def properties(self, setting: Setting) -> RuntimeProperties:
        """All that the device is given for a setting."""
        return RuntimeProperties.of({**self.config.default.as_dict(), **setting.properties.as_dict()})

    def compile(self, setting: Setting) -> ov.CompiledModel:
        """The model with the setting, at its batch; raises `DeviceError` where the device does not take it."""
        model = self.task.model
        if setting.batch is not None and self.batching is not None:
            model = self.batching.model_at(setting.batch)
        return _compiled(model, self.task.device, self.properties(setting))

    def renew_default(self) -> None:
        """Compile the default again, so that it is as fresh as those it meets next."""
        self.default = self.compile(NOTHING)

    def parity_of(self, compiled: ov.CompiledModel, setting: Setting) -> Parity:
        """Against the reference; at another batch sample by sample, as far as its samples fill calls."""
        if setting.batch is None or self.batching is None:
            return parity(run_all(compiled, self.samples), self.expected)
        expected = by_sample(self.expected, self.batching.own)
        calls = self.batching.samples_at(setting.batch)[: max(len(expected) // setting.batch, 1)]
        outputs = by_sample(run_all(compiled, calls), setting.batch)
        shared = min(len(outputs), len(expected))
        return parity(outputs[:shared], expected[:shared])

    def refusal(self, found: Parity, setting: Setting) -> str:
        """Why a setting's outputs are not acceptable, with the first layer that departs; empty where they are."""
        reason = self._departure(found, self.parity)
        return reason and reason + self._where(setting, self.task.model)

    def measure(self, entrants: Sequence[Entrant], rounds: int, *, is_last: bool = False) -> BenchResult:
        """The default and the entrants side by side; fewer rounds with batches, whose turns are the longer ones.

        What `is_last` decides is compiled anew, several times: a setting must not win by where its memory lay.
        """
        if any(each.setting.batch is not None for each in entrants):
            rounds = max(HEAT_ROUNDS, rounds // 3)
        own = self.batching.own if self.batching is not None else 1
        default = Contestant(name=DEFAULT, model=self.default, device=self.task.device, batch=own)
        if is_last:
            default = self._anew(DEFAULT, NOTHING, own)
        config = MeasureConfig(
            mode=MeasureMode(self.config.goal.value),
            rounds=rounds,
            min_round_ms=self.config.turn_ms,
            warmup_ms=2 * self.config.turn_ms,
            seed=self.config.seed,
        )
        contestants = [default]
        for each in entrants:
            is_own = each.setting.batch is None or self.batching is None
            contestants.append(
                self._anew(each.setting.name, each.setting, own)
                if is_last and is_own
                else self._contestant(each, own)
            )
        result = self._bench(contestants, self.task.samples, config=config)
        self.pace_ms = float(np.median(result.of(DEFAULT).rounds_ms))
        return result

    def turn_ms(self, setting: Setting) -> float:
        """What a turn takes for a setting, at the default's pace."""
        if self.config.goal is Goal.LATENCY:
            return max(self.config.turn_ms, self.pace_ms)
        own = self.batching.own if self.batching is not None else 1
        batch = own if setting.batch is None else setting.batch
        return max(self.config.turn_ms, least_requests(_in_flight(self.default), batch=batch) * batch * self.pace_ms)

    def heat_ms(self, setting: Setting) -> float:
        """What a setting takes until its heat is over: compilation, outputs, warm-up and rounds."""
        return self.gate_ms + (_WARM_TURNS + HEAT_ROUNDS) * self.turn_ms(setting)

    def rounds_in(self, left_ms: float, settings: Sequence[Setting]) -> int:
        """How many rounds of the default and these settings the time is enough for, at least 5."""
        round_ms = self.turn_ms(NOTHING) + sum(self.turn_ms(each) for each in settings)
        return max(int(left_ms / round_ms) - _WARM_TURNS, LEAST_ROUNDS)

    def _affordable(self, seconds: float) -> int:
        """How many samples the outputs are compared on, so that a slow model does not spend its time on that."""
        latency_ms = self.measure([], LEAST_ROUNDS).of(DEFAULT).latency_p50_ms
        return min(max(int(_GATE_SHARE * seconds * 1e3 / latency_ms), _LEAST_PARITY_SAMPLES), PARITY_SAMPLES)

    def _anew(self, name: str, setting: Setting, own: int) -> Contestant:
        properties = self.properties(setting).as_dict()
        return Contestant(
            name=name,
            model=self.task.model,
            device=self.task.device,
            properties=properties,
            is_hinted=False,
            batch=own,
        )

    def _contestant(self, entrant: Entrant, own: int) -> Contestant:
        setting, compiled, device = entrant.setting, entrant.compiled, self.task.device
        if setting.batch is None or self.batching is None:
            return Contestant(name=setting.name, model=compiled, device=device, batch=own)
        return Contestant(
            name=setting.name,
            model=compiled,
            device=device,
            samples=self.batching.samples_at(setting.batch),
            requests=_in_flight(compiled),
            batch=setting.batch,
        )

    def _departure(self, found: Parity, default: Parity | None) -> str:
        demands = {"min_cosine": self.config.min_cosine, "min_agreement": self.config.min_agreement}
        return departure(found, **demands, default=default)

    def _where(self, setting: Setting, reference: ov.Model) -> str:
        """The first layer that departs, as the end of a sentence; empty where it cannot be told."""
        if setting.batch is not None:  # its layers have other shapes than the reference's
            return ""
        candidate = Variant(
            model=self.task.model, device=self.task.device, properties=self.properties(setting).as_dict()
        )
        try:
            found = first_departure(
                Variant(model=reference), candidate, self.task.samples, min_cosine=self.config.min_cosine
            )
        except DeviceError:  # a part that does not run by itself; the refusal stands without it
            return ""
        return "" if found is None else f"; {found.sentence}"

    def _batching(self) -> Batching | None:
        """The model at other batches; None, with a warning, where its batch cannot be changed."""
        copies = HEAT_SIZE * _in_flight(self.default)
        try:
            found = find_batching(self.task.model, self.task.samples, self.config.batches, copies=copies)
        except ShapeError as exc:
            self.warnings.append(f"no other batch was tried: {exc}")
            return None
        self.warnings.extend(found.left_out)
        return found


def _in_flight(compiled: ov.CompiledModel) -> int:
    """How many requests throughput keeps in flight."""
    return max(int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")), 1)


def _compiled(model: ov.Model, device: str, properties: RuntimeProperties) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(model, device, properties.as_dict())
    except RuntimeError as exc:
        raise DeviceError(f"{device} does not take {Setting(properties=properties).name}: {reason_of(exc)}") from exc
