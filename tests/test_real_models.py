"""The whole job on real models and real data that lie beside the checkout; skipped where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import vinoopt
from vinoopt.records import AccuracyBudget, Precision, Verdict

pytestmark = pytest.mark.slow
BUDGET = AccuracyBudget(metric="top1", max_drop=0.01)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VINOOPT_CACHE_DIR", os.fspath(tmp_path / "cache"))


def check(bundle: vinoopt.Bundle) -> None:
    """Inside the budget on the test part and faster than float, or the float model, which is said."""
    result = bundle.result("CPU")
    assert result.drop is not None
    assert result.drop.verdict is not Verdict.OUTSIDE
    if result.budget_met:
        against_float = next(c for c in result.comparisons if c.reference == "float")
        assert against_float.speedup > 1
    else:
        assert result.plan.quantization is None
        assert result.plan.float_precision is Precision.F32


def test_squeezenet_on_raw_photographs(shared: Path, tmp_path: Path) -> None:
    bundle = vinoopt.compile(
        shared / "models" / "squeezenet1.0_fp32.onnx",
        data=shared / "data" / "imagenet_val" / "images",
        labels=shared / "data" / "imagenet_val" / "labels.csv",
        preprocess=[vinoopt.PreprocessSpec(colour_order="BGR", mean=(104.0, 117.0, 123.0))],
        budget=BUDGET,
        effort="fast",
        prune=False,
        output=tmp_path / "squeezenet",
    )
    assert bundle.manifest.float_accuracy is not None
    assert bundle.manifest.float_accuracy.value > 0.65
    check(bundle)


def test_resnet20_on_arrays(shared: Path, tmp_path: Path) -> None:
    mean, scale = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with np.load(shared / "data" / "cifar10_dev.npz") as arrays:
        calibration, pictures, labels = arrays["calib_images"][:300], arrays["test_images"], arrays["test_labels"]

    def normalized(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": ((images / 255 - mean) / scale).transpose(0, 3, 1, 2).astype(np.float32)}

    bundle = vinoopt.compile(
        shared / "models" / "cifar_resnet20.onnx",
        data=normalized(pictures),
        labels=labels,
        calibration_data=normalized(calibration),
        budget=BUDGET,
        effort="fast",
        prune=False,
        output=tmp_path / "resnet20",
    )
    assert bundle.manifest.float_accuracy is not None
    assert bundle.manifest.float_accuracy.value > 0.75
    check(bundle)
