"""What a drop seen on few samples is expected to be on others."""

from __future__ import annotations

import numpy as np
import pytest

from vinoopt.accuracy.evaluate import Scores, paired_drop
from vinoopt.accuracy.metrics import Metric, find_metric
from vinoopt.compression.gate import LEAST_KEPT_OF_CHANGES, expected_drop
from vinoopt.records import Accuracy, AccuracyBudget, DropType, TensorSpec

OUTPUTS = (TensorSpec(name="y", shape=(1, 10), dtype="float32"),)
TOP1 = find_metric("top1", outputs=OUTPUTS, has_labels=True)
COSINE = find_metric("cosine", outputs=OUTPUTS, has_labels=False)


def scores(values: np.ndarray, metric: Metric = TOP1) -> Scores:
    accuracy = Accuracy(metric=metric.name, value=float(np.mean(values)), samples=len(values))
    return Scores(statistics=list(values), accuracy=accuracy)


def hits(samples: int, *, lost: int, won: int, accuracy: float = 0.75) -> tuple[Scores, Scores]:
    before = np.zeros(samples)
    before[: int(accuracy * samples)] = 1
    after = before.copy()
    after[:lost] = 0
    after[samples - won :] = 1
    return scores(before), scores(after)


def expected(pair: tuple[Scores, Scores], *, metric: Metric = TOP1, **budget: object) -> tuple[float, float]:
    drop = paired_drop(metric, *pair, budget=AccuracyBudget(**budget), seed=0)
    return drop.value, expected_drop(metric, *pair, drop)


def test_four_images_of_two_hundred_do_not_condemn() -> None:
    seen, likely = expected(hits(203, lost=4, won=0))
    assert seen == pytest.approx(4 / 203)
    assert 0 < likely < 0.01


def test_heavy_damage_is_not_hidden_on_few_samples() -> None:
    seen, likely = expected(hits(200, lost=35, won=5))
    assert likely > 0.6 * seen > 0.05


def test_many_samples_speak_for_themselves() -> None:
    seen, likely = expected(hits(20000, lost=800, won=200))
    assert likely == pytest.approx(seen, rel=0.05)


def test_more_losses_are_never_expected_to_be_less() -> None:
    likely = [expected(hits(200, lost=lost, won=3))[1] for lost in range(30)]
    assert likely == sorted(likely)


def test_a_gain_of_few_changes_is_not_hidden() -> None:
    seen, likely = expected(hits(200, lost=0, won=5))
    assert seen < likely < 0.7 * seen


def test_luck_among_many_changes_is_not_believed() -> None:
    """A search would pick, of candidates that change 22 of 203 answers, the one that won most of them."""
    seen, likely = expected(hits(203, lost=11, won=11))
    assert seen == 0
    assert likely > 0.01
    seen, likely = expected(hits(203, lost=2, won=2))
    assert likely < 0.001


def test_a_relative_drop_stays_relative() -> None:
    pair = hits(200, lost=8, won=0)
    absolute, relative = expected(pair)[1], expected(pair, drop_type=DropType.RELATIVE)[1]
    assert relative == pytest.approx(absolute / 0.75)


def test_a_metric_that_tells_candidates_apart_is_believed() -> None:
    rng = np.random.default_rng(0)
    before = np.ones(50)
    after = 1 - np.abs(rng.normal(0.03, 0.005, 50))
    seen, likely = expected((scores(before, COSINE), scores(after, COSINE)), metric=COSINE)
    assert likely == pytest.approx(seen, rel=0.02)


def test_what_the_interval_cannot_tell_from_none_is_shrunk_and_not_forgotten() -> None:
    rng = np.random.default_rng(1)
    after = 1 - rng.normal(0.001, 0.2, 30)
    after += 1 - 0.001 - after.mean()
    seen, likely = expected((scores(np.ones(30), COSINE), scores(after, COSINE)), metric=COSINE)
    assert seen == pytest.approx(0.001)
    assert likely == pytest.approx(LEAST_KEPT_OF_CHANGES * seen)
