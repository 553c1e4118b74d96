"""What a run will still take, how a time limit is shared, and that it holds."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

from vinoopt.alarm import TimeIsUp, until
from vinoopt.cli.show import about
from vinoopt.compression.workload import refit_workload
from vinoopt.forecast import Forecast
from vinoopt.records import Event
from vinoopt.schedule import LEAST_SEARCH, Facts, announce, divide, expected_seconds, final_seconds

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


FACTS = Facts(
    sample_s=0.002,
    overhead_s=0.5,
    search=200,
    test=200,
    calibration=300,
    layers=50,
    algebra_s=1.0,
    formats=2,
    effort="balanced",
    quantize=True,
    prune=True,
    is_tuned=True,
    final_s=4.0,
)


def test_nothing_is_said_before_anything_is_known() -> None:
    assert Forecast().remaining_s() is None


def test_stages_count_down_and_end() -> None:
    clock = Clock()
    forecast = Forecast(clock=clock)
    forecast.expect("search", 60)
    forecast.expect("write", 4, is_cut=False)
    assert forecast.remaining_s() == 64
    with forecast.stage("search"):
        clock.now += 20
        assert forecast.remaining_s() == 44
        forecast.still("search", 10)
        assert forecast.remaining_s() == 14
        clock.now += 100  # longer than expected: it is not over all the same
        assert forecast.remaining_s() == pytest.approx(4 + 0.1 * 120)
    assert forecast.remaining_s() == 4
    assert forecast.took == {"search": 120}


def test_a_deadline_ends_what_can_be_cut_and_nothing_else() -> None:
    clock = Clock()
    forecast = Forecast(clock=clock, deadline=130.0)
    forecast.expect("search", 600)
    forecast.expect("write", 4, is_cut=False)
    assert forecast.remaining_s() == 34


def test_a_stage_that_fails_is_over_too() -> None:
    forecast = Forecast()
    forecast.expect("search", 60)
    with pytest.raises(RuntimeError), forecast.stage("search"):
        raise RuntimeError
    assert forecast.remaining_s() is None


def test_further_targets_are_told_and_bounded_by_the_end_of_the_run() -> None:
    clock = Clock()
    forecast = Forecast(clock=clock)
    announce(forecast, FACTS, targets=3)
    whole = forecast.remaining_s()
    assert whole is not None and whole > 3 * sum(expected_seconds(FACTS).values())
    forecast.end = clock.now + 60
    assert forecast.remaining_s() == 60
    clock.now += 70
    assert forecast.remaining_s() == 0


def test_a_time_limit_keeps_time_for_what_must_follow() -> None:
    found = divide(FACTS, now=10.0, end=300.0, limit_s=300.0, targets=1)
    choosing = expected_seconds(FACTS)["choose"]
    assert 200 < found.search < 300 - choosing
    assert found.search < found.tuning < 300
    two = divide(FACTS, now=10.0, end=300.0, limit_s=300.0, targets=2)
    assert two.search < found.search


def test_a_search_has_its_quarter_even_where_too_little_is_left() -> None:
    found = divide(FACTS, now=9.0, end=8.0, limit_s=8.0, targets=1)
    assert found.search == pytest.approx(9.0 + LEAST_SEARCH * 8.0)


@pytest.mark.parametrize(("limit", "seconds"), [(None, 4.0), (8.0, 0.4), (60.0, 1.2), (3600.0, 4.0)])
def test_a_short_limit_shortens_the_final_comparison(limit: float | None, seconds: float) -> None:
    assert final_seconds("balanced", limit) == pytest.approx(seconds)


def test_every_stage_that_is_expected_is_one_that_runs() -> None:
    forecast = Forecast()
    announce(forecast, FACTS, targets=2)
    for targets in (1, 0):  # that are left behind this one
        for name in ("anchors", "precisions", "weights", "widths", "choose"):
            with forecast.stage(name):
                assert forecast.remaining_s()
        if targets:
            announce(forecast, FACTS, targets=targets)
    with forecast.stage("tune"):
        assert forecast.remaining_s()
    with forecast.stage("write"):
        pass
    assert not forecast.remaining_s(), "the last target has none behind it"


RINGING = """
import math, time
from vinoopt.alarm import TimeIsUp, until
started = time.monotonic()
try:
    with until(started + 0.05):
        while time.monotonic() < started + 20:
            math.factorial(200)
except TimeIsUp:
    print("rang")
with until(time.monotonic() + 0.05):
    pass
time.sleep(0.1)  # it would ring now
print("quiet")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_the_alarm_rings_in_the_middle_of_work_and_only_there() -> None:
    # In a process of its own: test runners may have the alarm for their own time limits.
    told = subprocess.run([sys.executable, "-c", RINGING], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.split() == ["rang", "quiet"]


def test_no_library_mistakes_the_alarm_for_a_failure() -> None:
    assert not issubclass(TimeIsUp, Exception)


def test_without_a_deadline_or_in_another_thread_nothing_rings() -> None:
    with until(None):
        pass
    rang: list[bool] = []

    def work() -> None:
        with until(time.monotonic() - 1):
            time.sleep(0.02)
        rang.append(False)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rang == [False]


def test_an_event_carries_what_is_left() -> None:
    assert Event(stage="search", remaining_s=12.0).remaining_s == 12.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "about 5 s left"), (38, "about 40 s left"), (200, "about 3 min left"), (9000, "about 2.5 h left")],
)
def test_it_is_told_no_finer_than_it_is_known(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_wide_layers_are_expected_to_take_longer_to_refit() -> None:
    narrow, wide = (expected_seconds(replace(FACTS, algebra_s=seconds))["widths"] for seconds in (1.0, 100.0))
    assert wide == pytest.approx(narrow + (7 + 5) * 99)


def layer(rank: int, columns: int, outputs: int, *, is_first: bool = False) -> ov.Model:
    shape = [1, 6, columns] if rank == 3 else [columns]
    x = opset.parameter(shape, np.float32)
    weights = np.zeros((outputs, columns) if is_first else (columns, outputs), np.float32)
    product = opset.matmul(weights, x, False, False) if is_first else opset.matmul(x, weights, False, False)
    return ov.Model([product], [x])


def test_a_refit_is_counted_from_the_shapes_of_layers() -> None:
    small, large = (refit_workload(layer(3, 64, 8), samples=samples) for samples in (10, 20))
    rows = 10 * 6  # fewer positions than are sampled
    assert large.narrow - small.narrow == pytest.approx(rows * 64 * (64 + 2 * 8))
    assert small.wide == 0
    assert refit_workload(layer(3, 2048, 8), samples=10).wide > 1e9
    assert refit_workload(layer(3, 20000, 8), samples=10).wide == 0  # no refit takes it
    assert refit_workload(layer(1, 64, 8, is_first=True), samples=10).narrow > 0
    assert small.seconds() > 0
