"""Which blocks of a quantized model compute in INT8, and the same model with some of them back in float.

A *block* is a layer with a quantized operand: a convolution, a matrix product, an embedding, a recurrent cell.
NNCF calibrates once; every precision plan afterwards is that one model with the quantizers of its float blocks
taken out and their weights and biases restored from the float model. This is what NNCF's accuracy control does
when it reverts an operation (`nncf/quantization/algorithms/accuracy_control`), here for any set of blocks at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from vinoopt.errors import PlanError
from vinoopt.serde import nearest

_CONTRACTIONS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
_DECOMPRESSION = frozenset({"Convert", "Subtract", "Multiply", "Reshape", "FakeQuantize"})
_MAX_CHAIN = 8  # i8 constant -> Convert -> Subtract -> Multiply -> Reshape, with room to spare


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A layer that can compute in INT8 or in float."""

    name: str
    kind: str
    """OpenVINO operator type."""
    has_weights: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedPair:
    """A float model and what NNCF made of it; layers answer to the same friendly names in both."""

    original: ov.Model
    quantized: ov.Model


def find_blocks(pair: QuantizedPair) -> tuple[Block, ...]:
    """The blocks of the quantized model that the float model has too, in graph order."""
    known = {node.get_friendly_name() for node in pair.original.get_ops()}
    return tuple(
        Block(
            name=node.get_friendly_name(),
            kind=node.get_type_name(),
            has_weights=bool(_weight_inputs(node)),
        )
        for node in pair.quantized.get_ordered_ops()
        if node.get_friendly_name() in known and _is_block(node)
    )


def with_float_blocks(pair: QuantizedPair, names: Collection[str]) -> ov.Model:
    """A copy of the quantized model in which the blocks `names` compute in float again.

    An activation quantizer stays on an edge as long as a block that owns the edge is INT8. An edge into a block
    belongs to that block; an edge into any other operator belongs to the blocks that follow it before the next
    quantizer, else to the blocks before it, whose output quantizer it is.

    Raises `PlanError` for a name that is not a block.
    """
    blocks = {block.name for block in find_blocks(pair)}
    unknown = sorted(set(names) - blocks)
    if unknown:
        hint = nearest(unknown[0], sorted(blocks))
        raise PlanError(f'"{unknown[0]}" is not a quantized layer of the model{hint}')
    model = pair.quantized.clone()
    floats = set(names)
    if not floats:
        return model
    by_name = {node.get_friendly_name(): node for node in model.get_ops()}
    for quantizer in _activation_quantizers(model):
        for edge in list(quantizer.output(0).get_target_inputs()):
            if _owners(edge, quantizer) <= floats:
                edge.replace_source_output(quantizer.input_value(0))
    originals = {node.get_friendly_name(): node for node in pair.original.get_ops()}
    for name in sorted(floats):
        _restore(by_name[name], originals, by_name)
    model.validate_nodes_and_infer_types()
    return model


def _is_block(node: ov.Node) -> bool:
    if node.get_type_name() in _DECOMPRESSION or node.get_type_name() == "Constant":
        return False
    if _weight_inputs(node):
        return True
    return node.get_type_name() in _CONTRACTIONS and any(
        _is_activation_quantizer(value.get_node()) for value in node.input_values()
    )


def _weight_inputs(node: ov.Node) -> list[int]:
    """Inputs of `node` that hold quantized constants."""
    return [index for index, value in enumerate(node.input_values()) if _is_quantized_constant(value)]


def _is_quantized_constant(value: ov.Output) -> bool:
    """Whether `value` is a chain of decompression operators over an integer constant, or a quantized one."""
    node = value.get_node()
    is_quantized = False
    for _ in range(_MAX_CHAIN):
        if node.get_type_name() == "Constant":
            return is_quantized
        if node.get_type_name() not in _DECOMPRESSION:
            return False
        is_quantized |= node.get_type_name() in ("Convert", "FakeQuantize")
        node = node.input_value(0).get_node()
    return False


def _is_activation_quantizer(node: ov.Node) -> bool:
    return node.get_type_name() == "FakeQuantize" and not _is_quantized_constant(node.output(0))


def _activation_quantizers(model: ov.Model) -> Iterator[ov.Node]:
    return (node for node in model.get_ordered_ops() if _is_activation_quantizer(node))


def _owners(edge: ov.Input, quantizer: ov.Node) -> set[str]:
    consumer = edge.get_node()
    if _is_block(consumer):
        return {consumer.get_friendly_name()}
    after = _nearest_blocks([consumer], _following)
    return after or _nearest_blocks([quantizer.input_value(0).get_node()], _preceding)


def _nearest_blocks(start: Iterable[ov.Node], step: object) -> set[str]:
    """Names of the first blocks met from `start`; the walk ends at blocks and at quantizers."""
    found: set[str] = set()
    seen: set[str] = set()
    queue = deque(start)
    while queue:
        node = queue.popleft()
        name = node.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        if _is_block(node):
            found.add(name)
        elif node.get_type_name() != "FakeQuantize":
            queue.extend(step(node))  # type: ignore[operator]
    return found


def _following(node: ov.Node) -> list[ov.Node]:
    return [edge.get_node() for output in node.outputs() for edge in output.get_target_inputs()]


def _preceding(node: ov.Node) -> list[ov.Node]:
    return [value.get_node() for value in node.input_values()]


def _restore(layer: ov.Node, originals: dict[str, ov.Node], by_name: dict[str, ov.Node]) -> None:
    """Give `layer` the operands that its namesake in the float model has."""
    original = originals[layer.get_friendly_name()]
    for index, value in enumerate(original.input_values()):
        source = value.get_node()
        if source.get_type_name() == "Constant":
            layer.input(index).replace_source_output(_copy_constant(source).output(0))
        elif _passes_inserted(layer.input_value(index).get_node(), originals):
            # NNCF put operators of its own in between (SmoothQuant's Multiply): go back to the float source.
            twin = by_name.get(source.get_friendly_name())
            if twin is not None:
                layer.input(index).replace_source_output(twin.output(value.get_index()))
    for edge in list(layer.output(0).get_target_inputs()):
        _restore_bias(edge.get_node(), originals)


def _passes_inserted(node: ov.Node, originals: dict[str, ov.Node]) -> bool:
    return node.get_friendly_name() not in originals


def _restore_bias(node: ov.Node, originals: dict[str, ov.Node]) -> None:
    """Bias correction changed the constant of the Add behind a layer, or put an Add of zeros there first."""
    if node.get_type_name() != "Add":
        return
    for index, value in enumerate(node.input_values()):
        constant = value.get_node()
        if constant.get_type_name() != "Constant":
            continue
        original = originals.get(node.get_friendly_name())
        if original is None or original.get_type_name() != "Add":
            restored = ops.constant(np.zeros(constant.get_shape(), np.float32))
        else:
            twin = original.input_value(index).get_node()
            if twin.get_type_name() != "Constant":
                continue
            restored = _copy_constant(twin)
        node.input(index).replace_source_output(restored.output(0))


def _copy_constant(node: ov.Node) -> ov.Node:
    copy = ops.constant(np.array(node.data, copy=True))
    copy.set_friendly_name(node.get_friendly_name())
    return copy
