"""How fast a device is during a run, by a small network that is always the same and runs beside the contestants.

Two runs at different times share nothing else by which a slower moment of the machine could be told from a slower
model. Shared machines change their pace for seconds or minutes at a time, far beyond what rounds of one run show.
"""

from __future__ import annotations

import logging

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from vinoopt.bench.contestants import Contestant, MeasureMode

PACE = "(pace)"
"""No name that a file would have."""
_SIDE, _CHANNELS, _LAYERS = 32, 16, 4

_log = logging.getLogger(__name__)


def pace_contestant(device: str, mode: MeasureMode) -> Contestant | None:
    """The small network on the device, with its own input; None where it does not run there."""
    sample = {"x": np.linspace(-1, 1, _SIDE * _SIDE, dtype=np.float32).reshape(1, 1, _SIDE, _SIDE)}
    try:
        compiled = ov.Core().compile_model(_network(), device, {"PERFORMANCE_HINT": mode.name})
        compiled(sample)
    except RuntimeError as exc:
        _log.info("the pace of %s is not known: %s", device, exc)
        return None
    return Contestant(name=PACE, model=compiled, device=device, samples=[sample])


def _network() -> ov.Model:
    """Convolutions 3x3 with a ReLU each; no larger than the small networks that react to a machine's pace most."""
    x = ops.parameter([1, 1, _SIDE, _SIDE], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    rng = np.random.default_rng(0)
    value, channels = x.output(0), 1
    for _ in range(_LAYERS):
        weights = rng.normal(0, 1 / np.sqrt(9 * channels), (_CHANNELS, channels, 3, 3)).astype(np.float32)
        layer = ops.convolution(value, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
        value, channels = ops.relu(layer).output(0), _CHANNELS
    return ov.Model([value], [x], "pace")
