"""Remove the units that a plan drops: a smaller model, and the proof that it computes what it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as opset
from numpy.typing import ArrayLike, NDArray
from openvino.properties import hint as hints

from vinoopt.compression.groups import Coupling, Layer
from vinoopt.compression.rewrites import REWRITES, Cut, MaskDims, replace_node
from vinoopt.compression.vanishing import Vanished, Wiring, find_vanished
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import GroupWidth

REPLACED = frozenset({"Concat", "Constant", "ShapeOf", "Split", "Squeeze", "VariadicSplit"})
"""Operators that surgery may put a new node in the place of."""

REFERENCE_PROPERTIES = {
    hints.inference_precision: ov.Type.f32,
    # A property of the CPU plugin without a public name: without it FakeQuantize becomes INT8 arithmetic, and where a
    # value lies on the edge of a level the two models round it apart.
    "LP_TRANSFORMS_MODE": "NO",
}

Samples = Sequence[Mapping[str, ArrayLike]]
"""Per sample: input name (or its number as text) -> array."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerCut:
    """What is left of a contraction that has lost columns or rows."""

    name: str
    kept_columns: NDArray[np.int64]
    """Channels that it still reads, as numbers in the whole model: input channels of a convolution (over all
    groups of a grouped one), or indices of a MatMul's summed axis."""
    columns: int
    """How many it read."""
    kept_rows: NDArray[np.int64]
    """Channels that it still makes, as numbers in the whole model."""
    rows: int
    """How many it made."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrunedModel:
    """A smaller model, and where its layers' columns and rows lay in the whole one."""

    model: ov.Model
    consumers: tuple[LayerCut, ...]
    """Layers that have lost columns, in graph order."""
    producers: tuple[LayerCut, ...]
    """Layers that have lost rows, in graph order."""
    constants: tuple[str, ...]
    """Layers that had nothing left to read and are constants now."""


def apply_pruning(
    model: ov.Model,
    coupling: Coupling,
    widths: Sequence[GroupWidth],
    *,
    means: Mapping[str, ArrayLike] | None = None,
) -> PrunedModel:
    """A smaller copy of `model` that holds only the kept units; `model` is not changed.

    `means` gives, by layer name, the vector (one value per row of the whole model) that stands for a layer
    which reads nothing any more; without it such a layer gives zeros. Raises `PlanError` for a plan that does
    not fit, `CompressionError` where the smaller graph is not valid.
    """
    keep = kept_units(coupling, widths)
    nodes = _ordered(model, coupling)
    vanished = _vanished(nodes, coupling, keep)
    clone = model.clone()
    copies = _ordered(clone, coupling)
    wiring = Wiring.of(copies)
    cutter = _Cutter(
        coupling=coupling,
        keep=keep,
        wiring=wiring,
        vanished=vanished,
        in_shapes=[_in_shape(node) for node in nodes],
    )
    try:
        cutter.run(means or {})
        clone.validate_nodes_and_infer_types()
    except RuntimeError as exc:
        raise CompressionError(f"the smaller graph is not valid: {exc}") from exc
    cutter.check_shapes()
    cuts = [_layer_cut(layer, keep) for layer in coupling.layers if cutter.survives(layer)]
    return PrunedModel(
        model=clone,
        consumers=tuple(cut for cut in cuts if cut.kept_columns.size < cut.columns),
        producers=tuple(cut for cut in cuts if cut.kept_rows.size < cut.rows),
        constants=tuple(coupling.ops[index][1] for index in vanished.constant),
    )


def kept_units(coupling: Coupling, widths: Sequence[GroupWidth]) -> NDArray[np.bool_]:
    """Per unit of all groups whether it stays; `PlanError` for a plan that does not fit the coupling."""
    keep = np.ones(coupling.units, np.bool_)
    named: set[str] = set()
    for width in widths:
        group = coupling.group(width.group)
        if group.name in named:
            raise PlanError(f'group "{group.name}" is named twice')
        named.add(group.name)
        kept = np.asarray(width.kept, np.int64)
        if kept.size != np.unique(kept).size:
            raise PlanError(f'group "{group.name}": a unit is kept twice')
        if kept.size and (kept.min() < 0 or kept.max() >= group.units):
            raise PlanError(f'group "{group.name}" has units 0 to {group.units - 1}, not {kept.tolist()}')
        if not kept.size and not group.can_vanish:
            raise PlanError(
                f'group "{group.name}" must keep a unit: what reads it is not added to a residual path'
            )
        start = coupling.offsets[group.name]
        keep[start : start + group.units] = False
        keep[start + kept] = True
    return keep


def zeroed_reference(model: ov.Model, coupling: Coupling, widths: Sequence[GroupWidth]) -> ov.Model:
    """A copy of `model` in which the contractions that read dropped units have zeros in those columns.

    It has the whole model's shapes, and by construction computes what the smaller model must compute.
    """
    keep = kept_units(coupling, widths)
    clone = model.clone()
    nodes = _ordered(clone, coupling)
    for layer in coupling.layers:
        kept = _mask(layer.columns, keep)
        if not layer.is_reader or kept.all():
            continue
        node = nodes[layer.index]
        value = node.input_value(layer.data_port)
        shape = [1] * len(value.get_partial_shape())
        shape[layer.column_axis] = -1
        mask = opset.constant(kept.astype(np.float32).reshape(shape), dtype=value.get_element_type())
        node.input(layer.data_port).replace_source_output(opset.multiply(value, mask).output(0))
    clone.validate_nodes_and_infer_types()
    return clone


def verify_pruning(pruned: ov.Model, reference: ov.Model, samples: Samples) -> float:
    """The largest difference of any output, relative to that output's largest magnitude.

    Both run on the CPU in float32. Float rounding alone gives about 1e-6; more than 1e-4 is an error of
    surgery.
    """
    core = ov.Core()
    compiled = [core.compile_model(model, "CPU", REFERENCE_PROPERTIES) for model in (pruned, reference)]
    worst = 0.0
    for sample in samples:
        outputs = [list(each(dict(_by_port(sample, each))).values()) for each in compiled]
        for got, wanted in zip(*outputs, strict=True):
            got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
            if got.shape != wanted.shape:
                raise CompressionError(f"an output has shape {got.shape} instead of {wanted.shape}")
            scale = max(float(np.abs(wanted).max(initial=0.0)), np.finfo(np.float32).tiny)
            worst = max(worst, float(np.abs(got - wanted).max(initial=0.0)) / scale)
    return worst


def _by_port(
    sample: Mapping[str, ArrayLike], compiled: ov.CompiledModel
) -> list[tuple[int, NDArray[np.generic]]]:
    names = {
        name: index for index, port in enumerate(compiled.inputs) for name in (*port.get_names(), str(index))
    }
    return [(names[name], np.asarray(value)) for name, value in sample.items()]


# --------------------------------------------------------------------------- inside


def _ordered(model: ov.Model, coupling: Coupling) -> list[ov.Node]:
    """The model's operators in the order of the coupling; `PlanError` where it is another model."""
    nodes = list(model.get_ordered_ops())
    found = tuple((node.get_type_name(), node.get_friendly_name()) for node in nodes)
    if found != coupling.ops:
        raise PlanError("the pruning groups were found on another model; find them again on this one")
    return nodes


def _in_shape(node: ov.Node) -> tuple[int | None, ...]:
    if node.get_input_size() == 0 or node.get_input_partial_shape(0).rank.is_dynamic:
        return ()
    return tuple(d.get_length() if d.is_static else None for d in node.get_input_partial_shape(0))


def _mask(units: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which indices stay: those without a unit, and those of kept units."""
    if not keep.size:
        return np.ones(units.shape, np.bool_)
    mask: NDArray[np.bool_] = (units < 0) | keep[units]
    return mask


def _layer_cut(layer: Layer, keep: NDArray[np.bool_]) -> LayerCut:
    columns = _mask(layer.columns, keep) if layer.is_reader else np.ones(layer.columns.size, np.bool_)
    rows = _mask(layer.rows, keep)
    return LayerCut(
        name=layer.name,
        kept_columns=np.flatnonzero(columns),
        columns=columns.size,
        kept_rows=np.flatnonzero(rows),
        rows=rows.size,
    )


def _vanished(nodes: Sequence[ov.Node], coupling: Coupling, keep: NDArray[np.bool_]) -> Vanished:
    """What goes with tensors that have nothing left; `PlanError` where that is not legal."""
    empty = {
        key
        for key, dims in coupling.tensors.items()
        if any(units is not None and not _mask(units, keep).any() for units in dims)
    }
    vanished = find_vanished(
        Wiring.of(nodes),
        contractions=frozenset(layer.index for layer in coupling.layers if layer.is_reader),
        is_empty=empty.__contains__,
    )
    if vanished.refusal:
        raise PlanError(f"the plan drops too much: {vanished.refusal}")
    return vanished


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Cutter:
    """Cuts the operators of one copy."""

    coupling: Coupling
    keep: NDArray[np.bool_]
    wiring: Wiring
    vanished: Vanished
    in_shapes: Sequence[tuple[int | None, ...]]
    """Per operator the shape of its first input in the whole model."""

    def run(self, means: Mapping[str, ArrayLike]) -> None:
        layers = {layer.index: layer for layer in self.coupling.layers}
        constant = set(self.vanished.constant)
        dropped: dict[int, set[int]] = {}
        for index, port in self.vanished.dropped:
            dropped.setdefault(index, set()).add(port)
        for index, node in enumerate(self.wiring.ops):
            if index not in self.vanished.live:
                continue
            in_place = False
            self._cut_copies(node, index)
            if index in constant:
                self._make_constant(node, layers[index], means)
            elif index in dropped:
                _drop_inputs(node, dropped[index])
            elif node.get_type_name() == "Constant":
                self._cut_constant(node, index)
            else:
                in_place = self._rewrite(node, index)
            if in_place:
                # What is rewritten next is checked against the new shapes, not the old ones.
                node.validate_and_infer_types()

    def masks(self, key: tuple[int, int]) -> MaskDims:
        """What stays of a tensor, per dimension; empty where all does."""
        return self._masks(self.coupling.tensors.get(key, ()))

    def _masks(self, dims: Sequence[NDArray[np.int64] | None]) -> MaskDims:
        found = []
        for units in dims:
            mask = None if units is None else _mask(units, self.keep)
            found.append(None if mask is None or mask.all() else mask)
        return tuple(found) if any(mask is not None for mask in found) else ()

    def _cut_constant(self, node: ov.Node, index: int) -> None:
        masks = self.masks((index, 0))
        if masks:
            replace_node(node, _cut_values(node, masks))

    def _cut_copies(self, node: ov.Node, index: int) -> None:
        """Give the operator its own cut copy of constants that others read too."""
        for port in range(node.get_input_size()):
            masks = self._masks(self.coupling.copies.get((index, port), ()))
            if masks:
                shared = node.input_value(port).get_node()
                made = _cut_values(shared, masks)
                made.set_friendly_name(f"{shared.get_friendly_name()}/{node.get_friendly_name()}")
                node.input(port).replace_source_output(made.output(0))

    def _rewrite(self, node: ov.Node, index: int) -> bool:
        """Whether the operator is still in its place."""
        rewrite = REWRITES.get(node.get_type_name())
        inputs = tuple(self.masks(source) for source in self.wiring.sources[index])
        outputs = tuple(self.masks((index, port)) for port in range(node.get_output_size()))
        if rewrite is None or not (any(inputs) or any(outputs)):
            return True
        return rewrite(Cut(node=node, inputs=inputs, outputs=outputs, in_shape=self.in_shapes[index]))

    def _make_constant(self, node: ov.Node, layer: Layer, means: Mapping[str, ArrayLike]) -> None:
        mean = np.zeros(layer.rows.size) if layer.name not in means else np.asarray(means[layer.name])
        if mean.shape != layer.rows.shape:
            raise PlanError(f"the mean of '{layer.name}' has shape {mean.shape}, not ({layer.rows.size},)")
        shape = [1] * len(node.get_output_partial_shape(0))
        shape[layer.row_axis] = -1
        kept = mean[_mask(layer.rows, self.keep)].reshape(shape)
        made = opset.constant(kept, dtype=node.get_output_element_type(0))
        made.set_friendly_name(f"{layer.name}/mean")
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))

    def check_shapes(self) -> None:
        """Every tensor of the smaller graph must have as many indices as stay."""
        left = self.vanished.live - set(self.vanished.constant)
        for (index, port), dims in self.coupling.tensors.items():
            node = self.wiring.ops[index]
            if index not in left or node.get_type_name() in REPLACED:
                continue
            shape = node.get_output_partial_shape(port)
            for axis, units in enumerate(dims):
                wanted = None if units is None else int(_mask(units, self.keep).sum())
                if wanted is not None and shape[axis].is_static and shape[axis].get_length() != wanted:
                    raise CompressionError(
                        f"'{node.get_friendly_name()}' has shape {shape}; dimension {axis} should be {wanted}"
                    )

    def survives(self, layer: Layer) -> bool:
        """Whether the layer is still a contraction in the smaller model."""
        return layer.index in self.vanished.live and layer.index not in self.vanished.constant


def _cut_values(node: ov.Node, masks: MaskDims) -> ov.Node:
    """A constant with the values that stay."""
    data = node.get_data()
    for axis, mask in enumerate(masks):
        if mask is not None:
            data = np.compress(mask, data, axis=axis)
    return opset.constant(np.ascontiguousarray(data), dtype=node.get_element_type())


def _drop_inputs(node: ov.Node, empty: set[int]) -> None:
    left = [value for port, value in enumerate(node.input_values()) if port not in empty]
    replace_node(node, opset.concat(left, int(node.get_attributes()["axis"])))
