"""Contestants whose times a cost model gives: ratios without noise, so any difference is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import openvino as ov

from vinoopt.errors import InputError
from vinoopt.records import Comparison, Measurement
from vinoopt.toolchains.host import known_as

_EQUAL = 1e-6
"""Relative difference below which two modelled times are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelledBench:
    """Modelled latencies side by side."""

    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...] = ()

    def compare(self, reference: str, candidate: str) -> Comparison:
        """The ratio of the two modelled latencies, its interval a point; significant where they differ."""
        slow, fast = self._of(reference), self._of(candidate)
        speedup = slow.latency_p50_ms / fast.latency_p50_ms
        return Comparison(
            reference=reference,
            candidate=candidate,
            speedup=speedup,
            low=speedup,
            high=speedup,
            is_significant=abs(speedup - 1) > _EQUAL,
            evidence=fast.evidence,
        )

    def _of(self, name: str) -> Measurement:
        for each in self.measurements:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.measurements)
        raise InputError(f'no contestant "{name}" was modelled; there are {names}')


def times_of_blocks(
    model: ov.Model, blocks: Iterable[str], layer_us: Mapping[str, float]
) -> dict[str, float]:
    """The times of a compiler's layers gathered by the blocks that they belong to.

    A block's bias and dequantization belong to it; a quantizer that runs by itself belongs, in equal parts, to
    the blocks that read it, since it is there for their sake. What belongs to no block is left out.
    """
    times = dict.fromkeys(blocks, 0.0)
    owners = {name: [block] for name, block in known_as(model, times).items()}
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize":
            readers = [edge.get_node().get_friendly_name() for edge in node.output(0).get_target_inputs()]
            owners[node.get_friendly_name()] = [name for name in readers if name in times]
    for layer, microseconds in layer_us.items():
        found = owners.get(layer, [])
        for block in found:
            times[block] += microseconds / len(found)
    return times
