"""What the linear algebra of refits will take, from the shapes of a model's layers."""

from __future__ import annotations

import math
import timeit
from dataclasses import dataclass

import numpy as np
import openvino as ov

from vinoopt.compression.contractions import Contraction, index_contractions
from vinoopt.compression.refit import RIDGES, RefitSettings, can_refit
from vinoopt.compression.regression import EXACT_COLUMNS, threads_for

_TRIED = 4
"""Ridges that are tried for a wide layer, usually."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Operations of one sequential refit of every layer; those on one thread apart."""

    narrow: float
    """Of layers with up to `EXACT_COLUMNS` columns."""
    wide: float

    def seconds(self) -> float:
        """About how long this machine takes, told by products of about 100 ms in all."""
        return sum(
            operations / _operations_per_second(columns)
            for operations, columns in ((self.narrow, EXACT_COLUMNS), (self.wide, EXACT_COLUMNS + 1))
            if operations
        )


def refit_workload(model: ov.Model, *, samples: int) -> Workload:
    """Of refitting all layers that can be; inferences are not in it. `samples` counts along the batch axis."""
    rows_per_sample = RefitSettings().rows_per_sample
    operations = {False: 0.0, True: 0.0}
    for layer in index_contractions(model).values():
        if layer.is_depthwise or not can_refit(layer):
            continue
        columns, outputs = float(layer.columns), float(layer.outputs)
        is_wide = columns > EXACT_COLUMNS
        rows = samples * min(rows_per_sample, _positions(layer))
        summed = rows * columns * (columns + 2 * outputs) * (0.5 if is_wide else 1.0)  # float32 is twice as fast
        solved = (_TRIED if is_wide else len(RIDGES)) * columns**2 * (columns / 3 + 4 * outputs)
        operations[is_wide] += layer.groups * (summed + solved)
    return Workload(narrow=operations[False], wide=operations[True])


def _positions(layer: Contraction) -> float:
    """Output positions of one sample; infinite where the model does not fix them."""
    shape = layer.node.output(0).get_partial_shape()
    if shape.rank.is_dynamic:
        return math.inf
    lengths = list(shape)
    if lengths:
        del lengths[layer.channel_axis % len(lengths)]
    return math.prod(length.get_length() if length.is_static else math.inf for length in lengths[1:])


def _operations_per_second(columns: int) -> float:
    """Of products in float64, on as many threads as systems of so many columns are solved on."""
    factor = np.ones((512, 512))
    with threads_for(columns):
        return 2.0 * 512**3 / min(timeit.repeat(lambda: factor @ factor, number=1, repeat=10))
