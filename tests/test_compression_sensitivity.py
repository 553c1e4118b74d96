"""Damage tables find the sensitive blocks, and the divergence reads what kind of output it has."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from vinoopt.compression.sensitivity import block_damages, divergence


def calls(array: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"y": each[None]} for each in array]


def test_equal_outputs_have_no_damage() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    assert divergence(calls(logits), calls(logits)) == pytest.approx(0, abs=1e-12)


def test_a_classifier_is_compared_by_the_kl_divergence_of_its_softmax() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    shifted = logits + 5  # a softmax does not see a constant
    assert divergence(calls(logits), calls(shifted)) == pytest.approx(0, abs=1e-12)
    p, q = np.exp(2) / (np.exp(2) + 1), 0.5
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / q)
    assert divergence(calls(logits[:1]), calls(np.zeros((1, 2)))) == pytest.approx(expected)


def test_probabilities_are_not_put_through_a_second_softmax() -> None:
    probabilities = np.array([[0.9, 0.1]])
    other = np.array([[0.5, 0.5]])
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert divergence(calls(probabilities), calls(other)) == pytest.approx(expected, rel=1e-6)


def test_small_channels_of_a_detector_count_as_much_as_large_ones() -> None:
    rng = np.random.default_rng(1)
    boxes = rng.normal(size=(4, 100, 6))
    boxes[..., :4] *= 1000
    broken_scores = boxes.copy()
    broken_scores[..., 4:] = 0
    assert divergence(calls(boxes), calls(broken_scores)) == pytest.approx(2 / 6, rel=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_infinite_damage(bad: float) -> None:
    logits = np.zeros((2, 3))
    assert divergence(calls(logits), calls(np.full((2, 3), bad))) == np.inf


def test_outputs_of_changing_shape_are_compared_call_by_call() -> None:
    reference = [{"y": np.arange(2.0 * n).reshape(1, n, 2)} for n in (4, 6)]
    assert divergence(reference, reference) == 0


def test_rows_of_another_length_are_no_class_scores() -> None:
    rng = np.random.default_rng(0)
    reference = [{"y": rng.normal(size=(1, n))} for n in (5, 9)]
    near = [{"y": call["y"] + 0.01} for call in reference]
    far = [{"y": call["y"] + 0.1} for call in reference]
    assert 0 < divergence(reference, near) < divergence(reference, far) < np.inf


def test_what_a_suppression_leaves_is_compared_in_any_order_and_number() -> None:
    rng = np.random.default_rng(0)
    found = [rng.normal(size=(n, 5)) * [100, 100, 100, 100, 1] for n in (12, 0, 7)]
    reference = [{"boxes": rows} for rows in found]

    def damage(change: Callable[[np.ndarray], np.ndarray]) -> float:
        return divergence(reference, [{"boxes": change(rows)} for rows in found], open_outputs={"boxes"})

    one_less = damage(lambda rows: rows[:-1])
    assert damage(lambda rows: rows[::-1]) == pytest.approx(0, abs=1e-12)
    assert 0 < damage(lambda rows: rows * 1.001) < one_less < damage(lambda rows: rows[: len(rows) // 4]) < np.inf
    assert damage(lambda rows: rows * [1, 1, 1, 1, 0]) > 0.05, "scores count as much as coordinates"
    assert damage(lambda rows: rows[:0]) < np.inf
    assert damage(lambda rows: rows * np.nan if len(rows) == 7 else rows) == np.inf
    shorter = [{"boxes": rows[:-1]} for rows in found]
    assert divergence(reference, shorter) == pytest.approx(one_less), "a shape that was thought fixed may move too"


def test_bisection_finds_the_few_sensitive_blocks_with_few_probes() -> None:
    blocks = [f"b{i}" for i in range(100)]
    truth = dict.fromkeys(blocks, 0.0001) | {"b17": 1.0, "b80": 3.0}
    table = block_damages(blocks, lambda names: sum(truth[name] for name in names))
    assert table.is_complete
    assert table.probes < 50
    assert sorted(table.damages, key=table.damages.__getitem__)[-2:] == ["b17", "b80"]
    assert table.damages["b80"] == pytest.approx(3.0)


def test_when_time_runs_out_a_region_shares_its_damage() -> None:
    blocks = [f"b{i}" for i in range(64)]
    table = block_damages(blocks, lambda names: float(len(names)), deadline=time.monotonic() - 1)
    assert not table.is_complete
    assert table.damages["b5"] == pytest.approx(1.0)
    assert set(table.damages) == set(blocks)
