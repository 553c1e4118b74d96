"""How long the stages of a run will take, guessed before they begin, and how a time limit is shared among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vinoopt.forecast import Forecast

FINAL_S = {"fast": 1.5, "balanced": 4.0, "thorough": 8.0}
"""Per contestant of a final comparison, by effort."""
TUNING_S = 15.0
"""For the heats of runtime settings; the final and the duel have as much."""
LEAST_SEARCH = 0.4
"""Of a time limit, what the search has even where the stages that must follow would leave less."""
_FINAL_SHARE = 0.02
"""Of a time limit, what one contestant of a final comparison is measured for; at most `FINAL_S`."""
_LEAST_FINAL_S = 0.4
_FINALISTS = 8
"""Contestants in the two final comparisons of one target, usually."""
_BASELINES = 2
_WRITING_S = 3.0
"""For golden outputs and their replay in a fresh process."""
_TUNING_SHARE = 0.15
"""Of a time limit, what tuning may have."""
_CALIBRATING = 6.0
"""Inferences that calibrating on one sample costs: collecting ranges, and correcting biases layer by layer."""
_FITTED_BEFORE = 5
"""Times that what a refit computes is computed before the first narrower candidate: moments of all layers, maps that
could stand for branches, orders of units, cuts that are refitted to learn what of their damage lasts."""
_TRIALS = {"fast": 4, "balanced": 7, "thorough": 12}
"""Candidates that a stage of the search judges, usually."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a run before its search."""

    sample_s: float
    """Inference of one sample in float, in a queue."""
    overhead_s: float
    """Building, compiling and scoring a candidate."""
    search: int
    """Samples of the search part."""
    test: int
    calibration: int
    """Samples that the quantizer sees."""
    layers: int
    """Convolutions and matrix products."""
    algebra_s: float
    """Sums and solutions of the linear systems of one refit of every layer."""
    formats: int
    """Float formats of the target."""
    effort: str
    quantize: bool
    prune: bool
    is_tuned: bool
    final_s: float
    """Per contestant of a final comparison."""


def final_seconds(effort: str, time_limit_s: float | None) -> float:
    """How long one contestant of a final comparison is measured."""
    if time_limit_s is None:
        return FINAL_S[effort]
    return min(FINAL_S[effort], max(_FINAL_SHARE * time_limit_s, _LEAST_FINAL_S))


def expected_seconds(facts: Facts) -> dict[str, float]:
    """Stage -> seconds, from counts of candidates and probes; the search corrects its own as it learns."""
    judging = facts.overhead_s + facts.search * facts.sample_s
    timing = facts.overhead_s + 0.4 + 20 * facts.sample_s
    trial = judging + timing
    calibrating = 2.0 + facts.calibration * facts.sample_s * _CALIBRATING
    probing = facts.overhead_s + 16 * facts.sample_s
    stages = {"anchors": facts.formats * trial}
    if facts.quantize:
        stages["anchors"] += calibrating + facts.formats * trial
        probes = 3 * math.sqrt(facts.layers) * probing
        stages["precisions"] = 8 * timing + (0.0 if facts.effort == "fast" else probes) + 3 * trial
    if facts.prune:
        tables = 3 * timing + calibrating + facts.layers * probing
        trials = _TRIALS[facts.effort]
        stages["widths"] = 2 * calibrating + tables + trials * (trial + 2 * calibrating)
        stages["widths"] += (trials + _FITTED_BEFORE) * facts.algebra_s
    stages["choose"] = _choosing_s(facts)
    return stages


def _choosing_s(facts: Facts, *, contestants: int = _FINALISTS) -> float:
    judging = 2 * (facts.overhead_s + facts.test * facts.sample_s)
    return judging + contestants * (facts.final_s + facts.overhead_s + 0.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """When the parts of a run with a time limit have to be over, in `time.monotonic` seconds."""

    search: float
    """Of this target's search."""
    anchors: float
    """Of its baselines: if they take the search's time too, there is nothing else to choose among afterwards."""
    tuning: float
    """Of tuning, all targets."""


def divide(facts: Facts, *, now: float, end: float, limit_s: float, targets: int) -> Deadlines:
    """The rest of a time limit, shared among so many targets that are still to come.

    What has to follow a search is taken off beforehand: judging on the test part, the final comparison, tuning
    where it is asked for, and writing. The search keeps `LEAST_SEARCH` of the limit, divided among the targets,
    whatever is left: a limit that is shorter than the stages that must follow is overrun by them.
    """
    tuning_s = min(2 * TUNING_S, _TUNING_SHARE * limit_s) if facts.is_tuned else 0.0
    rest = end - now - _WRITING_S - tuning_s
    search = now + max(rest / targets - _choosing_s(facts), LEAST_SEARCH * limit_s / targets)
    anchors = now + (rest + tuning_s) / targets - _choosing_s(facts, contestants=_BASELINES)
    return Deadlines(search=search, anchors=max(anchors, search), tuning=end - _WRITING_S)


def announce(forecast: Forecast, facts: Facts, *, targets: int, training_s: float = 0.0) -> None:
    """Tell the forecast what one target will take, and those after it, and the end of the run.

    `training_s` is for distillation, where there is any.
    """
    stages = expected_seconds(facts)
    if training_s:
        stages["distill"] = training_s
    for name, seconds in stages.items():
        forecast.expect(name, seconds, is_cut=name != "choose")
    forecast.expect("further targets", (targets - 1) * sum(stages.values()), is_cut=False)
    if facts.is_tuned:
        forecast.expect("tune", 2 * TUNING_S, is_cut=False)
    forecast.expect("write", _WRITING_S + 2 * facts.overhead_s, is_cut=False)
