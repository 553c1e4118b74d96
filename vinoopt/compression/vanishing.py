"""Whole branches that may go: what is left of a graph when groups lose all their units.

A tensor that loses every index of a dimension is empty, and so is all that is computed from it, up to the
contractions that read it. Such a contraction gives a constant (its mean, or zero). That is legal where the
constant is added to a residual path, which still says the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray

UnitDims: TypeAlias = "tuple[NDArray[np.int64] | None, ...]"
SCALARWISE = frozenset({"Add", "Multiply", "Subtract", "Divide"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wiring:
    """Plain adjacency of a graph: quick to walk many times."""

    ops: tuple[ov.Node, ...]
    sources: tuple[tuple[tuple[int, int], ...], ...]
    """Per operator and input: the operator and output that feeds it."""
    readers: Mapping[tuple[int, int], tuple[tuple[int, int], ...]]
    """Per output: the operators and inputs that read it."""
    constants: frozenset[int]
    ends: tuple[int, ...]
    """Results and other operators that nobody reads."""

    @classmethod
    def of(cls, ops: Sequence[ov.Node]) -> Wiring:
        """The wiring of ordered operators."""
        order = {node.get_name(): index for index, node in enumerate(ops)}
        sources, constants = [], set()
        readers: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, node in enumerate(ops):
            found = []
            for port, value in enumerate(node.input_values()):
                source = (order[value.get_node().get_name()], value.get_index())
                found.append(source)
                readers.setdefault(source, []).append((index, port))
            sources.append(tuple(found))
            if node.get_type_name() == "Constant" or (
                found and all(source in constants for source, _ in found)
            ):
                constants.add(index)
        read = {source for source, _ in readers}
        return cls(
            ops=tuple(ops),
            sources=tuple(sources),
            readers={key: tuple(value) for key, value in readers.items()},
            constants=frozenset(constants),
            ends=tuple(i for i in range(len(ops)) if i not in read and ops[i].get_type_name() != "Parameter"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vanished:
    """What becomes of a graph with empty tensors."""

    constant: tuple[int, ...]
    """Contractions that read nothing any more and become constants."""
    dropped: tuple[tuple[int, int], ...]
    """Inputs of concatenations that are empty."""
    live: frozenset[int]
    """Operators that still count for an output."""
    refusal: str
    """Why it is not legal; empty where it is."""


def find_vanished(
    wiring: Wiring, *, contractions: frozenset[int], is_empty: Callable[[tuple[int, int]], bool]
) -> Vanished:
    """Walk back from the outputs over a graph in which some tensors are empty."""
    constant: set[int] = set()
    dropped: set[tuple[int, int]] = set()
    live, refusal = set(wiring.ends), ""
    stack = list(wiring.ends)
    while stack:
        index = stack.pop()
        empty = [port for port, source in enumerate(wiring.sources[index]) if is_empty(source)]
        name = wiring.ops[index].get_friendly_name()
        if empty and index in contractions:
            constant.add(index)
            continue
        if empty and wiring.ops[index].get_type_name() != "Concat":
            refusal = f"nothing would be left for {wiring.ops[index].get_type_name()} '{name}' to work on"
            break
        dropped |= {(index, port) for port in empty}
        for port, (source, _) in enumerate(wiring.sources[index]):
            if port not in empty and source not in live:
                live.add(source)
                stack.append(source)
    if not refusal:
        refusal = _residual_refusal(wiring, constant)
    return Vanished(
        constant=tuple(sorted(constant)),
        dropped=tuple(sorted(dropped)),
        live=frozenset(live),
        refusal=refusal,
    )


def _residual_refusal(wiring: Wiring, constant: set[int]) -> str:
    """Every contraction that becomes a constant must be added to something that does not."""
    shrunk = set(constant)
    partners = []
    for index in sorted(constant):
        chain, partner = _residual(wiring, index)
        if partner is None:
            name = wiring.ops[index].get_friendly_name()
            return f"'{name}' would read nothing, and its output is not added to a residual path"
        shrunk |= set(chain)
        partners.append(partner)
    for partner in partners:
        if partner in shrunk:
            return f"nothing would be left to add at '{wiring.ops[partner].get_friendly_name()}'"
    return ""


def _residual(wiring: Wiring, index: int) -> tuple[list[int], int | None]:
    """Elementwise operators with constants after a contraction, and the other side of the addition behind them."""
    chain: list[int] = []
    current = index
    shape = wiring.ops[index].get_output_partial_shape(0)
    while True:
        readers = wiring.readers.get((current, 0), ())
        if len(readers) != 1:
            return chain, None
        following, port = readers[0]
        node = wiring.ops[following]
        if node.get_type_name() not in SCALARWISE or str(node.get_output_partial_shape(0)) != str(shape):
            return chain, None
        other, other_port = wiring.sources[following][1 - port]
        if other not in wiring.constants:
            partner_shape = wiring.ops[other].get_output_partial_shape(other_port)
            adds = node.get_type_name() == "Add" and str(partner_shape) == str(shape)
            return chain, other if adds else None
        chain.append(following)
        current = following


def find_vanishing_groups(
    wiring: Wiring,
    *,
    contractions: frozenset[int],
    tensors: Mapping[tuple[int, int], UnitDims],
    ranges: Mapping[str, tuple[int, int]],
) -> frozenset[str]:
    """Names of the groups that may lose all units while the others keep theirs. `ranges`: first unit, count."""
    spans = [
        (key, int(units.min()), int(units.max()))
        for key, dims in tensors.items()
        for units in dims
        if units is not None and units.size and units.min() >= 0
    ]
    found = set()
    for name, (start, count) in ranges.items():
        empty = {key for key, low, high in spans if low >= start and high < start + count}
        if not find_vanished(wiring, contractions=contractions, is_empty=empty.__contains__).refusal:
            found.add(name)
    return frozenset(found)
