"""The part of the search that stores weights in INT8 or INT4 and computes in float: for models bound by weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import openvino as ov

from vinoopt import serde
from vinoopt.compression.activations import Sample, in_order, sized_like
from vinoopt.compression.judge import Judge
from vinoopt.compression.options import SearchOptions
from vinoopt.compression.precision_search import latency_of
from vinoopt.cost_model import layer_costs
from vinoopt.errors import ShapeError
from vinoopt.records import CompressionPlan, Device, Trial, TrialState, WeightCompressionPlan

REUSE = 16
"""A weight that takes part in no more products per inference costs more to fetch than to multiply: CPUs and GPUs do
tens of operations in the time of one access to memory."""
LEAST_BYTES = 4 << 20
"""Of such weights, in f32: fewer stay in a cache between two inferences, and nothing is fetched."""
LEAST_SHARE = 0.25
"""Of all bytes that an inference moves."""
_INT4_DEVICES = frozenset({Device.CPU, Device.GPU})
"""Whose plugins multiply by 4-bit weights of MatMul layers without unpacking them first."""
_GROUP = 64
"""Weights that share a scale in INT4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTraffic:
    """What an inference of the float model moves, in bytes as f32."""

    fetched: int
    """Weights that are used `REUSE` times at most."""
    moved: int
    """Weights and activations of all layers."""
    shared: tuple[str, ...] = ()
    """Layers whose weights are used more often: unpacking them would cost more than it saves."""
    bound: Mapping[str, int] = field(default_factory=dict)
    """The layers that use each of their weights `REUSE` times at most, and how many bytes those are as f32."""

    @property
    def is_bound(self) -> bool:
        """Whether smaller weights can be expected to save time."""
        return self.fetched >= LEAST_BYTES and self.fetched >= LEAST_SHARE * self.moved

    def __str__(self) -> str:
        return (
            f"{self.fetched / 2**20:.1f} of {self.moved / 2**20:.1f} MiB that an inference moves are weights used "
            f"{REUSE} times at most"
        )


def weigh(model: ov.Model, sample: Sample | None = None) -> WeightTraffic | None:
    """The traffic of the model, its open sizes being those of `sample`; None where shapes stay open."""
    if sample is not None:
        model = sized_like(model, in_order(model, dict(sample)))
    try:
        costs = layer_costs(model)
    except ShapeError:
        return None
    bound = {each.name: 4 * each.weights for each in costs if 0 < each.macs <= REUSE * each.weights}
    shared = {each.name for each in costs if each.weights and each.macs > REUSE * each.weights}
    moved = sum(4 * (each.weights + each.activations) for each in costs)
    return WeightTraffic(
        fetched=sum(bound.values()), moved=moved, shared=tuple(sorted(shared)), bound=MappingProxyType(bound)
    )


def search_weights(judge: Judge, options: SearchOptions, *, say: Callable[[str], None]) -> list[str]:
    """Judges weight-only candidates where they can pay; gives sentences for the report."""
    failed = all(t.state is TrialState.FAILED for t in judge.trials if t.plan.quantization is not None)
    traffic = weigh(judge.workshop.source, judge.data[0])
    if not failed and (traffic is None or not traffic.is_bound):
        if traffic is None:
            return ["weight-only compression was left out: the model's shapes stay open"]
        if not traffic.fetched:
            return []
        if beside := list(_beside_int8(judge, options, traffic)):
            return [f"weights of float blocks were stored in 8 bits: {'; '.join(map(_words, beside))}"]
        least = f"it is tried from {LEAST_BYTES / 2**20:.0f} MiB and {LEAST_SHARE:.0%} on"
        return [f"weight-only compression was left out: {traffic}; {least}"]
    why = "it cannot be quantized otherwise" if failed else str(traffic)
    say(f"weight-only compression: {why}")
    # What cannot be quantized is stored smaller throughout; else only where that pays.
    spared = () if failed or traffic is None else traffic.shared
    floats = tuple(sorted({*options.base.float_layers, *spared}))
    tried = [trial for plan in _plans(judge, options, floats) for trial in _judged(judge, options, plan)]
    tried += _beside_int8(judge, options, traffic)
    return [f"weight-only compression was tried ({why}): {'; '.join(map(_words, tried))}"] if tried else []


def _plans(judge: Judge, options: SearchOptions, ignored: tuple[str, ...]) -> Iterator[WeightCompressionPlan]:
    yield WeightCompressionPlan(float_layers=ignored)
    if judge.yardstick.target.device not in _INT4_DEVICES or options.effort == "fast":
        return
    for ratio in (1.0, 0.6):
        last = judge.trials[-1]
        if last.plan.weights is not None and last.plan.weights.mode != "int8_asym" and _is_inside(last):
            return  # a larger share in INT4 is inside already
        yield WeightCompressionPlan(mode="int4_asym", ratio=ratio, group_size=_GROUP, float_layers=ignored)


def _judged(judge: Judge, options: SearchOptions, weights: WeightCompressionPlan) -> Iterator[Trial]:
    if options.is_late:
        return
    floats = [t for t in judge.trials if _is_inside(t) and t.latency is not None and _is_float(t.plan)]
    fastest = min(floats, key=latency_of, default=None)
    ground = CompressionPlan() if fastest is None else fastest.plan
    yield judge.judge(serde.replace(ground, weights=weights), note="weight-only compression")


def _beside_int8(judge: Judge, options: SearchOptions, traffic: WeightTraffic | None) -> Iterator[Trial]:
    """The fastest mix of INT8 and float so far, with the weights of its float blocks stored in 8 bits."""
    mixed = [t for t in judge.trials if _is_inside(t) and t.latency is not None and t.plan.quantization is not None]
    best = min(mixed, key=latency_of, default=None)
    if best is None or best.plan.quantization is None or traffic is None or options.is_late:
        return
    chosen = set(best.plan.quantization.float_layers) & set(traffic.bound) - set(options.base.float_layers)
    if sum(traffic.bound[name] for name in chosen) >= LEAST_BYTES:
        others = {*traffic.bound, *traffic.shared} - chosen
        weights = WeightCompressionPlan(float_layers=tuple(sorted(others)))
        note = f"weights of {len(chosen)} float blocks in 8 bits"
        yield judge.judge(serde.replace(best.plan, weights=weights), note=note)


def _is_inside(trial: Trial) -> bool:
    return trial.state is TrialState.COMPLETE


def _is_float(plan: CompressionPlan) -> bool:
    return plan.quantization is None and plan.weights is None and not plan.widths


def _words(trial: Trial) -> str:
    if trial.state is TrialState.FAILED:
        return f"{trial.plan.title} failed ({trial.error})"
    time = "" if trial.latency is None else f"{trial.latency.latency_p50_ms:.3g} ms, "
    return f"{trial.plan.title} {time}{trial.drop_words} on the search part"
