"""The batch as something to tune: the model and its samples at other batches, and outputs back in single samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import psutil
from numpy.typing import NDArray

from vinoopt.bench import Sample
from vinoopt.errors import ShapeError
from vinoopt.toolchains.host import reason_of
from vinoopt.tuning.parity import Outputs

BATCHES = (1, 2, 4, 8, 16, 32)
_MEMORY_SHARE = 0.5
"""Of the memory that is free, what the requests of one heat may need."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batching:
    """A model whose batch can be changed, with its samples."""

    model: ov.Model
    own: int
    """Samples per call as the model is given."""
    rows: Mapping[str, NDArray[Any]]
    """Input -> all samples along its first dimension; an input without dimensions as it is."""
    sizes: tuple[int, ...]
    """Other batches to try, smallest first."""
    left_out: tuple[str, ...] = ()
    """Which were asked for and are not tried, and why."""

    def model_at(self, batch: int) -> ov.Model:
        """A copy of the model that takes so many samples per call."""
        return rebatched(self.model, own=self.own, batch=batch)

    def samples_at(self, batch: int) -> tuple[Sample, ...]:
        """Calls of so many samples, in order; what fills no call is left out."""
        count = min(len(array) for array in self.rows.values() if array.ndim) // batch
        return tuple(
            {
                name: array[place * batch : (place + 1) * batch] if array.ndim else array
                for name, array in self.rows.items()
            }
            for place in range(count)
        )


def find_batching(model: ov.Model, samples: Sequence[Sample], wanted: Sequence[int], *, copies: int) -> Batching:
    """The model at other batches, as far as the samples fill one call and memory holds `copies` of its activations.

    The batch is the first dimension of every input. Raises `ShapeError` where the model's batch cannot be changed.
    """
    own = _own_batch(samples)
    rows = {
        name: np.concatenate([sample[name] for sample in samples]) if np.ndim(array) else np.asarray(array)
        for name, array in samples[0].items()
    }
    count, memory = own * len(samples), _MEMORY_SHARE * psutil.virtual_memory().available
    sizes: list[int] = []
    left_out = []
    for batch in sorted(set(wanted) - {own}):
        if batch > count:
            left_out.append(f"batch {batch} was not tried: there are {count} samples")
        elif (need := copies * _working_bytes(rebatched(model, own=own, batch=batch))) > memory:
            left_out.append(f"batch {batch} was not tried: it may need {need / 1e9:.1f} GB for {copies} requests")
        else:
            sizes.append(batch)
    return Batching(model=model, own=own, rows=rows, sizes=tuple(sizes), left_out=tuple(left_out))


def rebatched(model: ov.Model, *, own: int, batch: int) -> ov.Model:
    """A copy of the model that takes `batch` samples per call instead of `own`.

    Reshapes to a fixed first dimension that is the batch follow it. Raises `ShapeError` where the model keeps state,
    where its operators do not work with the new shape, or where an output does not grow with the batch.
    """
    if model.get_sinks():
        raise ShapeError("the model keeps state between calls, so its batch stays as it is")
    copy = model.clone()
    try:
        _set_batch(copy, own)
        before = [port.get_partial_shape() for port in copy.outputs]
        _free_reshapes(copy, own)
        _set_batch(copy, batch)
    except RuntimeError as exc:
        raise ShapeError(f"the model does not work at batch {batch}: {reason_of(exc)}") from exc
    for place, (old, port) in enumerate(zip(before, copy.outputs, strict=True)):
        new = port.get_partial_shape()
        if not _follows(old, new, own=own, batch=batch):
            raise ShapeError(f"output {place} does not follow the batch: it is {old} at {own}, {new} at {batch}")
    return copy


def by_sample(outputs: Outputs, batch: int) -> Outputs:
    """Outputs of calls of so many samples as outputs of single samples."""
    return [
        list(sample)
        for call in outputs
        for sample in zip(*(np.split(np.asarray(array), batch) for array in call), strict=True)
    ]


def _own_batch(samples: Sequence[Sample]) -> int:
    sizes = {np.shape(array)[0] for sample in samples for array in sample.values() if np.ndim(array)}
    if len(sizes) != 1 or not min(sizes):
        listed = ", ".join(map(str, sorted(sizes))) or "none"
        raise ShapeError(f"the inputs have no first dimension in common that could be the batch ({listed})")
    return int(min(sizes))


def _set_batch(model: ov.Model, batch: int) -> None:
    for parameter in model.get_parameters():
        rank = parameter.get_partial_shape().rank
        if rank.is_dynamic or rank.get_length():
            parameter.set_layout(ov.Layout("N..."))
    ov.set_batch(model, batch)


def _free_reshapes(model: ov.Model, own: int) -> None:
    """Let reshapes copy their first dimension where it is the batch on both sides and is written as a number."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        pattern = [int(size) for size in node.input_value(1).get_node().get_data().ravel()]
        first = [port.get_partial_shape() for port in (node.input_value(0), node.output(0))]
        is_batch = all(not s.rank.is_dynamic and len(s) and s[0] == ov.Dimension(own) for s in first)
        if not is_batch or pattern[0] != own or (0 in pattern and not node.get_attributes()["special_zero"]):
            continue
        freed = ops.reshape(node.input_value(0), np.asarray([0, *pattern[1:]], np.int64), True)
        freed.set_friendly_name(node.get_friendly_name())
        freed.output(0).get_tensor().set_names(node.output(0).get_tensor().get_names())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(freed.output(0))


def _follows(old: ov.PartialShape, new: ov.PartialShape, *, own: int, batch: int) -> bool:
    """Whether only the first dimension changed, in step with the batch."""
    if old.rank.is_dynamic or new.rank.is_dynamic or len(old) != len(new) or not len(new):
        return False
    if not old[0].is_static or not new[0].is_static:
        return False
    first = old[0].get_length(), new[0].get_length()
    is_in_step = first[1] % batch == 0 and first[0] * batch == first[1] * own
    return is_in_step and list(old)[1:] == list(new)[1:]


def _working_bytes(model: ov.Model) -> int:
    """What the operator with the largest tensors reads and writes, twice: buffers of neighbours live as long."""
    largest = 0
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            ports = (*(port.get_source_output() for port in node.inputs()), *node.outputs())
            largest = max(largest, sum(_bytes(port) for port in ports))
    return 2 * largest


def _bytes(port: ov.Output) -> int:
    shape = port.get_partial_shape()
    if shape.is_dynamic or port.get_node().get_type_name() == "Constant":
        return 0
    return int(np.prod([dim.get_length() for dim in shape], dtype=np.int64)) * int(port.get_element_type().size)
