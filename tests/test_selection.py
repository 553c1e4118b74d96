"""What is said about the choice: why blocks stay float, what was seen and what is expected."""

from __future__ import annotations

import math

import pytest

from vinoopt.compression.search import SearchResult
from vinoopt.records import CompressionPlan, Evidence, Measurement, QuantizationPlan, Trial, TrialState
from vinoopt.selection import float_blocks, trial_line

FOUND = SearchResult(
    trials=(),
    damages={"head": 0.9, "stem": 0.1, "odd": math.inf},
    gains_us={"head": 5.0, "stem": 2.0, "thin": -3.0, "odd": 1.0},
    reasons=(),
    refused=frozenset({"tail"}),
)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine", "left alone as was asked"),
        ("tail", "the target's compiler refuses it in INT8"),
        ("head", "damage 0.9 (90% of all blocks) in INT8; INT8 would save 5.0 us"),
        ("thin", "INT8 would cost 3.0 us"),
        ("odd", "its damage in INT8 is not known: it does not run, or time was up; INT8 would save 1.0 us"),
        ("new", "the search did not look at it"),
    ],
)
def test_every_float_block_says_why(name: str, reason: str) -> None:
    plan = CompressionPlan(quantization=QuantizationPlan(float_layers=(name, "stem")))
    blocks = {block.name: block for block in float_blocks(plan, FOUND, ignored=("mine",))}
    assert blocks[name].reason == reason
    assert set(blocks) == {name, "stem"}


def test_the_most_damaging_comes_first_and_a_float_model_has_none() -> None:
    plan = CompressionPlan(quantization=QuantizationPlan(float_layers=("stem", "thin", "head")))
    assert [block.name for block in float_blocks(plan, FOUND, ignored=())] == ["head", "stem", "thin"]
    assert float_blocks(CompressionPlan(), FOUND, ignored=()) == ()


def trial(**fields: object) -> Trial:
    plan = CompressionPlan(quantization=QuantizationPlan())
    return Trial(**{"number": 3, "plan": plan, "target": "host:CPU", "state": TrialState.COMPLETE, **fields})


def test_a_trial_tells_what_was_seen_and_what_is_expected() -> None:
    assert trial_line(trial(drop=0.0197, expected_drop=0.0066)) == "#3 int8: drop +0.0197, expected +0.0066"
    assert trial_line(trial(drop=0.0, expected_drop=0.0)) == "#3 int8: drop +0.0000"
    over = trial(drop=0.05, expected_drop=0.03, state=TrialState.OVER_BUDGET)
    assert trial_line(over) == "#3 int8: drop +0.0500, expected +0.0300, over budget"
    timed = Measurement(name="int8", device="CPU", evidence=Evidence.MEASURED, latency_p50_ms=2.0)
    slower = trial(state=TrialState.SLOWER, latency=timed)
    assert trial_line(slower) == "#3 int8: not faster than what is known, so not judged: 2 ms (measured)"
