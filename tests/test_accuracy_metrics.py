"""Metrics: one contract for all, the values of the built-in ones, and how one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vinoopt.accuracy.metrics import Metric, find_metric, looks_like_classifier, metric_names, never_decides
from vinoopt.errors import DataError, MetricError
from vinoopt.records import TensorSpec

LOGITS = TensorSpec(name="logits", shape=(1, 10), dtype="float32")
SQUEEZENET = TensorSpec(name="logits", shape=(1, 10, 1, 1), dtype="float32")
FEATURES = TensorSpec(name="features", shape=(1, 4, 4), dtype="float32")
VALUE = TensorSpec(name="value", shape=(1, 1), dtype="float32")

MEANS = ("top1", "top5", "agreement", "cosine", "mse")
POOLED = ("sqnr", "pooled_cosine")


def find(name: str, *outputs: TensorSpec, has_labels: bool = True, **options: Any) -> Metric:
    return find_metric(name, outputs=outputs or (LOGITS,), has_labels=has_labels, options=options)


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"logits": random.normal(size=(1, 10)).astype(np.float32)} for _ in range(count)]


def disturbed(outputs: list[dict[str, np.ndarray]], amount: float) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [
        {"logits": o["logits"] + amount * random.normal(size=(1, 10)).astype(np.float32)} for o in outputs
    ]


def statistics(
    metric: Metric, outputs: list[dict[str, np.ndarray]], reference: list[dict[str, np.ndarray]]
) -> list:
    labels = [int(other["logits"].argmax()) for other in reference]
    return [
        metric.statistic(own, label, other)
        for own, label, other in zip(outputs, labels, reference, strict=True)
    ]


# --------------------------------------------------------------------------- the contract


@pytest.fixture(params=[*MEANS, *POOLED])
def metric(request: pytest.FixtureRequest) -> Metric:
    return find(request.param)


def test_it_says_what_it_is(metric: Metric) -> None:
    assert isinstance(metric, Metric)
    assert metric.name in metric_names()
    assert metric.unit
    assert not (metric.needs_labels and metric.needs_reference)


def test_its_value_is_a_number_whatever_the_order(metric: Metric) -> None:
    reference = samples(20)
    found = statistics(metric, disturbed(reference, 0.3), reference)
    assert isinstance(metric.value(found), float)
    assert metric.value(found) == pytest.approx(metric.value(found[::-1]), rel=1e-12)


def test_more_noise_is_never_better(metric: Metric) -> None:
    reference = samples(60)
    values = [metric.value(statistics(metric, disturbed(reference, a), reference)) for a in (0.0, 0.5, 5.0)]
    signed = values if metric.higher_is_better else [-value for value in values]
    assert signed[0] >= signed[1] >= signed[2]
    assert signed[0] > signed[2]


def test_the_float_model_is_perfect_against_itself(metric: Metric) -> None:
    reference = samples(8)
    value = metric.value(statistics(metric, reference, reference))
    best = {"mse": 0.0, "sqnr": 120.0}.get(metric.name, 1.0)
    assert value == pytest.approx(best, abs=1e-12)


def test_a_mean_is_the_mean_of_its_statistics(metric: Metric) -> None:
    reference = samples(20)
    found = statistics(metric, disturbed(reference, 0.3), reference)
    if metric.is_mean:
        assert metric.value(found) == pytest.approx(float(np.mean(found)), rel=1e-12)


def test_resampling_counts_are_repeated_samples(metric: Metric) -> None:
    if not hasattr(metric, "values"):
        assert metric.is_mean
        return
    reference = samples(12)
    found = statistics(metric, disturbed(reference, 0.3), reference)
    counts = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=5)
    repeated = [metric.value([found[i] for i in np.repeat(np.arange(12), row)]) for row in counts]
    np.testing.assert_allclose(metric.values(found, counts), repeated, rtol=1e-12)


def test_outputs_that_are_not_finite_are_the_worst(metric: Metric) -> None:
    reference = samples(12)
    broken = [{"logits": np.full((1, 10), np.nan, np.float32)} for _ in reference]
    value = metric.value(statistics(metric, broken, reference))
    assert not np.isnan(value)
    poor = metric.value(statistics(metric, disturbed(reference, 0.5), reference))
    assert value < poor if metric.higher_is_better else value > poor


# --------------------------------------------------------------------------- values


@given(scores=hnp.arrays(np.float32, (1, 10), elements=st.integers(-3, 3)), label=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_top_k_agrees_with_a_stable_sort(scores: np.ndarray, label: int) -> None:
    order = np.argsort(-scores[0], kind="stable")
    for k in (1, 5):
        assert find(f"top{k}").statistic({"logits": scores}, label, None) == float(label in order[:k])


def test_classifiers_of_four_axes_and_with_a_background_class() -> None:
    scores = np.zeros((1, 10, 1, 1), np.float32)
    scores[0, 4] = 1
    assert find("top1", SQUEEZENET).statistic({"logits": scores}, 4, None) == 1.0
    assert find("top1", SQUEEZENET, label_offset=1).statistic({"logits": scores}, 3, None) == 1.0


def test_labels_beyond_the_output_are_refused() -> None:
    metric = find("top1", label_offset=1)
    metric.check_labels(np.arange(9))
    for bad in (np.array([0, 9]), np.array([[1], [9]])):
        with pytest.raises(DataError, match="label 9 with label offset 1 lies outside"):
            metric.check_labels(bad)
    with pytest.raises(DataError, match="--label-offset"):
        metric.statistic({"logits": np.zeros((1, 10))}, 9, None)
    with pytest.raises(DataError, match="one class index per sample"):
        metric.check_labels((np.zeros((2, 2)),))


def test_the_worst_output_counts() -> None:
    metric = find("cosine", LOGITS, FEATURES)
    good, bad = np.ones((1, 10)), np.zeros((1, 4, 4))
    bad[0, 0, 0] = 1
    value = metric.statistic(
        {"logits": good, "features": bad}, None, {"logits": good, "features": np.ones((1, 4, 4))}
    )
    assert value == pytest.approx(0.25)
    chosen = find("cosine", LOGITS, FEATURES, output="logits")
    assert chosen.statistic({"logits": good, "features": bad}, None, {"logits": good}) == pytest.approx(1.0)


def test_sqnr_pools_signal_and_noise() -> None:
    metric = find("sqnr", VALUE)
    pairs = [(1.1, 1.0), (10.0, 10.0), (-2.0, -3.0)]
    found = [metric.statistic({"value": np.array([[a]])}, None, {"value": np.array([[b]])}) for a, b in pairs]
    assert metric.value(found) == pytest.approx(10 * np.log10((1 + 100 + 9) / (0.01 + 1)))


def test_mse_is_the_squared_difference() -> None:
    metric = find("mse", FEATURES)
    reference = {"features": np.zeros((1, 4, 4))}
    assert metric.statistic({"features": np.full((1, 4, 4), 2.0)}, None, reference) == pytest.approx(4.0)
    assert not metric.higher_is_better


def test_two_silent_outputs_agree() -> None:
    silence = {"logits": np.zeros((1, 10))}
    for name in ("cosine", "pooled_cosine"):
        metric = find(name)
        assert metric.value([metric.statistic(silence, None, silence)]) == 1.0


# --------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("outputs", "has_labels", "chosen"),
    [
        ((LOGITS,), True, "top1"),
        ((LOGITS,), False, "agreement"),
        ((SQUEEZENET,), False, "agreement"),
        ((FEATURES,), False, "cosine"),
        ((TensorSpec(name="wave", shape=(1, 1, 512), dtype="float32"),), False, "cosine"),
        ((LOGITS, FEATURES), False, "cosine"),
        ((VALUE,), False, "pooled_cosine"),
        ((TensorSpec(name="l", shape=("?", 10), dtype="float32"),), True, "top1"),
    ],
)
def test_auto_goes_by_labels_and_outputs(
    outputs: tuple[TensorSpec, ...], has_labels: bool, chosen: str
) -> None:
    assert find("auto", *outputs, has_labels=has_labels).name == chosen


def test_outputs_whose_largest_is_always_the_same_are_no_decisions() -> None:
    rng = np.random.default_rng(0)
    calls = [{"logits": rng.normal(size=(2, 10))} for _ in range(30)]
    landmarks = [{"logits": call["logits"] + 50 * (np.arange(10) == 7)} for call in calls]
    agreement = find("agreement")
    assert never_decides(agreement, landmarks)
    assert not never_decides(agreement, calls)
    assert not never_decides(agreement, landmarks[:5]), "too few to tell"
    assert not never_decides(find("cosine"), landmarks)


def test_embeddings_and_outlines_are_no_decisions() -> None:
    rng = np.random.default_rng(0)
    agreement = find("agreement", TensorSpec(name="v", shape=(1, 64), dtype="float32"))
    scores = [{"v": rng.normal(size=(1, 64))} for _ in range(30)]
    embeddings = [{"v": call["v"] / np.linalg.norm(call["v"])} for call in scores]
    outlines = [{"v": call["v"] + 50 * (np.arange(64) == rng.choice([3, 9]))} for call in scores]
    assert not never_decides(agreement, scores)
    assert never_decides(agreement, embeddings[:4])
    assert never_decides(agreement, outlines) and not never_decides(agreement, outlines[:10])


def test_a_classifier_among_several_outputs_is_found() -> None:
    assert find("top1", FEATURES, LOGITS).output == "logits"
    assert find("auto", FEATURES, LOGITS, output="logits").name == "top1"


@pytest.mark.parametrize(
    ("name", "outputs", "has_labels", "options", "words"),
    [
        ("tpo1", (LOGITS,), True, {}, 'unknown metric "tpo1"; did you mean "top1"'),
        ("top1", (LOGITS,), False, {}, "needs labels; give --labels"),
        ("top1", (FEATURES,), True, {}, "no output looks like class scores"),
        ("top1", (LOGITS, LOGITS), True, {}, "several outputs look"),
        ("top1", (LOGITS, FEATURES), True, {"output": "logit"}, 'no output "logit"; did you mean "logits"'),
        ("top1", (LOGITS, FEATURES), True, {"output": "features"}, "holds something else"),
        ("top1", (LOGITS,), True, {"label_ofset": 1}, 'no option "label_ofset"; did you mean "label_offset"'),
        ("mse", (LOGITS,), True, {"label_offset": 1}, 'no option "label_offset"'),
        ("auto", (FEATURES,), True, {}, "what the labels mean is not known"),
        ("cosine", (VALUE,), False, {}, "only their sign"),
        ("my_metrics:best", (LOGITS,), False, {}, "--allow-code"),
    ],
)
def test_choices_that_cannot_be_are_explained(
    name: str, outputs: tuple[TensorSpec, ...], has_labels: bool, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MetricError, match=words):
        find(name, *outputs, has_labels=has_labels, **options)


def test_missing_reference_or_output_is_said() -> None:
    with pytest.raises(MetricError, match="compares with the float model"):
        find("agreement").statistic({"logits": np.zeros((1, 10))}, None, None)
    with pytest.raises(MetricError, match='gave no output "logits"'):
        find("agreement").statistic({"other": np.zeros((1, 10))}, None, {"logits": np.zeros((1, 10))})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 2), True),
        ((8, 1000, 1, 1), True),
        ((1, 1), False),
        ((1, 5, 85), False),
        ((10,), False),
        ((1, "?"), False),
    ],
)
def test_what_looks_like_a_classifier(shape: tuple[int | str, ...], expected: bool) -> None:
    assert looks_like_classifier(TensorSpec(name="y", shape=shape, dtype="float32")) is expected


OWN_METRIC = """
class Largest:
    name = "largest"
    higher_is_better = True
    needs_labels = False
    needs_reference = False
    unit = "share"
    is_mean = True
    def __init__(self, *, outputs, options):
        self.output = outputs[0].name
    def statistic(self, outputs, label, reference):
        return float(outputs[self.output].max())
    def value(self, statistics):
        return sum(statistics) / len(statistics)

def not_a_metric(*, outputs, options):
    return 3

ready = Largest(outputs=[type("Spec", (), {"name": "logits"})], options={})
"""


def test_metrics_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(OWN_METRIC)
    monkeypatch.chdir(tmp_path)

    def own(name: str) -> Metric:
        return find_metric(f"own_metrics:{name}", outputs=[LOGITS], has_labels=False, allow_code=True)

    for name in ("Largest", "ready"):
        assert own(name).statistic({"logits": np.eye(1, 10)}, None, None) == 1.0
    with pytest.raises(MetricError, match="is no Metric"):
        own("not_a_metric")


def test_metrics_of_other_packages_are_found_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugged_metrics.py").write_text(OWN_METRIC)
    info = tmp_path / "plugged_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vinoopt.metrics]\nlargest = plugged_metrics:Largest\nlost = plugged_metrics:absent\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "largest" in metric_names()
    assert find("largest").name == "largest"
    with pytest.raises(MetricError, match="cannot be loaded"):
        find("lost")
