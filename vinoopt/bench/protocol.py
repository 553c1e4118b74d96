"""The loop: warm-up, then rounds in which every contestant has one turn, in random order."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from pydantic import Field

from vinoopt.alarm import make_interrupts_safe
from vinoopt.bench.conditions import Watch, evidence_here, round_warnings
from vinoopt.bench.contestants import Contestant, MeasureMode, Runner, Sample, open_runner
from vinoopt.bench.intervals import LEAST_ROUNDS, compare, median_range, percentile_ranges
from vinoopt.bench.startup import StartUp, start_up
from vinoopt.errors import InputError, ToolchainError
from vinoopt.records import Comparison, Evidence, Measurement, Range, Record, RuntimeProperties

MAX_PER_TURN = 20_000
SETTLE_SHARE = 0.1
"""Part of a turn that is run untimed first: the contestant before it took the caches."""
REQUESTS_TO_FILL = 64
"""A throughput turn runs at least so many samples, so that filling and draining the queue hardly count."""
WAVES = 16
"""For the same reason, so many times the requests in flight."""
_COMPILING_SHARE = 0.25
"""Of the time that a contestant is measured, what compiling it again may take."""
_PERCENTILES = (50, 90, 99)


class MeasureConfig(Record):
    """How long and how a measurement goes.

    `rounds` rounds are run; with `seconds`, as many as fit into that time instead, warm-up included, but at
    least 5. In a round every contestant has one turn of at least `min_round_ms`, which holds as many
    inferences as fit, at least one.
    """

    mode: MeasureMode = MeasureMode.LATENCY
    rounds: int = Field(default=20, ge=LEAST_ROUNDS)
    min_round_ms: float = Field(default=20.0, gt=0)
    warmup_ms: float = Field(default=100.0, ge=0)
    seconds: float | None = Field(default=None, gt=0)
    seed: int = 0
    instances: int = Field(default=4, ge=1)
    """Compilations of each contestant, which run in turn: one may be faster than the next for good, by where its
    memory lies. Fewer where compiling again would take more than a quarter of the time; one where nothing
    is beside it."""
    start_up: bool = False
    """Whether every contestant is also opened in processes of its own, before the rounds and beyond `seconds`, for
    its compile and first-inference times, cold and with the model cache, and its peak memory."""


class Progress(Record):
    """A round is done."""

    round: int
    rounds: int
    """How many there will be, by the pace so far."""


class BenchResult(Record):
    """What one run measured side by side; measurements in the order of the contestants."""

    mode: MeasureMode
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...] = ()
    """What made the machine doubtful, for all contestants alike."""

    def of(self, name: str) -> Measurement:
        """The measurement of this contestant; `InputError` for an unknown name."""
        for each in self.measurements:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.measurements)
        raise InputError(f'no contestant "{name}" was measured; there are {names}')

    def compare(self, reference: str, candidate: str) -> Comparison:
        """How many times faster `candidate` is than `reference`, with its 95% interval."""
        return compare(self.of(reference), self.of(candidate))

    def comparisons(self) -> tuple[Comparison, ...]:
        """The first contestant, which the run is about, against every other one."""
        subject, *others = (each.name for each in self.measurements)
        return tuple(self.compare(other, subject) for other in others)


@dataclass(slots=True)
class _Racer:
    name: str
    runners: tuple[Runner, ...]
    """The same contestant, compiled several times."""
    samples: int
    batch: int
    properties: RuntimeProperties | None
    shapes: dict[str, tuple[int, ...]]
    first_ms: float = 0.0
    start_up: StartUp | None = None
    warnings: tuple[str, ...] = ()
    per_turn: int = 1
    rounds_ms: list[float] = field(default_factory=list)
    latencies_ms: list[NDArray[np.float64]] = field(default_factory=list)
    """Of each round."""
    instances: list[int] = field(default_factory=list)
    """The runner of each round."""

    @property
    def runner(self) -> Runner:
        """The first of them, where any will do."""
        return self.runners[0]

    def runner_in(self, round_number: int, place: int) -> Runner:
        """The runner whose turn it is; two racers of different places meet each other's in every combination."""
        count = len(self.runners)
        self.instances.append((round_number + place * (round_number // count)) % count)
        return self.runners[self.instances[-1]]


def measure(
    contestants: Sequence[Contestant],
    samples: Sequence[Sample],
    *,
    config: MeasureConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> BenchResult:
    """Latency or throughput of every contestant, taken side by side on this machine.

    `samples` are real inputs; each request takes the next one, and in a given round all contestants start at
    the same. Latency mode runs one synchronous request at a time; a round's figure is its median in ms.
    Throughput mode keeps the device's optimal number of requests in flight, or as many as a contestant asks
    for; a round's figure is ms per inference, and with a `batch` ms per sample of it. Contestants share a
    process: what their start takes is told apart only with `start_up`.
    Raises `InputError` and its kin for contestants or samples that cannot be used, `DeviceError` where
    OpenVINO cannot compile or run one.
    """
    make_interrupts_safe()
    config = config or MeasureConfig()
    _check(contestants, samples)
    starts = [_started(each, samples, config) for each in contestants]
    start = time.monotonic()
    watch = Watch()
    share_s = _measured_s(config) / len(contestants) if len(contestants) > 1 else 0.0
    racers = [_ready(each, samples, config, share_s) for each in contestants]
    for racer, (found, warnings) in zip(racers, starts, strict=True):
        racer.start_up, racer.warnings = found, (*racer.runner.warnings, *warnings)
    rng = np.random.default_rng(config.seed)
    rounds_start = time.monotonic()
    with _without_garbage_collection():
        for done in range(1, 1_000_000):
            for index in rng.permutation(len(racers)):
                _take_turn(racers[index], done, config.mode, place=int(index))
            pace = (time.monotonic() - rounds_start) / done
            planned = planned_rounds(config, pace, rounds_start - start)
            if progress is not None:
                progress(Progress(round=done, rounds=max(planned, done)))
            if done >= planned:
                break
    evidence = evidence_here()
    return BenchResult(
        mode=config.mode,
        measurements=tuple(_measurement(racer, config.mode, evidence) for racer in racers),
        warnings=watch.warnings(),
    )


def _check(contestants: Sequence[Contestant], samples: Sequence[Sample]) -> None:
    names = [each.name for each in contestants]
    if not names:
        raise InputError("there is nothing to measure: no contestants")
    if len(set(names)) != len(names):
        raise InputError(f"contestants need names of their own: {', '.join(names)}")
    bare = [each.name for each in contestants if not (samples if each.samples is None else each.samples)]
    if bare:
        raise InputError(f"no samples to run {', '.join(bare)} on")


def planned_rounds(config: MeasureConfig, pace_s: float, spent_s: float) -> int:
    """How many rounds there will be when one takes `pace_s` and making ready took `spent_s`."""
    if config.seconds is None:
        return config.rounds
    return max(int((config.seconds - spent_s) / pace_s), LEAST_ROUNDS)


def _started(
    contestant: Contestant, common: Sequence[Sample], config: MeasureConfig
) -> tuple[StartUp | None, tuple[str, ...]]:
    """The contestant's start-up where that is asked for, or why there is none; what is compiled has started."""
    if not config.start_up or isinstance(contestant.model, ov.CompiledModel):
        return None, ()
    samples = common if contestant.samples is None else contestant.samples
    try:
        return start_up(contestant, samples[0], mode=config.mode), ()
    except ToolchainError as exc:
        first = str(exc).splitlines()[0]
        return None, (f"{contestant.name}: its start-up could not be measured: {first}",)


def _measured_s(config: MeasureConfig) -> float:
    """Seconds that all contestants together are to be measured."""
    return config.rounds * config.min_round_ms / 1e3 if config.seconds is None else config.seconds


def _compiled_again(contestant: Contestant, first: Runner, config: MeasureConfig, share_s: float) -> list[Runner]:
    """More runners of a contestant that is measured beside others for `share_s`, as many as that allows."""
    if not isinstance(contestant.model, ov.Model | Path) or first.compile_ms is None:
        return []  # it comes compiled
    affordable = int(_COMPILING_SHARE * share_s * 1e3 / max(first.compile_ms, 1e-3))
    return [open_runner(contestant, mode=config.mode) for _ in range(min(config.instances - 1, affordable))]


def _ready(
    contestant: Contestant, common: Sequence[Sample], config: MeasureConfig, share_s: float
) -> _Racer:
    """The contestant compiled, warm, and with its number of inferences per turn settled."""
    runner = open_runner(contestant, mode=config.mode)
    samples = common if contestant.samples is None else contestant.samples
    runners = (runner, *_compiled_again(contestant, runner, config, share_s))
    for each in runners:
        each.load(samples)
    racer = _Racer(
        name=contestant.name,
        runners=runners,
        samples=len(samples),
        batch=contestant.batch,
        properties=_properties(contestant, config.mode),
        shapes={name: np.shape(array) for name, array in samples[0].items()},
    )
    racer.first_ms = _timed(runner, 0)
    for each in runners[1:]:
        _timed(each, 0)
    times = [_timed(runner, index % racer.samples) for index in (1, 2)]
    while sum(times) < config.warmup_ms:
        times.append(_timed(runner, len(times) % racer.samples))
    least = 1
    if config.mode is MeasureMode.THROUGHPUT:
        least = least_requests(runner.in_flight, batch=contestant.batch)
        filling = [index % racer.samples for index in range(least)]
        start = time.perf_counter_ns()
        runner.stream(filling)
        times = [(time.perf_counter_ns() - start) / 1e6 / len(filling)]
    typical = float(np.median(times))
    racer.per_turn = min(max(math.ceil(config.min_round_ms / max(typical, 1e-4)), least), MAX_PER_TURN)
    return racer


def _properties(contestant: Contestant, mode: MeasureMode) -> RuntimeProperties | None:
    """What the contestant is compiled with, where it is compiled here."""
    if not isinstance(contestant.model, ov.Model | Path):
        return None
    is_blob = isinstance(contestant.model, Path) and contestant.model.suffix == ".blob"
    return RuntimeProperties.of(dict(contestant.properties) if is_blob else contestant.hinted(mode))


def least_requests(in_flight: int, *, batch: int) -> int:
    """How many requests a turn of throughput mode holds at least."""
    return max(math.ceil(REQUESTS_TO_FILL / batch), WAVES * in_flight)


def _take_turn(racer: _Racer, round_number: int, mode: MeasureMode, *, place: int) -> None:
    runner = racer.runner_in(round_number - 1, place)
    first = round_number * 7919  # a prime: rounds begin at different samples
    indices = [(first + i) % racer.samples for i in range(racer.per_turn)]
    for index in indices[: math.ceil(SETTLE_SHARE * len(indices))]:
        runner.infer(index)
    if mode is MeasureMode.LATENCY:
        times = [_timed(runner, index) for index in indices]
        racer.rounds_ms.append(float(np.median(times)))
    else:
        start = time.perf_counter_ns()
        times = list(runner.stream(indices))
        racer.rounds_ms.append((time.perf_counter_ns() - start) / 1e6 / (len(indices) * racer.batch))
    racer.latencies_ms.append(np.asarray(times, np.float64))


def _timed(runner: Runner, index: int) -> float:
    start = time.perf_counter_ns()
    runner.infer(index)
    return (time.perf_counter_ns() - start) / 1e6


def _measurement(racer: _Racer, mode: MeasureMode, evidence: Evidence) -> Measurement:
    latencies = np.concatenate(racer.latencies_ms)
    p50, p90, p99 = (float(p) for p in np.percentile(latencies, _PERCENTILES))
    ranges = percentile_ranges(racer.latencies_ms, _PERCENTILES)
    return Measurement(
        name=racer.name,
        device=racer.runner.device,
        evidence=evidence,
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        latency_p50_range_ms=ranges[0],
        latency_p90_range_ms=ranges[1],
        latency_p99_range_ms=ranges[2],
        **_throughput(racer, mode),
        samples=len(latencies),
        rounds_ms=tuple(racer.rounds_ms),
        instances=tuple(racer.instances) if len(racer.runners) > 1 else (),
        properties=racer.properties,
        shapes=racer.shapes,
        batch=racer.batch,
        **_start_figures(racer),
        size_bytes=racer.runner.size_bytes,
        warnings=(*racer.warnings, *round_warnings(racer.name, racer.rounds_ms)),
    )


def _throughput(racer: _Racer, mode: MeasureMode) -> dict[str, Any]:
    if mode is not MeasureMode.THROUGHPUT:
        return {}
    ms = median_range(racer.rounds_ms)
    return {
        "throughput_per_s": 1000 / float(np.median(racer.rounds_ms)),
        "throughput_range_per_s": Range(low=1000 / ms.high, high=1000 / ms.low),
    }


def _start_figures(racer: _Racer) -> dict[str, Any]:
    """From processes of its own where there were some; else of this process, which has run OpenVINO before."""
    if racer.start_up is not None:
        return racer.start_up.model_dump()
    return {"compile_ms": racer.runner.compile_ms, "first_inference_ms": racer.first_ms}


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
