"""Which channels must live or die together: pruning groups of an OpenVINO model.

Removing a unit is exact: only contractions with a constant weight read channels away, so the smaller model
computes what the whole model computes with the columns of those contractions set to zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.compression.coupling import Dims, FrozenLayer, Labels, Trace
from vinoopt.compression.rules import trace_model
from vinoopt.compression.solving import Solution, solve
from vinoopt.compression.vanishing import Wiring, find_vanishing_groups
from vinoopt.errors import PlanError
from vinoopt.records import PruningGroup
from vinoopt.serde import nearest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerUnits:
    """The unit that each column (or row) of a layer belongs to."""

    name: str
    unit_of: NDArray[np.int64]
    """Per column or row: the unit's number in its group, or -1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """A contraction with a constant weight, and the units on its two sides, numbered over all groups."""

    name: str
    index: int
    """Position among the model's ordered operators."""
    columns: NDArray[np.int64]
    """Per channel that it reads (a MatMul's summed axis, a convolution's input channels): its unit, or -1."""
    rows: NDArray[np.int64]
    """Per channel that it makes: its unit, or -1."""
    is_reader: bool
    """Whether its columns end here; a grouped convolution that loses whole groups only passes them on."""
    data_port: int
    column_axis: int
    row_axis: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Coupling:
    """Pruning groups of one model, and where every unit lies in it."""

    groups: tuple[PruningGroup, ...]
    """Groups that can be pruned, in graph order; names are unique."""
    blocked: tuple[PruningGroup, ...]
    """Groups that cannot, with the reason."""
    frozen: tuple[FrozenLayer, ...]
    """Layers without a rule, or outside what their rule covers."""
    columns: Mapping[str, tuple[LayerUnits, ...]]
    """Group -> the layers that read its units, by column."""
    rows: Mapping[str, tuple[LayerUnits, ...]]
    """Group -> the layers that make its units, by row."""
    layers: tuple[Layer, ...]
    offsets: Mapping[str, int]
    """Group -> number of its first unit, counted over all groups."""
    units: int
    ops: tuple[tuple[str, str], ...]
    """Type and friendly name of every operator, in order: how a model is recognised."""
    tensors: Mapping[tuple[int, int], tuple[NDArray[np.int64] | None, ...]]
    """(operator, output) -> per dimension the unit of every index or -1; tensors without units are left out."""
    copies: Mapping[tuple[int, int], tuple[NDArray[np.int64] | None, ...]]
    """(operator, input) -> the same, of a constant with several readers that is cut for each of them."""

    def group(self, name: str) -> PruningGroup:
        """The group of that name; `PlanError` where there is none, or it cannot be pruned."""
        for group in self.groups:
            if group.name == name:
                return group
        for group in self.blocked:
            if group.name == name:
                raise PlanError(f'group "{name}" cannot be pruned: {group.reason}')
        raise PlanError(f'no group "{name}"{nearest(name, [group.name for group in self.groups])}')


def find_groups(model: ov.Model, *, ignored: Sequence[str] = ()) -> Coupling:
    """Find the channels of `model` that must live or die together.

    `ignored` names layers that keep their inputs and outputs whole. The model is not changed. Raises
    `PlanError` for an ignored name that the model does not have.
    """
    ops = model.get_ordered_ops()
    trace = trace_model(ops)
    _ignore(trace, ops, ignored)
    _freeze_stray_constants(trace, ops)
    solution = solve(trace)
    return _build(ops, trace, solution)


def _ignore(trace: Trace, ops: Sequence[ov.Node], ignored: Sequence[str]) -> None:
    names = {node.get_friendly_name() for node in ops}
    for name in ignored:
        if name not in names:
            raise PlanError(f'ignored layer "{name}" is not in the model{nearest(name, sorted(names))}')
    wanted = set(ignored)
    for node in ops:
        if node.get_friendly_name() in wanted:
            outputs = [trace.tensors[node.get_name(), port] for port in range(node.get_output_size())]
            inputs = [trace.dims(node, port) for port in range(node.get_input_size())]
            for dims in (*inputs, *outputs):
                for labels in dims or ():
                    trace.freeze(labels, f"'{node.get_friendly_name()}' is to be left alone")


def _freeze_stray_constants(trace: Trace, ops: Sequence[ov.Node]) -> None:
    """A constant that is also read where no rule looks at its indices keeps its size."""
    for node in ops:
        if node.get_type_name() == "Constant":
            for target in node.output(0).get_target_inputs():
                if (target.get_node().get_name(), target.get_index()) not in trace.read_ports:
                    for labels in trace.tensors[node.get_name(), 0] or ():
                        reader = target.get_node().get_friendly_name()
                        trace.freeze(labels, f"'{reader}' reads '{node.get_friendly_name()}' as a parameter")
                    break


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Member:
    """Units that lie in the same places: a group in the making."""

    name: str
    components: Labels
    """In the order of the first producer's rows."""
    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    kind: str
    reason: str
    """Why it cannot be pruned; empty where it can."""


def _members(trace: Trace, solution: Solution) -> list[_Member]:
    """Components that lie in the same places, in graph order of their first producer."""
    places = _places(trace, solution)
    signatures = _signatures(trace, solution, places)
    members: list[_Member] = []
    seen: dict[str, int] = {}
    taken: set[int] = set()
    for place in places:
        if not place.is_row:
            continue
        unique, first = np.unique(place.components, return_index=True)
        parts: dict[tuple[int, ...], list[int]] = {}
        for component in unique[np.argsort(first)].tolist():
            if component not in taken:
                taken.add(component)
                parts.setdefault(signatures[component], []).append(component)
        for signature, found in parts.items():
            member = _member(found, [places[i] for i in signature if i < len(places)], (trace, solution))
            number = seen[member.name] = seen.get(member.name, 0) + 1
            members.append(
                dataclasses.replace(member, name=f"{member.name}#{number}") if number > 1 else member
            )
    return members


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Place:
    """The columns or the rows of a layer."""

    layer: str
    is_row: bool
    labels: Labels
    components: Labels
    """Of the labels that are not frozen from birth; other frozen ones included."""


def _places(trace: Trace, solution: Solution) -> list[_Place]:
    found = []
    for contraction in trace.contractions:
        if solution.reads(contraction):
            found.append((contraction.name, False, contraction.columns))
        found.append((contraction.name, True, contraction.rows))
    found += [(name, True, labels) for name, labels in trace.embeddings if labels is not None]
    return [
        _Place(layer=name, is_row=is_row, labels=labels, components=solution.component[labels[labels >= 0]])
        for name, is_row, labels in found
    ]


def _signatures(trace: Trace, solution: Solution, places: Sequence[_Place]) -> dict[int, tuple[int, ...]]:
    """Per component the numbers of the places it lies in; of free ones also the tensor dimensions.

    With the tensors among the places, a dimension holds all units of a group or none: it becomes empty only
    where whole groups go.
    """
    found: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        for component in np.unique(place.components).tolist():
            found.setdefault(component, []).append(number)
    arrays = {
        id(labels): labels for dims in trace.tensors.values() for labels in dims or () if labels is not None
    }
    for number, labels in enumerate(arrays.values(), start=len(places)):
        components = solution.components_of(labels)
        for component in np.unique(components[components >= 0]).tolist():
            if component in found:
                found[component].append(number)
    return {component: tuple(numbers) for component, numbers in found.items()}


def _member(components: list[int], places: Sequence[_Place], found: tuple[Trace, Solution]) -> _Member:
    trace, solution = found
    reason_index = int(solution.reason[components[0]])
    reason = trace.reasons[reason_index] if reason_index >= 0 else ""
    consumers = tuple(dict.fromkeys(place.layer for place in places if not place.is_row))
    producers = tuple(dict.fromkeys(place.layer for place in places if place.is_row))
    if not reason and not consumers:
        reason = "no layer with a constant weight reads it"
    rows = solution.components_of(next(place.labels for place in places if place.is_row))
    return _Member(
        name=producers[0],
        components=np.asarray(components, np.int64),
        consumers=consumers,
        producers=producers,
        kind=_kind(components[0], rows, found),
        reason=reason,
    )


def _kind(component: int, rows: Labels, found: tuple[Trace, Solution]) -> str:
    """Groups of a grouped convolution go whole, and so do heads: neighbouring rows that a reshape parts."""
    trace, solution = found
    where = np.flatnonzero(rows == component)
    if (np.diff(where) == 1).sum() * 2 < max(where.size, 2):
        return "channels"
    for site in trace.sites:
        choice = solution.chosen.get(site.key)
        if choice is not None and (solution.components_of(site.factors[choice]) == component).any():
            return "heads" if site.preferred is None else "groups"
    return "channels"


def _build(ops: Sequence[ov.Node], trace: Trace, solution: Solution) -> Coupling:
    order = {node.get_name(): index for index, node in enumerate(ops)}
    members = _members(trace, solution)
    prunable = [member for member in members if not member.reason]
    unit_of = np.full(solution.reason.size, -1, np.int64)
    ranges: dict[str, tuple[int, int]] = {}
    count = 0
    for member in prunable:
        size = member.components.size
        unit_of[member.components] = np.arange(count, count + size)
        ranges[member.name] = (count, size)
        count += size
    layers = _layers((trace, solution), order, unit_of)
    tensors = _mapped_dims(trace.tensors, solution, order, unit_of)
    vanishing = find_vanishing_groups(
        Wiring.of(ops),
        contractions=frozenset(layer.index for layer in layers if layer.is_reader),
        tensors=tensors,
        ranges=ranges,
    )
    records = [_record(member, vanishing) for member in members]
    groups = tuple(record for record in records if record.is_prunable)
    return Coupling(
        groups=groups,
        blocked=tuple(record for record in records if not record.is_prunable),
        frozen=tuple(trace.frozen),
        columns=MappingProxyType({g.name: _units(layers, ranges[g.name], rows=False) for g in groups}),
        rows=MappingProxyType({g.name: _units(layers, ranges[g.name], rows=True) for g in groups}),
        layers=layers,
        offsets=MappingProxyType({name: start for name, (start, _) in ranges.items()}),
        units=count,
        ops=tuple((node.get_type_name(), node.get_friendly_name()) for node in ops),
        tensors=MappingProxyType(tensors),
        copies=MappingProxyType(_mapped_dims(trace.copies, solution, order, unit_of)),
    )


def _record(member: _Member, vanishing: frozenset[str]) -> PruningGroup:
    vanishes = not member.reason and member.name in vanishing
    reason = member.reason
    if not reason and member.components.size == 1 and not vanishes:
        reason = "it has a single unit"
    return PruningGroup(
        name=member.name,
        units=int(member.components.size),
        producers=member.producers,
        consumers=member.consumers,
        is_prunable=not reason,
        reason=reason,
        kind=member.kind,
        can_vanish=vanishes,
    )


def _layers(found: tuple[Trace, Solution], order: Mapping[str, int], unit_of: Labels) -> tuple[Layer, ...]:
    trace, solution = found
    return tuple(
        Layer(
            name=contraction.name,
            index=order[contraction.node],
            columns=_mapped(contraction.columns, solution, unit_of),
            rows=_mapped(contraction.rows, solution, unit_of),
            is_reader=solution.reads(contraction),
            data_port=contraction.data_port,
            column_axis=contraction.column_axis,
            row_axis=contraction.row_axis,
        )
        for contraction in trace.contractions
    )


def _mapped(labels: Labels, solution: Solution, unit_of: Labels) -> Labels:
    """The unit of every label, -1 where it stays."""
    components = solution.components_of(labels)
    if not unit_of.size:  # a model without a single channel that a layer contracts over
        return np.full_like(components, -1)
    return np.where(components >= 0, unit_of[components], -1)


TensorUnits = dict[tuple[int, int], tuple[Labels | None, ...]]


def _mapped_dims(
    dims_of: Mapping[tuple[str, int], Dims], solution: Solution, order: Mapping[str, int], unit_of: Labels
) -> TensorUnits:
    """Units per dimension; what has none is left out, and arrays are shared as the labels are."""
    memo: dict[int, Labels | None] = {}

    def mapped(labels: Labels | None) -> Labels | None:
        if labels is None:
            return None
        if id(labels) not in memo:
            units = _mapped(labels, solution, unit_of)
            memo[id(labels)] = units if (units >= 0).any() else None
        return memo[id(labels)]

    result = {}
    for (name, port), dims in dims_of.items():
        units = tuple(mapped(labels) for labels in dims or ())
        if any(each is not None for each in units):
            result[order[name], port] = units
    return result


def _units(layers: Sequence[Layer], span: tuple[int, int], *, rows: bool) -> tuple[LayerUnits, ...]:
    start, count = span
    found = []
    for layer in layers:
        if not rows and not layer.is_reader:
            continue
        units = layer.rows if rows else layer.columns
        inside = (units >= start) & (units < start + count)
        if inside.any():
            found.append(LayerUnits(name=layer.name, unit_of=np.where(inside, units - start, -1)))
    return tuple(found)
