"""The scripts answer for themselves, and a tiny run of each brings what it promises."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vinoopt.demo import demo_files
from vinoopt.hardware.detect import fingerprint
from vinoopt.hardware.profile import check_profile, load_profile
from vinoopt.records import Device, Precision

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("[!_]*.py"))
NEEDS = {"train_demo": ("torch", "sklearn")}
"""What a script needs that the package does not."""


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VINOOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    return tmp_path


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / f"{name}.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def lines(name: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, Path(name).read_text().splitlines())


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_help_answers(name: str) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    assert run(name, "--help").stdout.startswith("usage:")


@pytest.mark.slow
def test_a_device_is_measured_into_a_profile_that_holds() -> None:
    told = run("bench_device", "--device", "CPU", "--seconds", "2")
    about, *found = lines("device.jsonl")
    assert (about["what"], about["cpu"]) == ("fingerprint", fingerprint().cpu)
    assert {each["what"] for each in found} == {"peak", "bandwidth", "operator"}
    assert [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")] == [about, *found]
    assert fingerprint().cpu in load_profile("device.toml").sources[-1]
    assert all(each["evidence"] == "measured" and each["value"] > 0 for each in found if not each["why"])
    errors = [finding for finding in check_profile("device.toml") if finding.severity == "error"]
    assert not errors
    cpu = load_profile("device.toml").devices[Device.CPU]
    rates = [each["value"] for each in found if each["what"] == "peak" and each["precision"] == "f32"]
    assert cpu.peak_gops[Precision.F32].value == pytest.approx(max(rates), rel=1e-3)
    assert "measured by scripts/bench_device.py on" in cpu.peak_gops[Precision.F32].source
    assert cpu.bandwidth_gb_per_s is not None
    assert "convolution 3x3" in told.stdout


@pytest.mark.slow
def test_measured_figures_replace_those_of_a_shipped_profile() -> None:
    run("bench_device", "--device", "CPU", "--seconds", "1", "--megabytes", "1", "--inherits", "lunar-lake")
    shipped, merged = load_profile("lunar-lake"), load_profile("device.toml")
    assert "bench_device" in merged.devices[Device.CPU].peak_gops[Precision.F32].source
    assert merged.devices[Device.NPU] == shipped.devices[Device.NPU]
    _, *found = lines("device.jsonl")
    cached = [each["why"] for each in found if each["what"] == "bandwidth" and each["why"]]
    if cached:  # where the system tells its caches, a tensor that fits them brings no bandwidth
        assert merged.devices[Device.CPU].bandwidth_gb_per_s == shipped.devices[Device.CPU].bandwidth_gb_per_s


@pytest.mark.parametrize(
    "words",
    [
        ("bench_device",),
        ("bench_peers", "--models", "digits"),
        ("bench_trust", "self", "--model", "digits"),
        ("bench_tuning", "--model", "digits"),
        ("bench_compile", "--quick"),
    ],
    ids=lambda words: words[0],
)
def test_a_device_that_is_not_here_is_told(words: tuple[str, ...], tmp_path: Path) -> None:
    name, *more = words
    script = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *more, "--device", "NPU.9"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "OpenVINO lists no NPU.9" in done.stderr
    assert not any(each.read_text() for each in tmp_path.glob("*.jsonl"))


def test_a_broken_latency_limit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_tuning = importlib.import_module("bench_tuning")
    row = {"limit_ms": 2.0, "is_default": False, "p90_range_ms": {"tuned": [2.1, 2.3]}}
    assert bench_tuning.breaks_limit(row)
    assert not bench_tuning.breaks_limit({**row, "p90_range_ms": {"tuned": [1.9, 2.3]}})
    assert not bench_tuning.breaks_limit({**row, "limit_ms": None})
    assert not bench_tuning.breaks_limit({**row, "is_default": True})


@pytest.mark.slow
def test_a_small_network_is_compiled_and_its_stages_told() -> None:
    told = run("bench_compile", "--quick")
    (row,) = lines("compile.jsonl")
    assert {"load", "data", "search", "choice", "write"} <= set(row["stage_seconds"])
    assert row["trials"] >= 2
    assert sum(row["stage_seconds"].values()) == pytest.approx(row["seconds"], rel=0.1, abs=3.0)
    peaks = list(row["stage_peak_bytes"].values())
    assert 0 < row["before_bytes"] <= min(peaks)
    assert max(peaks) == row["peak_bytes"]
    assert "peak MB" in told.stdout


@pytest.mark.slow
def test_the_demo_meets_its_peers() -> None:
    told = run("bench_peers", "--models", "digits", "--effort", "fast", "--seconds", "1")
    roads = {row["road"]: row for row in lines("peers.jsonl")}
    others = {"float f32", "nncf.quantize", "nncf accuracy control", "onnxruntime", "onnxruntime int8"}
    assert {*others, "vinoopt", "vinoopt in control's time"} <= set(roads)
    assert not [road for road, row in roads.items() if "failed" in row]
    prepared = [row for row in roads.values() if row["prep_seconds"] is not None]
    assert all(row["prep_peak_bytes"] > 50e6 and row["per_s"] > 0 for row in prepared)
    assert roads["vinoopt"]["accuracy"] >= roads["float f32"]["accuracy"] - 0.03
    assert all(row["device"] == "CPU" for row in roads.values())
    assert sum(line.startswith("{") for line in told.stdout.splitlines()) == len(roads)


@pytest.mark.slow
def test_the_same_thing_twice_is_not_called_different() -> None:
    words = ("--model", "digits", "--hint", "latency", "--runs", "3", "--seconds", "1")
    for ways, way in enumerate(("self", "apart"), start=1):
        script = [sys.executable, str(ROOT / "scripts" / "bench_trust.py"), way, *words]
        told = subprocess.run(script, capture_output=True, text=True, check=False)  # a busy machine may fail one of 3
        assert "of 3" in told.stdout, told.stderr
        assert len(list(lines("trust.jsonl"))) == 3 * ways
    app = [sys.executable, str(ROOT / "scripts" / "bench_trust.py"), "benchmark_app", *words[:4], "--runs", "1"]
    told = subprocess.run([*app, "--seconds", "1"], capture_output=True, text=True, check=False)
    assert "median ms" in told.stdout, told.stderr


@pytest.mark.slow
def test_tuning_meets_the_hints() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "bench_tuning.py"), "--model", "digits", "--goal", "sweet spot"]
    words = ("--tune-seconds", "2", "--seconds", "1")
    told = subprocess.run([*script, *words], capture_output=True, text=True, check=False)
    (row,) = lines("tuning.jsonl")
    assert row["limit_ms"] > 0
    assert row["p90_range_ms"]["tuned"][0] > 0
    assert json.loads(told.stdout.splitlines()[0]) == row
    assert set(row["over"]) == {"latency hint", "throughput hint"}
    assert "sweet spot" in told.stdout


@pytest.mark.slow
def test_the_search_is_asked_for_other_budgets_and_for_less_time() -> None:
    words = ("--case", "digits", "--effort", "fast")
    asked = ("--max-drop", "0.05", "--max-drop", "0.01", "--time-limit", "60", "--seconds", "1")
    told = run("bench_search", "budgets", *words, *asked)
    rows = list(lines("search.jsonl"))
    floats = [row for row in rows if row["what"] in ("float", "float bf16")]
    assert [row["what"] for row in rows if row not in floats] == ["nncf.quantize", "5%", "1%"]
    assert floats and sum(row["over_best"] is None for row in rows) == 1
    assert all(row["accuracy"] > 0.9 for row in rows)
    assert "times faster" in told.stdout
    run("bench_search", "stop", *words, "--output", "stop.jsonl")
    whole, part = lines("stop.jsonl")
    assert part["limit_s"] == pytest.approx(0.3 * whole["seconds"], abs=0.1)
    assert part["budget_met"]
    cap = ("--target", "skylake:CPU", "--time-limit", "40", "--output", "cap.jsonl")
    run("bench_search", "cap", *words, *cap)
    (row,) = lines("cap.jsonl")
    assert row["over"]


@pytest.mark.slow
def test_a_model_that_is_too_wide_is_pruned() -> None:
    told = run("bench_pruning", "--case", "digits_wide", "--effort", "fast", "--seconds", "2")
    (row,) = lines("pruning.jsonl")
    assert row["budget_met"]
    assert row["pruned_groups"] > 0
    assert row["weight_bytes"]["vinoopt"] < row["weight_bytes"]["nncf.quantize"]
    assert row["over_int8"][1] > 1.2
    assert row["search_minutes"] > 0
    assert "over INT8" in told.stdout
    again = run("bench_pruning", "--case", "digits_wide", "--effort", "fast")
    assert "already there" in again.stderr


@pytest.mark.slow
def test_a_model_is_tabled_on_an_emulated_target(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "digits.onnx").write_bytes(demo_files().model.read_bytes())
    told = run(
        "table_targets", str(models), "--target", "skylake:CPU", "--dimension", "32", "--output", "t.jsonl"
    )
    (row,) = lines("t.jsonl")
    assert (row["model"], row["target"]) == ("digits", "skylake:CPU")
    assert row["verdict"] == "compiled", told.stderr
