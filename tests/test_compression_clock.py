"""Times at widths that were not timed, foretold from models in which one colour of groups was cut, or both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import graphs
import openvino as ov
import pytest

from vinoopt.compression.clock import Clock, TimedWidths, two_colours
from vinoopt.compression.groups import Coupling, Layer, find_groups

Truth = Callable[[float, float], float]
"""Share of channels read, share made -> microseconds."""


def kept_share(coupling: Coupling, widths: Mapping[str, int], layer: Layer) -> tuple[float, float]:
    """Of the channels that a layer reads and of those that it makes, where the first units of a group stay."""
    gone = {
        coupling.offsets[name] + unit
        for name, width in widths.items()
        for unit in range(width, coupling.group(name).units)
    }
    read, made = (1 - sum(int(u) in gone for u in side) / max(side.size, 1) for side in (layer.columns, layer.rows))
    return read, made


def timed(coupling: Coupling, widths: Mapping[str, int], truth: Truth) -> TimedWidths:
    times = {layer.name: truth(*kept_share(coupling, widths, layer)) for layer in coupling.layers}
    return TimedWidths(widths=widths, times_us=times)


def clock_of(coupling: Coupling, truth: Truth) -> Clock:
    colours = two_colours(coupling, timed(coupling, {}, truth).times_us)
    units = {group.name: group.units for group in coupling.groups}
    cuts = [({}, 1.0), *((cut, share) for cut in (colours[0] | colours[1], *colours) for share in (0.75, 0.5) if cut)]
    widths = [{name: int(units[name] * share) for name in cut} for cut, share in cuts]
    return Clock(coupling, [timed(coupling, each, truth) for each in widths], colours)


def whole(coupling: Coupling, widths: Mapping[str, int], truth: Truth) -> float:
    return sum(timed(coupling, widths, truth).times_us.values())


def in_blocks_of_outputs(read: float, made: float) -> float:
    """Costs by the inputs alone: outputs are computed 16 at a time whether they are there or not."""
    return 5 + 95 * read


@pytest.mark.parametrize("build", [graphs.chain, graphs.option_a, graphs.depthwise, graphs.inverted_residual])
def test_the_sides_of_a_layer_differ_in_colour(build: Callable[[], ov.Model]) -> None:
    coupling = find_groups(build())
    first, second = two_colours(coupling, {layer.name: 1.0 for layer in coupling.layers})
    assert first | second == {group.name for group in coupling.groups}
    assert not first & second
    owner = {
        coupling.offsets[group.name] + unit: group.name for group in coupling.groups for unit in range(group.units)
    }
    for layer in coupling.layers:
        read, made = ({owner[int(u)] for u in side if int(u) in owner} for side in (layer.columns, layer.rows))
        assert all(a == b or (a in first) != (b in first) for a, b in itertools.product(read, made)), layer.name


def test_a_triangle_is_cut_where_it_costs_least() -> None:
    coupling = find_groups(graphs.residual())  # a projection from stem to down2, beside down
    for cheap, alike in (("short", {"stem", "down2"}), ("down2", {"down", "down2"}), ("down", {"stem", "down"})):
        times = {layer.name: 1.0 if layer.name == cheap else 50.0 for layer in coupling.layers}
        first, second = two_colours(coupling, times)
        assert alike <= first or alike <= second, cheap


@pytest.mark.parametrize(
    "truth",
    [in_blocks_of_outputs, lambda read, made: 5 + 95 * made, lambda read, made: 10 + 90 * read * made],
    ids=["inputs count", "outputs count", "both count"],
)
def test_it_knows_which_side_saves_time(truth: Truth) -> None:
    coupling = find_groups(graphs.option_a())
    clock = clock_of(coupling, truth)
    assert clock.at({}) == pytest.approx(whole(coupling, {}, truth))
    for group in coupling.groups:
        for share in (0.75, 0.5):
            widths = {group.name: int(group.units * share)}
            assert clock.at(widths) == pytest.approx(whole(coupling, widths, truth), rel=0.02), group.name


def test_what_was_timed_is_met_and_noise_is_no_gain() -> None:
    coupling = find_groups(graphs.residual())
    halves = {group.name: group.units // 2 for group in coupling.groups}

    def slower_when_narrow(read: float, made: float) -> float:
        return 100 - 30 * (1 - read) + 20 * (1 - made)

    clock = clock_of(coupling, slower_when_narrow)
    assert clock.at(halves) <= clock.at({})
    for group in coupling.groups:
        times = [clock.at({group.name: width}) for width in range(group.units, -1, -1)]
        assert times == sorted(times, reverse=True), group.name


def test_only_a_block_that_goes_altogether_saves_its_overhead() -> None:
    coupling = find_groups(graphs.residual())
    branch = next(group for group in coupling.groups if group.can_vanish)
    row = timed(coupling, {}, lambda read, made: 1e-3)
    clock = Clock(coupling, [row], two_colours(coupling, row.times_us), overhead_us=8.0)
    layers = len(coupling.layers)
    assert clock.at({branch.name: 1}) == pytest.approx(8.0 * layers, rel=0.01)
    gone = clock.at({branch.name: 0})
    assert gone < 8.0 * layers - 7.9
    assert math.isclose(gone % 8.0, 0.0, abs_tol=0.1)
