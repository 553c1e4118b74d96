"""Where outputs begin to depart: the first layer of a graph, found by halving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from vinoopt.bench import Sample
from vinoopt.errors import DeviceError
from vinoopt.records import Record
from vinoopt.toolchains.host import reason_of
from vinoopt.tuning.parity import error_at, relative_error, run_all

MAX_SAMPLES = 8
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
_NO_LAYERS = frozenset({"Parameter", "Result", "Constant"})
_Arrays = list[list[NDArray[Any]]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variant:
    """A model as it is run: where, and with which properties."""

    model: ov.Model
    device: str = "CPU"
    properties: Mapping[str, str] = field(default_factory=lambda: dict(EXACT))


class LayerDeparture(Record):
    """The first layer whose output departs from the reference's, while what it is computed from does not."""

    layer: str
    type: str
    error: float
    """Root of the squared error over the variation of the reference's output; infinite where one is not finite."""
    before: float
    """The largest such error of what is handed on just before this layer."""
    limit: float
    final: float
    """The same at the worst output of the model."""

    @property
    def sentence(self) -> str:
        """`first departs at "conv5" (Convolution): by 34% of its variation, 0.2% just before (limit 4.5%)`."""
        by = "values that are not finite" if not np.isfinite(self.error) else f"{self.error:.2%} of its variation"
        return (
            f'first departs at "{self.layer}" ({self.type}): by {by}, {self.before:.2%} just before '
            f"(limit {self.limit:.2%})"
        )


def first_departure(
    reference: Variant, candidate: Variant, samples: Sequence[Sample], *, min_cosine: float = 0.999
) -> LayerDeparture | None:
    """The first layer whose output departs beyond tolerance; None where the outputs do not depart at all.

    Both graphs are cut behind the same layer, compiled and run; layers are the same by name and shape, so the
    candidate may also be a quantized or otherwise rewritten copy. A layer departs where the root of its squared
    error exceeds `sqrt(2 (1 - min_cosine))` of the variation of the reference's output about its channel means (an
    error of this size brings a centred signal to that cosine), or half of the error of the whole model, whichever
    is less. Halving needs a logarithmic number of compilations and finds a layer with a sound prefix and a departing
    output; where a departure heals and comes again, that need not be the very first. Models with state are not
    cut: None. Raises `DeviceError` where a variant does not run.
    """
    if reference.model.get_sinks() or candidate.model.get_sinks():
        return None
    cutter = _Cutter(reference, candidate, tuple(samples[:MAX_SAMPLES]))
    last = len(cutter.layers) - 1
    if last < 0:
        return None
    final = cutter.final_error()
    limit = min(error_at(min_cosine), final / 2)
    if not final > 0:
        return None
    errors = {last: cutter.error(last)}
    if errors[last] <= limit:  # what lies behind the last layer that both graphs have
        return None
    low, high = -1, last
    while high - low > 1:
        middle = (low + high) // 2
        errors[middle] = cutter.error(middle)
        low, high = (low, middle) if errors[middle] > limit else (middle, high)
    node = cutter.layers[high]
    return LayerDeparture(
        layer=node.get_friendly_name(),
        type=node.get_type_name(),
        error=errors[high],
        before=errors.get(low, 0.0),
        limit=limit,
        final=final,
    )


class _Cutter:
    """The layers that two variants share, in the candidate's order, and the error behind each."""

    def __init__(self, reference: Variant, candidate: Variant, samples: tuple[Sample, ...]) -> None:
        self.reference, self.candidate, self.samples = reference, candidate, samples
        self.known = {node.get_friendly_name(): node for node in _computed(reference.model)}
        self.order = _computed(candidate.model)
        self.layers = [node for node in self.order if self._is_shared(node)]

    def error(self, place: int) -> float:
        """The largest error of what the layers up to this one hand on; the candidate is cut behind them."""
        names = self._handed_on(self.layers[place])
        own, other = (
            self._outputs(variant, names) for variant in (self.candidate, self.reference)
        )
        return _largest_error(own, other)

    def final_error(self) -> float:
        """The largest error of the models' outputs."""
        own, other = (
            run_all(_compiled(each.model, each), self.samples) for each in (self.candidate, self.reference)
        )
        return _largest_error([list(e) for e in own], [list(e) for e in other])

    def _is_shared(self, node: ov.Node) -> bool:
        twin = self.known.get(node.get_friendly_name())
        if twin is None or twin.get_type_name() != node.get_type_name():
            return False
        shapes = [[port.get_partial_shape() for port in each.outputs()] for each in (node, twin)]
        return bool(shapes[0] == shapes[1])

    def _handed_on(self, last: ov.Node) -> list[str]:
        """The last layer, and those before it that something behind it still reads."""
        position = {node.get_friendly_name(): place for place, node in enumerate(self.order)}
        end = position[last.get_friendly_name()]
        names = [last.get_friendly_name()]
        for node in self.layers:
            if position[node.get_friendly_name()] >= end:
                break
            readers = (
                edge.get_node().get_friendly_name() for port in node.outputs() for edge in port.get_target_inputs()
            )
            if any(position.get(reader, end + 1) > end for reader in readers):
                names.append(node.get_friendly_name())
        return names

    def _outputs(self, variant: Variant, names: Sequence[str]) -> _Arrays:
        copy = variant.model.clone()
        nodes = {node.get_friendly_name(): node for node in copy.get_ops()}
        ports = [port for name in names for port in nodes[name].outputs()]
        results = [ops.result(port) for port in ports]
        model = ov.Model(results, copy.get_parameters(), "cut")
        return [list(each) for each in run_all(_compiled(model, variant), self.samples)]


def _computed(model: ov.Model) -> list[ov.Node]:
    """Operators that depend on an input, in the order of execution."""
    fed: set[str] = set()
    found = []
    for node in model.get_ordered_ops():
        sources = {port.get_source_output().get_node().get_friendly_name() for port in node.inputs()}
        if node.get_type_name() == "Parameter" or sources & fed:
            fed.add(node.get_friendly_name())
            if node.get_type_name() not in _NO_LAYERS:
                found.append(node)
    return found


def _compiled(model: ov.Model, variant: Variant) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(model, variant.device, dict(variant.properties))
    except RuntimeError as exc:
        raise DeviceError(f"a part of the model does not compile for {variant.device}: {reason_of(exc)}") from exc


def _largest_error(own: _Arrays, other: _Arrays) -> float:
    ports = range(len(other[0]))
    errors = (relative_error([a[port] for a in own], [b[port] for b in other]) for port in ports)
    return max(errors, default=0.0)
