"""What the tables of widths take from a few measurements."""

from __future__ import annotations

import math

import pytest

from vinoopt.compression.widths import lasting_shares, middle_width

NAMES = ("first", "second", "third", "fourth", "last")


def test_what_lasts_is_measured_at_both_ends_first_and_interpolated_between():
    asked: list[str] = []

    def share(name: str) -> float:
        asked.append(name)
        return {"first": 0.1, "third": 0.2, "last": 0.9}[name]

    found = lasting_shares(NAMES, share, count=3, is_late=lambda: False)
    assert asked == ["first", "last", "third"]
    assert found["third"] == pytest.approx(0.2)
    assert found["second"] == pytest.approx(math.sqrt(0.1 * 0.2))
    assert list(found) == list(NAMES)


def test_more_than_all_is_not_left_and_what_cannot_be_built_says_nothing():
    assert lasting_shares(NAMES, lambda name: 3.0, count=2, is_late=lambda: False) == dict.fromkeys(NAMES, 1.0)
    found = lasting_shares(NAMES, lambda n: math.inf if n == "last" else 0.5, count=2, is_late=lambda: False)
    assert found == pytest.approx(dict.fromkeys(NAMES, 0.5))
    assert lasting_shares(NAMES, lambda name: math.inf, count=5, is_late=lambda: False) == {}


def test_no_time_measures_nothing():
    def share(name: str) -> float:
        raise AssertionError("measured")

    assert lasting_shares(NAMES, share, count=5, is_late=lambda: True) == {}
    assert lasting_shares((), share, count=5, is_late=lambda: False) == {}


def test_the_middle_is_of_those_that_leave_something():
    assert middle_width((12, 8, 4, 0)) == 8
    assert middle_width((0,)) == 0
