"""The path to smaller models: cheapest steps first, measured in company, with few probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vinoopt.compression.descent import Descent, Ground, Place

UNITS = {"a": 4, "b": 4, "c": 4}
TIMES = {"a": 10.0, "b": 5.0, "c": 1.0}


def lost(widths: Mapping[str, int]) -> dict[str, float]:
    return {name: 1 - width / UNITS[name] for name, width in widths.items()}


def predict(widths: Mapping[str, int], floats: frozenset[str]) -> float:
    saved = sum(TIMES[name] * share for name, share in lost(widths).items())
    return sum(TIMES.values()) - saved + 2.0 * len(floats)


def additive(widths: Mapping[str, int]) -> float:
    return sum({"a": 0.4, "b": 0.1, "c": 0.1}[name] * share**2 for name, share in lost(widths).items())


def alone(damage=additive) -> dict[str, dict[int, float]]:
    return {name: {width: damage({name: width}) for width in (3, 2, 1)} for name in UNITS}


def walk(descent: Descent) -> list[Place]:
    while descent.extend() is not None:
        pass
    return descent.places


def test_cheapest_damage_per_time_goes_first_and_the_path_ends_with_everything_narrow():
    places = walk(Descent(Ground(units=UNITS, damages=alone()), predict=predict, probe=additive))
    steps = [dict(after.widths) for after in places[1:]]
    assert steps[0] == {"b": 3}  # 0.00625 for 1.25; a: 0.025 for 2.5; c: 0.00625 for 0.25
    assert steps[-1] == {"a": 1, "b": 1, "c": 1}
    assert [p.time_us for p in places] == sorted((p.time_us for p in places), reverse=True)
    assert places[-1].damage == pytest.approx(additive(steps[-1]))


def test_a_step_that_saves_less_than_the_clock_tells_is_not_taken():
    ground = Ground(units=UNITS, damages=alone(), least_us={"b": 2.0, "c": 1.0})
    steps = [dict(place.widths) for place in walk(Descent(ground, predict=predict, probe=additive))]
    assert not any("c" in widths or widths.get("b") == 3 for widths in steps)
    assert steps[-1] == {"a": 1, "b": 2}


def test_from_units_to_a_stand_in_to_nothing_and_never_back():
    left = {2: 0.5, -3: 0.3, -1: 0.2, 0: 0.0}  # share of the time that is left
    harm = {2: 0.02, -3: 0.03, -1: 0.1, 0: 0.9}
    ground = Ground(units={"a": 4}, damages={"a": harm})
    descent = Descent(
        ground,
        predict=lambda widths, floats: 10.0 * left.get(widths.get("a", 4), 1.0),
        probe=lambda widths: harm.get(widths.get("a", 4), 0.0),
    )
    assert [dict(place.widths) for place in walk(descent)[1:]] == [{"a": 2}, {"a": -3}, {"a": -1}, {"a": 0}]


def test_damage_that_is_made_up_for_behind_counts_for_less():
    def first_steps(lasting: Mapping[str, Mapping[int, float]]) -> tuple[set[str], list[Place]]:
        ground = Ground(units=UNITS, damages=alone(), lasting=lasting)
        places = walk(Descent(ground, predict=predict, probe=additive))
        return set(places[1].widths), places

    assert first_steps({})[0] == {"b"}
    names, places = first_steps({"a": dict.fromkeys((3, 2, 1), 0.1)})
    assert names == {"a"}
    assert places[1].damage == pytest.approx(0.1 * additive(places[1].widths))
    full = sum({"a": 0.1}.get(name, 1.0) * additive({name: 1}) for name in UNITS)
    assert places[-1].damage == pytest.approx(full)


def test_damage_in_company_counts_rather_than_damage_alone():
    def entangled(widths: Mapping[str, int]) -> float:  # a is harmless as long as b is whole
        return additive(widths) * (50.0 if {"a", "b"} <= widths.keys() else 1.0)

    places = walk(Descent(Ground(units=UNITS, damages=alone(entangled)), predict=predict, probe=entangled))
    company = [p for p in places if {"a", "b"} <= p.widths.keys()]
    without = [p for p in places if not {"a", "b"} <= p.widths.keys()]
    assert {"c": 1}.items() <= company[0].widths.items() or len(without) > 3
    assert places[-1].damage == pytest.approx(entangled(places[-1].widths))


def test_a_path_that_turns_goes_on_by_other_steps():
    path = Descent(Ground(units=UNITS, damages=alone()), predict=predict, probe=additive)
    for _ in range(3):
        path.extend()
    assert [dict(place.widths) for place in path.places[:3]] == [{}, {"b": 3}, {"b": 3, "a": 3}]
    path.turn(1, 2)
    assert [dict(place.widths) for place in path.places] == [{}, {"b": 3}]
    rest = walk(path)
    assert rest[-1].widths == {"b": 1, "c": 1}, "a may not become as narrow as it was, and that was its first step"
    assert rest[-1].damage == pytest.approx(additive(rest[-1].widths))


def test_a_turn_leaves_what_is_milder_in_the_same_group():
    path = Descent(Ground(units={"a": 4}, damages={"a": alone()["a"]}), predict=predict, probe=additive)
    walk(path)
    assert [dict(place.widths) for place in path.places] == [{}, {"a": 3}, {"a": 2}, {"a": 1}]
    path.turn(0, 3)  # of its steps the last damages most
    assert [dict(place.widths) for place in walk(path)] == [{}, {"a": 3}, {"a": 2}]


def test_a_block_that_hurt_in_int8_stays_in_float():
    ground = Ground(units={}, damages={}, block_damages={"x": 0.1, "y": 0.2}, floats=frozenset({"x", "y"}))
    path = Descent(ground, predict=lambda widths, floats: float(len(floats)), probe=lambda widths: 0.0)
    walk(path)
    path.turn(0, 2)
    assert walk(path)[-1].floats == {"y"}


def test_a_step_that_cannot_be_built_is_left_out():
    def broken(widths: Mapping[str, int]) -> float:
        return math.inf if "a" in widths else additive(widths)

    places = walk(Descent(Ground(units=UNITS, damages=alone()), predict=predict, probe=broken))
    assert all("a" not in place.widths for place in places)
    assert dict(places[-1].widths) == {"b": 1, "c": 1}


def test_blocks_go_to_int8_where_that_is_cheaper_than_narrowing():
    ground = Ground(
        units=UNITS,
        damages=alone(),
        block_damages={"conv": 1e-4, "head": 10.0},
        floats=frozenset({"conv", "head", "fixed"}),
    )
    places = walk(Descent(ground, predict=predict, probe=additive))
    assert places[1].floats == {"head", "fixed"}
    assert places[-1].floats == {"fixed"}  # no damage known: not a choice
    assert places[-2].floats == {"head", "fixed"}


def test_nothing_is_probed_when_it_is_late():
    probed = []
    descent = Descent(
        Ground(units=UNITS, damages=alone()),
        predict=predict,
        probe=lambda widths: probed.append(widths) or 0.0,
        is_late=lambda: True,
    )
    assert descent.extend() is None
    assert not probed


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.floats(0.001, 10.0), min_size=8, max_size=8))
def test_estimates_that_hold_cost_one_probe_a_step(weights):
    units = {f"g{index}": 8 for index in range(8)}
    scale = dict(zip(units, weights, strict=True))
    probed = []

    def damage(widths: Mapping[str, int]) -> float:
        probed.append(dict(widths))
        return sum(scale[name] * (1 - width / 8) ** 2 for name, width in widths.items())

    table = {name: {width: damage({name: width}) for width in range(7, 0, -1)} for name in units}
    probed.clear()
    descent = Descent(
        Ground(units=units, damages=table),
        predict=lambda widths, floats: 64.0 - sum(8 - width for width in widths.values()),
        probe=damage,
    )
    places = walk(descent)
    assert len(probed) == len(places) - 1  # the damages here do add up
    prices = [
        (after.damage - before.damage) / (before.time_us - after.time_us)
        for before, after in itertools.pairwise(places)
    ]
    assert prices == pytest.approx(sorted(prices), rel=1e-6, abs=1e-9)
