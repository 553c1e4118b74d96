"""Index-level coupling: atoms for the indices of tensors, links between them, and the units that result.

Every index of every dimension of a constant is an *atom*; operator rules carry the atoms forward, so that a
tensor's dimension is an array of labels. Rules emit *links* (these indices live or die together) and *freezes*
(this index must stay). Connected components of atoms are the *units*. A label below zero is an index that is
frozen from birth; it names its reason.

Where a reshape merges or splits dimensions, or a grouped convolution reads its channels, just one of the
factors may carry units: flat index `(a, b)` cannot go with `a` and with `b`. Such places are *sites*; they are
decided after all other links are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray

Labels: TypeAlias = NDArray[np.int64]
Dims: TypeAlias = "tuple[Labels | None, ...] | None"
"""Labels per dimension; None for a dimension of unknown size, or for a tensor of unknown rank."""

MAX_ATOMS_PER_DIMENSION = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Site:
    """A flat dimension that is the product of several; at most one factor carries units."""

    key: tuple[str, str]
    """Name of the node, and which of its places."""
    layer: str
    flat: Labels
    factors: tuple[Labels, ...]
    preferred: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contraction:
    """A layer with a constant weight: it reads `columns` away and makes `rows`."""

    name: str
    node: str
    columns: Labels
    rows: Labels
    data_port: int
    column_axis: int
    """Axis of the data input that is summed over."""
    row_axis: int
    """Axis of the output that the rows lie on."""
    site: tuple[str, str] | None = None
    """Grouped convolution: the site that decides whether it reads positions inside its groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenLayer:
    """A layer that keeps its indices, and why."""

    name: str
    op_type: str
    reason: str


@dataclass(slots=True, eq=False)
class Trace:
    """What the operator rules have found while walking a graph once, front to back."""

    tensors: dict[tuple[str, int], Dims] = field(default_factory=dict)
    copies: dict[tuple[str, int], Dims] = field(default_factory=dict)
    """Inputs that read a constant of `shared`, with the labels of their own copy of it."""
    shared: set[str] = field(default_factory=set)
    """Vectors with several readers. Exporters keep equal values once; that is no reason to cut them alike."""
    constants: set[str] = field(default_factory=set)
    """Names of nodes whose value depends on constants alone."""
    contractions: list[Contraction] = field(default_factory=list)
    embeddings: list[tuple[str, Labels | None]] = field(default_factory=list)
    """Lookups in a constant table, and the labels of its width."""
    frozen: list[FrozenLayer] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    read_ports: set[tuple[str, int]] = field(default_factory=set)
    """Inputs whose labels a rule has looked at."""
    atom_count: int = 0
    left: list[Labels] = field(default_factory=list)
    """Links, with `right` at equal positions."""
    right: list[Labels] = field(default_factory=list)
    freezes: list[tuple[Labels, Labels]] = field(default_factory=list)
    """Atoms that stay, and the number of the reason of each."""

    # ---------------------------------------------------------------- reading and writing tensors

    def dims(self, node: ov.Node, port: int) -> Dims:
        """Labels of a node's input."""
        source, key = node.input_value(port), (node.get_name(), port)
        self.read_ports.add(key)
        if source.get_node().get_name() in self.shared:
            if key not in self.copies:
                self.copies[key] = tuple(self.atoms(size, "a long vector") for size in source.get_shape())
            return self.copies[key]
        return self.tensors[source.get_node().get_name(), source.get_index()]

    def all_dims(self, node: ov.Node, count: int | None = None) -> list[tuple[Labels | None, ...]] | None:
        """Labels of the first `count` inputs (all without it); None where a rank is not known."""
        dims = [self.dims(node, port) for port in range(count or node.get_input_size())]
        found = [each for each in dims if each is not None]
        return found if len(found) == len(dims) else None

    def window_dims(self, node: ov.Node) -> tuple[Labels | None, ...]:
        """Frozen labels of what lies behind batch and channels in the first output."""
        fixed = self.fixed_dims(node.output(0), f"window of '{node.get_friendly_name()}'")
        return fixed[2:] if fixed is not None else ()

    def is_constant(self, node: ov.Node, port: int) -> bool:
        """Whether an input's value depends on constants alone."""
        return node.input_value(port).get_node().get_name() in self.constants

    def put(self, node: ov.Node, *outputs: Dims) -> None:
        """Set the labels of a node's outputs."""
        for index, dims in enumerate(outputs):
            self.tensors[node.get_name(), index] = dims

    def atoms(self, size: int, reason: str) -> Labels:
        """New free labels; frozen at once where the dimension is too long to be channels."""
        if size > MAX_ATOMS_PER_DIMENSION:
            return self.fixed(size, reason)
        self.atom_count += size
        return np.arange(self.atom_count - size, self.atom_count, dtype=np.int64)

    def fixed(self, size: int, reason: str) -> Labels:
        """Labels that are frozen from birth; they take no room."""
        return np.broadcast_to(np.int64(-1 - self.reason(reason)), (size,))

    def reason(self, text: str) -> int:
        """Index of a reason."""
        if not self.reasons or self.reasons[-1] != text:
            self.reasons.append(text)
        return len(self.reasons) - 1

    # ---------------------------------------------------------------- links and freezes

    def link(self, one: Labels | None, other: Labels | None, reason: str) -> None:
        """Labels at equal positions live or die together; a partner of unknown size freezes."""
        if one is None or other is None:
            self.freeze(one, reason)
            self.freeze(other, reason)
            return
        if one is other:
            return
        both = (one >= 0) & (other >= 0)
        if both.any():
            self.left.append(one[both])
            self.right.append(other[both])
        for free, stuck in ((one, other), (other, one)):
            mask = (free >= 0) & (stuck < 0)
            if mask.any():
                self.freezes.append((free[mask], -stuck[mask] - 1))

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These indices must stay."""
        if labels is None:
            return
        free = labels[labels >= 0]
        if free.size:
            self.freezes.append((free, np.full(free.size, self.reason(reason), np.int64)))

    def freeze_node(self, node: ov.Node, reason: str) -> None:
        """Nothing that this node reads or makes may lose an index."""
        name = node.get_friendly_name()
        self.frozen.append(FrozenLayer(name=name, op_type=node.get_type_name(), reason=reason))
        why = f"{node.get_type_name()} '{name}': {reason}"
        for port in range(node.get_input_size()):
            for labels in self.dims(node, port) or ():
                self.freeze(labels, why)
        self.put(node, *(self.fixed_dims(output, why) for output in node.outputs()))

    def fixed_dims(self, output: ov.Output, reason: str) -> Dims:
        """Frozen labels in the shape of an output."""
        shape = output.get_partial_shape()
        if shape.rank.is_dynamic:
            return None
        return tuple(self.fixed(d.get_length(), reason) if d.is_static else None for d in shape)

    # ---------------------------------------------------------------- broadcasting

    def broadcast(
        self, inputs: Iterable[tuple[Labels | None, ...]], reason: str
    ) -> tuple[Labels | None, ...]:
        """Labels of the numpy broadcast of the inputs; broadcast dimensions of size 1 stay."""
        found: tuple[Labels | None, ...] = ()
        for dims in inputs:
            longer, shorter = (found, dims) if len(found) >= len(dims) else (dims, found)
            lead = len(longer) - len(shorter)
            joined = [
                self._join(one, other, reason) for one, other in zip(longer[lead:], shorter, strict=True)
            ]
            found = (*longer[:lead], *joined)
        return found

    def _join(self, one: Labels | None, other: Labels | None, reason: str) -> Labels | None:
        if one is None or other is None:
            self.link(one, other, reason)
            sized = one if one is not None else other
            return None if sized is None or sized.size == 1 else self.fixed(sized.size, reason)
        if one.size == other.size:
            self.link(one, other, reason)
            return one if (one >= 0).any() else other
        small, large = (one, other) if one.size == 1 else (other, one)
        self.freeze(small, reason)
        return large
