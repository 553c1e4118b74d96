"""Mixes of INT8 and float blocks with the conversions between them, against brute force over all mixes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from vinoopt.compression.boundaries import (
    MixCosts,
    Neighbours,
    Tensor,
    fastest_mix,
    find_neighbours,
    fit_costs,
    trace_mixes,
)
from vinoopt.compression.frontier import INT8

UNIT = 8192.0


def chain(count: int, *, floats: frozenset[int] = frozenset()) -> Neighbours:
    tensors = tuple(Tensor(left=i, right=i + 1, elements=UNIT) for i in range(count - 1))
    return Neighbours(blocks={f"b{i}": i for i in range(count)}, nodes=count, floats=floats, tensors=tensors)


def all_mixes(names: list[str]) -> list[frozenset[str]]:
    return [frozenset(c) for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[MixCosts, dict[str, float]]:
    blocks, others = draw(st.integers(2, 5)), draw(st.integers(0, 3))
    nodes = blocks + others
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=9))
    neighbours = Neighbours(
        blocks={f"b{i}": i for i in range(blocks)},
        nodes=nodes,
        floats=frozenset(draw(st.sets(st.integers(blocks, nodes - 1), max_size=1))) if others else frozenset(),
        tensors=tuple(Tensor(left=a, right=b, elements=draw(st.integers(1, 40000))) for a, b in pairs if a != b),
    )
    gains = {f"b{i}": draw(st.integers(-20, 50)) for i in range(blocks)}
    damages = {f"b{i}": draw(st.integers(0, 100)) / 10 for i in range(blocks)}
    costs = MixCosts(neighbours=neighbours, gains_us=gains, conversion_us=draw(st.integers(0, 10)))
    return costs, damages


def damage_of(damages: dict[str, float], floats: frozenset[str]) -> float:
    return sum(damage for name, damage in damages.items() if name not in floats)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_ends_are_the_best_there_are_and_no_corner_is_missed(
    problem: tuple[MixCosts, dict[str, float]],
) -> None:
    costs, damages = problem
    points = trace_mixes(costs, damages)
    everything = [(damage_of(damages, f), costs.beyond_int8_us(f)) for f in all_mixes(list(damages))]
    assert points[-1].time_us == pytest.approx(min(t for _, t in everything), abs=1e-4)
    assert all(a.damage < b.damage and a.time_us > b.time_us for a, b in itertools.pairwise(points))
    for price in (0.01, 0.3, 2.0, 30.0):
        best = min(t + price * d for d, t in everything)
        assert min(p.time_us + price * p.damage for p in points) == pytest.approx(best, rel=1e-4, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_fastest_mix_is_found_whatever_it_damages(problem: tuple[MixCosts, dict[str, float]]) -> None:
    costs, damages = problem
    best = min(costs.beyond_int8_us(floats) for floats in all_mixes(list(damages)))
    assert costs.beyond_int8_us(fastest_mix(costs)) == pytest.approx(best, abs=1e-4)


def test_a_block_that_gains_nothing_stays_int8_between_int8_neighbours() -> None:
    gains = {"b0": 10.0, "b1": -1.0, "b2": 10.0}
    free = MixCosts(neighbours=chain(3), gains_us=gains)
    assert fastest_mix(free) == {"b1"}
    dear = MixCosts(neighbours=chain(3), gains_us=gains, conversion_us=3.0)
    assert fastest_mix(dear) == frozenset()


def test_sensitive_blocks_take_those_between_them_along() -> None:
    damages = {"b0": 0.0, "b1": 9.0, "b2": 0.01, "b3": 9.0, "b4": 0.0}
    gains = dict.fromkeys(damages, 2.0) | {"b0": 20.0, "b4": 20.0}
    costs = MixCosts(neighbours=chain(5), gains_us=gains, conversion_us=3.0)
    mixes = [{n for n, pick in p.picks.items() if pick != INT8} for p in trace_mixes(costs, damages)]
    assert {"b1", "b2", "b3"} in mixes


def test_what_was_seen_gives_the_costs_back() -> None:
    names = [f"b{i}" for i in range(6)]
    truth = MixCosts(
        neighbours=chain(6), gains_us={n: float(i) for i, n in enumerate(names)}, scale=1.3, conversion_us=2.5
    )
    mixes = [set(names), {"b1", "b3", "b5"}, {"b0", "b1"}]
    fitted = fit_costs(truth.neighbours, truth.gains_us, [(m, truth.beyond_int8_us(m)) for m in mixes])
    assert (fitted.scale, fitted.conversion_us) == pytest.approx((1.3, 2.5), rel=0.2)


def test_what_float_costs_beyond_kernels_is_shared_out_by_what_blocks_write() -> None:
    names = [f"b{i}" for i in range(4)]
    neighbours = replace(chain(4), sizes={"b0": 9 * UNIT, "b1": UNIT, "b2": UNIT, "b3": UNIT})
    # Kernels say that INT8 gains nothing; the whole model says that it gains 24 us.
    fitted = fit_costs(neighbours, dict.fromkeys(names, -0.1), [(set(names), 24.0), ({"b0"}, 18.0 + 4.0)])
    assert fitted.own_us["b0"] > 8 * fitted.own_us["b1"] > 0
    assert fastest_mix(fitted) == frozenset()


def test_a_latency_that_another_process_spoilt_does_not_undo_what_kernels_say() -> None:
    gains = dict.fromkeys(["b0", "b1", "b2"], 10.0)
    spoilt = fit_costs(chain(3), gains, [({"b0", "b1", "b2"}, -5.0), ({"b1"}, 14.0)])
    assert 0 < spoilt.scale < 1
    assert fastest_mix(spoilt) == frozenset()


def test_a_choice_that_cannot_be_run_in_int8_is_never_int8() -> None:
    costs = MixCosts(neighbours=chain(2), gains_us={"b0": 5.0, "b1": 5.0})
    points = trace_mixes(costs, {"b0": math.inf, "b1": 1.0})
    assert all(p.picks["b0"] != INT8 for p in points)
    assert points[-1].picks["b1"] == INT8


def test_the_graph_holds_what_lies_between_blocks_and_shares_tensors() -> None:
    rng = np.random.default_rng(0)
    x = ops.parameter([1, 4, 8, 8], np.float32, name="x")

    def conv(data: ov.Node, name: str) -> ov.Node:
        weights = ops.constant(rng.normal(size=(4, 4, 1, 1)).astype(np.float32))
        return ops.convolution(data, weights, [1, 1], [0, 0], [0, 0], [1, 1], name=name)

    stem = ops.relu(conv(x, "stem"))
    joined = ops.add(conv(stem, "left"), stem)
    soft = ops.softmax(joined, 1)
    found = find_neighbours(ov.Model([conv(soft, "tail")], [x], "m"), ["stem", "left", "tail"])
    assert set(found.blocks) == {"stem", "left", "tail"}
    assert len(found.floats) == 1
    costs = MixCosts(neighbours=found, gains_us={}, conversion_us=1.0)
    one = 1 + 4 * 8 * 8 / UNIT
    # A float block in front of the softmax moves a conversion, and adds none.
    assert costs.conversions_us({"left"}) == pytest.approx(0)
    assert costs.conversions_us({"stem"}) == pytest.approx(one)
    # The softmax is float already, so a float tail needs no conversion that INT8 would not: one fewer.
    assert costs.conversions_us({"tail"}) == pytest.approx(-one)
    assert costs.conversions_us({"stem", "left", "tail"}) == pytest.approx(-2 * one)
