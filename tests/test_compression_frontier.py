"""The frontier against brute force over all combinations."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vinoopt.compression.frontier import Option, trace_frontier

finite = st.floats(0, 100, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, list[Option]]:
    return {
        f"item{i}": [
            Option(name=f"o{k}", damage=draw(finite), time_us=draw(finite))
            for k in range(draw(st.integers(1, 4)))
        ]
        for i in range(draw(st.integers(1, 4)))
    }


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_combination_beats_a_point_in_both_damage_and_time(items: dict[str, list[Option]]) -> None:
    everything = [
        (sum(o.damage for o in combination), sum(o.time_us for o in combination))
        for combination in itertools.product(*items.values())
    ]
    for point in trace_frontier(items):
        assert not any(
            damage < point.damage - 1e-9 and time < point.time_us - 1e-9 for damage, time in everything
        )


@settings(max_examples=100, deadline=None)
@given(problems())
def test_it_runs_from_the_least_damage_to_the_least_time(items: dict[str, list[Option]]) -> None:
    points = trace_frontier(items)
    assert points[0].damage == pytest.approx(sum(min(o.damage for o in each) for each in items.values()))
    assert points[-1].time_us == pytest.approx(sum(min(o.time_us for o in each) for each in items.values()))
    assert all(a.damage <= b.damage and a.time_us > b.time_us for a, b in itertools.pairwise(points))


def test_an_option_that_is_slower_and_more_damaging_is_never_picked() -> None:
    points = trace_frontier(
        {"conv": [Option(name="f32", damage=0, time_us=10), Option(name="int8", damage=1, time_us=12)]}
    )
    assert [point.picks["conv"] for point in points] == ["f32"]


def test_an_item_without_options_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        trace_frontier({"conv": []})


def test_a_choice_that_cannot_be_run_is_never_picked() -> None:
    points = trace_frontier(
        {
            "conv": [
                Option(name="f32", damage=0, time_us=10),
                Option(name="int8", damage=1, time_us=5),
                Option(name="int4", damage=math.inf, time_us=1),
            ]
        }
    )
    assert [point.picks["conv"] for point in points] == ["f32", "int8"]
