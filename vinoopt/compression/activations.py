"""Activations inside a model: run in batches, from the nearest tensors that are already known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from vinoopt.errors import CompressionError, DataError

Tensor: TypeAlias = NDArray[Any]
Sample: TypeAlias = Mapping[str, Tensor]
Batch: TypeAlias = dict[str, Tensor]

_FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}
CALL_BYTES = 256 << 20
"""Of tensors that one call hands out."""
_BATCH_TOLERANCE = 1e-3
"""Relative; kernels for other batch sizes sum in another order, a mixed-up batch is off by far more."""


def iterate_calls(
    model: ov.Model, samples: Iterable[Sample], *, size: int, also: Sequence[ov.Model] = ()
) -> Iterator[Batch]:
    """Whole model calls of about `size` samples each, in order, made as they are asked for.

    Samples are joined along their first axis where every input and output of the model leaves it open, and
    where joining two of them gives the same outputs as running them apart (a constant inside the graph may
    carry the batch), in `model` and in those that are `also` to be run. Otherwise each sample is a call of its own.
    Raises `DataError` where there are none.
    """
    calls = ({name: np.asarray(value) for name, value in sample.items()} for sample in samples)
    first = list(itertools.islice(calls, 2))
    if not first:
        raise DataError("no samples to run the model on; hand in at least one")
    per_call = (
        size // _leading(first[0]) if len(first) > 1 and _signature(first[0]) == _signature(first[1]) else 1
    )
    if per_call > 1 and not all(_keeps_samples_apart(each, first) for each in (model, *also)):
        per_call = 1
    waiting: list[Batch] = []
    for call in itertools.chain(first, calls):
        if waiting and (len(waiting) >= per_call or _signature(call) != _signature(waiting[0])):
            yield _join(waiting)
            waiting = []
        waiting.append(call)
    yield _join(waiting)


def sized_like(model: ov.Model, values: Sequence[Any]) -> ov.Model:
    """The model, or a copy with its open sizes as `values` have them: tensors of one call, in the inputs' order."""
    if not model.is_dynamic():
        return model
    model = model.clone()
    model.reshape({index: ov.PartialShape(list(value.shape)) for index, value in enumerate(values)})
    return model


def open_batch(*models: ov.Model) -> bool:
    """Open the first axis of all inputs, in place, of all models or of none; whether that is done.

    A file often fixes its batch though nothing in the graph hangs on it. Left alone is a model whose shapes do not
    follow; `iterate_calls` finds out about constants that carry the batch.
    """
    if not all(_can_open(model.clone()) for model in models):
        return False
    for model in models:
        model.reshape(_opened_shapes(model))
    return True


def _can_open(model: ov.Model) -> bool:
    """Whether every output's first axis follows that of the inputs; changes the model."""
    shapes = [port.get_partial_shape() for port in (*model.inputs, *model.outputs)]
    if not all(shape.rank.is_static and shape.rank.get_length() > 0 for shape in shapes):
        return False
    if len({str(shape[0]) for shape in shapes}) > 1:
        return False
    try:
        model.reshape(_opened_shapes(model))
    except RuntimeError:
        return False
    ends = [port.get_partial_shape() for port in model.outputs]
    return all(shape.rank.is_static and shape.rank.get_length() > 0 and shape[0].is_dynamic for shape in ends)


def _opened_shapes(model: ov.Model) -> dict[int, ov.PartialShape]:
    return {
        index: ov.PartialShape([-1, *list(port.get_partial_shape())[1:]]) for index, port in enumerate(model.inputs)
    }


def _leading(call: Batch) -> int:
    return int(next(iter(call.values())).shape[0])


def _join(calls: Sequence[Batch]) -> Batch:
    return (
        calls[0]
        if len(calls) == 1
        else {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
    )


def _signature(call: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape[1:]) for name, value in sorted(call.items()))


def _keeps_samples_apart(model: ov.Model, pair: Sequence[Batch]) -> bool:
    shapes = [port.get_partial_shape() for port in (*model.inputs, *model.outputs)]
    if not all(
        shape.rank.is_static and shape.rank.get_length() > 0 and shape[0].is_dynamic for shape in shapes
    ):
        return False
    whole = Part([result.input_value(0) for result in model.get_results()], model.get_parameters())
    pair = [pair[0], _unlike(pair[1])]
    apart = [whole.run(in_order(model, call)) for call in pair]
    try:
        together = whole.run(in_order(model, _join(pair)))
    except CompressionError:  # the graph refuses another batch: a shape inside it is fixed
        return False
    for joint, *singles in zip(together, *apart, strict=True):
        expected = np.concatenate(singles)
        if joint.shape != expected.shape:
            return False
        expected = expected.astype(np.float64)
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-30)
        if not float(np.abs(joint - expected).max(initial=0.0)) <= _BATCH_TOLERANCE * scale:  # not a number is no
            return False
    return True


def _unlike(call: Batch) -> Batch:
    """The call at half its values, so that no extreme of it is that of the call beside it; indices stay."""
    return {
        name: value // 2 if value.dtype == np.uint8 else value / 2 if value.dtype.kind == "f" else value
        for name, value in call.items()
    }


def samples_per_call(outputs: Iterable[ov.Output], *, most: int) -> int:
    """How many samples to run at once so that the values of all `outputs` together stay below `CALL_BYTES`.

    Counts the sizes that the model fixes, beyond the first axis; ask before that is opened.
    """
    size = 0
    for output in outputs:
        shape = list(output.get_partial_shape()) if output.get_partial_shape().rank.is_static else []
        lengths = [each.get_length() for each in shape[1:] if each.is_static]
        size += math.prod(lengths) * output.get_element_type().size
    return min(max(CALL_BYTES // max(size, 1), 1), most)


class Part:
    """The stretch of a model between `inputs` (parameters) and `outputs`, compiled for the shapes it meets."""

    def __init__(self, outputs: Sequence[ov.Output], inputs: Sequence[ov.Node]) -> None:
        self._outputs = outputs
        self._inputs = inputs
        self._compiled: dict[tuple[tuple[int, ...], ...], ov.CompiledModel] = {}

    def run(self, feed: Sequence[Tensor]) -> list[Tensor]:
        """The outputs' values in float32; `CompressionError` where OpenVINO cannot compile or run the stretch."""
        shapes = tuple(tensor.shape for tensor in feed)
        try:
            if shapes not in self._compiled:
                self._compiled[shapes] = self._compile(shapes)
            return list(self._compiled[shapes](list(feed)).values())
        except RuntimeError as exc:
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[-1]
            raise CompressionError(f"OpenVINO could not run a stretch of the model: {reason}") from exc

    def _compile(self, shapes: Sequence[tuple[int, ...]]) -> ov.CompiledModel:
        part = ov.Model([opset.result(output) for output in self._outputs], list(self._inputs)).clone()
        # Fixed shapes let the CPU plugin choose its kernels once; the clone leaves ours open.
        part.reshape({index: ov.PartialShape(list(shape)) for index, shape in enumerate(shapes)})
        return ov.Core().compile_model(part, "CPU", _FLOAT)


class ActivationStream:
    """Tensors of a model over fixed calls; what has been passed is not computed twice.

    The stream owns `model` and cuts it as it advances: tensors on the cut are held for all calls and become the
    inputs of what follows, as long as they fit `memory_bytes`; otherwise the older cut stays and the stretch in
    between is computed again. Over all layers this costs about one pass through the model instead of one per
    layer. Weights behind the cut may be changed between two reads.
    """

    def __init__(self, model: ov.Model, calls: Sequence[Batch], *, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._model = model  # keeps the nodes alive
        self._inputs: list[ov.Node] = list(model.get_parameters())
        self._held: list[list[Tensor]] = [in_order(model, call) for call in calls]
        self._order = {node: index for index, node in enumerate(model.get_ordered_ops())}
        self._moving = _fed_by(self._inputs)

    @property
    def calls(self) -> int:
        """How many calls every read yields."""
        return len(self._held)

    def advance(self, node: ov.Node) -> None:
        """Declare everything that `node` depends on final, and hold the tensors that it and later layers read."""
        passed = {*self._inputs, *self._ancestors(node)}
        frontier = sorted(
            (output for each in passed for output in each.outputs() if self._is_read_beyond(output, passed)),
            key=lambda output: (self._order.get(output.get_node(), -1), output.get_index()),
        )
        if all(output.get_node() in self._inputs for output in frontier):
            return
        held: list[list[Tensor]] = []
        used = 0
        for tensors in self.read(frontier):
            held.append(tensors)
            used += sum(tensor.nbytes for tensor in tensors)
            if used * self.calls > self._memory_bytes * len(held):
                return
        self._cut(frontier, held)

    def read(self, outputs: Sequence[ov.Output]) -> Iterator[list[Tensor]]:
        """The values of `outputs`, call by call."""
        places = {node: index for index, node in enumerate(self._inputs)}
        fresh = [output for output in outputs if output.get_node() not in places]
        needed = self._needed_inputs(fresh)
        part = Part(fresh, needed)
        for held in self._held:
            values = iter(part.run([held[places[node]] for node in needed]) if fresh else ())
            yield [held[places[o.get_node()]] if o.get_node() in places else next(values) for o in outputs]

    def _needed_inputs(self, outputs: Sequence[ov.Output]) -> list[ov.Node]:
        reached: set[ov.Node] = set()
        for output in outputs:
            reached |= {output.get_node(), *self._ancestors(output.get_node())}
        return [node for node in self._inputs if node in reached]

    def depends_on(self, output: ov.Output, nodes: Collection[ov.Node]) -> bool:
        """Whether `output` comes from one of `nodes` without a cut in between."""
        return any(node in nodes for node in (output.get_node(), *self._ancestors(output.get_node())))

    def _ancestors(self, node: ov.Node) -> set[ov.Node]:
        """Nodes that `node` depends on and that depend on the inputs."""
        found: set[ov.Node] = set()
        stack = [node]
        while stack:
            for source in stack.pop().input_values():
                above = source.get_node()
                if above in self._moving and above not in found:
                    found.add(above)
                    stack.append(above)
        return found

    def _is_read_beyond(self, output: ov.Output, passed: set[ov.Node]) -> bool:
        readers = (target.get_node() for target in output.get_target_inputs())
        return any(reader in self._moving and reader not in passed for reader in readers)

    def _cut(self, frontier: Sequence[ov.Output], held: list[list[Tensor]]) -> None:
        inputs: list[ov.Node] = []
        for output in frontier:
            if output.get_node() in self._inputs:
                inputs.append(output.get_node())
                continue
            parameter = opset.parameter(output.get_partial_shape(), output.get_element_type())
            for reader in output.get_target_inputs():
                reader.replace_source_output(parameter.output(0))
            self._moving.add(parameter)
            inputs.append(parameter)
        self._inputs, self._held = inputs, held


def in_order(model: ov.Model, call: Batch) -> list[Tensor]:
    """The values of a call in the order of the model's inputs; `DataError` where one is missing."""
    ordered = []
    for number, port in enumerate(model.inputs):
        names = [*sorted(port.get_names()), port.get_node().get_friendly_name(), str(number)]
        name = next((name for name in names if name in call), None)
        if name is None:
            raise DataError(f'a sample has no value for input "{names[0]}"; it has {", ".join(sorted(call))}')
        ordered.append(np.ascontiguousarray(call[name], dtype=port.get_element_type().to_dtype()))
    return ordered


def _fed_by(inputs: Sequence[ov.Node]) -> set[ov.Node]:
    """Every node that depends on `inputs`, these included; model outputs are left out."""
    found = set(inputs)
    stack = list(inputs)
    while stack:
        for output in stack.pop().outputs():
            for target in output.get_target_inputs():
                below = target.get_node()
                if below not in found and below.get_type_name() != "Result":
                    found.add(below)
                    stack.append(below)
    return found
